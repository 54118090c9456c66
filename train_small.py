"""GRPO against ETR on a small language model: one file, read from top to bottom.

    python train_small.py                             built-in arithmetic, no GPU, no download
    python train_small.py --task gsm8k                Qwen2.5-0.5B-Instruct on GSM8K, one GPU
    python train_small.py --task math --levels 1 2 3  the same on MATH

Data flows one way: prompts, rollouts, rewards, advantages, bounds, loss, step, metrics, pictures.
Arms differ only in their rule for the bounds.

Shapes: P prompts, G completions each, B = P*G rows, T completion tokens, H hidden units, V words.
Left out on purpose: several GPUs, an inference engine, a KL penalty, LoRA.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from collections import defaultdict, namedtuple
from fractions import Fraction
from pathlib import Path

if "ipykernel" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)  # a notebook's

import loky
import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
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


Arm = namedtuple("Arm", "rule color")  # Okabe-Ito colours
ARMS = {
    "grpo": Arm(elastic(0.0, 0.0), "#000000"),
    "etr": Arm(elastic(1.0, 1.0), "#D55E00"),
    "micro": Arm(elastic(1.0, 0.0), "#E69F00"),
    "macro": Arm(elastic(0.0, 1.0), "#009E73"),
    "clip-higher": Arm(elastic(0.0, 0.0, above=1.4), "#0072B2"),  # DAPO: 0.2, 0.28
}
REAL = dict(
    model="Qwen/Qwen2.5-0.5B-Instruct", steps=100, updates_per_step=8, learning_rate=2e-6,
    max_new_tokens=256, train_problems=0, warmup_steps=0, warmup_batch=16, warmup_rate=1e-5)
TASKS = {
    "arithmetic": dict(
        model="built-in", steps=50, updates_per_step=16, learning_rate=1e-4, max_new_tokens=48,
        train_problems=20000, warmup_steps=300, warmup_batch=64, warmup_rate=8e-3),
    "gsm8k": REAL,
    "math": dict(REAL, max_new_tokens=512),
}
EVAL_SAMPLES = 8  # per held-out problem, for pass@1 and pass@8
LR_WARMUP_UPDATES = 20  # Adam's first steps at the full rate wreck a tiny model
MINIBATCHES = 4  # per rollout batch; more updates than that go over it again
LOGITS_AT_ONCE = 2**24  # 64 MiB
SAVING = 1 / 20  # of the time is for checkpoints


class UserError(Exception):
    """One sentence instead of a stack trace."""


@contextlib.contextmanager
def expecting(what, kinds=Exception):
    """Turns an error inside into one sentence."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        got = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"expected {what}, got {got:.300}") from error


def fitting(advice):
    return expecting(f"more memory ({advice})", torch.OutOfMemoryError)


def number(kind, least, below=math.inf):
    def parse(text):
        if not least <= kind(text) < below:
            raise ValueError
        return kind(text)
    parse.__name__ = f"{kind.__name__} in [{least:g}, {below:g})"  # argparse's
    return parse


def add_flags(add):
    count = number(int, 1)
    natural = number(int, 0, 2**63)
    rate = number(float, 1e-12)
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--data", help="folder with train.jsonl, test.jsonl")
    add("--levels", type=natural, nargs="+", help="of MATH, or GSM8K's number of steps")
    add("--train-problems", type=natural, help="0: all")
    add("--eval-problems", type=count, default=200, help="held out, on the way")
    add("--test-problems", type=count, default=200, help="held out, for the end")
    add("--model", help="hub id or folder")
    add("--device", choices={"cpu", device}, default=device)
    add("--shots", type=natural, help="examples in a prompt; 2 without warm start")
    add("--temperature", type=number(float, 1e-3), default=1.0, help="divides the logits")
    add("--max-new-tokens", type=count, help="longest completion")
    add("--micro-batch-tokens", type=count, default=4096, help="lower it to save memory")
    add("--algos", choices=ARMS, nargs="+", default=["grpo", "etr"], help="arms to compare")
    add("--clip", type=number(float, 1e-9, 1 / 3), default=0.2, help="clip radius of GRPO, eps")
    add("--seeds", type=count, default=1, help="how many, paired between the arms")
    add("--seed", type=natural, default=0, help="the first")
    add("--out", help="folder, runs/TASK if not given")
    add("--resume", action="store_true", help="continue what is in --out")
    add("--warmup-steps", type=natural, help="supervised, before RL")
    add("--warmup-batch", type=count, help="worked solutions in each")
    add("--warmup-rate", type=rate, help="its learning rate")
    add("--steps", type=count, help="rollout batches")
    add("--prompts-per-step", type=count, default=32, help="P")
    add("--group-size", type=number(int, 2), default=8, help="completions per prompt, G")
    add("--updates-per-step", type=count, help="with 1 nothing is clipped")
    add("--flip-rewards", type=number(float, 0, 0.5), default=0.0, help="share that is wrong")
    add("--learning-rate", type=rate, help="of AdamW")
    add("--eval-every", type=count, default=10, help="steps")


def parse_args(argv=None):
    first = argparse.ArgumentParser("train_small.py", add_help=False)
    first.add_argument("--task", choices=TASKS, default="arithmetic", help="sets other defaults")
    parser = argparse.ArgumentParser(
        "train_small.py", parents=[first], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser.add_argument)
    parser.set_defaults(**TASKS[first.parse_known_args(argv)[0].task])
    args = parser.parse_args(argv)
    built_in = args.model == "built-in"
    if built_in != (args.task == "arithmetic"):
        parser.error(f"--model {args.model}: expected built-in for --task arithmetic only")
    if built_in and (args.data or args.levels):
        parser.error("--data, --levels: expected with --task gsm8k or math only")
    idle = [] if args.warmup_steps else ["warmup_batch", "warmup_rate"]
    if any(vars(args)[name] != parser.get_default(name) for name in idle):
        parser.error("--warmup-batch, --warmup-rate: only with --warmup-steps")
    if args.shots is None:
        args.shots = 0 if args.warmup_steps or built_in else 2
    args.out = Path(args.out or f"runs/{args.task}")
    return args


