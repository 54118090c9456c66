"""GRPO against ETR on a small language model: one file, read from top to bottom.

    python train_small.py                             built-in arithmetic, no GPU, no download
    python train_small.py --task gsm8k                Qwen2.5-0.5B-Instruct on GSM8K, one GPU
    python train_small.py --task math --levels 1 2 3  the same on MATH

Data flows one way: prompts, rollouts, rewards, advantages, bounds, loss, step, metrics, pictures.
Arms differ only in their rule for the bounds: weights at the start, prompts and code are the same.

Shapes: P prompts, G completions each, B = P*G rows, T completion tokens, H hidden units, V words.
Left out on purpose: several GPUs, an inference engine, a KL penalty, LoRA.
"""

import argparse
import contextlib
import fcntl
import functools
import inspect
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
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from matplotlib.figure import Figure
from tqdm import tqdm

import etr

# ---- config


def elastic(micro, macro, above=1.0):
    """The rule of an arm: (rewards, advantages, eps) -> clip radii (low, high), all (P, G)."""
    def rule(rewards, advantages, eps):
        budgets = etr.variance_budgets(rewards, macro)
        return etr.elastic_clip_bounds(advantages, budgets, eps, above * eps, micro)
    return rule


Arm = namedtuple("Arm", "rule color")  # Okabe-Ito colours, the same in every picture
ARMS = {
    "grpo": Arm(elastic(0.0, 0.0), "#000000"),
    "etr": Arm(elastic(1.0, 1.0), "#D55E00"),
    "micro": Arm(elastic(1.0, 0.0), "#E69F00"),
    "macro": Arm(elastic(0.0, 1.0), "#009E73"),
    "clip-higher": Arm(elastic(0.0, 0.0, above=1.4), "#0072B2"),  # DAPO: 0.2 below, 0.28 above
}
REAL = dict(
    model="Qwen/Qwen2.5-0.5B-Instruct", steps=100, updates_per_step=8, learning_rate=2e-6,
    max_new_tokens=256, train_problems=0, warmup_steps=0, warmup_batch=16, warmup_rate=1e-5)
TASKS = {  # the defaults that depend on the task
    "arithmetic": dict(
        model="built-in", steps=50, updates_per_step=16, learning_rate=1e-4, max_new_tokens=48,
        train_problems=20000, warmup_steps=300, warmup_batch=64, warmup_rate=8e-3),
    "gsm8k": REAL,
    "math": dict(REAL, max_new_tokens=512),
}
EVAL_SAMPLES = 8  # per held-out problem, for pass@1 and pass@k
EVAL_AT_ONCE = 64  # held-out problems
LR_WARMUP_UPDATES = 20  # Adam's first steps at the full rate wreck a tiny model
MINIBATCHES = 4  # per rollout batch; more updates than that go over it again
LOGITS_AT_ONCE = 2**24  # 64 MiB


class UserError(Exception):
    """A mistake the user can mend: one sentence instead of a stack trace."""


