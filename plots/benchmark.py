"""What train_small.py costs, beside what people would use instead: `python plots/benchmark.py`, half an hour on two idle cores.

Prints one table, saves it as benchmark.csv and draws benchmark.png, both beside this file. Contestants do the same work, take
turns in one run, and are compared by medians. The parts of the table:

    loss      peak memory and time of the loss and its gradient, against keeping all logits; each in a process of its own
    demo      where the seconds of the default run go
    growth    time and memory of a training step against G, length and vocabulary: the slope in a log-log plot, 1 is linear
    rollout   useful tokens per second of `sample`, of generate() and of generate_batch() (continuous batching)
    step      one training step (rollout, old log-probabilities, 4 updates), against TRL's GRPOTrainer where trl is installed
    limit     floating-point operations per second, as a share of what a large matrix product reaches
    gpu       the same for decoding, where there is a GPU

The models are the built-in one and a random one in the shape of SmolLM2-135M. The end token of a random model has a bias that
makes its completions ragged: their lengths are geometric and the longest are cut off.
"""

import contextlib
import csv
import io
import math
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter, namedtuple
from pathlib import Path
from statistics import linear_regression, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402

import etr  # noqa: E402
import train_small as ts  # noqa: E402

HERE, REPEATS, UPDATES = Path(__file__).parent, 5, 4
GROWTH = {"G": [8, 16, 32, 64], "length": [32, 64, 128, 256], "vocabulary": [6144, 12288, 24576, 49152]}
BASE = dict(G=8, length=64, vocabulary=4096)  # the other two, while one grows
SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3)
GSM8K_PROMPTS = (238, 290)  # tokens, from the tenth to the ninetieth percentile, with train_small.py's two worked examples
Setup = namedtuple("Setup", "name threads args model tokenizer problems")
COLUMNS = dict(part=8, model=12, what=56, value=10, unit=9, ratio=8, target=8, threads=8, repeats=8, range=18)
table = []