def seeded(*key):
    """Random numbers by `key` alone: a resumed run needs no saved state."""
    return random.Random(repr(key))


# ---- task: problems

# prompt, target: token ids of question and solution, by `encode`
Problem = namedtuple("Problem", "question solution answer prompt target", defaults=[None, None])
HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default"),
}
FIELDS = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}
GAIN = "finds gets wins buys".split()
LOSE = "eats loses sells gives".split()
NAMES = "Ann Ben Eva Leo Mia Tom".split()
THINGS = "apples books coins eggs pens shells".split()
LARGEST = 20  # every total stays in 0..20, one token per number


def slip(total, rng):
    near = range(max(total - 3, 0), min(total + 3, LARGEST) + 1)
    return rng.choice([other for other in near if other != total])


def arithmetic_problems(count, rng):
    """Distinct word problems of 1 to 7 steps, from a textbook full of errors.

    A fixed 30 % of the facts a + b have a fixed wrong result in 65 % of the worked solutions, the
    others any in 5 %: greedily a trained model is wrong, and sampling finds better.
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
    (question + solution).encode()  # fails unless both are text
    if task == "gsm8k":
        level = str(solution.count("<<"))  # one annotation a step
        solution = re.sub(r"<<[^>]*>>", "", solution)
    else:
        level = re.fullmatch(r"(?:Level )?(\d+|\?)(?:\.0)?", str(row["level"]))[1]
    answer = stated_answer(task, solution)
    if answer is None:
        raise ValueError("no answer")
    return level, Problem(question, solution.strip(), answer.strip())


def read_problems(args, split):
    """The problems of "train" or "test", shuffled."""
    hub, *subset = HUB[args.task]
    with expecting(f"a folder --data with train.jsonl and test.jsonl, or a hub with {hub}"):
        if args.data:
            path = Path(args.data, f"{split}.jsonl")
            rows = path.read_text(encoding="utf-8-sig").split("\n")
        else:
            import datasets
            rows = map(json.dumps, datasets.load_dataset(hub, *subset, split=split))
    problems, levels = [], set()
    for line, row in enumerate(rows, 1):
        if not row.strip():
            continue
        with expecting(f"{' and '.join(FIELDS[args.task])} as published in line {line} of "
                       f"{args.data or hub}, {split}"):
            level, problem = to_problem(args.task, json.loads(row))
        levels.add(level)
        if problem.answer and (not args.levels or level in map(str, args.levels)):
            problems.append(problem)  # two of MATH have no answer
    if levels and not problems:
        raise UserError(f"expected --levels among {' '.join(sorted(levels))}, got {args.levels}")
    seeded("split").shuffle(problems)
    return problems


def load_problems(args):
    """{split: problems}, without overlap."""
    n, tests = args.eval_problems, args.test_problems
    if args.task == "arithmetic":
        train = arithmetic_problems(n + tests + args.train_problems, seeded("arithmetic"))
        test = train[n:n + tests]
    else:
        train, test = read_problems(args, "train"), read_problems(args, "test")[:tests]
    held_out, train = train[:n], train[n:]
    seen = {problem.question for problem in held_out + test}
    train = [problem for problem in train if problem.question not in seen]
    # In every prompt, so short.
    examples = sorted(train, key=lambda problem: abs(len(problem.solution) - 150))[:args.shots]
    train = [problem for problem in train if problem not in examples][:args.train_problems or None]
    if len(train) < args.prompts_per_step or not test:
        raise UserError(f"expected --prompts-per-step {args.prompts_per_step} problems beside "
                        f"--eval-problems {n}, 1 to test on, got {len(train)} and {len(test)}")
    return dict(train=train, eval=held_out, test=test, examples=examples)


# ---- task: verifier

MANY = r"(?! *(and|or|dozens?|hundred|thousand|\w*illion|pi)\b)"
UNIT = rf"(?i)(?<=[\d.}}])\s*{MANY}([a-z/]{{2,}}|[gml]\b)[a-z ,./-]*(\^[23])?$"
REWRITE = (
    ("[−–]", "-"), ("²", "^2"), (r"\{,\}", ","), (r"_\{(\d+)\}", r"_\1"),
    (r"√(\d+|\w)", r"\\sqrt{\1}"), (r"\\[dtc]frac", r"\\frac"),
    (r"\\(text)?color\{[^{}]*\}|\\(left|right|displaystyle|degree|[()[\]])", ""),
    (r"\\?[$€£¥₹%]|\*\*|`|°[CF]?| *\\! *|\^ *\{?\\circ\}?", ""),
    (r"(?<!\\)\\([,;: ]|q?quad)|~|\s", " "),
    (r"\\(?:text|mbox|math|bold)[a-z]*\{([^{}]*)\}", "\t\\1 "),  # a font
    (rf"(?<=[\w)}}]) *\t{MANY}[a-zA-Z ./]*[\^{{\d}}.]*$", ""),  # a unit
    (r"""^[\s"'“*]+|[\s.'"”*]+$|(?<![\w,])\s+|\s+(?!\w)""", ""),
    (r"^[({]+([^(){},]*)[)}]+$", r"\1"),
)
idle_pools = defaultdict(list)  # of each process


def stated_answer(task, completion):
    """The last box or, but for MATH, what follows the last "####" or "answer is"."""
    text = completion.rpartition("</think>")[2]
    contents, between = [], ""
    for part in text.split("\\boxed")[1:]:
        part, depth, end = part.lstrip(), 0, 0
        for end, letter in enumerate(part, 1):
            depth += (letter == "{") - (letter == "}")
            if depth <= 0:
                break
        if not re.fullmatch(r"([\s$,;]|and|or)+", between):
            contents = []
        content = part[:end].removeprefix("{").removesuffix("}").strip()
        contents.append("" if depth else content)
        between = part[end:]
    if contents:
        return ", ".join(dict.fromkeys(contents))
    *_, last = re.split(r"(?i)####|(?<!/)answer(?: is|[:>*_])+", text)
    if task != "math" and last != text:
        return re.split(r"\.\s|\n|<[/|a-z]", last.strip())[0]


def read_number(text):
    """The number `text` states: 7/2 for "3 1/2 cm", None for 3+4."""
    text = re.sub(r"(?<=\d)[, ](?=\d{3}(?![\d/]))", "", re.sub(UNIT, "", text))
    fraction = r"\\frac *(?:(\d)|\{(-?\d+)\}) *(?:(\d)|\{(\d+)\})"
    text = re.sub(fraction, r" \1\2/\3\4", text).strip(" {}")
    number = r"(?a)([+-]?) *(?:(\d+) +(?=\d+/))?(\d+/0*[1-9]\d*|\d+\.?\d*|\.\d+)"
    if match := re.fullmatch(number, text):
        sign, whole, rest = match.groups("0")
        return Fraction(sign + whole) + Fraction(sign + rest)


def judge(*texts):
    """Whether two LaTeX texts have one value."""
    with contextlib.suppress(Exception):  # not on macOS
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    from math_verify import grader, parser
    from sympy import Expr, FiniteSet, simplify
    signal.alarm(8)  # nothing else stops 9^{9^{9^9}}
    try:
        form = parser.NormalizationConfig(malformed_operators=True)  # \frac12
        gold, answer = [parser.latex2sympy(text, normalization_config=form) for text in texts]
        if isinstance(gold, Expr) and isinstance(answer, Expr):
            return simplify(gold - answer) == 0
        if isinstance(gold, FiniteSet) == isinstance(answer, FiniteSet):
            return grader.sympy_expr_eq(gold, answer, 30, 30, True)
    except MemoryError:
        raise
    except Exception:
        pass
    finally:
        signal.alarm(0)


def ask(verdicts, *texts):
    """Adds what `judge` says in a process of its own, in another if that dies."""
    judge.__module__ = "__main__"  # sent as code: no torch there
    multiprocessing.current_process().daemon = False  # a Pool's has none
    safe = {"PYTHONSAFEPATH": "1"}
    for idle in idle_pools[os.getpid()], [], []:
        pool = idle.pop() if idle else loky.ProcessPoolExecutor(1, timeout=10, env=safe)
        try:
            verdicts.append(pool.submit(judge, *texts).result(60))
            return idle.append(pool)
        except BaseException as error:  # Ctrl-C reaches it too
            pool.shutdown(kill_workers=True)
            verdicts.append(error)
            if re.search("MemoryError|SIG(ALRM|ABRT|SEGV)", repr(error)):
                return verdicts.append(False)


def grade(task, completion, gold):
    """1.0 if `completion` states the value of `gold` last, else 0.0."""
    if task not in TASKS:
        raise ValueError(f"expected {', '.join(TASKS)}, got {task}")
    answer = stated_answer(task, completion)
    if not answer or len(answer) > 300:
        return 0.0
    for pattern, new in REWRITE:
        gold, answer = re.sub(pattern, new, gold), re.sub(pattern, new, answer)
    if gold.lower() == answer.lower():
        return 1.0
    *labels, answer = [answer] if "=" in gold else re.split("[=:]", answer)
    multiple = re.search(r"\d ?[a-z](?![a-z]| ?\d)", "=".join(labels))  # 2x = 12
    if multiple or re.search(r"\d_|^[a-zA-Z ]{3,}$|^[^a-zA-Z]*=", gold):
        return 0.0
    wanted = read_number(gold)
    if wanted is not None:
        values = {*map(read_number, labels)}  # None for 6+6 = 12
        return float(read_number(answer) == wanted and values <= {None, wanted})
    verdicts = []
    thread = threading.Thread(target=ask, args=[verdicts, gold, answer], daemon=True)
    thread.start()  # spared Ctrl-C
    thread.join()
    if isinstance(verdicts[-1], BaseException):
        raise UserError(f"expected math-verify to work, got {verdicts[-1]!r:.300}")
    return float(bool(verdicts[-1]))


# ---- model and prompts

Policy = namedtuple("Policy", "model tokenizer stop")  # stop: ids of the end tokens
PLAIN_CHAT = """{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}\
Question: {{ turn.content }}
Answer:{% else %} {{ turn.content }}{{ eos_token }}
{% endif %}{% endfor %}"""  # for models that know no chat


def built_in_model(seed):
    """A two-layer Llama with one token per word or number."""
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
        chat_template="{{ messages | map(attribute='content') | join(' ') }}"
                      "{{ '' if add_generation_prompt else ' <eos>' }}")


def load_model(name, device, seed):
    """Policy in fp32: bf16 would lose RL-sized updates."""
    with expecting(f"a language model (and chat template, if any) in --model {name}"):
        if name == "built-in":
            model, tokenizer = built_in_model(seed)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True)
            if odd := sorted(found["missing_keys"] | found["unexpected_keys"]):
                raise ValueError(f"missing or unknown weights {odd}")
        rows, eos = len(model.get_input_embeddings().weight), tokenizer.eos_token_id
        if len(tokenizer) > rows or eos is None:
            raise ValueError(f"{len(tokenizer)} tokens for {rows} embeddings, end token {eos}")
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT
        chat = tokenizer.apply_chat_template(turns("QUESTION", "ANSWER"), tokenize=False)
        tail = re.search("(?s)QUESTION.*ANSWER(.*)", chat)[1]
    # A chat may end a turn with another token than eos.
    ends = tokenizer(tail.strip(), add_special_tokens=False)["input_ids"][:1]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    more = model.generation_config.eos_token_id or eos
    stop = [*special.intersection(ends), eos, *np.ravel(more)]
    # bf16 where it is native; emulated it is slow.
    model.mixed = name != "built-in" and (
        torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
        torch.cpu.get_capabilities().get("avx512_bf16", False) and device == "cpu")
    model.to(device).eval()  # dropout would move the ratio
    return Policy(model, tokenizer, stop)


def turns(*texts):
    roles = itertools.cycle(["user", "assistant"])
    return [dict(role=role, content=text) for role, text in zip(roles, texts)]


def encode(policy, problems, examples):
    """The problems with their token ids; examples: in front of each question.

    target: what the chat has behind the prompt, to the end of the turn, or None.
    """
    shots = [text for example in examples for text in (example.question, example.solution)]
    asked = [turns(*shots, problem.question) for problem in problems]
    answered = [turns(*shots, problem.question, problem.solution) for problem in problems]
    with expecting("a chat template that takes every problem"):
        prompts, chats = (policy.tokenizer.apply_chat_template(
            part, add_generation_prompt=part is asked, return_dict=False)
            for part in (asked, answered))
    encoded = []
    for problem, prompt, chat in zip(problems, prompts, chats):
        start, chat = len(prompt), chat + policy.stop[:1]
        end = next(i for i in range(start, len(chat)) if chat[i] in policy.stop)
        target = chat[start:end + 1] if chat[:start] == prompt else None
        encoded.append(problem._replace(prompt=prompt, target=target))
    return encoded


def check_lengths(args, policy, data):
    """Raises UserError unless the model can read and write it all."""
    room = getattr(policy.model.config, "max_position_embeddings", math.inf)
    longest = max(len(p.prompt) for part in data.values() for p in part) + args.max_new_tokens
    learnt = data["train"] if args.warmup_steps else []
    if any(p.target is None for p in learnt):
        raise UserError("expected, for --warmup-steps, a chat template that answers right "
                        f"behind its prompt, got another with --model {args.model}")
    longest = max([longest, *(len(p.prompt + p.target) for p in learnt)])
    if longest > room:
        raise UserError(f"expected prompts and solutions of at most {room} tokens, got {longest}; "
                        "lower --shots or --max-new-tokens")


# ---- rollouts, log-probabilities and entropy


def mixed_precision(model):
    return torch.autocast(model.device.type, torch.bfloat16, model.mixed)


class Cache(transformers.DynamicCache):
    """Keeps keys in bf16 like values: rotary positions make them fp32."""

    def update(self, key, value, *args, **options):
        return super().update(key.to(value.dtype), value, *args, **options)


def forward(model, cache, ids, attention):
    """Hidden states (b, t, H) of `ids` (b, t), which join the cache.

    attention: (b, all tokens so far), 0 at the padding on the left.
    """
    positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    return model.base_model(
        input_ids=ids.clamp(min=0), attention_mask=attention, position_ids=positions, cache=cache,
        use_cache=True).last_hidden_state.float()


def pad(rows, device, side):
    """Lists of token ids as one tensor (B, longest), -1 where there is none."""
    rows = [torch.tensor(row) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=-1, padding_side=side)
    return padded.to(device)


def prefill(model, prompts):
    """Runs B prompts, equal neighbours once: (cache, last hidden state (B, H), attention)."""
    groups = [[*same] for _, same in itertools.groupby(prompts)]
    ids = pad([same[0] for same in groups], model.device, "left")
    cache, attention = Cache(config=model.config), (ids >= 0).long()
    hidden = forward(model, cache, ids, attention)[:, -1]
    rows = [row for row, same in enumerate(groups) for _ in same]
    rows = torch.tensor(rows, device=model.device)
    cache.batch_select_indices(rows)
    return cache, hidden[rows], attention[rows]


def head_logits(model, hidden, temperature):
    """(B, H) -> (B, V) in fp32: bf16 would put 2 % of noise on the ratio."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.get_output_embeddings()(hidden) / temperature