@contextlib.contextmanager
def expecting(what):
    """Turns any error inside into one sentence."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # these have a sentence of their own
        raise
    except Exception as error:
        got = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"expected {what}, got {got:.300}") from error


def number(kind, least, below=math.inf):
    def parse(text):
        if not least <= kind(text) < below:
            raise ValueError
        return kind(text)
    parse.__name__ = f"{kind.__name__} in [{least:g}, {below:g})"  # for argparse's message
    return parse


def add_flags(add):
    count, natural = number(int, 1), number(int, 0)
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    # problems
    add("--task", choices=TASKS, default="arithmetic", help="sets other defaults, too")
    add("--data", help="folder with train.jsonl and test.jsonl, instead of the hub")
    add("--levels", type=count, nargs="+", help="of MATH, or GSM8K's number of steps")
    add("--train-problems", type=natural, help="0: all")
    add("--eval-problems", type=count, default=200, help="held out, for validation")
    add("--test-problems", type=count, default=200, help="held out, for the final test")
    # model and memory
    add("--model", help="hub id or folder")
    add("--device", choices={"cpu", device}, default=device)
    add("--shots", type=natural, help="worked examples in a prompt; 2 without warm start")
    add("--max-new-tokens", type=count, help="longest completion")
    add("--micro-batch-tokens", type=count, default=4096, help="lower it to save memory")
    # arms, seeds, output
    add("--algos", choices=ARMS, nargs="+", default=["grpo", "etr"], help="arms to compare")
    add("--clip", type=number(float, 1e-9, 1 / 3), default=0.2, help="clip radius of GRPO, eps")
    add("--seeds", type=count, default=1, help="how many, paired between the arms")
    add("--seed", type=natural, default=0, help="the first")
    add("--out", help="folder, runs/TASK if not given")
    add("--resume", action="store_true", help="continue what is in --out")
    # training
    add("--warmup-steps", type=natural, help="supervised, before RL")
    add("--warmup-batch", type=count, help="worked solutions in each")
    add("--steps", type=count, help="rollout batches")
    add("--prompts-per-step", type=count, default=32, help="prompts in a rollout batch, P")
    add("--group-size", type=number(int, 2), default=8, help="completions per prompt, G")
    add("--updates-per-step", type=count, help="per rollout batch; with 1 nothing is clipped")
    add("--flip-rewards", type=number(float, 0, 0.5), default=0.0, help="share that is wrong")
    add("--learning-rate", type=number(float, 1e-12), help="of AdamW, after its warm-up")
    add("--eval-every", type=count, default=10, help="steps, also between checkpoints")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        "train_small.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser.add_argument)
    parser.set_defaults(**TASKS["arithmetic"])  # for --help
    parser.set_defaults(**TASKS[parser.parse_known_args(argv)[0].task])
    args = parser.parse_args(argv)
    built_in = args.model == "built-in"
    if built_in != (args.task == "arithmetic"):
        parser.error(f"--model {args.model}: expected built-in for --task arithmetic only")
    if args.shots is None:
        args.shots = 0 if args.warmup_steps or built_in else 2
    args.out = Path(args.out or f"runs/{args.task}")
    args.algos = list(dict.fromkeys(args.algos))
    return args


def seeded(*key):
    """A random.Random of `key` alone: a resumed run needs no saved state."""
    return random.Random(repr(key))


# ---- task: problems

# prompt, target: token ids of question and solution, by `encode`
Problem = namedtuple("Problem", "question solution answer prompt target", defaults=[None, None])
HUB = {"gsm8k": ("openai/gsm8k", "main"), "math": ("DigitalLearningGmbH/MATH-lighteval", "default")}
FIELDS = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}
GAIN, LOSE = "finds gets wins buys".split(), "eats loses sells gives".split()
NAMES, THINGS = "Ann Ben Eva Leo Mia Tom".split(), "apples books coins eggs pens shells".split()
LARGEST = 20  # every total stays in 0..20, one token per number


def slip(total, rng):
    near = range(max(total - 3, 0), min(total + 3, LARGEST) + 1)
    return rng.choice([other for other in near if other != total])


def arithmetic_problems(count, rng):
    """Distinct word problems of 1 to 7 steps in GSM8K's form, from a textbook full of errors.

    A fixed 30 % of the facts a + b have a fixed wrong result in 65 % of the worked solutions, the
    others any in 5 %. So a trained model is right more often by sampling than greedily: RL has
    something to find and to lose.
    """
    totals, changes = range(LARGEST + 1), [*range(1, 10), *range(-1, -10, -1)]
    believed = {(a, b): slip(a + b, rng) for a in totals for b in changes
                if a + b in totals and rng.random() < 0.3}
    problems = {}
    while len(problems) < count:
        start = total = told = rng.choice(totals)  # `total` is true, `told` the textbook's
        thing, events, solution = rng.choice(THINGS), "", []
        for _ in range(rng.randint(1, 7)):
            possible = [b for b in changes if total + b in totals and told + b in totals]
            if not possible:
                break
            change = rng.choice(possible)
            if (told, change) in believed:
                wrong, chance = believed[told, change], 0.65
            else:
                wrong, chance = slip(told + change, rng), 0.05
            result = wrong if rng.random() < chance else told + change
            events += f" , {rng.choice(GAIN if change > 0 else LOSE)} {abs(change)}"
            solution.append(f"{told} {'+' if change > 0 else '-'} {abs(change)} = {result}")
            total, told = total + change, result
        question = f"{rng.choice(NAMES)} has {start} {thing}{events} . How many {thing} ?"
        worked = " \n ".join([*solution, f"#### {told}"])
        problems[question] = Problem(question, worked, str(total))
    return list(problems.values())


def to_problem(task, row):
    """(level, Problem) of a row as published."""
    question, solution = (row[name] for name in FIELDS[task])
    if type(solution) is int:
        solution = f"#### {solution}"
    (question + solution).encode()  # fails unless both are text
    if task == "gsm8k":
        level = str(solution.count("<<"))  # one annotation a step
        solution = re.sub(r"<<[^>]*>>", "", solution)
        answer = solution.split("####", 1)[1]
    else:
        level = re.fullmatch(r"(?:Level )?(\d+|\?)(?:\.0)?", str(row["level"]))[1]
        answer = boxes(solution)[-1]
    if answer.strip() and not grade(task, solution, answer):
        raise ValueError("an answer that cannot be graded")
    return level, Problem(question, solution.strip(), answer.strip())


def read_problems(args, split):
    """The problems of "train" or "test", shuffled."""
    hub, *subset = HUB[args.task]
    with expecting(f"a folder --data with train.jsonl and test.jsonl, or a hub with {hub}"):
        if args.data:
            rows = Path(args.data, f"{split}.jsonl").read_text(encoding="utf-8-sig").split("\n")
        else:
            import datasets  # not needed for local data
            rows = map(json.dumps, datasets.load_dataset(hub, *subset, split=split))
    problems = []
    for line, row in enumerate(rows, 1):
        if not row.strip():
            continue
        place = f"in line {line} of {args.data or hub}, {split}"
        with expecting(f"{' and '.join(FIELDS[args.task])} as published {place}"):
            level, problem = to_problem(args.task, json.loads(row))
        if not problem.answer:  # two problems of MATH are like that
            print(f"left out: the empty answer {place}", file=sys.stderr)
        elif not args.levels or level in map(str, args.levels):
            problems.append(problem)
    seeded("split").shuffle(problems)
    return problems


def load_problems(args):
    """{"train", "eval", "test", "examples": problems}, without overlap."""
    n, tests = args.eval_problems, args.test_problems
    if args.task == "arithmetic":
        train = arithmetic_problems(n + tests + args.train_problems, seeded("arithmetic"))
        test = train[n:n + tests]
    else:
        train, test = read_problems(args, "train"), read_problems(args, "test")[:tests]
    held_out, train = train[:n], train[n:]
    # Short ones, in every prompt and so not trained on.
    examples = sorted(train, key=lambda problem: abs(len(problem.solution) - 150))[:args.shots]
    seen = {problem.question for problem in held_out + test + examples}
    train = [problem for problem in train if problem.question not in seen]
    train = train[:args.train_problems or None]
    if len(train) < args.prompts_per_step or not test:
        raise UserError(f"expected --prompts-per-step {args.prompts_per_step} problems to train on "
                        f"and 1 to test on, got {len(train)} and {len(test)}")
    return dict(train=train, eval=held_out, test=test, examples=examples)


# ---- task: verifier

LAYOUT = [(re.compile(pattern), new) for pattern, new in (
    (r"[−–]", "-"), ("²", "^2"), ("³", "^3"), ("½", r"\\frac{1}{2}"), ("·", r"\\cdot "),
    ("≤", r"\\le "), ("≥", r"\\ge "), ("∞", r"\\infty "), ("π", r"\\pi "),
    (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"\\\\\[[^\]]*\]", r"\\\\"),  # space between the rows of a matrix
    (r"(?<!\\)\\[()\[\]]|\\?[$€£¥₹]|\*\*|`|\\(?:text)?color\s*\{[^{}]*\}|\\(?=%)", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])|\s*\\!\s*", ""),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![a-z])|°[CF]?", ""),
    (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-z]))|~", " "),
    # \text{...} behind a value is its unit, elsewhere it is only a font
    (r"(?<=[\w)}])\s*\\(?:text|mbox|mathrm)\s*\{(?!\s*(?:and|or)\b)[^{}]*\}"
     r"(?:\^\{?[23]\}?)?(?=\s*(?:[.,)\]]|\\text|$))", ""),
    (r"\\(?:text|mbox|math|boldsymbol)(?:rm|bf|it)?\s*\{([^{}]*)\}", r" \1 "),
    (r",?\s+(?:and|or)\s+|\{,\}", ","),
    (r"(\d)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", lambda match: repeating(*match.groups())),
    (r"^\s*\{(?!.*\\over)((?:[^{}]|\{[^{}]*\})*)\}\s*$", r"\1"),
    (r"\\[dtc]frac", r"\\frac"), (r"\\log_e", r"\\ln "), (r"\\varnothing", r"\\emptyset "),
    (r"\\in(?![a-z])", "="), (r"(?<=\d)_(\d+)", r"_{\1}"),
    (r"[\s.*]+$|^[\s*]+|(?<![\w,])\s+|\s+(?!\w)", ""),
    (r"^(.*)\\pm(.*)$", r"\1+\2,\1-\2"),
)]
LABEL = re.compile(r"(?:^|(?<=,))\s*[A-Za-z(|\\](?:[A-Za-z\\{}()'|+*/, -]|[_^({]\d+)*[=:]")
PLAIN = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)\.?\d*|\.\d+)", re.ASCII)
NUMBERS = re.compile(r"(?:[-+\d., /{}]|\\frac)+", re.ASCII)
UNIT = re.compile(
    r"(?<=[\d.}])(?:[\s/(-]*(?!half|dozen|hundred|thousand|[bmtr]+illion)(?:[a-z]{3,}|of|in|ft|oz"
    r"|lb|[ap]\.m|[ckm]?[mgl]|[chsf])(?![a-z])(?:\^[23])?\)?)+$", re.I)
# Numbers in a row, number bases, x=13=12 and towers of powers: not for math-verify.
MISREAD = re.compile(r"\d \d|\d_|=[^,]*=|\^(?:\{[^{}]*|\w*)\^")
STATED = re.compile(r"(?i)\banswer\b[*_]*\s*(?:is\b|=|:)[*_:\s]*")


def repeating(whole, start, cycle):
    """The fraction for a repeating decimal: \\frac{3}{9} for 0.\\overline{3}."""
    top = int(whole + start + cycle) - int("0" + whole + start)
    return rf"\frac{{{top}}}{{{'9' * len(cycle) + '0' * len(start)}}}"


def tidy(text):
    """`text` in one layout: (\\frac{1}{2},3) for \\left( \\dfrac{1}{2},\\; 3\\text{ cm}\\right)."""
    text = " ".join(text.split())
    for pattern, new in LAYOUT:
        text = pattern.sub(new, text)
    return text


def parse_number(text):
    """The number that plain digits state, as an exact Fraction, or None: 2469/2 for 1,234.50."""
    return Fraction(text.replace(",", "")) if PLAIN.fullmatch(text.strip()) else None


def boxes(text):
    """The content of each \\boxed{}, "" for an open one; joined ones are one list.

    >>> boxes(r"\\boxed{7}? No: \\boxed{\\frac{1}{2}}, \\boxed 3")
    ['7', '\\\\frac{1}{2}, 3']
    """
    runs, between = [], "no box yet"
    for part in text.split("\\boxed")[1:]:
        depth = end = 0
        for end, letter in enumerate(part):
            depth += (letter == "{") - (letter == "}")
            if depth <= 0 and not letter.isspace():
                break
        content = part[:end + 1].strip()
        content = "" if depth else content[1:-1] if content[:1] == "{" else content
        if not re.fullmatch(r"(?:[\s$,;]|and|or)+", between):
            runs.append([])
        runs[-1].append(content)
        between = part[end + 1:]
    return [", ".join(dict.fromkeys(run)) for run in runs]


def stated_answers(task, completion):
    """The answers that `completion` states; where there are several, all must be right."""
    found = boxes(completion)
    if found:
        return found[-1:] if task == "math" else found
    lines = completion.split("####")[1:] or STATED.split(completion)[1:][-1:]
    return [re.split(r"\.\s|\n", line.strip())[0] for line in lines]


def equal(task, gold, answer):
    """Whether the LaTeX `answer` states the value of `gold`."""
    if len(answer) > 300:
        return False
    gold, answer = tidy(gold), tidy(answer)
    if "%" in gold or task != "math":
        gold, answer = gold.replace("%", ""), answer.replace("%", "")
    if "=" not in gold:
        answer = LABEL.sub("", answer)
    elif "=" not in answer and re.match("[A-Za-z]=", gold):
        gold = LABEL.sub("", gold)
    if gold.casefold() == answer.casefold():
        return True
    if NUMBERS.fullmatch(gold):
        answer = UNIT.sub("", answer)
        if PLAIN.fullmatch(gold) and PLAIN.fullmatch(answer):
            return parse_number(gold) == parse_number(answer)
        if re.search(r"\\(?!frac|over)[a-z]", answer):
            return False
    if re.search(r"^[a-zA-Z ]{3,}$", gold) or MISREAD.search(gold + "," + answer):
        return False
    return same_latex(gold, answer)


def parse_tree(latex):
    """The sympy tree of `latex`, not worked out: 6+6 is Add(6, 6). x < 3 is a set."""
    settings = NormalizationConfig(malformed_operators=True)
    tree = sympy.sympify(latex2sympy(latex, normalization_config=settings))
    if isinstance(tree, sympy.FiniteSet) and len(tree) == 1:
        return tree.args[0]
    solvable = isinstance(tree, (sympy.Rel, sympy.And)) and len(tree.free_symbols) == 1
    return tree.as_set() if solvable and not tree.has(sympy.Eq) else tree


def value(tree, seed):
    """The value of an expression at a random point, exact where it can be."""
    tree = sympy.nsimplify(tree.doit(), rational=True)
    point = {symbol: sympy.Rational(random.Random(symbol.name + seed).uniform(-3, 3))
             for symbol in tree.free_symbols}
    return tree.xreplace({**point, sympy.Symbol("i"): sympy.I})


def same_value(gold, answer):
    """Whether two expressions agree at three points: exactly, or to 25 digits of their size."""
    for seed in "abc":
        left, right = value(gold, seed), value(answer, seed)
        error = left - right
        if error if error.is_Rational else abs(sympy.N(error / left, 30)) > 1e-25:
            return False
    return True


def same(gold, answer):
    """Whether two trees have one value: lists in any order, points in theirs."""
    if all(isinstance(tree, sympy.Expr) and not tree.is_Matrix for tree in (gold, answer)):
        return gold == answer or same_value(gold, answer)
    if type(gold) is not type(answer) or len(gold.args) != len(answer.args) or not gold.args:
        return gold == answer
    if isinstance(gold, sympy.Eq) and gold.free_symbols:  # one a multiple of the other
        ratio = (gold.lhs - gold.rhs) / (answer.lhs - answer.rhs)
        return value(ratio, "a") != 0 and same_value(ratio, value(ratio, "a"))
    if isinstance(gold, (sympy.FiniteSet, sympy.Union, sympy.And)):
        both_ways = (gold.args, answer.args), (answer.args, gold.args)
        return all(any(same(one, other) for other in right)
                   for left, right in both_ways for one in left)
    return all(map(same, gold.args, answer.args))


def serve():
    """Print a verdict for each question read, made by a child that has a second of CPU time."""
    for text in (r"\sqrt{2x^2}-\pi", "(-3,4]", r"\{1,2\}", "y=2x", "x<1", "(1,2)", r"\frac{1}{2}"):
        parse_tree(text)  # fills the parser's caches, which children inherit
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            right = False
            try:
                gold, answer = map(parse_tree, json.loads(line))
                if isinstance(answer, sympy.Number) or not isinstance(gold, sympy.Number):
                    right = same(gold, answer)
            finally:
                os._exit(not right)  # whatever was raised
        print(int(os.waitpid(child, 0)[1] == 0), flush=True)


@functools.cache
def math_worker():
    """A process with math-verify, because a tower of powers can only be stopped by ending it."""
    source = "import json, os, random, resource, sys, sympy\n"
    source += "from math_verify.parser import NormalizationConfig, latex2sympy\n"
    source += "".join(map(inspect.getsource, (parse_tree, value, same_value, same, serve)))
    # In a session of its own: Ctrl-C is not for it.
    return subprocess.Popen([sys.executable, "-c", source + "serve()"], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


worker_lock = threading.Lock()


def same_latex(gold, answer):
    """Whether the worker says that two LaTeX texts have one value."""
    with worker_lock:
        print(json.dumps([gold, answer]), file=math_worker().stdin, flush=True)
        return math_worker().stdout.readline() == "1\n"


def grade(task, completion, gold):
    """1.0 if each answer that `completion` states equals `gold`, else 0.0.

    >>> grade("gsm8k", "#### $1,234", "1234"), grade("math", r"\\boxed{0.5}", r"\\frac12")
    (1.0, 1.0)
    """
    if task not in ("arithmetic", "gsm8k", "math"):
        raise ValueError(f"grade: expected arithmetic, gsm8k or math, got {task}")
    answers = stated_answers(task, completion)
    return float(bool(answers) and all(equal(task, gold, answer) for answer in answers))


# ---- model and prompts

# lead: what a chat writes before a solution; stop: ids of end tokens, first that of solutions
Policy = namedtuple("Policy", "model tokenizer lead stop")
PLAIN_CHAT = """{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}\
Question: {{ turn.content }}
Answer:{% else %} {{ turn.content }}{{ eos_token }}
{% endif %}{% endfor %}"""  # for models that know no chat


def built_in_model(seed):
    """A two-layer Llama with one token per word or number of the arithmetic task."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<pad>", "<eos>", "\n", *"+ - = , . ? #### How many has".split(), *GAIN, *LOSE, *NAMES,
             *THINGS, *map(str, range(LARGEST + 1))]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=None, pad_token_id=0,
        eos_token_id=1, initializer_range=0.1))  # the usual 0.02 is for wide models
    return model, transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
        chat_template="{{ messages | map(attribute='content') | join(' ') }}")


