"""What train_small.py costs, beside what people use instead: `python plots/benchmark.py`.

Prints a table, saves it as benchmark.csv and draws benchmark.png. Contestants do the same work in
turns and are compared by medians; `better` says how many times better ours is. Besides the
built-in model there is a random one in the shape of SmolLM2-135M: its lengths are geometric, and
so many of its words state the answer that half of its completions are right.
"""

import itertools
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import datasets
import pandas as pd
import tokenizers
import torch
import transformers
import trl

import etr
import train_small as ts

HERE = Path(__file__).parent
REPEATS = 3
UPDATES = 4
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3)
LOSSES = {49152: REPEATS, 151936: 1}  # vocabulary, and how often it is measured
table = []


def row(part, model, what, values, unit, better=1.0):
    """Adds a line and saves the table. values: one per repetition."""
    spread = f"{min(values):.3g}..{max(values):.3g}"
    table.append(dict(
        part=part, model=model, what=what, value=median(values), unit=unit, better=better,
        range=spread, repeats=len(values), threads=torch.get_num_threads()))
    pd.DataFrame(table).to_csv(HERE / "benchmark.csv", index=False, float_format="%.4g")
    print(f"{part}, {model}: {what} {median(values):.4g} {unit} ({spread}), {better:.3g}")


def timed(work):
    """(what it returns, seconds)"""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def take_turns(*works):
    """For each work [(result, seconds)]; the first round is a rehearsal."""
    runs = [[timed(work) for work in works] for _ in range(REPEATS + 1)]
    return list(zip(*runs[1:]))


# ---------- models


def arguments(P, G, longest):
    return ts.parse_args(
        f"--updates-per-step {UPDATES} --prompts-per-step {P} --group-size {G} "
        f"--max-new-tokens {longest} --learning-rate 1e-6".split())


def built_in():
    """(args, policy, problems) of the demo after its warm start."""
    args, policy = arguments(32, 8, 48), ts.load_model("built-in", "cpu", 0)
    problems = ts.encode(policy, ts.load_problems(args)["train"], [])
    optimizer = ts.make_optimizer(policy.model)
    for step in range(1, args.warmup_steps + 1):
        ts.warmup_step(args, 0, step, optimizer, policy, problems)
    return args, policy, problems[:args.prompts_per_step]