Rollouts = namedtuple("Rollouts", "tokens mask logprobs entropies")  # each (B, T)


@torch.no_grad()
def sample(policy, prompts, max_new_tokens, rng, temperature):
    """A completion of each of B prompts from softmax(logits / temperature); 0 is greedy.

    The mask includes the end token. An entropy, in nats, is that of a token's whole softmax.
    """
    model, B, device = policy.model, len(prompts), policy.model.device
    stop = torch.tensor(policy.stop, device=device)
    tokens = torch.full((B, max_new_tokens), -1, device=device)
    logprobs, entropies = torch.zeros(2, *tokens.shape, device=device)
    rows = torch.arange(B, device=device)  # completions that go on
    with mixed_precision(model):  # around the loop: weights are cast once
        cache, hidden, attention = prefill(model, prompts)
        for t in range(max_new_tokens):
            logp = head_logits(model, hidden, temperature or 1).log_softmax(-1)
            # One number per completion, ended or not: no draw depends on others.
            u = torch.rand(B, 1, generator=rng, device=device)[rows]
            cdf = logp.exp().cumsum(-1)
            drawn = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
            drawn = drawn.clamp(max=logp.shape[1] - 1)  # NaN gives V
            token = drawn if temperature else logp.argmax(-1)
            tokens[rows, t] = token
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
    mask = tokens >= 0
    return Rollouts(*(x[:, :t + 1] for x in (tokens * mask, mask, logprobs, entropies)))