def load_model(name, device, seed):
    """Policy with fp32 parameters: bf16 ones would lose RL-sized updates."""
    with expecting(f"--model {name} to be a hub id or folder of a causal language model"):
        if name == "built-in":
            model, tokenizer = built_in_model(seed)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        rows, eos = len(model.get_input_embeddings().weight), tokenizer.eos_token_id
        if len(tokenizer) > rows or eos is None:
            raise ValueError(f"{len(tokenizer)} tokens for {rows} embeddings, end token {eos}")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT
    # A chat may end a turn with another token than eos; the generation config may name more.
    asked, answered = render(tokenizer, ["?"]), render(tokenizer, ["?", "ANSWER"])
    shared = len(os.path.commonprefix([asked, answered]))
    lead, _, tail = answered[shared:].partition("ANSWER")
    ends = tokenizer(tail.strip(), add_special_tokens=False)["input_ids"][:1]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    more = model.generation_config.eos_token_id or eos
    stop = [*special.intersection(ends), eos, *np.ravel(more)]
    # bf16 for the layers where it is native; emulated it would be slower than fp32.
    model.mixed = name != "built-in" and (
        torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
        torch.cpu.get_capabilities().get("avx512_bf16", False) and device == "cpu")
    model.to(device).eval()  # for good: dropout would move the ratio before any update
    return Policy(model, tokenizer, lead, stop)


