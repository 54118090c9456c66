"""GRPO against ETR on a small language model: one file, read from top to bottom.

    python train_small.py                                   built-in arithmetic task, tiny model, no GPU, no download
    python train_small.py --task gsm8k --algos grpo etr     Qwen2.5-0.5B-Instruct on GSM8K, one GPU
    python train_small.py --task math --levels 1 2 3        the same on MATH

Data flows one way: prompts -> rollouts -> rewards -> advantages -> bounds -> loss -> step -> metrics -> plots. Every arm of a
seed starts from the same weights, sees the same prompts and runs the same code; arms differ only in `clip_bounds`.

Left out on purpose: several GPUs, an inference engine, a KL penalty, LoRA. Rollouts are sampled at temperature 1 from the full
softmax, because that is the distribution the loss scores. The README explains every metric.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

import etr

matplotlib.use("Agg")  # there may be no screen
import matplotlib.pyplot as plt  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------- config

Arm = namedtuple("Arm", "micro macro low high color")  # elasticities, factors on --clip-low and --clip-high, Okabe-Ito colour
ARMS = {
    "grpo": Arm(0.0, 0.0, 1.0, 1.0, "#000000"),
    "etr": Arm(1.0, 1.0, 1.0, 1.0, "#D55E00"),
    "micro": Arm(1.0, 0.0, 1.0, 1.0, "#E69F00"),
    "macro": Arm(0.0, 1.0, 1.0, 1.0, "#009E73"),
    "clip-higher": Arm(0.0, 0.0, 1.0, 1.4, "#0072B2"),  # DAPO: 0.2 below, 0.28 above
}
TASKS = {  # the defaults that depend on the task
    "arithmetic": dict(model="built-in", steps=50, prompts_per_step=32, group_size=8, updates_per_step=16, learning_rate=1e-4,
                       max_new_tokens=48, eval_problems=200, train_problems=20000, warmup_steps=300, warmup_learning_rate=8e-3),
    "gsm8k": dict(model="Qwen/Qwen2.5-0.5B-Instruct", steps=100, prompts_per_step=32, group_size=8, updates_per_step=8,
                  learning_rate=2e-6, max_new_tokens=256, eval_problems=200, train_problems=0, warmup_steps=0,
                  warmup_learning_rate=1e-5),
}
TASKS["math"] = dict(TASKS["gsm8k"], max_new_tokens=512)
EVAL_SAMPLES = 8  # completions per held-out problem, for pass@1 and pass@k
LR_WARMUP_UPDATES = 20  # Adam's first steps at the full rate wreck a tiny model
MINIBATCHES = 4  # a rollout batch is cut into this many; more updates than that go over it again
LOGITS_AT_ONCE = 2**24  # 64 MiB, unless a single completion has more: the head's share of memory
WARMUP_BATCH = 64  # worked solutions per supervised step


class UserError(Exception):
    """A mistake the user can mend, or a fault of the machine: its one sentence is printed instead of a stack trace."""


def whole(least):
    def parse(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text}")
        return int(text)
    return parse


def positive(text):
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return float(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser("train_small.py", description="Train a small language model with GRPO, ETR and their relatives.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, epilog="Defaults depend on --task.")
    add = parser.add_argument
    add("--task", choices=TASKS, default="arithmetic", help="arithmetic is built in; gsm8k and math come from the hub or --data")
    add("--model", help="hub id or folder of a causal language model")
    add("--data", help="folder with train.jsonl and test.jsonl in the original format, instead of the hub")
    add("--levels", type=whole(1), nargs="+", default=[1, 2, 3, 4, 5], help="MATH difficulty levels to keep")
    add("--train-problems", type=whole(0), help="how many problems to train on, 0 for all")
    add("--eval-problems", type=whole(1), help="how many for validation, and how many for the final test")
    add("--algos", nargs="+", choices=ARMS, default=["grpo", "etr"], help="arms to compare")
    add("--seeds", type=whole(1), default=1, help="how many seeds, paired between the arms")
    add("--seed", type=whole(0), default=0, help="the first seed")
    add("--steps", type=whole(1), help="rollout batches")
    add("--prompts-per-step", type=whole(1), help="prompts in a rollout batch")
    add("--group-size", type=whole(2), help="completions per prompt, G")
    add("--updates-per-step", type=whole(1), help="optimiser steps per rollout batch; with 1 nothing is ever clipped")
    add("--learning-rate", type=positive, help="of AdamW, after its warm-up")
    add("--max-new-tokens", type=whole(1), help="longest completion")
    add("--clip-low", type=positive, default=0.2, help="clip radius below 1")
    add("--clip-high", type=positive, default=0.2, help="clip radius above 1")
    add("--scale-max", type=positive, default=3.0, help="how far ETR may stretch a radius")
    add("--warmup-steps", type=whole(0), help="supervised steps on worked solutions before RL")
    add("--warmup-learning-rate", type=positive, help="of the supervised steps")
    add("--micro-batch-tokens", type=whole(1), default=4096, help="tokens per forward and backward pass: lower it if memory runs out")
    add("--eval-every", type=whole(1), default=10, help="steps between checkpoints and evaluations on the validation slice")
    add("--out", help="output folder, runs/TASK if not given")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    parser.set_defaults(**TASKS["arithmetic"])
    parser.set_defaults(**TASKS[parser.parse_known_args(argv)[0].task])
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{args.task}"
    args.algos = list(dict.fromkeys(args.algos))
    if args.clip_low * args.scale_max >= 1:
        parser.error(f"--clip-low {args.clip_low} times --scale-max {args.scale_max}: expected less than 1, got "
                     f"{args.clip_low * args.scale_max:g}, which would switch the lower clip off; lower one of them")
    if (args.task == "arithmetic") != (args.model == "built-in"):
        parser.error(f"--model {args.model}: the arithmetic task runs on the built-in model only; for a real model choose --task "
                     "gsm8k or --task math")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(args.device.split(":")[0]):
        parser.error(f"--device {args.device}: expected one of {', '.join(d for d in available if available[d])}, which is what torch "
                     f"{torch.__version__} finds here")
    return args


def seeded(*key):
    """A random.Random that depends on `key` alone, so that a resumed run needs no saved generator state."""
    return random.Random(repr(key))


def generator(device, *key):
    return torch.Generator(device).manual_seed(seeded(*key).getrandbits(62))


# ------------------------------------------------------------------------------------------------------ task: problems

Problem = namedtuple("Problem", "question solution answer prompt", defaults=[None])  # prompt: token ids, put in by `encode`
# Worked examples shown before each question: they set the format of the answer better than an instruction does.
EXAMPLES = {
    "gsm8k": [("A box holds 6 pens. Mia buys 4 boxes and gives 5 pens to her brother. How many pens does she keep?",
               "Mia buys 4 * 6 = 24 pens.\nShe keeps 24 - 5 = 19 pens.\n#### 19"),
              ("Tickets cost $12 for adults and half of that for children. What do 2 adults and 3 children pay?",
               "A child pays 12 / 2 = $6.\nThe adults pay 2 * 12 = $24 and the children 3 * 6 = $18.\n"
               "Together they pay 24 + 18 = $42.\n#### 42")],
    "math": [("What is the value of $3x^2-1$ when $x=2$?", "We get $3\\cdot 2^2-1=12-1=11$. The answer is $\\boxed{11}$."),
             ("A bag holds 4 red and 6 blue balls. What is the probability that a ball drawn at random is red?",
              "Of 10 balls 4 are red, so the probability is $\\frac{4}{10}=\\frac{2}{5}$. The answer is $\\boxed{\\frac{2}{5}}$.")],
}
GAIN, LOSE = ["finds", "gets", "wins", "buys"], ["eats", "loses", "sells", "gives"]
NAMES, THINGS = ["Ann", "Ben", "Eva", "Leo", "Mia", "Tom"], ["apples", "books", "coins", "eggs", "pens", "shells"]
LARGEST = 20  # every total stays in 0..20, one token per number


def arithmetic_problems(count, rng):
    """Distinct word problems of 1 to 7 steps in GSM8K's form, with worked solutions from a textbook full of errors.

    The textbook has misconceptions: a fixed 30 % of the facts a + b and a - b come out wrong, always in the same way, in 65 % of
    the solutions, and any other fact in 5 %; it carries on from the wrong total. A model trained on it solves most problems by
    sampling and few greedily: there is something for RL to find, and something to lose if exploration ends early.
    """
    facts = {(a, sign, b): a + sign * b for a in range(LARGEST + 1) for sign in (1, -1) for b in range(1, 10)
             if 0 <= a + sign * b <= LARGEST}
    slip = lambda total: rng.choice([t for t in range(total - 3, total + 4) if t != total and 0 <= t <= LARGEST])
    misconceptions = {fact: slip(total) for fact, total in facts.items() if rng.random() < 0.3}
    problems = {}
    while len(problems) < count:
        start = total = told = rng.randint(0, LARGEST)  # `total` is true, `told` is what the textbook says
        thing, events, solution = rng.choice(THINGS), "", []
        for _ in range(rng.randint(1, 7)):
            sign, b = rng.choice([(sign, b) for sign in (1, -1) for b in range(1, 10)
                                  if (total, sign, b) in facts and (told, sign, b) in facts] or [(0, 0)])
            if not b:  # nothing keeps both within bounds
                break
            fact, right = (told, sign, b), facts[told, sign, b]
            wrong, chance = (misconceptions[fact], 0.65) if fact in misconceptions else (slip(right), 0.05)
            result = wrong if rng.random() < chance else right
            events += f" , {rng.choice(GAIN if sign > 0 else LOSE)} {b}"
            solution.append(f"{told} {'+' if sign > 0 else '-'} {b} = {result}")
            total, told = facts[total, sign, b], result
        question = f"{rng.choice(NAMES)} has {start} {thing}{events} . How many {thing} ?"
        if solution:
            problems[question] = Problem(question, " \n ".join([*solution, f"#### {told}"]), str(total))
    return list(problems.values())


def last_boxed(text):
    """The content of the last \\boxed{...} in `text`, or None. Linear in its length, whatever the nesting."""
    start = text.rfind("\\boxed")
    opening = re.compile(r"\\boxed\s*\{|\\boxed\s+([0-9A-Za-z])").match(text, start) if start >= 0 else None
    if not opening or opening[1]:
        return opening and opening[1]
    depth = 1
    for i in range(opening.end(), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[opening.end():i]
    return None


def to_problem(task, row, where):
    """A row of GSM8K or MATH as a Problem. Raises UserError that names the place."""
    fields = ("question", "answer") if task == "gsm8k" else ("problem", "solution", "level")
    if not isinstance(row, dict) or any(not isinstance(row.get(name), (str, int)) for name in fields):
        raise UserError(f"{where}: expected a JSON object with the fields {', '.join(fields)}")
    if task == "gsm8k":
        solution, mark, answer = row["answer"].rpartition("####")
        if not mark or parse_number(answer) is None:
            raise UserError(f"{where}: expected a GSM8K answer that ends in '#### number', got {row['answer'][-40:]!r}")
        solution = re.sub(r"<<[^>]*>>", "", solution).strip()  # without the calculator annotations
        return Problem(row["question"], f"{solution}\n#### {answer.strip()}", answer.strip())
    answer = last_boxed(row["solution"])
    if answer is None:
        raise UserError(f"{where}: expected a MATH solution with its answer in \\boxed{{}}, got {row['solution'][-40:]!r}")
    return Problem(row["problem"], row["solution"], answer)


def read_folder(folder):
    """{split: [(where, row)]} of train.jsonl and test.jsonl; `where` names file and line for messages."""
    data = {}
    for path in (Path(folder) / "train.jsonl", Path(folder) / "test.jsonl"):
        try:
            with path.open(encoding="utf-8") as file:
                lines = [(f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--data {folder}: expected a folder with train.jsonl and test.jsonl in UTF-8 ({error})") from None
        if not lines:
            raise UserError(f"{path}: expected problems, one JSON object a line, got an empty file")
        data[path.stem] = []
        for where, line in lines:
            try:
                data[path.stem].append((where, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: expected one JSON object, got {line[:40]!r} ({error})") from None
    return data


def read_hub(task):
    """{split: [(where, row)]} of GSM8K, or of MATH with MATH-500 for the test, from the Hugging Face hub."""
    import datasets  # here, because a run on local data does without it
    try:
        if task == "gsm8k":
            data = datasets.load_dataset("openai/gsm8k", "main")
        else:
            subjects = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
                        "precalculus")
            parts = [datasets.load_dataset("EleutherAI/hendrycks_math", subject, split="train") for subject in subjects]
            data = dict(train=itertools.chain(*parts), test=datasets.load_dataset("HuggingFaceH4/MATH-500", split="test"))
    except Exception as error:  # datasets raises many kinds when a hub cannot be reached
        raise UserError(f"--task {task}: its data could not be fetched from the hub ({type(error).__name__}); check the network, or name "
                        "a folder with train.jsonl and test.jsonl by --data") from error
    return {split: [(f"hub, {split} row {i}", row) for i, row in enumerate(data[split])] for split in ("train", "test")}


def load_problems(args):
    """{"train", "validation", "test": list of Problem}. Validation is held out of the training file; test is for the final number."""
    count = args.eval_problems
    if args.task == "arithmetic":
        problems = arithmetic_problems(args.train_problems + 2 * count, seeded("arithmetic"))
        validation, test, train = problems[:count], problems[count:2 * count], problems[2 * count:]
    else:
        data = read_folder(args.data) if args.data else read_hub(args.task)
        level = lambda row: str(row.get("level"))[-1:] if isinstance(row, dict) and "level" in row else None  # "Level 3" or 3
        wanted = {*map(str, args.levels), None}  # a MATH row without a level is reported by to_problem
        split = {name: [to_problem(args.task, row, where) for where, row in rows if args.task == "gsm8k" or level(row) in wanted]
                 for name, rows in data.items()}
        for problems in split.values():
            seeded("split").shuffle(problems)
        validation, test = split["train"][:count], split["test"][:count]
        held_out = {problem.question for problem in validation + test}
        train = [problem for problem in split["train"] if problem.question not in held_out][:args.train_problems or None]
    if len(train) < args.prompts_per_step or not test:
        raise UserError(f"expected at least --prompts-per-step {args.prompts_per_step} problems to train on and one to test on, got "
                        f"{len(train)} and {len(test)} after {count} were held out; give more data or lower --eval-problems")
    return dict(train=train, validation=validation, test=test)


# --------------------------------------------------------------------------------------------------------- task: verifier

WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})"
ABBREVIATIONS = r"%|(?:cm|mm|km|kg|mg|ml|mph|lbs?|oz|ft|hrs?|am|pm|min|g|m|h|l|L|s)(?![A-Za-z])"
NUMBER = re.compile(rf"([+-]?)\s*(?:(?:({WHOLE})\s+)?({WHOLE})\s*/\s*({WHOLE})|({WHOLE})?(\.[0-9]{{0,30}})?)"
                    rf"\s*(?:{ABBREVIATIONS})?((?:\s+[A-Za-z][A-Za-z/]*(?:\^?\{{?[23]\}}?)?,?){{0,6}})")
NOT_UNITS = set("or and to not plus minus times over than hundred thousand million billion trillion dozen k half".split())
GROUP = r"\s*(?:\{\s*([+-]?[0-9]{1,30})\s*\}|([0-9]))"


def clean(text):
    """Answer text without the mark-up that does not change its value."""
    for pattern, new in ((r"[\u2212\u2013]", "-"), (r"\\[dt]frac", r"\\frac"), (r"\\(?:left|right)(?![a-z])", ""),
                         (r"\s*\\!\s*|\\,|\\;|\\\(|\\\)|\\\[|\\\]|`", ""), (r"\{,\}", ","), (r"(?<!\\)\\ |~", " "), (r"\\%", "%"),
                         (r"(?<![0-9A-Za-z])\*\*(.+?)\*\*(?![0-9A-Za-z])", r"\1"), (r"\^\s*\{?\s*\\circ\s*\}?|°", ""),
                         (r"(?<![0-9])\\?[$€£]|\\?[$€£](?![0-9])", ""),
                         (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1")):
        text = re.sub(pattern, new, text)
    return text.strip()


def parse_number(text):
    """The one number that `text` states, as an exact Fraction, or None.

    Takes 1,234 $5 5% -3 .50 12. **7** \\boxed{7} 3/4 \\frac{3}{4} 1 1/2 and a unit behind it; nothing with a second number, an
    operator or a word such as "or", "thousand" in it: an answer is one number, not a list of guesses or a sum to work out.

    >>> [str(parse_number(text)) for text in ("$1,234.50", r"\\boxed{\\frac{1}{2}}", "12 or 13", "6+6")]
    ['2469/2', '1/2', 'None', 'None']
    """
    if len(text) > 200:
        return None
    text = clean(text)
    boxed = re.fullmatch(r"\\boxed\s*\{(.*)\}\.?", text, re.S)
    text = clean(boxed[1]) if boxed else text
    text = re.sub(r"\\frac" + GROUP + GROUP, lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    text = re.sub(r"\(([A-Za-z ]+)\)$", r" \1", text.lstrip("= ").rstrip(" .*"))
    text = re.sub(r"^(-?)\s+", r"\1", text).rstrip()
    match = NUMBER.fullmatch(text)
    if not match:
        return None
    sign, whole, top, bottom, integer, decimals, unit = match.groups()
    words = re.sub(r"[^a-z ]", " ", unit.lower()).split()
    if NOT_UNITS & set(words) or any(len(word) == 1 and word not in "aghlms" for word in words):
        return None
    plain = lambda digits: int(digits.replace(",", ""))
    if top:
        if not plain(bottom):
            return None
        value = Fraction(plain(top), plain(bottom)) + (plain(whole) if whole else 0)
    elif not (integer or (decimals or "").strip(".")):
        return None
    else:
        value = Fraction((integer or "0").replace(",", "") + (decimals or "").rstrip("."))
    return -value if sign == "-" else value


def grade_number(completion, gold):
    """Exact match of the final number: after '####', or else in \\boxed{}, or else behind 'answer is'. All must agree."""
    stated = re.findall(r"####\s*([^\n#]*)", completion)
    if not stated and "\\boxed" in completion:
        stated = [last_boxed(part) or "" for part in re.split(r"(?=\\boxed)", completion) if part.startswith("\\boxed")]
    if not stated:
        stated = re.findall(r"(?i)\banswer\s*(?:is|:|=)\s*:?([^\n]*)", completion)
    expected = parse_number(gold)
    return float(expected is not None and bool(stated) and all(parse_number(text) == expected for text in set(stated)))


# math-verify runs in a process of its own, which forks for each question: a tower of powers can only be stopped by ending it.
MATH_WORKER = r"""
import json, logging, os, resource, signal, sys
logging.disable(logging.CRITICAL)
from math_verify import LatexExtractionConfig, parse, verify
config = [LatexExtractionConfig(boxed_match_priority=0)]
latex = lambda text: parse("$" + text + "$", extraction_config=config, parsing_timeout=None)
for text in (r"\frac{2x^2}{3}-\sqrt{5}", r"(-\infty,3]\cup(4,5)", r"\{1,-2\}", "y=2x+1",
             r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,3+4i)", r"2\cos\pi"):
    verify(latex(text), latex(text + "+1"), timeout_seconds=None)  # load sympy and fill the parser's caches, which children inherit
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        signal.setitimer(signal.ITIMER_PROF, 1.0)  # seconds of CPU, so that the verdict does not depend on who else is busy
        gold, answer = json.loads(line)
        # Twelve decimals, because six would take 3.141593 for pi; relations as sets, so that x <= 3 is (-infinity, 3].
        os._exit(not verify(latex(gold), latex(answer), float_rounding=12, numeric_precision=30, allow_set_relation_comp=True,
                            timeout_seconds=None))
    print(int(os.waitpid(child, 0)[1] == 0), flush=True)