def random_model(P, G, prompt_lengths, mean, longest, **shape):
    """(args, policy, problems) with random weights; mean: of the lengths, before the cut."""
    torch.manual_seed(0)
    V = shape["vocab_size"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **shape, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    head = torch.nn.Linear(shape["hidden_size"], V)
    head.weight = model.get_input_embeddings().weight
    head.bias.data.zero_()[1] = math.log(V / mean)
    model.set_output_embeddings(head)
    model.mixed = False
    every = round(mean)  # one word in so many states the answer
    ids = {f"#### 7 \n {i}" if i % every == 2 else str(i): i for i in range(V)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="1")
    problems = []
    for length in torch.linspace(*prompt_lengths, P).int().tolist():
        prompt = (torch.randint(1, V // every, (length,)) * every).tolist()
        problems.append(ts.Problem(" ".join(map(str, prompt)), "", "7", prompt))
    return arguments(P, G, longest), ts.Policy(model.eval(), tokenizer, [1]), problems


# ---------- rollouts, steps


def rollouts(name, args, policy, problems):
    """Useful tokens are those up to and including the first end token."""
    model, prompts = policy.model, [problem.prompt for problem in problems]
    G, longest, width = args.group_size, args.max_new_tokens, max(map(len, prompts))
    rng = torch.Generator().manual_seed(0)
    config = transformers.GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=longest,
        num_return_sequences=G, eos_token_id=1, pad_token_id=0)
    ids = torch.tensor([[-1] * (width - len(prompt)) + prompt for prompt in prompts])

    def ours():
        rows = [prompt for prompt in prompts for _ in range(G)]
        return int(ts.sample(policy, rows, longest, rng, temperature=1).mask.sum())

    def generate():
        rows = model.generate(ids.clamp(min=0), config, attention_mask=(ids >= 0).long())
        ended = (rows[:, width:] == 1).long()
        return int((ended.cumsum(1) - ended == 0).sum())

    works = ours, generate
    rates = [[tokens / seconds for tokens, seconds in runs] for runs in take_turns(*works)]
    for work, rate in zip(works, rates):
        row("rollout", name, work.__name__, rate, "tokens/s", median(rates[0]) / median(rate))


def stepper(args, policy, problems, mixed=False):
    """A function that takes one training step; mixed: with the layers in bf16."""
    optimizer, count = ts.make_optimizer(policy.model), itertools.count(1)

    def step():
        policy.model.eval()
        policy.model.mixed = mixed
        return ts.train_step(args, "etr", 0, next(count), optimizer, policy, problems)[0]
    return step


class Turns(transformers.TrainerCallback):
    """Takes one of our steps after each of TRL's, outside its clock."""

    def __init__(self, step):
        self.step, self.ours, self.theirs = step, [], []

    def on_step_begin(self, args, state, control, **_):
        if state.global_step % UPDATES == 0:
            self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % UPDATES == 0:
            self.theirs.append(time.perf_counter() - self.started)
            self.ours.append(timed(self.step))


def against_trl(name, args, policy, problems, mixed=False):
    answers = {problem.question: problem.answer for problem in problems}
    turns = Turns(stepper(args, policy, problems, mixed))

    def reward(prompts, completions, **_):
        return [ts.grade(args.task, text, answers[prompt])
                for prompt, text in zip(prompts, completions)]
    config = trl.GRPOConfig(
        output_dir=tempfile.gettempdir(), save_strategy="no", logging_strategy="no",
        num_generations=args.group_size, steps_per_generation=UPDATES, bf16=mixed,
        per_device_train_batch_size=args.prompts_per_step * args.group_size // UPDATES,
        max_completion_length=args.max_new_tokens, max_steps=UPDATES * (REPEATS + 1),
        learning_rate=args.learning_rate, lr_scheduler_type="constant", use_cpu=True,
        gradient_checkpointing=False)
    data = datasets.Dataset.from_dict(dict(prompt=[*answers]))
    trl.GRPOTrainer(policy.model, reward, config, data, processing_class=policy.tokenizer,
                    callbacks=[turns]).train()
    metrics, ours = zip(*turns.ours[1:])
    skipped = median(line["frac_reward_zero_std"] for line in metrics)
    row("step", name, f"ours, {skipped:.0%} of groups without gradient", ours, "s")
    row("step", name, "TRL", turns.theirs[1:], "s", median(turns.theirs[1:]) / median(ours))


def precision(name, *setup):
    """The step with its layers in bf16, and ETR's own share of it."""
    rewards = torch.arange(32).view(4, 8) % 3 / 2

    def bounds():
        return ts.ARMS["etr"].rule(rewards, etr.group_advantages(rewards), 0.2)
    works = stepper(*setup), stepper(*setup, mixed=True), bounds
    fp32, bf16, own = ([seconds for _, seconds in runs] for runs in take_turns(*works))
    row("bf16", name, "ours, layers in bf16", bf16, "s")
    row("bf16", name, "ours, fp32", fp32, "s", median(fp32) / median(bf16))
    row("share", name, "ETR's advantages and bounds", own, "s", median(fp32) / median(own))


# ---------- memory


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB, on Linux


def alone(work, *args):
    """Calls it in a process of its own that has loaded the libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_small"])
    with context.Pool(1) as pool:
        return pool.apply(work, args)


def loss_cost(whole, vocabulary, threads, length=256):
    """(seconds, GiB) of the loss of 32 completions and its gradient; a model without layers."""
    torch.set_num_threads(threads)
    if length > 8:  # what torch sets aside for its first gradient is neither's
        loss_cost(whole, 128, threads, 8)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, num_hidden_layers=0, tie_word_embeddings=False))
    model.mixed = False
    model.get_input_embeddings().requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight.grad = torch.zeros_like(head.weight)
    tokens, A = torch.randint(2, vocabulary, (32, length)), torch.linspace(-1, 1, 32)
    mask, old = tokens > 0, torch.full(tokens.shape, -math.log(vocabulary))

    def run():
        if whole:
            ids = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=2)
            logp = model(input_ids=ids).logits.log_softmax(-1)
            parts = [(slice(None), logp.gather(-1, tokens[..., None])[..., 0])]
        else:
            parts = ts.score(model, [[2]] * 32, tokens, mask, range(32), 10**9, 1)
        for i, logp in parts:
            etr.surrogate_loss(logp, old[i], A[i], 0.2, 0.2, mask[i], mask.sum())[0].backward()
    before = peak_memory()
    return timed(run)[1], peak_memory() - before


def losses(threads):
    for V, repeats in LOSSES.items():
        ours, whole = (zip(*[alone(loss_cost, kind, V, threads) for _ in range(repeats)])
                       for kind in (False, True))
        for what, unit, a, b in zip(("seconds", "memory"), ("s", "GiB"), ours, whole):
            row("loss", f"V = {V:,}", f"{what}, ours", a, unit)
            row("loss", f"V = {V:,}", f"{what} with all logits", b, unit, median(b) / median(a))


# ---------- picture


def draw():
    lines = pd.DataFrame(table)
    lines = lines[(lines.better != 1) & lines.part.isin(["loss", "rollout", "step"])][::-1]
    figure = ts.Figure(figsize=(10, 1.5 + 0.42 * len(lines)), layout="constrained")
    axis = figure.subplots()
    made = axis.barh(lines.what + ", " + lines.model, lines.better, color="#D55E00")
    axis.bar_label(made, fmt=" %.2g", fontsize=14)
    axis.axvline(1, color="#777777", ls="--")
    low, high = lines[lines.part == "step"].better.agg(["min", "max"])
    axis.set(title=f"TRL's step takes {low:.1f} to {high:.1f} times as long as ours",
             xlabel="theirs / ours: seconds, and memory of the loss")
    figure.savefig(HERE / "benchmark.png", dpi=110)


def main():
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    losses(threads)
    torch.set_num_threads(1)
    small = built_in()
    rollouts("built-in", *small)
    against_trl("built-in", *small)
    torch.set_num_threads(threads)
    for name, lengths in (("135M, short prompts", (24, 48)), ("135M, GSM8K's", (238, 290))):
        rollouts(name, *random_model(4, 8, lengths, 24, 64, **SMOLLM2))
    large = random_model(4, 8, (12, 24), 12, 32, **SMOLLM2)
    against_trl("135M, fp32", *large)
    against_trl("135M, bf16", *large, mixed=True)
    precision("135M", *large)
    draw()


if __name__ == "__main__":
    main()