def render(tokenizer, turns):
    """The text of a chat in which user and assistant take turns; after a user it asks for more."""
    roles = itertools.cycle(["user", "assistant"])
    chat = [dict(role=role, content=text) for role, text in zip(roles, turns)]
    with expecting(f"a chat template for user and assistant of --model {tokenizer.name_or_path}"):
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=len(turns) % 2 == 1)
        if turns[-1].strip() not in text:
            raise ValueError("a text without what was said")
    return text


def encode(policy, problems, examples):
    """The problems with their token ids; examples: in front of each question."""
    def ids(texts):  # a chat template writes its own special tokens
        return policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
    shots = [text for example in examples for text in (example.question, example.solution)]
    prompts = ids([render(policy.tokenizer, [*shots, problem.question]) for problem in problems])
    targets = ids([policy.lead + problem.solution for problem in problems])
    return [problem._replace(prompt=prompt, target=[*target, policy.stop[0]])
            for problem, prompt, target in zip(problems, prompts, targets)]


# ---- rollouts, log-probabilities and entropy


def mixed_precision(model):
    return torch.autocast(model.device.type, torch.bfloat16, model.mixed)


def forward(model, cache, ids, attention):
    """Hidden states (b, t, H) of the tokens `ids` (b, t), which follow the cache and join it.

    attention: (b, all tokens so far), 0 at padding on the left, which has no position.
    """
    positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    return model.base_model(
        input_ids=ids.clamp(min=0), attention_mask=attention, position_ids=positions, cache=cache,
        use_cache=True).last_hidden_state.float()


def pad(rows, device, side):
    """Lists of token ids as one tensor (B, longest), -1 where there is none."""
    rows = [torch.tensor(row, device=device) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=-1, padding_side=side)


def prefill(model, prompts):
    """Runs B prompts, equal neighbours once, through the model.

    Returns the key-value cache, the hidden state (B, H) that predicts the first completion token,
    and the attention mask (B, L).
    """
    groups = [[*same] for _, same in itertools.groupby(prompts)]
    ids = pad([same[0] for same in groups], model.device, "left")
    cache, attention = transformers.DynamicCache(config=model.config), (ids >= 0).long()
    hidden = forward(model, cache, ids, attention)[:, -1]
    sizes = torch.tensor([len(same) for same in groups], device=model.device)
    rows = torch.repeat_interleave(sizes)
    cache.batch_select_indices(rows)
    return cache, hidden[rows], attention[rows]