"""
math_worker = None


def math_verify_equal(gold, answer):
    """math-verify's verdict on two LaTeX answers; False after a second of CPU or 4 GiB, whatever the answer holds."""
    global math_worker
    if math_worker is None:
        math_worker = subprocess.Popen([sys.executable, "-c", MATH_WORKER], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, start_new_session=True)  # Ctrl-C is not for it
    try:
        print(json.dumps([gold, answer]), file=math_worker.stdin, flush=True)
        return math_worker.stdout.readline() == "1\n"
    except BrokenPipeError:  # it did not even start
        return False


def grade_math(completion, gold):
    """Equality of the last \\boxed{} with the gold answer: as text, as exact numbers, or else by math-verify."""
    answer = last_boxed(completion)
    if answer is None or len(answer) > 300 or "\x00" in answer:
        return 0.0
    strip = lambda text: re.sub(r"\s+", "", re.sub(r"\.$", "", clean(text)))
    if strip(answer) == strip(gold):
        return 1.0
    if "%" in clean(answer) and "%" not in clean(gold):
        return 0.0
    if "=" not in gold:
        answer = re.sub(r"^\s*[A-Za-z]\s*(?:=|\\in(?![a-z]))", "", clean(answer))
    expected = parse_number(re.sub(r"^\s*[A-Za-z]\s*=", "", gold))
    if expected is not None:  # a number must be stated as a number: math-verify would take 6+6 for 12
        return float(parse_number(re.sub(r"^\s*[A-Za-z]\s*=", "", answer)) == expected)
    base = re.compile(r"_\{?[0-9]+\}?$")  # 101_2: math-verify ignores the base
    if base.search(strip(gold)):
        return float(not base.search(strip(answer)) and base.sub("", strip(gold)) == strip(answer)
                     or re.sub(r"[{}]", "", strip(gold)) == re.sub(r"[{}]", "", strip(answer)))
    relation, ordered = re.compile(r"[<>]|\\[lg]eq?(?![a-z])"), re.compile(r"[(\[].*,.*[)\]]", re.S)
    both = clean(gold), clean(answer)
    # math-verify would take x=13=12 for 12, and the set {3, 4} for the point (3, 4).
    if answer.count("=") > gold.count("=") or len({bool(ordered.search(x)) for x in both if not relation.search(x)}) > 1:
        return 0.0
    return float(math_verify_equal(gold, answer))