def row(part, model, what, values, unit, ratio="", target="", threads=1):
    """Adds a line, and saves the table: what is measured stays if the run is interrupted. values: one per repetition."""
    table.append(dict(part=part, model=model, what=what, value=f"{median(values):.4g}", unit=unit, ratio=ratio and f"{ratio:.3g}",
                      target=target, threads=threads, repeats=len(values), range=f"{min(values):.3g}..{max(values):.3g}"))
    with open(HERE / "benchmark.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    print(" ".join(str(table[-1][name]).ljust(width) for name, width in COLUMNS.items()), flush=True)


def timed(work, *args):
    """(what it returns, seconds)"""
    started = time.perf_counter()
    return work(*args), time.perf_counter() - started


# ---------------------------------------------------------------------------------------------------------------- models

def built_in():
    """The demo's model after a short warm start, which gives its completions their natural lengths."""
    args = ts.parse_args(f"--updates-per-step {UPDATES} --warmup-steps 150".split())
    model, tokenizer = ts.load_model(args, 0)
    problems = ts.encode(args, tokenizer, ts.load_problems(args)["train"])
    with tempfile.TemporaryDirectory() as args.out:
        ts.warm_up(args, 0, model, tokenizer, problems)
    return Setup("built-in", 1, args, model, tokenizer, problems[:args.prompts_per_step])


def random_model(threads, P, G, prompt_lengths, mean, longest, name="135M", **shape):
    """A model with random weights, whose words are numbers. mean: of the geometric lengths; infinite: all have the longest."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    V = shape["vocab_size"]
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(shape["hidden_size"], V)
    head.weight = model.get_input_embeddings().weight
    head.bias.data = torch.zeros(V).index_fill(0, torch.tensor(1), math.log(V / mean) if mean < math.inf else -1e4)
    model.set_output_embeddings(head)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    args = ts.parse_args(f"--updates-per-step {UPDATES} --group-size {G} --prompts-per-step {P} --max-new-tokens {longest} "
                         "--learning-rate 1e-6".split())
    prompts = [torch.randint(2, V, (int(length),)).tolist() for length in torch.linspace(*prompt_lengths, P)]
    problems = [ts.Problem(" ".join(map(str, ids)), "", "", ids) for ids in prompts]
    return Setup(name, threads, args, model, tokenizer, problems)


def parity(task, completion, gold):
    """A reward that costs nothing and differs within a group."""
    return float(len(completion.split()) % 2)


def limit(setup, what, tokens, seconds, passes=1):
    """The share of a matrix product's speed. Attention's own products are left out; only completion tokens need the head."""
    head = setup.model.get_input_embeddings().weight.numel()
    layers = sum(parameter.numel() for parameter in setup.model.base_model.parameters()) - head
    operations = 2 * passes * (layers * (tokens + sum(len(problem.prompt) for problem in setup.problems)) + head * tokens)
    a = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / median(timed(torch.mm, a, a)[1] for _ in range(2 * REPEATS))
    row("limit", setup.name, f"{what}; a matrix product: {peak / 1e9:.0f}", [operations / 1e9 / s for s in seconds], "GFLOP/s",
        operations / median(seconds) / peak, threads=setup.threads)


# ------------------------------------------------------------------------------------------------------ rollouts and steps

def rollouts(setup):
    """Useful tokens are those up to and including the first end token."""
    torch.set_num_threads(setup.threads)
    model, G, longest, eos = setup.model, setup.args.group_size, setup.args.max_new_tokens, setup.tokenizer.eos_token_id
    prompts, rng = [problem.prompt for problem in setup.problems], torch.Generator().manual_seed(0)
    config = transformers.GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=longest,
                                           num_return_sequences=G, eos_token_id=eos, pad_token_id=setup.tokenizer.pad_token_id)
    width = max(map(len, prompts))
    ids, mask = (torch.tensor([[0] * (width - len(prompt)) + [fill or token for token in prompt] for prompt in prompts])
                 for fill in (0, 1))
    # On a CPU its own choice is a cache as large as memory, in which a token takes seconds: size the cache to the work.
    batching = transformers.ContinuousBatchingConfig(page_size=32, num_blocks=len(prompts) * G * ((width + longest) // 32 + 2),
                                                     max_batch_tokens=max(256, len(prompts) * G))

    alive = []  # how many completions go on, at each token of our last rollout

    def ours():
        alive[:] = ts.sample(model, prompts, G, longest, [eos], rng).mask.sum(0).tolist()
        return sum(alive)

    def generate():
        ended = (model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:] == eos).long()
        return int((ended.cumsum(1) - ended == 0).sum())

    def generate_batch():
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching).values()
        assert len(outputs) == len(prompts) * G and not any(output.error for output in outputs)
        return sum(len(output.generated_tokens) for output in outputs)

    layers = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {layer.in_features: torch.randn(max(sum(map(len, prompts)), len(prompts) * G), layer.in_features) for layer in layers}

    @torch.no_grad()
    def products():
        """The matrix products of that rollout and nothing else."""
        for rows, called in ((sum(map(len, prompts)), layers), *((rows, [*layers, model.get_output_embeddings()]) for rows in alive[1:])):
            for layer in called:
                layer(inputs[layer.in_features][:rows])
        return sum(alive)

    rounds = [[timed(work) for work in (ours, generate, generate_batch, products)] for _ in range(REPEATS + 1)]
    del rounds[0]  # it was for warming up
    rates = [[tokens / seconds for tokens, seconds in runs] for runs in zip(*rounds)]
    tokens = median(runs[0][0] for runs in rounds)
    size = f" ({len(prompts)} x {G}, {tokens / len(prompts) / G:.0f} of {longest} tokens, prompts to {width})"
    names = "ours" + size, "generate", "generate_batch", "our matrix products alone"
    for name, target, rate in zip(names, ("", ">= 2.5", ">= 1.2", ""), rates):
        row("rollout", setup.name, name, rate, "tokens/s", median(rates[0]) / median(rate), target, setup.threads)
    limit(setup, "rollout", tokens, [tokens / rate for rate in rates[0]])


def steps(setup):
    """TRL's trainer runs, and after each of its steps we take one of ours, outside its clock."""
    torch.set_num_threads(setup.threads)
    args, optimizer, ts.grade = setup.args, ts.make_optimizer(setup.model), parity
    P, G, cuts = args.prompts_per_step, args.group_size, min(ts.MINIBATCHES, args.prompts_per_step)
    ours, rollout, theirs, started, sample = [], [], [], 0.0, ts.sample

    def timed_sample(*args, **named):
        result, seconds = timed(lambda: sample(*args, **named))
        rollout.append(seconds)
        return result

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, _, state, *rest, **more):
            nonlocal started
            if state.global_step % UPDATES == 0:
                started = time.perf_counter()

        def on_step_end(self, _, state, *rest, **more):
            if state.global_step % UPDATES == 0:
                theirs.append(time.perf_counter() - started)
                step()

    def step():
        ts.sample = timed_sample
        ours.append(ts.train_step(args, "etr", 0, len(ours) + 1, setup.model, setup.tokenizer, optimizer, setup.problems)[0])
        ts.sample = sample

    try:
        import datasets
        import trl
    except ImportError:
        print("trl is not installed, so its step is left out")
        for _ in range(REPEATS + 1):
            step()
    else:
        with tempfile.TemporaryDirectory() as folder:
            config = trl.GRPOConfig(
                output_dir=folder, per_device_train_batch_size=P * G // cuts, steps_per_generation=cuts, num_generations=G,
                num_iterations=UPDATES // cuts, max_completion_length=args.max_new_tokens, max_steps=UPDATES * (REPEATS + 1),
                learning_rate=args.learning_rate, lr_scheduler_type="constant", beta=0.0, bf16=False, use_cpu=True,
                gradient_checkpointing=False, dataloader_pin_memory=False, report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True)
            trainer = trl.GRPOTrainer(
                model=setup.model, args=config, processing_class=setup.tokenizer, callbacks=[Turns()],
                reward_funcs=lambda completions, **_: [parity("", text, "") for text in completions],
                train_dataset=datasets.Dataset.from_dict(dict(prompt=[problem.question for problem in setup.problems])))
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        setup.model.eval()
    seconds, length = ([metrics[name] for metrics in ours[1:]] for name in ("seconds", "completion_length_mean"))
    length = median(length)
    row("step", setup.name, f"ours ({P} x {G}, {length:.0f} tokens, {UPDATES} updates)", seconds, "s", 1.0, threads=setup.threads)
    if theirs:
        ratio = median(theirs[1:]) / median(seconds)
        row("step", setup.name, "TRL's GRPOTrainer", theirs[1:], "s", ratio, ">= 2", setup.threads)

    def bounds(rewards):
        return etr.elastic_clip_bounds(etr.group_advantages(rewards), etr.variance_budgets(rewards))

    own = [timed(bounds, torch.arange(P * G).view(P, G) % 3 / 2)[1] for _ in range(20 * REPEATS)]
    ratio = median(own) / median(seconds)
    row("step", setup.name, "ETR's own: advantages, budgets, bounds", own, "s", ratio, "<= 0.01", setup.threads)
    limit(setup, "update", length * P * G, [s - r for s, r in zip(seconds, rollout[1:])], passes=3 * UPDATES // cuts)


# ------------------------------------------------------------------------------------------------- the demo, memory, growth

def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alone(work, *args, **named):
    """Calls it in a process of its own that has loaded the libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "train_small"])
    with context.Pool(1) as pool:
        return pool.apply(work, args, named)


def demo_cost():
    """{part: seconds} of the default run, `python train_small.py`; its last part is the whole."""
    parts = dict(load_problems="loading", load_model="loading", encode="loading", warm_up="warm start", evaluate="evaluation",
                 sample_and_grade="rollouts and rewards", train_step="updates", draw="pictures")
    seconds, outer = Counter(), []

    def clocked(part, work):
        def wrapped(*args, **named):
            outer.append(part)
            result, took = timed(lambda: work(*args, **named))
            outer.pop()
            if outer in ([], ["updates"]):  # what evaluation calls is part of it
                seconds.update({part: took, **{around: -took for around in outer}})
            return result
        return wrapped

    for name, part in parts.items():
        setattr(ts, name, clocked(part, getattr(ts, name)))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        code, whole = timed(ts.main, ["--device", "cpu", "--out", f"{folder}/run"])
    assert code == 0
    return dict(seconds, rest=whole - sum(seconds.values()), whole=whole)


def demo():
    seconds = alone(demo_cost)
    for part, took in seconds.items():
        row("demo", "built-in", part, [took], "s", took / seconds["whole"])


def loss_cost(whole, vocabulary, length, threads):
    """(seconds, bytes) of the loss of 32 completions and its gradient, on top of hidden states, output head and its gradient."""
    torch.set_num_threads(threads)
    if vocabulary > 100:  # what torch loads and sets aside for its first gradient is neither's
        loss_cost(whole, 100, 8, threads)
    setup = random_model(threads, 4, 8, (8, 8), math.inf, length, vocab_size=vocabulary, hidden_size=576, num_hidden_layers=0)
    setup.args.micro_batch_tokens = 10**9
    head, prompts = setup.model.get_output_embeddings(), [problem.prompt for problem in setup.problems for _ in range(8)]
    tokens, mask = torch.randint(2, vocabulary, (32, length)), torch.ones(32, length, dtype=torch.bool)
    A, old = torch.linspace(-1, 1, 32), torch.full((32, length), -math.log(vocabulary))
    states = torch.randn(32, length, 576, requires_grad=True)
    ts.hidden_states = lambda *_: states * 1
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def backward(i, logprobs):
        etr.surrogate_loss(logprobs, old[i], A[i], 0.2, 0.2, mask[i], denominator=mask.sum())[0].backward()

    def run():
        if whole:
            logprobs = head(ts.hidden_states()).log_softmax(-1)
            backward(torch.arange(32), logprobs.gather(-1, tokens[..., None])[..., 0])
        else:
            for i, logprobs in ts.score_in_pieces(setup.args, setup.model, prompts, range(32), tokens, mask):
                backward(i, logprobs)

    before = peak_memory()
    return timed(run)[1], peak_memory() - before


def losses(threads, vocabulary, repeats, length=256):
    rounds = [[alone(loss_cost, whole, vocabulary, length, threads) for whole in (False, True)] for _ in range(repeats)]
    for at, what, unit, factor, target in ((1, "peak memory", "GiB", 2**-30, "<= 0.067"), (0, "time", "s", 1, "<= 1")):
        ours, whole = ([cost[at] * factor for cost in costs] for costs in zip(*rounds))
        V, ratio = f"V={vocabulary}", median(ours) / median(whole)
        row("loss", V, f"{what}, ours (32 x {length} tokens)", ours, unit, ratio, target, threads)
        row("loss", V, f"{what}, all logits kept", whole, unit, 1.0, threads=threads)


def step_cost(G, length, vocabulary):
    """(seconds of each step, bytes on top of the model) for completions that all have this length; one thread."""
    torch.set_num_threads(1)
    setup = random_model(1, 4, G, (16, 32), math.inf, length, vocab_size=vocabulary, hidden_size=64, intermediate_size=192,
                         num_hidden_layers=2, num_attention_heads=4)
    ts.grade, optimizer, before = parity, ts.make_optimizer(setup.model), peak_memory()
    seconds = [ts.train_step(setup.args, "etr", 0, step, setup.model, setup.tokenizer, optimizer, setup.problems)[0]["seconds"]
               for step in range(REPEATS + 1)]
    return seconds[1:], peak_memory() - before


def growth():
    for name, sizes in GROWTH.items():
        costs = [alone(step_cost, **dict(BASE, **{name: size})) for size in sizes]
        seconds, memory = [cost[0] for cost in costs], [[cost[1] / 2**20] for cost in costs]
        for what, unit, runs in (("seconds", "s", seconds), ("memory", "MiB", memory)):
            medians = [median(run) for run in runs]
            for size, run in zip(sizes, runs):
                row("growth", f"{name}={size}", f"{what} of a step", run, unit, median(run) / medians[0])
            slope = linear_regression([math.log(x) for x in sizes], [math.log(x) for x in medians]).slope
            row("growth", name, f"{what}, slope", [slope], "", target="<= 1")


# ------------------------------------------------------------------------------------------------------- GPU, plot, main

def decoding(device):
    """Tokens per second by G, and the weights' bytes read per second as a share of what a large copy moves."""
    wait = getattr(torch, device).synchronize
    block = torch.empty(2**30, dtype=torch.uint8, device=device)
    bandwidth = 2 * block.numel() / median(timed(lambda: (block.clone(), wait()))[1] for _ in range(2 * REPEATS))
    setup, rng = random_model(1, 8, 8, (32, 64), math.inf, 128, **SMOLLM2), torch.Generator(device).manual_seed(0)
    model, prompts = setup.model.to(device), [problem.prompt for problem in setup.problems]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for G in (8, 16, 32, 64):
        seconds = [timed(lambda: (ts.sample(model, prompts, G, 128, [1], rng), wait()))[1] for _ in range(REPEATS + 1)][1:]
        row("gpu", "135M", f"rollout, 8 x {G}, 128 tokens", [8 * G * 128 / s for s in seconds], "tokens/s")
        row("gpu", "135M", f"weights read; a copy: {bandwidth / 1e9:.0f}", [weights * 128 / s / 1e9 for s in seconds], "GB/s",
            weights * 128 / median(seconds) / bandwidth)


def draw():
    colors = ["#D55E00", "#000000", "#0072B2"]
    figure, axes = ts.plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")

    def ratios(part, what):
        """The smallest and the largest, or nothing."""
        found = sorted(float(line["ratio"]) for line in table if line["part"] == part and line["what"].startswith(what))
        return found[:1] + found[-1:]

    def bars(axis, part, column, models, names, labels, title, ylabel):
        skip = int(column == "ratio")  # of ours, which is the line at 1
        for at, model in enumerate(models):
            values = [float(line[column]) for line in table if (line["part"], line["model"]) == (part, model)][skip:]
            for i, (name, value) in enumerate(zip(names, values)):
                x = at + 0.85 * i / len(names)
                axis.bar(x, value, 0.8 / len(names), color=colors[i + skip], label=name if at == 0 else None)
                axis.text(x, value, f"{value:.3g}", ha="center", va="bottom", fontsize=12)
        axis.set_xticks([at + 0.425 * (1 - 1 / len(names)) for at in range(len(models))], labels)
        axis.set_title(title, fontsize=14)
        axis.set_ylabel(ylabel, fontsize=13)
        axis.legend(fontsize=12, frameon=False)

    both, labels = ["built-in", "135M"], ["built-in model", "135M"]
    bars(axes[0, 0], "rollout", "ratio", [*both, "135M, GSM8K"], ["generate", "generate_batch"],
         ["built-in", "135M, short\nprompts", "135M, GSM8K's\nprompts"],
         "Rollouts: {:.1f} to {:.1f} times theirs".format(*ratios("rollout", "generate")), "our tokens per second, theirs = 1")
    axes[0, 0].axhline(1, ls="--", color="#777777")
    trl = ratios("step", "TRL")
    bars(axes[0, 1], "step", "value", both, ["ours", "TRL"], labels,
         "A step: {:.1f} to {:.1f} times as fast as TRL's".format(*trl) if trl else "A training step", "seconds")
    bars(axes[0, 2], "loss", "value", ["V=49152", "V=151936"], ["ours", "all logits kept"], ["V = 49,152", "V = 151,936"],
         "The loss: 1/{:.0f} to 1/{:.0f} of the memory".format(*(1 / ratio for ratio in reversed(ratios("loss", "peak memory, ours")))),
         "peak memory (GiB),\n32 x 256 tokens")
    for axis, what in ((axes[1, 0], "seconds"), (axes[1, 1], "memory")):
        slopes = []
        for name, color in zip(GROWTH, colors):
            lines = [line for line in table if line["model"].split("=")[0] == name and what in line["what"]]
            *costs, slope = [float(line["value"]) for line in lines]
            slopes.append(slope)
            x, y = ([value / values[0] for value in values] for values in (GROWTH[name], costs))
            axis.plot(x, y, "o-", color=color, lw=2.5, label=f"{name}: slope {slope:.2f}")
        axis.plot([1, 8], [1, 8], ls="--", color="#777777", label="linear")
        ticks = [1, 2, 4, 8]
        axis.set(xscale="log", yscale="log", xticks=ticks, xticklabels=ticks, yticks=ticks, yticklabels=ticks)
        axis.minorticks_off()
        axis.set_xlabel("size, smallest = 1", fontsize=13)
        axis.set_ylabel("cost, smallest = 1", fontsize=13)
        axis.set_title(f"A step's {what}: slopes of {min(slopes):.1f} to {max(slopes):.1f}", fontsize=14)
        axis.legend(fontsize=12, frameon=False)
    lines = [line for line in table if line["part"] == "limit"]
    for i, line in enumerate(lines):
        axes[1, 2].barh(i, 100 * float(line["ratio"]), color=colors[0])
        axes[1, 2].text(100 * float(line["ratio"]), i, f" {float(line['value']):.3g} GFLOP/s", va="center", fontsize=12)
    axes[1, 2].set_yticks(range(len(lines)), [f"{line['model']}, {line['what'].split(';')[0]}" for line in lines])
    axes[1, 2].set_xlim(0, 100)
    axes[1, 2].set_xlabel("% of a large matrix product's speed", fontsize=13)
    axes[1, 2].set_title("{:.0%} to {:.0%} of the machine's limit".format(*ratios("limit", "")), fontsize=14)
    for axis in axes.flat:
        axis.tick_params(labelsize=12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "benchmark.png", dpi=110)


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} threads for the larger models\n")
    print(" ".join(name.ljust(width) for name, width in COLUMNS.items()))
    losses(threads, 49152, REPEATS)
    losses(threads, 151936, 1)
    growth()
    demo()
    small = built_in()
    rollouts(small)
    steps(small)
    rollouts(random_model(threads, 4, 8, (24, 48), 24, 64, **SMOLLM2))
    rollouts(random_model(threads, 4, 8, GSM8K_PROMPTS, 24, 64, "135M, GSM8K", **SMOLLM2))
    steps(random_model(threads, 4, 4, (12, 24), 16, 48, **SMOLLM2))
    if torch.cuda.is_available():
        decoding("cuda")
    draw()


if __name__ == "__main__":
    main()