def head_logits(model, hidden):
    """(B, H) -> (B, V) in fp32: bf16 would put 2 % of noise on the ratio, as much as a bound."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.get_output_embeddings()(hidden)


Rollouts = namedtuple("Rollouts", "tokens mask logprobs entropies")  # each (B, T)


@torch.no_grad()
def sample(policy, prompts, max_new_tokens, rng, temperature=1):
    """A completion of each of B prompts from the full softmax; temperature 0 is greedy.

    The mask includes the end token; an entropy is that of the softmax a token came from, in nats.
    """
    model, B, device = policy.model, len(prompts), policy.model.device
    stop = torch.tensor(policy.stop, device=device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    tokens, (logprobs, entropies) = mask.long(), torch.zeros(2, *mask.shape, device=device)
    rows = torch.arange(B, device=device)  # completions that go on
    with mixed_precision(model):  # around the loop: weights are cast once
        cache, hidden, attention = prefill(model, prompts)
        for t in range(max_new_tokens):
            logp = head_logits(model, hidden).log_softmax(-1)
            # One number per completion, ended or not, so that no draw depends on others.
            u = torch.rand(B, 1, generator=rng, device=device)[rows]
            cdf = logp.exp().cumsum(-1)
            drawn = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
            token = drawn if temperature else logp.argmax(-1)
            tokens[rows, t], mask[rows, t] = token, True
            logprobs[rows, t] = logp.gather(1, token[:, None])[:, 0]
            entropies[rows, t] = torch.special.entr(logp.exp()).sum(-1)
            keep = (~torch.isin(token, stop)).nonzero()[:, 0]
            if len(keep) == 0 or t + 1 == max_new_tokens:
                break
            if len(keep) < len(rows):
                cache.batch_select_indices(keep)
                rows, token, attention = rows[keep], token[keep], attention[keep]
            attention = F.pad(attention, (0, 1), value=1)
            hidden = forward(model, cache, token[:, None], attention)[:, -1]
    return Rollouts(*(x[:, :t + 1] for x in (tokens, mask, logprobs, entropies)))


def sample_and_grade(policy, args, problems, group_size, key, temperature=1):
    """Rollouts, their texts, and 0/1 rewards (P, G)."""
    device = policy.model.device
    problems = [problem for problem in problems for _ in range(group_size)]  # one a row
    rng = torch.Generator(device).manual_seed(seeded(*key).getrandbits(62))
    prompts = [problem.prompt for problem in problems]
    rollouts = sample(policy, prompts, args.max_new_tokens, rng, temperature)
    written = [tokens[mask] for tokens, mask in zip(rollouts.tokens, rollouts.mask)]
    texts = policy.tokenizer.batch_decode(
        written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    rewards = [grade(args.task, text, problem.answer) for text, problem in zip(texts, problems)]
    return rollouts, texts, torch.tensor(rewards, device=device).view(-1, group_size)


def score(model, prompts, tokens, mask, rows, micro_batch_tokens):
    """Yields (some of `rows`, their log-probabilities (b, T), 0 where the mask is false).

    prompts: one per row of tokens and mask (B, T); equal neighbours are run once. Call backward()
    on each part before asking for the next.
    """
    if not rows:
        return
    head, rows = model.get_output_embeddings(), torch.tensor(rows, device=tokens.device)
    options = torch.nn.LinearCrossEntropyOptions(  # torch makes the logits chunk by chunk
        batch_chunk_size=max(1, LOGITS_AT_ONCE // len(head.weight)))
    longest = max(len(prompts[i]) for i in rows) + int(mask[rows].sum(1).max())
    for i in rows.split(max(1, micro_batch_tokens // longest)):
        T, on = int(mask[i].sum(1).max()), mask[i]
        with mixed_precision(model):
            cache, first, attention = prefill(model, [prompts[row] for row in i])
            attention = F.pad(attention, (0, T), value=1)
            # The state at t predicts token t; padding on the right is never looked at.
            rest = forward(model, cache, tokens[i, :T], attention)[:, :-1]
        states = torch.cat([first[:, None], rest], 1)[on[:, :T]]
        losses = F.linear_cross_entropy(states, head.weight, tokens[i][on], linear_bias=head.bias,
                                        reduction="none", options=options)
        yield i, torch.zeros(on.shape, device=on.device).masked_scatter(on, -losses)


def check_model(policy, name):
    """Raises UserError unless rollouts, scores and a gradient are those of the plain forward.

    Models that scale their logits, or whose state padding spoils, would silently train wrong.
    """
    model, weight = policy.model, policy.model.get_input_embeddings().weight
    prompts = [[2, 3]] * 3 + [[*range(1, 13)]] * 3
    policy = policy._replace(stop=[*range(0, len(weight), 3)])  # many, so that rows leave
    mixed, model.mixed = model.mixed, False
    with expecting(f"--model {name} to do with a cache and padding what it does without, as "
                   "Llama, Qwen2, Qwen3, Mistral, Phi or GPT-2 do"):
        rng = torch.Generator(model.device).manual_seed(0)
        tokens, mask, old, _ = sample(policy, prompts, 12, rng)
        (_, scores), = score(model, prompts, tokens, mask, range(6), 10**6)
        plain = torch.zeros_like(old)
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt + tokens[i, mask[i]].tolist()], device=model.device)
            logits, n = model(input_ids=ids).logits[0, :-1], len(prompt)
            plain[i, mask[i]] = -F.cross_entropy(logits[n - 1:], ids[0, n:], reduction="none")
        right, got = (torch.autograd.grad(x.sum(), weight)[0] for x in (plain, scores))
        unit = right.abs().max()
        torch.testing.assert_close((old, scores, got / unit), (plain, plain, right / unit),
                                   rtol=0, atol=1e-3)
    model.mixed = mixed


# ---- one training step


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def apply_gradients(model, optimizer, learning_rate, updates_done):
    """One update, unless the gradient is not finite. Returns its norm."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if math.isfinite(norm):
        warmth = min(1.0, (updates_done + 1) / LR_WARMUP_UPDATES)
        optimizer.param_groups[0]["lr"] = learning_rate * warmth
        optimizer.step()
    optimizer.zero_grad()
    return norm


# Sums over a step's tokens and updates, apart for groups with k = 0..G right completions
BY_CORRECT = ("tokens_right", "tokens_wrong", "clipped_right", "clipped_wrong", "kl", "ratio",
              "radius_squared")