def sample_and_grade(policy, args, problems, group_size, key, temperature):
    """Rollouts, their texts, and 0/1 rewards (P, G)."""
    device = policy.model.device
    problems = [problem for problem in problems for _ in range(group_size)]  # one a row
    rng = torch.Generator(device).manual_seed(seeded(*key).getrandbits(62))
    prompts = [problem.prompt for problem in problems]
    with fitting("lower --prompts-per-step or --group-size in another --out"):
        rollouts = sample(policy, prompts, args.max_new_tokens, rng, temperature)
    lengths = rollouts.mask.sum(1).tolist()
    written = [row[:length] for row, length in zip(rollouts.tokens.tolist(), lengths)]
    texts = policy.tokenizer.batch_decode(
        written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    rewards = [grade(args.task, text, problem.answer) for text, problem in zip(texts, problems)]
    return rollouts, texts, torch.tensor(rewards, device=device).view(-1, group_size)


def score(model, prompts, tokens, mask, rows, micro_batch_tokens, temperature):
    """Yields (some of `rows`, their log-probabilities (b, T), 0 where the mask is false).

    prompts: one per row of tokens and mask (B, T). Call backward() before the next.
    """
    if not rows:
        return
    head, lengths = model.get_output_embeddings(), mask.sum(1).tolist()
    options = torch.nn.LinearCrossEntropyOptions(  # torch makes the logits chunk by chunk
        batch_chunk_size=max(1, LOGITS_AT_ONCE // len(head.weight)))
    longest = max(len(prompts[row]) for row in rows) + max(lengths[row] for row in rows)
    at_once = max(1, micro_batch_tokens // longest)
    for start in range(0, len(rows), at_once):
        part = rows[start:start + at_once]
        T, i = max(lengths[row] for row in part), torch.tensor(part, device=tokens.device)
        on = mask[i]
        with mixed_precision(model):
            cache, first, attention = prefill(model, [prompts[row] for row in part])
            attention = F.pad(attention, (0, T), value=1)
            # The state at t predicts token t; padding on the right is never looked at.
            rest = forward(model, cache, tokens[i, :T], attention)[:, :-1]
        states = torch.cat([first[:, None], rest], 1)[on[:, :T]] / temperature
        bias = None if head.bias is None else head.bias / temperature
        losses = F.linear_cross_entropy(states, head.weight, tokens[i][on], linear_bias=bias,
                                        reduction="none", options=options)
        yield i, torch.zeros(on.shape, device=on.device).masked_scatter(on, -losses)


@torch.no_grad()
def check_model(policy, name, temperature):
    """Raises UserError unless rollouts and scores are those of the plain forward.

    Those that scale their logits, or whose state padding spoils, would train wrong.
    """
    model, wanted = policy.model, f"--model {name} to write with a cache and padding as without"
    mixed, model.mixed = model.mixed, False
    prompts = [[2, 3]] * 3 + [[*range(1, 13)]] * 3
    stop = [*range(0, len(model.get_input_embeddings().weight), 3)]  # many, so that rows leave
    with expecting(wanted), fitting("take a smaller --model"):
        rng = torch.Generator(model.device).manual_seed(0)
        tokens, mask, old, _ = sample(policy._replace(stop=stop), prompts, 12, rng, temperature)
        (_, scores), = score(model, prompts, tokens, mask, range(6), 10**6, temperature)
        plain = torch.zeros_like(old)
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt + tokens[i, mask[i]].tolist()], device=model.device)
            logits, n = model(input_ids=ids).logits[0, :-1] / temperature, len(prompt)
            plain[i, mask[i]] = -F.cross_entropy(logits[n - 1:], ids[0, n:], reduction="none")
        worst = float(torch.stack([old - plain, scores - plain]).abs().max())
    if not worst < 1e-3:
        raise UserError(f"expected {wanted}, got log-probabilities that are off by {worst:.1g}")
    model.mixed = mixed


# ---- one training step


def make_optimizer(model):
    return torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def apply_gradients(model, optimizer, learning_rate):
    """One update, clipped to norm 1. Returns the norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


# Sums over a step's tokens and updates, for groups with k = 0..G right completions
BY_CORRECT = "tokens_right tokens_wrong clipped_right clipped_wrong kl ratio radius_squared".split()


def count_by_correct(log_ratio, mask, right, A, low, high):
    """The BY_CORRECT sums of each row, (7, b)."""
    ratio, count = log_ratio.exp(), mask.sum(1)
    below, above = etr.clipped_tokens(ratio, A[:, None], low[:, None], high[:, None])
    kl = log_ratio.expm1() - log_ratio  # the k3 estimator
    sums = [(value * mask).sum(1) for value in (above, below, kl, ratio)]
    radius = torch.where(right, high, low)  # the side that acts
    return torch.stack([count * right, count * ~right, *sums, count * radius**2])


def flip(rewards, share, rng):
    """A dishonest verifier."""
    lies = rewards.new_tensor([rng.random() < share for _ in range(rewards.numel())])
    return (rewards - lies.view(rewards.shape)).abs()


def train_step(args, arm, seed, step, optimizer, policy, problems):
    """The README's seven steps: (metrics, a few rollouts as text)."""
    model, P, G = policy.model, args.prompts_per_step, args.group_size
    # 1. roll out: which prompts depends on seed and step, never on the arm
    batch, key = seeded("prompts", seed, step).sample(problems, P), ("rollout", seed, step)
    rollouts, texts, rewards = sample_and_grade(policy, args, batch, G, key, args.temperature)
    rewards = flip(rewards, args.flip_rewards, seeded("flips", seed, step))
    tokens, mask, old, _ = rollouts  # row i is completion i % G of prompt i // G
    # 2. advantages, 3. to 5. the trust region: the one line in which arms differ
    advantages = etr.group_advantages(rewards)
    bounds = ARMS[arm].rule(rewards, advantages, args.clip)
    A, low, high = (x.flatten() for x in (advantages, *bounds))
    # 6. loss, and 7. several updates per rollout batch
    prompts = [problem.prompt for problem in batch for _ in range(G)]
    lengths, teaches = mask.reshape(P, -1).sum(1).tolist(), advantages.any(1).tolist()

    def scored(groups):  # without those that have no advantage, so no gradient
        rows = [i for g in groups if teaches[g] for i in range(g * G, g * G + G)]
        return score(model, prompts, tokens, mask, rows, args.micro_batch_tokens, args.temperature)
    order = seeded("minibatches", seed, step).sample(range(P), P)
    n = min(MINIBATCHES, P, args.updates_per_step)
    parts = [sorted(order[part::n]) for part in range(n)]
    if model.mixed:  # bf16 rounds by composition: score `old` in the parts to come
        with torch.no_grad():
            for i, logprobs in itertools.chain(*map(scored, parts)):
                old[i] = logprobs
    right, k = rewards.flatten() > 0, rewards.sum(1).long().repeat_interleave(G)
    sums, norms = torch.zeros(len(BY_CORRECT), G + 1, device=mask.device), []
    for update, groups in zip(range(args.updates_per_step), itertools.cycle(parts)):
        size = sum(lengths[g] for g in groups)  # of silent ones too
        for i, logprobs in scored(groups):
            loss, _ = etr.surrogate_loss(logprobs, old[i], A[i], low[i], high[i], mask[i], size)
            loss.backward()
            sums.index_add_(1, k[i], count_by_correct(
                logprobs.detach() - old[i], mask[i], right[i], A[i], low[i], high[i]))
        done = (step - 1) * args.updates_per_step + update + 1
        rate = args.learning_rate * min(1.0, done / LR_WARMUP_UPDATES)
        norms.append(apply_gradients(model, optimizer, rate))
    metrics = step_metrics(step, rollouts, rewards, sums, norms)
    return metrics, show(f"step {step}", batch, texts, rewards)


def show(title, batch, texts, rewards):
    """Five of the completions, for samples.txt."""
    G, rewards = len(texts) // len(batch), rewards.flatten().tolist()
    shown = range(0, len(texts), max(1, len(texts) // 5))[:5]
    return "".join(f"{title}, reward {rewards[i]:.0f}\n{batch[i // G].question}\n"
                   f">>> {texts[i]}\n\n" for i in shown)


def step_metrics(step, rollouts, rewards, sums, norms):
    sampled, total = int(rollouts.mask.sum()), dict(zip(BY_CORRECT, sums.sum(1).tolist()))
    trained = total["tokens_right"] + total["tokens_wrong"]

    def mean(*names):  # None if no group teaches
        return sum(total[name] for name in names) / trained if trained else None
    return dict(
        step=step, reward_mean=float(rewards.mean()),
        entropy=float(rollouts.entropies.sum()) / sampled,
        clip_fraction=mean("clipped_wrong", "clipped_right"),
        clip_fraction_low=mean("clipped_wrong"), clip_fraction_high=mean("clipped_right"),
        ratio_mean=mean("ratio"), approx_kl=mean("kl"),
        frac_reward_zero_std=float((rewards == rewards[:, :1]).all(1).float().mean()),
        completion_length_mean=sampled / rewards.numel(), grad_norm=sum(norms) / len(norms),
        by_correct=dict(zip(BY_CORRECT, sums.tolist())))


# ---- warm start and evaluation


def warmup_step(args, seed, step, optimizer, policy, problems):
    """One step on worked solutions: (metrics, "")."""
    batch = seeded("warmup", seed, step).choices(problems, k=args.warmup_batch)
    batch.sort(key=lambda problem: len(problem.prompt))  # less padding
    prompts, rows = [problem.prompt for problem in batch], range(len(batch))
    tokens = pad([problem.target for problem in batch], policy.model.device, "right")
    mask, total = tokens >= 0, 0.0
    for _, logprobs in score(
            policy.model, prompts, tokens, mask, rows, args.micro_batch_tokens, temperature=1):
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        total += float(loss.detach())
    rise = step / min(LR_WARMUP_UPDATES, args.warmup_steps / 10)
    fall = 1 - 0.9 * step / args.warmup_steps  # to a tenth
    apply_gradients(policy.model, optimizer, args.warmup_rate * min(1.0, rise) * fall)
    return dict(step=step, loss=total), ""


def evaluate(args, seed, policy, data, splits):
    """(metrics of each of `splits`, some greedy answers as text).

    _right: right samples of each problem. At k = EVAL_SAMPLES the unbiased estimate of pass@k
    (Chen et al. 2021) is the share of problems with a right one.
    """
    scores, text = {}, ""

    def graded(split, samples, temperature):
        """Yields (problems, texts, rewards) of at most a rollout batch."""
        at_once = max(1, args.prompts_per_step * args.group_size // samples)
        for start in range(0, len(data[split]), at_once):
            part, key = data[split][start:start + at_once], (split, seed, start)
            yield part, *sample_and_grade(policy, args, part, samples, key, temperature)[1:]
    for split in splits:
        answers = [*graded(split, 1, temperature=0)]
        greedy = torch.cat([rewards for *_, rewards in answers])
        drawn = graded(split, EVAL_SAMPLES, args.temperature)
        samples = torch.cat([rewards for *_, rewards in drawn])
        scores |= {
            f"{split}_pass1": float(samples.mean()),
            f"{split}_greedy": float(greedy.mean()),
            f"{split}_passk": float(samples.amax(1).mean()),
            f"{split}_right": samples.sum(1).int().tolist(),
        }
        text += show(f"{split}, greedy", *answers[0])
    return scores, text


# ---- runs that survive interruption

stopping = []  # not empty after Ctrl-C


def save(path, value):
    """A crash leaves the old content or the new."""
    temporary = Path(f"{path}.tmp")
    with writing(path), temporary.open("wb") as file:
        file.write(value.encode()) if isinstance(value, str) else torch.save(value, file)
    os.replace(temporary, path)


def writing(path):  # every library has its own error for a full disk
    return expecting(f"to write {path} (mend that, then add --resume)")


def train(folder, model, steps, one_step):
    """Calls one_step(step, optimizer) -> (metrics, text) per step; returns all metrics.

    Writes both to `folder`, and now and then a checkpoint, from which it continues.
    """
    optimizer, checkpoint = make_optimizer(model), folder / "checkpoint.pt"
    lines, samples = [], ""
    if checkpoint.exists():
        with expecting(f"a whole {checkpoint}"):
            weights, moments, lines, samples = torch.load(checkpoint, map_location="cpu")
            model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        del weights, moments
    folder.mkdir(exist_ok=True)
    saved, cost = time.perf_counter(), 0.0
    bar = tqdm(steps[len(lines):], folder.name, len(steps), initial=len(lines), mininterval=1)
    for step in bar:
        started = time.perf_counter()
        metrics, text = one_step(step, optimizer)
        lines.append(dict(metrics, seconds=time.perf_counter() - started))
        samples += text
        with expecting("finite metrics (lower --learning-rate or --warmup-rate in another --out)"):
            content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        save(folder / "metrics.jsonl", content)
        save(folder / "samples.txt", samples)
        now = time.perf_counter()
        if step == steps[-1] or SAVING * (now - saved) >= cost or stopping:
            save(checkpoint, (model.state_dict(), optimizer.state_dict(), lines, samples))
            saved, cost = time.perf_counter(), time.perf_counter() - now
        if stopping:
            raise KeyboardInterrupt
        shown = {"loss", "reward_mean", "entropy"} & metrics.keys()
        bar.set_postfix({name: metrics[name] for name in shown}, refresh=False)
    return lines


def run_arm(args, arm, seed, data):
    """Trains one arm of one seed, in OUT/ARM-seedSEED."""
    folder = args.out / f"{arm}-seed{seed}"
    if (folder / "model").exists():
        return
    policy = load_model(args.model, args.device, seed)

    def stage(name, steps, eval_every, start, take_step):
        def one_step(step, optimizer):
            metrics, text = start | dict(step=0), ""
            if step:
                with fitting("lower --micro-batch-tokens and add --resume"):
                    metrics, text = take_step(step, optimizer)
            last, due = step == steps, step > 0 and step % eval_every == 0
            splits = ["eval"] * (last or due) + ["test"] * last
            scores, answers = evaluate(args, seed, policy, data, splits)
            return metrics | scores, text + answers
        return train(args.out / name, policy.model, range(steps + 1), one_step)

    *_, warm = stage(  # later arms load its checkpoint
        f"warmup-seed{seed}", args.warmup_steps, args.warmup_steps + 1, {},
        lambda *at: warmup_step(args, seed, *at, policy, data["train"]))
    stage(folder.name, args.steps, args.eval_every, warm,
          lambda *at: train_step(args, arm, seed, *at, policy, data["train"]))
    with writing(folder):
        for part in (policy.tokenizer, policy.model):
            part.save_pretrained(folder / "model.tmp")
        os.replace(folder / "model.tmp", folder / "model")
    (folder / "checkpoint.pt").unlink()


# What may change between calls.
FREE = {"algos", "seed", "seeds", "micro_batch_tokens", "out", "resume"}


def open_out(args, inputs):
    """Makes --out, unless it holds another run. Returns its lock."""
    args.out.mkdir(parents=True, exist_ok=True)
    with expecting(f"no other process in --out {args.out}", TimeoutError):
        lock = FileLock(args.out / "lock").acquire(timeout=0)
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()
    given = vars(args) | dict(out=str(args.out), problems_and_weights=digest)
    path = args.out / "config.json"
    if path.exists() and not args.resume:
        raise UserError(f"expected no run in --out {args.out}; add --resume or name another")
    if path.exists():
        with expecting(f"the arguments of a run in {path}"):
            old = dict(json.loads(path.read_text()))
        changed = [f"{name} {old.get(name)} instead of {value}" for name, value in given.items()
                   if name not in FREE and old.get(name) != value]
        if changed:
            raise UserError(f"expected, to continue {args.out}, {'; '.join(changed)}")
    elif any(args.out.glob("*-seed*")):
        raise UserError(f"expected {path} beside the runs there; name another --out")
    save(path, json.dumps(given, indent=1) + "\n")
    return lock


# ---- pictures and the table

matplotlib.rcParams.update({
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "savefig.dpi": 130,
})
T_975 = [0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's, for 1, 2... seeds


def load_runs(args):
    """{(arm, seed): metrics by step}"""
    runs = {}
    for arm, seed in itertools.product(args.algos, range(args.seed, args.seed + args.seeds)):
        path = args.out / f"{arm}-seed{seed}" / "metrics.jsonl"
        with expecting(f"whole lines of metrics in {path}"):
            runs[arm, seed] = pd.read_json(
                path, lines=True, precise_float=True) if path.exists() else pd.DataFrame()
    return runs


def mean_and_band(curves):
    """One {x: value} per seed -> (x that all have, mean, half-width of its 95 % t-interval)."""
    x, n = sorted(set.intersection(*map(set, curves))), len(curves)
    values = np.array([[curve[at] for at in x] for curve in curves])
    t = T_975[n - 1] if n <= len(T_975) else 1.96 + 2.5 / (n - 1)
    return x, values.mean(0), t * values.std(0, ddof=int(n > 1)) / n**0.5


def panel(axis, curves, title, xlabel, ylabel="", ylim=(0, None)):
    """Mean and band of {arm: one {x: y} per seed}, each named at its right end."""
    ends, height = [], -math.inf
    for arm, seeds in curves.items():
        x, mean, half = mean_and_band(seeds)
        color = ARMS[arm].color
        axis.plot(x, mean, color=color, lw=2.5)
        axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.18, lw=0)
        ends += [(mean[-1], x[-1], arm, color)] if x else []
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=ylim)
    for y, x, arm, color in sorted(ends):  # names apart where ends meet
        height = max(y, height + 0.06 * np.ptp(axis.get_ylim()))
        axis.annotate(arm, (x, height), xytext=(6, 0), textcoords="offset points", va="center",
                      color=color, weight="bold", annotation_clip=False)


def draw(args):
    """Accuracy and entropy, as far as they are on disk."""
    runs = defaultdict(list)
    for (arm, _), run in load_runs(args).items():
        if len(run) > 1:
            runs[arm].append(run)
    if not runs:
        return
    accuracy, entropy = ({
        arm: [run[metric].dropna().to_dict() for run in seeds] for arm, seeds in runs.items()}
        for metric in ("eval_pass1", "entropy"))
    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    panel(left, accuracy, "Held-out accuracy", "step", "pass@1")
    panel(right, entropy, "Policy entropy", "step", "nats per token")
    means = {arm: mean_and_band(seeds)[1] for arm, seeds in accuracy.items()}
    moved = ", ".join(f"{arm} {mean[0]:.2f} to {mean[-1]:.2f}" for arm, mean in means.items())
    figure.suptitle(f"{args.task}, pass@1: {moved}")
    n = min(map(len, runs.values()))
    figure.supxlabel(f"seeds: {n}; bands, from 2 on: 95 % interval of the mean", fontsize=11)
    figure.savefig(args.out / "accuracy_entropy.png")


def report(args):
    """Saves results.json, a row per run, and prints it as a table."""
    rows = []
    for (arm, seed), run in load_runs(args).items():
        row = dict(arm=arm, seed=seed)
        with expecting(f"all metrics of the finished run {args.out}/{arm}-seed{seed}"):
            for name in ("pass1", "greedy", "passk", "right"):
                row[f"{name}_before"], row[f"{name}_after"] = run[f"test_{name}"].dropna()
            mechanism = run.loc[:, "clip_fraction":"completion_length_mean"].astype(float).mean()
            row |= dict(entropy_first=run.entropy[1], entropy_last=run.entropy.iloc[-1],
                        **mechanism.dropna(), seconds=run.seconds[1:].sum())
        rows.append(row)
    save(args.out / "results.json", json.dumps(rows, indent=1) + "\n")
    table = pd.DataFrame(rows).drop(columns=["right_before", "right_after"]).round(4)
    print(table.T.to_string(header=False))
    print(f"\nMore in {args.out}")


# ---- main


def run(args):
    if args.model == "built-in" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # more would wait for each other
    problems, policy = load_problems(args), load_model(args.model, args.device, seed=0)
    check_model(policy, args.model, args.temperature)
    examples = problems.pop("examples")
    data = {split: encode(policy, part, examples) for split, part in problems.items()}
    check_lengths(args, policy, data)
    weights = policy.stop, [torch.hash_tensor(x.cpu()) for x in policy.model.parameters()]
    del policy  # one model in memory at a time
    with open_out(args, (data, weights)):
        for seed, arm in itertools.product(range(args.seed, args.seed + args.seeds), args.algos):
            try:
                run_arm(args, arm, seed, data)
            finally:
                draw(args)
        report(args)


def on_interrupt(*_):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopping.append(True)
    print("\nstopping after this step; at once with another Ctrl-C", file=sys.stderr)


def main(argv=None):
    args, code, threads = parse_args(argv), 2, torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stopping.clear()
    ours = threading.current_thread() is threading.main_thread()  # others can't catch Ctrl-C
    before = signal.signal(signal.SIGINT, on_interrupt) if ours else None
    try:
        with fitting("take a smaller --model"), expecting(f"to write in {args.out}", OSError):
            run(args)
        return 0
    except KeyboardInterrupt:
        message, code = f"stopped; the same command with --resume continues {args.out}", 130
    except UserError as error:
        message = str(error)
    finally:
        torch.set_num_threads(threads)
        if ours:
            signal.signal(signal.SIGINT, before)
    print(f"train_small.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