def grade(task, completion, gold):
    """1.0 if the completion's final answer equals `gold`, else 0.0. completion: the model's text alone, without the prompt."""
    if task not in TASKS:
        raise ValueError(f"grade: expected one of {', '.join(TASKS)}, got {task}")
    return grade_math(completion, gold) if task == "math" else grade_number(completion, gold)


# ----------------------------------------------------------------------------------------------------- model and prompts

def built_in_tokenizer():
    """One token per word or number of the arithmetic task."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<pad>", "<eos>", "\n", "+", "-", "=", ",", ".", "?", "####", "How", "many", "has", *GAIN, *LOSE, *NAMES, *THINGS]
    words += [str(number) for number in range(LARGEST + 1)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def load_model(args, seed):
    """(model, tokenizer): fp32 parameters, because RL-sized updates are lost in bf16 ones."""
    if args.model == "built-in":
        tokenizer = built_in_tokenizer()
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, initializer_range=0.1))  # the usual 0.02 is for wide models: this learns 2x faster
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
            model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"--model {args.model}: expected a hub id that can be reached, or a folder with a causal language model "
                            f"and its tokenizer ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows or tokenizer.eos_token_id is None:
        raise UserError(f"--model {args.model}: expected a tokenizer with an end token and at most {rows} tokens, one per row of the "
                        f"model's embedding, got {len(tokenizer)} tokens and end token {tokenizer.eos_token}; are both of one model?")
    model.to(args.device).eval()  # eval for good: dropout would make the ratio differ from 1 before the first update
    probe = torch.arange(4, device=args.device)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=probe).last_hidden_state
        if not torch.allclose(head_logits(model, hidden), model(input_ids=probe).logits.float(), atol=1e-3, rtol=1e-3):
            raise UserError(f"--model {args.model}: expected logits that are its last hidden state times its output embedding; Gemma 2 "
                            "and Granite cap or scale them, which this file does not: choose another model")
    return model, tokenizer


def stop_tokens(model, tokenizer):
    """Every token that ends a completion: chat models name a second one in their generation config."""
    extra = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])} - {None})


def encode(args, tokenizer, problems):
    """The problems with their prompt's token ids: a chat with worked examples, plain text with them, or the bare question."""
    shots = EXAMPLES.get(args.task, [])
    if tokenizer.chat_template:
        chats = [[{"role": role, "content": text} for pair in [*shots, (problem.question,)]
                  for role, text in zip(("user", "assistant"), pair)] for problem in problems]
        texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    elif shots:
        head = "".join(f"Question: {question}\nAnswer: {answer}{tokenizer.eos_token}\n" for question, answer in shots)
        texts = [f"{head}Question: {problem.question}\nAnswer:" for problem in problems]
    else:
        texts = [problem.question for problem in problems]
    # A chat template writes its own special tokens; plain text needs the tokenizer's, such as Llama's first token.
    ids = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return [problem._replace(prompt=prompt) for problem, prompt in zip(problems, ids)]