def count_by_correct(log_ratio, mask, right, A, low, high):
    """The BY_CORRECT sums of each row, (7, b)."""
    ratio, count = log_ratio.exp(), mask.sum(1)
    below, above = etr.clipped_tokens(ratio, A[:, None], low[:, None], high[:, None])
    kl = ratio - 1 - log_ratio  # the k3 estimator
    sums = [(value * mask).sum(1) for value in (above, below, kl, ratio)]
    radius = torch.where(right, high, low)  # the right are clipped above, the wrong below
    return torch.stack([count * right, count * ~right, *sums, count * radius**2])


def flip(rewards, share, rng):
    """A dishonest verifier: this share of the 0/1 rewards is wrong."""
    lies = torch.tensor([rng.random() < share for _ in range(rewards.numel())]).view(rewards.shape)
    return torch.where(lies.to(rewards.device), 1 - rewards, rewards)


def train_step(args, arm, seed, step, policy, optimizer, problems):
    """One rollout batch and its updates: (metrics, a few rollouts as text)."""
    started, P, G = time.perf_counter(), args.prompts_per_step, args.group_size
    # 1. roll out: which prompts depends on seed and step, never on the arm
    batch = seeded("prompts", seed, step).sample(problems, P)
    rollouts, texts, rewards = sample_and_grade(policy, args, batch, G, ("rollout", seed, step))
    rewards = flip(rewards, args.flip_rewards, seeded("flips", seed, step))
    tokens, mask, old, _ = rollouts  # row i is completion i % G of prompt i // G
    prompts = [problem.prompt for problem in batch for _ in range(G)]

    def scored(groups):  # without those that have no advantage, so no gradient
        rows = [i for g in groups for i in range(g * G, g * G + G) if A[g * G] != 0]
        return score(policy.model, prompts, tokens, mask, rows, args.micro_batch_tokens)

    # 2. advantages, 3. to 5. the trust region: the one line in which arms differ
    advantages = etr.group_advantages(rewards)
    bounds = ARMS[arm].rule(rewards, advantages, args.clip)
    A, low, high = (x.flatten() for x in (advantages, *bounds))
    if policy.model.mixed:  # in bf16, token by token and all at once differ: use one path
        with torch.no_grad():
            for i, logprobs in scored(range(P)):
                old[i] = logprobs
    # 6. loss, and 7. several updates per rollout batch
    right, correct = rewards.flatten() > 0, rewards.sum(1).long().repeat_interleave(G)
    sums, norms = torch.zeros(len(BY_CORRECT), G + 1, device=mask.device), []
    rng, cuts = seeded("minibatches", seed, step), min(MINIBATCHES, P, args.updates_per_step)
    for update in range(args.updates_per_step):
        if update % cuts == 0:
            order = rng.sample(range(P), P)  # a new one for each pass over the batch
        groups = sorted(order[update % cuts::cuts])
        size = mask.unflatten(0, (P, G))[groups].sum()
        for i, logprobs in scored(groups):
            loss, _ = etr.surrogate_loss(logprobs, old[i], A[i], low[i], high[i], mask[i], size)
            loss.backward()
            sums.index_add_(1, correct[i], count_by_correct(
                logprobs.detach() - old[i], mask[i], right[i], A[i], low[i], high[i]))
        done = (step - 1) * args.updates_per_step + update
        norms.append(apply_gradients(policy.model, optimizer, args.learning_rate, done))
    metrics = step_metrics(step, rollouts, rewards, sums, norms, time.perf_counter() - started)
    return metrics, show(step, batch, texts, rewards)


def show(step, batch, texts, rewards):
    """Four of the rollouts, for samples.txt."""
    G, rewards = len(texts) // len(batch), rewards.flatten()
    shown = range(0, len(texts), max(1, len(texts) // 4))
    return "".join(f"step {step}, reward {int(rewards[i])}\n{batch[i // G].question}\n"
                   f">>> {texts[i]}\n\n" for i in shown)


def step_metrics(step, rollouts, rewards, sums, norms, seconds):
    finite = [norm for norm in norms if math.isfinite(norm)]
    if not finite:
        raise UserError(f"expected a finite gradient in step {step}; lower --learning-rate")
    sampled, total = int(rollouts.mask.sum()), dict(zip(BY_CORRECT, sums.sum(1).tolist()))
    trained = max(1.0, total["tokens_right"] + total["tokens_wrong"])
    low, high = total["clipped_wrong"] / trained, total["clipped_right"] / trained
    return dict(
        step=step, reward_mean=float(rewards.mean()),
        entropy=float(rollouts.entropies.sum()) / sampled,
        clip_fraction=low + high, clip_fraction_low=low, clip_fraction_high=high,
        ratio_mean=total["ratio"] / trained, approx_kl=total["kl"] / trained,
        frac_reward_zero_std=float((rewards == rewards[:, :1]).all(1).float().mean()),
        completion_length_mean=sampled / rewards.numel(), grad_norm=sum(finite) / len(finite),
        updates_skipped=len(norms) - len(finite), tokens_per_second=sampled / seconds,
        by_correct=dict(zip(BY_CORRECT, sums.tolist())))


# ---- warm start and evaluation


def warmup_step(args, seed, step, policy, optimizer, problems):
    """One supervised step on worked solutions. Returns its metrics."""
    batch = seeded("warmup", seed, step).choices(problems, k=args.warmup_batch)
    batch.sort(key=lambda problem: len(problem.prompt))  # less padding
    prompts, rows = [problem.prompt for problem in batch], range(len(batch))
    tokens = pad([problem.target for problem in batch], policy.model.device, "right")
    mask, total = tokens >= 0, 0.0
    for _, logprobs in score(policy.model, prompts, tokens, mask, rows, args.micro_batch_tokens):
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        total += float(loss.detach())
    rate = args.warmup_rate * (1 - 0.9 * step / args.warmup_steps)  # to end at rest
    apply_gradients(policy.model, optimizer, rate, step - 1)
    return dict(step=step, loss=total)


def pass_at_k(samples, correct, k):
    """Unbiased estimate of the chance that one of k is right (Chen et al. 2021, eq. 1).

    >>> pass_at_k(8, 1, 1), pass_at_k(8, 1, 8)
    (0.125, 1.0)
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def evaluate(args, seed, policy, data, splits):
    """{SPLIT_pass1, _greedy, _passk, _passk_curve} for each of `splits`."""
    scores, n = {}, EVAL_SAMPLES
    for split in splits:
        greedy, right = [], []
        for start in range(0, len(data[split]), EVAL_AT_ONCE):
            part, key = data[split][start:start + EVAL_AT_ONCE], (split, seed, start)
            greedy += sample_and_grade(policy, args, part, 1, key, temperature=0)[2].tolist()
            right += sample_and_grade(policy, args, part, n, key)[2].sum(1).int().tolist()
        curve = [float(np.mean([pass_at_k(n, c, k) for c in right])) for k in range(1, n + 1)]
        scores |= {f"{split}_pass1": curve[0], f"{split}_greedy": float(np.mean(greedy)),
                   f"{split}_passk": curve[-1], f"{split}_passk_curve": curve}
    return scores


# ---- runs that survive interruption

stopping = []  # not empty after Ctrl-C


def save(path, value):
    """Text, or anything by torch.save; a crash leaves the old content or the new."""
    temporary = Path(f"{path}.tmp")
    with writing(path), temporary.open("wb") as file:
        file.write(value.encode()) if isinstance(value, str) else torch.save(value, file)
    os.replace(temporary, path)


def writing(path):  # every library has its own error for a full disk
    return expecting(f"to write {path} (mend that, then add --resume)")


def train(folder, model, steps, eval_every, one_step):
    """Calls one_step(step, optimizer) -> (metrics, text) for each of `steps`; returns all metrics.

    Writes both to `folder`, with a checkpoint every `eval_every` steps, from which it continues.
    """
    optimizer, checkpoint = make_optimizer(model), folder / "checkpoint.pt"
    lines, samples = [], ""
    if checkpoint.exists():
        with expecting(f"a whole {checkpoint}"):
            weights, moments, lines, samples = torch.load(checkpoint, map_location=model.device)
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
    folder.mkdir(exist_ok=True)
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between lines of a log file
    bar = tqdm(steps[len(lines):], folder.name, len(steps), initial=len(lines), mininterval=pause,
               miniters=1, delay=pause)
    for step in bar:
        started = time.perf_counter()
        metrics, text = one_step(step, optimizer)
        lines.append(dict(metrics, seconds=time.perf_counter() - started))
        samples += text
        save(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        save(folder / "samples.txt", samples)
        if step == steps[-1] or step % eval_every == 0 or stopping:
            save(checkpoint, (model.state_dict(), optimizer.state_dict(), lines, samples))
        if stopping:
            raise KeyboardInterrupt
        shown = {"loss", "reward_mean", "entropy"} & metrics.keys()
        bar.set_postfix({name: metrics[name] for name in shown}, refresh=False)
    return lines


def run_arm(args, arm, seed, data):
    """Trains one arm of one seed in OUT/ARM-seedSEED, which in the end holds its model."""
    folder = args.out / f"{arm}-seed{seed}"
    if (folder / "model").exists():
        return
    policy = load_model(args.model, args.device, seed)

    def warm_start(step, optimizer):
        metrics, splits = dict(step=0), ["eval", "test"] * (step == args.warmup_steps)
        if step:
            metrics = warmup_step(args, seed, step, policy, optimizer, data["train"])
        return metrics | evaluate(args, seed, policy, data, splits), ""

    def one_step(step, optimizer):
        if step == 0:
            return dict(before, step=0), ""
        metrics, text = train_step(args, arm, seed, step, policy, optimizer, data["train"])
        last = step == args.steps
        splits = ["eval"] * (last or step % args.eval_every == 0) + ["test"] * last
        return metrics | evaluate(args, seed, policy, data, splits), text

    shared = args.out / f"warmup-seed{seed}"  # trained once, for all arms
    *_, before = train(shared, policy.model, range(args.warmup_steps + 1), 100, warm_start)
    train(folder, policy.model, range(args.steps + 1), args.eval_every, one_step)
    with writing(folder):
        for part in (policy.tokenizer, policy.model):
            part.save_pretrained(folder / "model.tmp")
        os.replace(folder / "model.tmp", folder / "model")
    (folder / "checkpoint.pt").unlink()


def open_out(args, **about):
    """Makes --out and writes its config.json, unless it holds another run. Returns its lock."""
    args.out.mkdir(parents=True, exist_ok=True)
    lock = open(args.out / "lock", "w")  # given up when the process ends, however it ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"expected no other process in --out {args.out}") from None
    path = args.out / "config.json"
    given = {name: value for name, value in vars(args).items() if name not in ("resume", "out")}
    if path.exists() and not args.resume:
        raise UserError(f"expected no run in --out {args.out}; add --resume or name another")
    with expecting(f"arguments in {path}"):
        stored = json.loads(path.read_text())["arguments"] if path.exists() else given
        changed = [f"{name} was {stored.get(name)}, is {value}" for name, value in given.items()
                   if stored.get(name) != value]
    if changed:
        raise UserError(f"expected the arguments of the run, but {'; '.join(changed)}")
    save(path, json.dumps(dict(arguments=given, **about), indent=1) + "\n")
    return lock


# ---- pictures and the table

matplotlib.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.25, "savefig.dpi": 130})
T_975 = [0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t for 1, 2... seeds
HEAD = "\narm         seed  pass@1          greedy          pass@8          entropy         clip"
TABLE = ("{arm:11s} {seed:4d}  {pass1_before:.3f} -> {pass1_after:.3f}  {greedy_before:.3f} -> "
         "{greedy_after:.3f}  {passk_before:.3f} -> {passk_after:.3f}  {entropy_first:.3f} -> "
         "{entropy_last:.3f}  {clip_fraction_mean:.1%}")


def read_metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def load_runs(args):
    """{arm: one list of metrics per seed}, of runs that have made a step."""
    runs = {}
    for arm, seed in itertools.product(args.algos, range(args.seed, args.seed + args.seeds)):
        lines = read_metrics(args.out / f"{arm}-seed{seed}")
        if len(lines) > 1:
            runs.setdefault(arm, []).append(lines)
    return runs


def mean_and_band(curves):
    """One {x: value} per seed -> (x that all have, mean, half-width of its 95 % t-interval)."""
    x, n = sorted(set.intersection(*map(set, curves))), len(curves)
    values = np.array([[curve[at] for at in x] for curve in curves])
    t = T_975[n - 1] if n <= len(T_975) else 2.26
    return x, values.mean(0), t * values.std(0, ddof=int(n > 1)) / n**0.5


def panel(axis, curves, title, xlabel, ylabel=""):
    """Mean and band of {name: one {x: y} per seed}, each named at its right end."""
    ends = []
    for name, seeds in curves.items():
        x, mean, half = mean_and_band(seeds)
        color = ARMS[name].color if name in ARMS else "#777777"
        axis.plot(x, mean, color=color, lw=2.5)
        axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.18, lw=0)
        if x:
            ends.append((mean[-1], x[-1], name, color))
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.set_ylim(bottom=0)
    ends, heights = sorted(ends), []  # of the names, pushed apart where ends meet
    for y, *_ in ends:
        heights.append(max(y, heights[-1] + 0.065 * axis.get_ylim()[1]) if heights else y)
    up = (sum(heights) - sum(y for y, *_ in ends)) / max(1, len(ends))
    for height, (_, x, name, color) in zip(heights, ends):
        axis.annotate(name, (x, height - up), xytext=(6, 0), textcoords="offset points",
                      va="center", color=color, weight="bold", annotation_clip=False)


def over_steps(runs, name):
    """{arm: one {step: metric} per seed}"""
    return {arm: [{line["step"]: line[name] for line in lines if name in line} for lines in seeds]
            for arm, seeds in runs.items()}


def by_pass_rate(runs, name, side=""):
    """{arm: one {k/G: % of the tokens} per seed}, for k = 1..G-1: other groups teach nothing."""
    def curve(lines):
        sums = {key: np.sum([line["by_correct"][key] for line in lines[1:]], 0)
                for key in BY_CORRECT}
        tokens = sum(sums[key] for key in BY_CORRECT if key.startswith(f"tokens_{side}"))
        G = len(tokens) - 1
        return {k / G: 100 * sums[name][k] / tokens[k] for k in range(1, G) if tokens[k]}
    return {arm: [curve(lines) for lines in seeds] for arm, seeds in runs.items()}


def picture(path, title, caption, columns, *panels):
    rows = len(panels) // columns
    figure = Figure(figsize=(5.2 * columns, 4.4 * rows), layout="constrained")
    for axis, content in zip(figure.subplots(rows, columns).flat, panels):
        panel(axis, *content)
    figure.suptitle(title)
    figure.supxlabel(caption, fontsize=11)
    figure.savefig(path)


def draw(args):
    """Both pictures, from the metrics on disk."""
    runs = load_runs(args)
    if not runs:
        return
    n = min(map(len, runs.values()))
    caption = f"{n} seeds, bands: 95 % interval of the mean" if n > 1 else "1 seed: no bands"
    accuracy, entropy = over_steps(runs, "eval_pass1"), over_steps(runs, "entropy")
    means = {arm: mean_and_band(seeds)[1] for arm, seeds in accuracy.items()}
    moved = [f"{arm} {mean[0]:.2f} to {mean[-1]:.2f}" for arm, mean in means.items()]
    uniform = math.log(json.loads((args.out / "config.json").read_text())["vocabulary"])
    if uniform < 2 * max(max(curve.values()) for seeds in entropy.values() for curve in seeds):
        entropy["ln|V|"] = [{0: uniform, args.steps: uniform}]  # a policy of pure noise
    picture(
        args.out / "accuracy_entropy.png", f"{args.task}, pass@1: {', '.join(moved)}", caption, 2,
        (accuracy, "Held-out accuracy", "step", "pass@1"),
        (entropy, "Policy entropy", "step", "nats per token"))

    clipped = {arm: np.mean([line["clip_fraction"] for lines in seeds for line in lines[1:]])
               for arm, seeds in runs.items()}
    shares = ", ".join(f"{arm} {share:.1%}" for arm, share in clipped.items())
    rate = "pass rate, k/G"
    picture(
        args.out / "mechanism.png", f"Tokens clipped: {shares}", caption, 3,
        (by_pass_rate(runs, "radius_squared"), "Budget", rate, "squared clip radius, 1e-2"),
        (by_pass_rate(runs, "clipped_right", "right"), "Right, clipped above", rate, "% of tokens"),
        (by_pass_rate(runs, "clipped_wrong", "wrong"), "Wrong, clipped below", rate, "% of tokens"),
        (by_pass_rate(runs, "kl"), "KL spent", rate, "nats per token, 1e-2"),
        (over_steps(runs, "frac_reward_zero_std"), "Groups that teach nothing", "step", "share"),
        (over_steps(runs, "completion_length_mean"), "Length", "step", "tokens"))


def report(args):
    """Saves results.json and prints it as a table."""
    seeds = range(args.seed, args.seed + args.seeds)
    warmups = [read_metrics(args.out / f"warmup-seed{seed}") for seed in seeds]
    warmup = sum(line["seconds"] for lines in warmups for line in lines)
    results = dict(task=args.task, total_seconds=warmup, warmup_seconds=warmup, arms={})
    print(HEAD)
    for arm, seeds in load_runs(args).items():
        results["arms"][arm] = []
        for seed, (first, *lines) in enumerate(seeds, args.seed):
            row = dict(seed=seed, seconds=sum(line["seconds"] for line in lines),
                       clip_fraction_mean=float(np.mean([x["clip_fraction"] for x in lines])),
                       entropy_first=lines[0]["entropy"], entropy_last=lines[-1]["entropy"])
            for when, line in (("before", first), ("after", lines[-1])):
                row |= {f"{name[5:]}_{when}": line[name] for name in line if name[:5] == "test_"}
            results["arms"][arm].append(row)
            results["total_seconds"] += row["seconds"]
            print(TABLE.format(arm=arm, **row))
    save(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    print(f"\nIn {args.out}: accuracy_entropy.png, mechanism.png, results.json")


# ---- main


def run(args):
    if args.model == "built-in" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # more would wait for each other
    problems, policy = load_problems(args), load_model(args.model, args.device, args.seed)
    check_model(policy, args.model)
    examples = problems.pop("examples")
    data = {split: encode(policy, part, examples) for split, part in problems.items()}
    longest = max(len(problem.prompt) for part in data.values() for problem in part)
    room = getattr(policy.model.config, "max_position_embeddings", math.inf) - longest
    if args.max_new_tokens > room:
        raise UserError(f"expected --max-new-tokens up to {room}, which the longest prompt leaves")
    lock = open_out(
        args, device=torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        vocabulary=len(policy.model.get_output_embeddings().weight),
        parameters=policy.model.num_parameters(), threads=torch.get_num_threads(),
        problems={split: len(part) for split, part in data.items()},
        versions=dict(torch=torch.__version__, transformers=transformers.__version__))
    del policy  # one model in memory at a time
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in args.algos:
            run_arm(args, arm, seed, data)
            draw(args)
    report(args)
    lock.close()


def on_interrupt(*_):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopping.append(True)
    print("\nstopping after this step; at once with another Ctrl-C", file=sys.stderr)


def main(argv=None):
    args, code = parse_args(argv), 2
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stopping.clear()
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        run(args)
        return 0
    except KeyboardInterrupt:
        draw(args)
        message, code = f"stopped; the same command with --resume continues {args.out}", 130
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "expected more GPU memory; lower --micro-batch-tokens and name another --out"
    except OSError as error:
        message = f"expected to write in {args.out}, got {error}; then add --resume"
    print(f"train_small.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