def encode_solution(args, tokenizer, problem):
    """Token ids of the worked solution, with the end token."""
    space = " " if args.task in EXAMPLES and not tokenizer.chat_template else ""
    return tokenizer(space + problem.solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


# ------------------------------------------------------------------------------ rollouts, log-probabilities and entropy

def head_logits(model, hidden):
    """(..., H) -> (..., V) in fp32. In bf16 the ratio would carry 2 % of noise, as much as a tight elastic bound."""
    head = model.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


def autocast(device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def prefill(model, prompts, repeats):
    """Runs each prompt through the model once, however many completions it has.

    prompts: P lists of token ids. repeats: how many completions each has. Returns, for the B = sum(repeats) rows in order: the
    key-value cache, the hidden state (B, H) that predicts the first completion token, and the attention mask (B, L).
    """
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding is on the left, so positions must not count it
    cache = transformers.DynamicCache(config=model.config)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache,
                              use_cache=True).last_hidden_state[:, -1]
    rows = torch.repeat_interleave(torch.arange(len(prompts), device=device), torch.tensor(repeats, device=device))
    cache.batch_select_indices(rows)
    return cache, hidden[rows], mask[rows]


Rollouts = namedtuple("Rollouts", "tokens mask logprobs entropies")  # each (B, T), on the model's device


@torch.no_grad()
def sample(model, prompts, group_size, max_new_tokens, stop, rng, temperature=1.0):
    """Samples `group_size` completions per prompt from the full softmax; temperature 0 takes the most likely token.

    The prompt is run once per group, and rows that have ended leave the batch. Returns Rollouts with B = P * group_size rows:
    tokens; the mask of completion tokens, which includes the end token; the log-probability of each token and the entropy, in
    nats, of the softmax it came from, both at temperature 1 over the whole vocabulary.
    """
    device, B = model.device, len(prompts) * group_size
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs, entropies = tokens.float(), tokens.float()
    stop = torch.tensor(stop, device=device)
    rows = torch.arange(B, device=device)  # the completion each row of the cache belongs to
    alive = torch.ones(B, dtype=torch.bool, device=device)
    with autocast(device):
        cache, hidden, attention = prefill(model, prompts, [group_size] * len(prompts))
        for t in range(max_new_tokens):
            logp = head_logits(model, hidden).log_softmax(-1)
            if temperature == 0:
                token = logp.argmax(-1)
            else:
                # One number per completion, ended or not, so no draw depends on who has left; multinomial would take B x V of them.
                u = torch.rand(B, 1, generator=rng, device=device)[rows]
                cdf = (logp / temperature).softmax(-1).cumsum(-1)
                token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
            tokens[rows, t], logprobs[rows, t] = token, logp.gather(1, token[:, None])[:, 0]
            entropies[rows, t] = -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)  # exp(-inf) * -inf would be NaN
            alive = alive & ~torch.isin(token, stop)
            left = int(alive.sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left <= 0.875 * len(rows):  # leaving costs a copy of the cache, so it waits until an eighth is done
                keep = alive.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, token, attention, alive = rows[keep], token[keep], attention[keep], alive[keep]
            attention = torch.cat([attention, torch.ones_like(attention[:, :1])], 1)
            hidden = model.base_model(input_ids=token[:, None], attention_mask=attention, cache=cache, use_cache=True,
                                      position_ids=attention.sum(1, keepdim=True) - 1).last_hidden_state[:, -1]
    ends = torch.isin(tokens, stop).long()
    mask = (ends.cumsum(1) - ends == 0)[:, :t + 1]  # up to the first end token, with it
    return Rollouts(tokens[:, :t + 1] * mask, mask, *(x[:, :t + 1].where(mask, 0.0) for x in (logprobs, entropies)))


def sample_and_grade(args, model, tokenizer, problems, group_size, rng, temperature=1.0):
    """A group of completions per problem: Rollouts, their texts without the end token, and the rewards, 0 or 1, (P, G)."""
    rollouts = sample(model, [problem.prompt for problem in problems], group_size, args.max_new_tokens,
                      stop_tokens(model, tokenizer), rng, temperature)
    rows = [tokens[mask].tolist() for tokens, mask in zip(rollouts.tokens.cpu(), rollouts.mask.cpu())]
    # Cleaning up spaces would change what the model wrote.
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    rewards = [grade(args.task, text, problems[i // group_size].answer) for i, text in enumerate(texts)]
    return rollouts, texts, torch.tensor(rewards, device=model.device).view(len(problems), group_size)


def hidden_states(model, prompts, repeats, tokens):
    """The state (B, T, H) that predicts each completion token: the one at t predicts token t, so no shift is left to get wrong.

    prompts: P lists of token ids; repeats: how many rows each has; tokens: (B, T).
    """
    with autocast(model.device):
        cache, first, attention = prefill(model, prompts, repeats)
        if tokens.shape[1] == 1:
            return first[:, None]
        attention = torch.cat([attention, torch.ones_like(tokens[:, 1:])], 1)  # padding on the right is never looked at
        positions = attention.sum(1, keepdim=True) - tokens.shape[1] + 1 + torch.arange(tokens.shape[1] - 1, device=tokens.device)
        rest = model.base_model(input_ids=tokens[:, :-1], attention_mask=attention, position_ids=positions, cache=cache,
                                use_cache=True).last_hidden_state
        return torch.cat([first[:, None], rest], 1)


@torch.no_grad()
def head_backward(model, hidden, logp, chosen, gradient):
    """Back through the output head, by hand: d log p(y) / d logits is onehot(y) - p. Written over logp, nothing else is of its size.

    hidden: (N, H); logp: (N, V); chosen: the tokens y, (N, 1); gradient: d loss / d log p(y), (N,). Adds to the head's gradients
    and returns d loss / d hidden, (N, H).
    """
    head = model.get_output_embeddings()
    for parameter in head.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    d_logits = logp.exp_().mul_(-gradient[:, None]).scatter_add_(1, chosen, gradient[:, None])
    head.weight.grad.addmm_(d_logits.T, hidden.float())  # in place: autograd would make another such gradient per slice
    if head.bias is not None:
        head.bias.grad += d_logits.sum(0)
    return d_logits @ head.weight


def score_in_pieces(args, model, prompts, rows, tokens, mask):
    """Yields (some of `rows`, the log-probabilities (b, T) of their tokens, 0 where mask is false): `sample`'s counterpart in training.

    For gradients, call backward() on each before asking for the next. prompts: the prompt of each row of tokens and mask (B, T); one
    that neighbouring rows share is run once per piece. The layers see pieces of at most --micro-batch-tokens, the head slices of a
    piece: one slice's logits exist at a time.
    """
    lengths, pieces = mask.sum(1).tolist(), [[]]
    for row in rows:
        longer = [*pieces[-1], row]
        if len(longer) > 1 and len(longer) * max(len(prompts[i]) + lengths[i] for i in longer) > args.micro_batch_tokens:
            pieces.append([])
        pieces[-1].append(row)
    for piece in pieces:
        shared = [(prompt, len(list(same))) for prompt, same in itertools.groupby(prompts[i] for i in piece)]
        longest, index = max(lengths[i] for i in piece), torch.tensor(piece, device=tokens.device)
        states = hidden_states(model, *zip(*shared), tokens[index, :longest])
        size = max(1, LOGITS_AT_ONCE // (longest * model.get_output_embeddings().weight.shape[0]))
        d_states = torch.zeros_like(states)
        for i, part, d_part in zip(index.split(size), states.detach().split(size), d_states.split(size)):
            on, chosen = mask[i, :longest], tokens[i][mask[i]][:, None]
            hidden = part[on]
            with torch.no_grad():
                logp = head_logits(model, hidden).log_softmax(-1)
            chosen_logp = logp.gather(1, chosen)[:, 0].requires_grad_(states.requires_grad)
            yield i, torch.zeros(mask[i].shape, device=mask.device).masked_scatter(mask[i], chosen_logp)
            if chosen_logp.grad is not None:
                d_part[on] = head_backward(model, hidden, logp, chosen, chosen_logp.grad).to(states.dtype)
        if chosen_logp.grad is not None:
            states.backward(d_states)


# ---------------------------------------------------------------------------------------- files that survive any interruption

class Stopped(Exception):
    """Ctrl-C was pressed and everything is saved."""


stop_requested = threading.Event()


def write_atomically(path, write):
    """Calls write(temporary path), then renames: whoever reads `path` finds the old content or the new, never a part."""
    try:
        write(f"{path}.tmp")
    except RuntimeError as error:  # how torch.save reports a full disk
        raise OSError(f"a failure to write all of {path}.tmp") from error
    os.replace(f"{path}.tmp", path)


def save_text(text, path):
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def save_json(value, path):
    save_text(json.dumps(value, indent=1) + "\n", path)


def save_checkpoint(path, model, optimizer, **state):
    state.update(model=model.state_dict(), optimizer=optimizer.state_dict())
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path, model, optimizer):
    """Restores model and optimizer; returns what else was saved, or None where there is no checkpoint."""
    if not path.exists():
        return None
    state = torch.load(path, map_location=model.device, weights_only=True)
    model.load_state_dict(state.pop("model"))
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


# ----------------------------------------------------------------------------------------------------------- warm start

def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)


def apply_gradients(model, optimizer, learning_rate, updates_before):
    """One optimiser step with warm-up and clipping. Returns the gradient norm; a non-finite one leaves the weights alone."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (updates_before + 1) / LR_WARMUP_UPDATES)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def warm_up(args, seed, model, tokenizer, problems):
    """Supervised steps on worked solutions; every arm of a seed starts from the result, OUT/warmup-seedK.pt. Returns seconds."""
    if not args.warmup_steps:
        return 0.0
    path, optimizer = Path(args.out) / f"warmup-seed{seed}.pt", make_optimizer(model)
    state = load_checkpoint(path, model, optimizer) or dict(step=0, seconds=0.0)
    started, done = time.perf_counter() - state["seconds"], state["step"]
    if done == args.warmup_steps:
        return state["seconds"]
    bar = tqdm(range(done + 1, args.warmup_steps + 1), desc=f"warm start, seed {seed}", initial=done, total=args.warmup_steps)
    for step in bar:
        batch = seeded("warmup", seed, step).choices(problems, k=WARMUP_BATCH)
        batch.sort(key=lambda problem: len(problem.prompt))  # rows of one length, less padding
        rows = [torch.tensor(encode_solution(args, tokenizer, problem), device=args.device) for problem in batch]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row).bool() for row in rows], batch_first=True)
        loss = 0.0
        for _, logprobs in score_in_pieces(args, model, [problem.prompt for problem in batch], range(len(batch)), tokens, mask):
            piece = -logprobs.sum() / mask.sum()
            piece.backward()
            loss += float(piece.detach())
        # Linear decay to a tenth: the warm start should end at rest, not in the middle of a stride.
        apply_gradients(model, optimizer, args.warmup_learning_rate * (1 - 0.9 * step / args.warmup_steps), step - 1)
        bar.set_postfix(loss=f"{loss:.3f}")
        last, stopping = step == args.warmup_steps, stop_requested.is_set()
        if last or stopping or step % 100 == 0:  # once finished, Adam's state is of no more use
            save_checkpoint(path, model, make_optimizer(model) if last else optimizer, step=step, seconds=time.perf_counter() - started)
        if stopping:
            raise Stopped
    return time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------- one training step

def clip_bounds(args, arm, rewards, advantages):
    """(low, high), each (P, G). The only place where arms differ."""
    arm = ARMS[arm]
    budgets = etr.variance_budgets(rewards, arm.macro)
    return etr.elastic_clip_bounds(advantages, budgets, args.clip_low * arm.low, args.clip_high * arm.high, arm.micro, args.scale_max)


def minibatches(groups, count, rng):
    """Endless minibatches of whole groups, `count` per pass over the batch; each pass has a new order."""
    while True:
        order = rng.sample(range(groups), groups)
        yield from (sorted(order[i::count]) for i in range(count))


# Sums over tokens and over the updates of a step, kept apart for groups with k = 0..G correct completions.
BY_CORRECT = ("tokens_right", "tokens_wrong", "clipped_right", "clipped_wrong", "kl", "radius_squared")


def count_by_correct(log_ratio, mask, right, advantages, low, high):
    """The six BY_CORRECT sums of each row, (6, b). Right completions are clipped above, wrong ones below."""
    ratio, count = log_ratio.exp(), mask.sum(1)
    below, above = etr.clipped_tokens(ratio, advantages[:, None], low[:, None], high[:, None])
    kl = ((ratio - 1 - log_ratio) * mask).sum(1)
    return torch.stack([count * right, count * ~right, (above & mask).sum(1), (below & mask).sum(1), kl,
                        count * torch.where(right, high, low)**2])


def train_step(args, arm, seed, step, model, tokenizer, optimizer, problems):
    """One rollout batch and its updates. Returns (metrics, gradient norm of each update, a few rollouts as text)."""
    started = time.perf_counter()
    P, G, device = args.prompts_per_step, args.group_size, model.device
    batch = seeded("prompts", seed, step).sample(problems, P)  # by seed and step, never by arm
    rollouts, texts, rewards = sample_and_grade(args, model, tokenizer, batch, G, generator(device, "rollout", seed, step))
    tokens, mask = rollouts.tokens, rollouts.mask
    advantages = etr.group_advantages(rewards)
    low, high = clip_bounds(args, arm, rewards, advantages)
    right, A, low, high = rewards.flatten() > 0, advantages.flatten(), low.flatten(), high.flatten()
    correct = rewards.sum(1).long().repeat_interleave(G)

    problem_of = [batch[i // G] for i in range(P * G)]  # row i is completion i % G of prompt i // G
    pieces = lambda rows: score_in_pieces(args, model, [problem.prompt for problem in problem_of], rows, tokens, mask)
    old = rollouts.logprobs
    if device.type == "cuda":  # in bf16, token by token and all at once differ by more than a tight bound: use one path
        with torch.no_grad():
            old = torch.cat([logprobs for _, logprobs in pieces(range(P * G))])

    totals, by_correct, norms = Counter(), torch.zeros(len(BY_CORRECT), G + 1, device=device), []
    stream = minibatches(P, min(MINIBATCHES, P, args.updates_per_step), seeded("minibatches", seed, step))
    for update, groups in enumerate(itertools.islice(stream, args.updates_per_step)):
        rows = [group * G + member for group in groups for member in range(G)]
        for i, logprobs in pieces(rows):
            loss, stats = etr.surrogate_loss(logprobs, old[i], A[i], low[i], high[i], mask[i], denominator=mask[rows].sum())
            loss.backward()
            for name, value in stats.items():  # means over this piece's tokens: weigh them by its tokens
                totals[name] += float(value * mask[i].sum())
            by_correct.index_add_(1, correct[i], count_by_correct(logprobs.detach() - old[i], mask[i], right[i], A[i], low[i], high[i]))
        norms.append(apply_gradients(model, optimizer, args.learning_rate, (step - 1) * args.updates_per_step + update))

    seconds, finite, sampled = time.perf_counter() - started, [norm for norm in norms if math.isfinite(norm)], int(mask.sum())
    trained = float(by_correct[:2].sum())
    metrics = dict(
        step=step, reward_mean=float(rewards.mean()), entropy=float(rollouts.entropies.sum()) / sampled,
        **{name: total / trained for name, total in totals.items()},
        frac_reward_zero_std=float((advantages == 0).all(1).float().mean()), completion_length_mean=sampled / (P * G),
        grad_norm=sum(finite) / len(finite) if finite else None, updates_skipped=len(norms) - len(finite),
        tokens_per_second=sampled / seconds, seconds=seconds, by_correct=dict(zip(BY_CORRECT, by_correct.tolist())))
    shown = [f"step {step}, reward {int(right[i])}\n{problem_of[i].question}\n>>> {texts[i]}\n\n" for i in range(0, P * G, max(1, P * G // 4))]
    return metrics, norms, "".join(shown)


# ------------------------------------------------------------------------------------------------------------ evaluation

def pass_at_k(samples, correct, k):
    """Unbiased estimate of the chance that one of k samples is right, from `correct` of `samples` (Chen et al. 2021, eq. 1).

    >>> pass_at_k(8, 1, 1), pass_at_k(8, 1, 8)
    (0.125, 1.0)
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def evaluate(args, seed, model, tokenizer, problems):
    """Held-out accuracy: dict of pass1 (mean of EVAL_SAMPLES samples), greedy and passk (a list, k = 1..EVAL_SAMPLES), and, of the
    same samples, entropy (nats per token), mean length in tokens and the share of groups with equal rewards."""
    n, k, right, entropy, tokens = len(problems), EVAL_SAMPLES, [], 0.0, 0
    def rollouts_of(group_size, temperature):
        at_once = args.prompts_per_step * k // group_size
        for start in range(0, n, at_once):
            yield sample_and_grade(args, model, tokenizer, problems[start:start + at_once], group_size,
                                   generator(model.device, "eval", seed, start), temperature)
    greedy = sum(float(rewards.sum()) for _, _, rewards in rollouts_of(1, temperature=0))
    for rollouts, _, rewards in rollouts_of(k, temperature=1):
        right += rewards.sum(1).int().tolist()
        entropy, tokens = entropy + float(rollouts.entropies.sum()), tokens + int(rollouts.mask.sum())
    return dict(pass1=sum(right) / (n * k), greedy=greedy / n, entropy=entropy / tokens, length=tokens / (n * k), problems=n,
                passk=[sum(pass_at_k(k, c, j) for c in right) / n for j in range(1, k + 1)],
                zero_std=sum(c in (0, k) for c in right) / n)


# ----------------------------------------------------------------------------------------------------------------- plots

T_975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t, 1..9 degrees of freedom; 2 beyond


def load_runs(out):
    """{arm: {seed: [metrics of each step]}} of the runs under `out`."""
    runs = {arm: {} for arm in ARMS}
    for path in sorted(Path(out).glob("*-seed*/metrics.jsonl")):
        arm, _, seed = path.parent.name.rpartition("-seed")
        runs[arm][int(seed)] = [json.loads(line) for line in path.read_text().splitlines()]
    return {arm: seeds for arm, seeds in runs.items() if seeds}


def mean_and_band(curves):
    """(x, mean, half-width of its 95 % interval) over seeds, at the steps that all have. curves: one {x: value} per seed."""
    x, n = sorted(set.intersection(*map(set, curves))), len(curves)
    values = np.array([[curve[at] for at in x] for curve in curves])
    half = (T_975[n - 2] if n <= 10 else 2.0) * values.std(0, ddof=1) / n**0.5 if n > 1 else np.zeros(len(x))
    return x, values.mean(0), half


def panel(axis, title, xlabel, ylabel):
    axis.set_title(title, fontsize=14)
    axis.set_xlabel(xlabel, fontsize=13)
    axis.set_ylabel(ylabel, fontsize=13)
    axis.tick_params(labelsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def draw_lines(axis, lines, title, xlabel, ylabel, top=None):
    """Draws {arm: (x, y, half)} with bands, each labelled at its right end; labels are pushed apart where ends meet."""
    lines = {arm: line for arm, line in lines.items() if len(line[0])}
    for arm, (x, y, half) in lines.items():
        axis.plot(x, y, color=ARMS[arm].color, lw=2.5)
        axis.fill_between(x, y - half, y + half, color=ARMS[arm].color, alpha=0.18, lw=0)
    axis.set_ylim(0, top)
    at, apart = -math.inf, 0.065 * axis.get_ylim()[1]
    for arm, (x, y, _) in sorted(lines.items(), key=lambda item: item[1][1][-1]):
        at = max(y[-1], at + apart)
        axis.annotate(arm, (x[-1], at), xytext=(6, 0), textcoords="offset points", color=ARMS[arm].color, fontsize=13, weight="bold",
                      va="center", annotation_clip=False)
    panel(axis, title, xlabel, ylabel)


def draw(args):
    """Both pictures from the metrics on disk; nothing before each arm has made a step."""
    out, runs = Path(args.out), load_runs(args.out)
    if not runs or any(len(lines) < 2 for seeds in runs.values() for lines in seeds.values()):
        return
    over_steps = lambda name, factor=1, first=1: {arm: mean_and_band([
        {line["step"]: factor * line[name] for line in lines[first:] if name in line} for lines in seeds.values()]) for arm, seeds in runs.items()}
    step, n = "step (rollout batches)", min(len(seeds) for seeds in runs.values())

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    accuracy, entropy = over_steps("eval_pass1", first=0), over_steps("entropy", first=0)
    draw_lines(left, accuracy, "Held-out accuracy", step, "pass@1 on held-out problems")
    draw_lines(right, entropy, "Policy entropy", step, "entropy of the policy (nats per token)")
    uniform = math.log(json.loads((out / "config.json").read_text())["vocabulary"])
    if uniform < 2 * right.get_ylim()[1]:
        right.axhline(uniform, color="#777777", ls="--", lw=1.5)
        right.text(0, uniform, " uniform policy, ln|V|", color="#777777", fontsize=12, va="bottom")
    ends = ", ".join(f"{arm} {y[-1]:.2f}" for arm, (_, y, _) in accuracy.items())
    figure.suptitle(f"{args.task}: pass@1 from {next(iter(accuracy.values()))[1][0]:.2f} to {ends}", fontsize=15, weight="bold")
    figure.supxlabel(f"{n} seeds, bands: 95 % interval of the mean" if n > 1 else "1 seed, so no bands: differences may be noise",
                     fontsize=11, color="#555555")
    figure.savefig(out / "accuracy_entropy.png", dpi=130)

    sums = {arm: {name: sum(np.array(line["by_correct"][name]) for lines in seeds.values() for line in lines[1:]) for name in BY_CORRECT}
            for arm, seeds in runs.items()}
    def by_pass_rate(name, *token_names):
        lines = {}
        for arm, sums_of in sums.items():
            tokens = sum(sums_of[name] for name in token_names)
            k = np.flatnonzero(tokens[1:-1]) + 1  # k = 0 and k = G have no gradient to clip
            lines[arm] = (k / (len(tokens) - 1), sums_of[name][k] / tokens[k], np.zeros(len(k)))
        return lines
    percent = lambda lines: {arm: (x, 100 * y, half) for arm, (x, y, half) in lines.items()}
    rate = "pass rate of the group, k/G"
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    draw_lines(axes[0, 0], by_pass_rate("radius_squared", "tokens_right", "tokens_wrong"), "The budget", rate, "mean squared clip radius")
    draw_lines(axes[0, 1], percent(by_pass_rate("clipped_right", "tokens_right")), "Right answers, clipped above", rate, "tokens clipped (%)")
    draw_lines(axes[0, 2], percent(by_pass_rate("clipped_wrong", "tokens_wrong")), "Wrong answers, clipped below", rate, "tokens clipped (%)")
    draw_lines(axes[1, 0], over_steps("frac_reward_zero_std", 100), "Groups that teach nothing", step, "groups with equal rewards (%)", 100)
    draw_lines(axes[1, 1], over_steps("approx_kl", 1000), "Distance moved per step", step, "KL (1e-3 nats per token)")
    draw_lines(axes[1, 2], over_steps("completion_length_mean"), "Length of completions", step, "tokens")
    shares = ", ".join(f"{arm} {np.mean(y):.1f} %" for arm, (_, y, _) in over_steps("clip_fraction", 100).items())
    figure.suptitle(f"Who is clipped: {shares} of all tokens", fontsize=16, weight="bold")
    figure.savefig(out / "mechanism.png", dpi=130)
    plt.close("all")


# ---------------------------------------------------------------------------------------------------------- runs and main

def evaluation_metrics(scores):
    return dict(eval_pass1=scores["pass1"], eval_greedy=scores["greedy"], eval_passk=scores["passk"][-1])


def run_arm(args, arm, seed, before, model, tokenizer, data):
    """Trains one arm from the warm start. Continues from its checkpoint where there is one. Returns its row of results.json."""
    folder, optimizer = Path(args.out) / f"{arm}-seed{seed}", make_optimizer(model)
    folder.mkdir(exist_ok=True)
    scores = before["validation"]  # step 0 is the warm start: nothing was updated, so nothing moved or was clipped
    still = ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "approx_kl", "grad_norm", "tokens_per_second", "seconds")
    start = dict(dict.fromkeys(still, 0.0), step=0, reward_mean=scores["pass1"], entropy=scores["entropy"], ratio_mean=1.0,
                 frac_reward_zero_std=scores["zero_std"], completion_length_mean=scores["length"], updates_skipped=0,
                 **evaluation_metrics(scores))
    state = load_checkpoint(folder / "checkpoint.pt", model, optimizer) or dict(step=0, seconds=0.0, lines=[start], samples="")
    lines, started, skipped = state["lines"], time.perf_counter() - state["seconds"], 0
    bar = tqdm(range(state["step"] + 1, args.steps + 1), desc=f"{arm}, seed {seed}", initial=state["step"], total=args.steps)
    for step in bar:
        metrics, norms, shown = train_step(args, arm, seed, step, model, tokenizer, optimizer, data["train"])
        for norm in norms:
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped == 3:
                raise UserError(f"{arm}, seed {seed}, step {step}: expected finite gradients, got three in a row that are not; the "
                                f"last checkpoint is kept in {folder}: start anew with a lower --learning-rate")
        evaluated, stopping = step % args.eval_every == 0 or step == args.steps, stop_requested.is_set()
        if evaluated:
            metrics.update(evaluation_metrics(evaluate(args, seed, model, tokenizer, data["validation"])))
            state["samples"] += shown
        lines.append(metrics)
        save_text("".join(json.dumps(line) + "\n" for line in lines), folder / "metrics.jsonl")
        save_text(state["samples"], folder / "samples.txt")
        if evaluated or stopping:
            state.update(step=step, seconds=time.perf_counter() - started)
            save_checkpoint(folder / "checkpoint.pt", model, optimizer, **state)
        if stopping:
            raise Stopped
        bar.set_postfix(reward=f"{metrics['reward_mean']:.2f}", entropy=f"{metrics['entropy']:.3f}",
                        clip=f"{100 * metrics['clip_fraction']:.1f}%")
    after, row = evaluate(args, seed, model, tokenizer, data["test"]), dict(seed=seed)
    for name, pick in (("pass1", lambda s: s["pass1"]), ("greedy", lambda s: s["greedy"]), ("passk", lambda s: s["passk"][-1]),
                       ("passk_curve", lambda s: s["passk"])):
        row.update({f"{name}_before": pick(before["test"]), f"{name}_after": pick(after)})
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return dict(row, entropy_first=lines[1]["entropy"], entropy_last=lines[-1]["entropy"],
                clip_fraction_mean=float(np.mean([line["clip_fraction"] for line in lines[1:]])), seconds=time.perf_counter() - started)


def check_out(args):
    """Raises UserError unless --out is new or, with --resume, holds a run with these very arguments."""
    path = Path(args.out) / "config.json"
    if path.exists() and not args.resume:
        raise UserError(f"--out {args.out}: expected a new folder, but it holds a run; add --resume to continue it, or name another")
    if args.resume and not path.exists():
        raise UserError(f"--resume: expected a run in {args.out}, got none; leave --resume out to start one")
    stored = json.loads(path.read_text())["arguments"] if args.resume else {}
    differing = [f"{name} was {value}, is {getattr(args, name, None)}" for name, value in stored.items()
                 if getattr(args, name, None) != value]
    if differing:
        raise UserError(f"--resume: expected the arguments that {args.out} was started with, but {'; '.join(differing)}")


def print_table(results, out):
    print(f"\n{'arm':12s} seed   pass@1          greedy          pass@{EVAL_SAMPLES}          entropy         clipped  seconds")
    for arm, rows in results["arms"].items():
        for r in rows:
            change = "  ".join(f"{r[f'{name}_before']:.3f} -> {r[f'{name}_after']:.3f}" for name in ("pass1", "greedy", "passk"))
            print(f"{arm:12s} {r['seed']:4d}  {change}  {r['entropy_first']:.3f} -> {r['entropy_last']:.3f} "
                  f"{100 * r['clip_fraction_mean']:7.2f}% {r['seconds']:8.0f}")
    print(f"\nPictures: {out / 'accuracy_entropy.png'}, {out / 'mechanism.png'}    Numbers: {out / 'results.json'}")


def run(args):
    if args.model == "built-in" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on a model this small the threads wait for each other
    check_out(args)
    if args.task == "math" and not math_verify_equal("x+1", "1+x"):
        raise UserError("--task math needs the package math-verify on Linux or macOS; pip install -r requirements.txt brings it")
    out, problems = Path(args.out), load_problems(args)
    model, tokenizer = load_model(args, args.seed)
    data = {name: encode(args, tokenizer, part) for name, part in problems.items()}
    longest = max(len(problem.prompt) for part in data.values() for problem in part)
    context = getattr(model.config, "max_position_embeddings", math.inf)
    if longest + args.max_new_tokens > context:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: expected at most {context - longest}, because the longest prompt has "
                        f"{longest} tokens and the model's context {context}; lower it or choose another --model")
    out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{args.device}, {torch.get_num_threads()} threads"
    arguments = {name: value for name, value in vars(args).items() if name != "resume"}
    save_json(dict(arguments=arguments, device=device, vocabulary=model.get_output_embeddings().weight.shape[0],
                   parameters=model.num_parameters(), problems={name: len(part) for name, part in data.items()},
                   versions=dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)),
              out / "config.json")
    results = dict(task=args.task, total_seconds=0.0, warmup_seconds=0.0, arms={arm: [] for arm in args.algos})
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in args.algos:
            model = None  # or the last arm's would stay in memory beside the next
            model, tokenizer = load_model(args, seed)
            warmup_seconds = warm_up(args, seed, model, tokenizer, data["train"])
            before, result = out / f"before-seed{seed}.json", out / f"{arm}-seed{seed}" / "result.json"
            if not before.exists():
                save_json({name: evaluate(args, seed, model, tokenizer, data[name]) for name in ("validation", "test")}, before)
            if not result.exists():
                save_json(run_arm(args, arm, seed, json.loads(before.read_text()), model, tokenizer, data), result)
            (result.parent / "checkpoint.pt").unlink(missing_ok=True)
            results["arms"][arm].append(json.loads(result.read_text()))
            draw(args)
        results["warmup_seconds"] += warmup_seconds
    results["total_seconds"] = results["warmup_seconds"] + sum(row["seconds"] for rows in results["arms"].values() for row in rows)
    save_json(results, out / "results.json")
    print_table(results, out)


def on_interrupt(*_):
    if stop_requested.is_set():
        raise KeyboardInterrupt
    stop_requested.set()
    print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        run(args)
        return 0
    except Stopped:
        draw(args)
        message, code = f"stopped and saved in {args.out}; the same command with --resume continues", 130
    except UserError as error:
        message, code = str(error), 2
    except torch.OutOfMemoryError:
        message, code = ("the GPU's memory ran out; lower --micro-batch-tokens, then --prompts-per-step or --max-new-tokens, and name a "
                         "new --out"), 2
    except KeyboardInterrupt:
        message, code = f"stopped at once; what {args.out} has saved is kept, and the same command with --resume continues", 130
    except (OSError, SafetensorError) as error:
        message, code = f"expected to write in {args.out}, got {error}; mend that, and if a run was under way continue it by --resume", 2
    print(f"train_small.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
