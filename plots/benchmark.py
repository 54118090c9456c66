"""What train_small.py costs, beside what people would use instead: `python plots/benchmark.py` (about ten minutes on two idle cores).

Prints one table, saves it as benchmark.csv and draws benchmark.png, both beside this file. Contestants do the same work, take turns in
one process, and are compared by medians. Row by row:

    rollout   useful tokens per second of train_small.sample, generate() and generate_batch() (continuous batching)
    step      one training step (rollout, old log-probabilities, 4 updates) against TRL's GRPOTrainer
    loss      peak memory and time of the loss and its gradient against logits kept whole, each in a process of its own
    growth    how time and memory of a step grow with G, length and vocabulary: the slope in a log-log plot, 1 is linear
    limit     floating-point operations per second of rollouts and updates, as a share of a large matrix product's

The models are the built-in one and a random one in the shape of SmolLM2-135M whose end token has a bias that makes lengths ragged:
geometric, most are short and a few are cut off. TRL (pip install trl) is left out where it is not installed.
"""

import csv
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402

import etr  # noqa: E402
import train_small as ts  # noqa: E402

plt = ts.plt
REPEATS, GROWTH_REPEATS, LOSS_REPEATS = 5, 5, 3
HERE, UPDATES, OURS, THEIRS = Path(__file__).parent, 4, "#D55E00", ["#000000", "#0072B2"]
Setup = namedtuple("Setup", "name threads args model tokenizer problems")  # everything a training step needs
rows = []  # of the table


def row(part, model, what, value, unit, ratio=None, target="", threads=1, repeats=1, spread=""):
    """Adds a line to the table and saves all of it: an interrupted run leaves what it has measured."""
    rows.append(dict(part=part, model=model, what=what, value=f"{value:.4g}", unit=unit, ratio="" if ratio is None else f"{ratio:.3g}",
                     target=target, threads=threads, repeats=repeats, spread=spread))
    with open(HERE / "benchmark.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    line = rows[-1]
    print(f"{part:8s} {model:10s} {what:44s} {line['value']:>9s} {unit:9s} {line['ratio']:>7s} {target:9s} {threads:3d} {repeats:3d}  {spread}",
          flush=True)


def spread(values):
    return f"{min(values):.3g}..{max(values):.3g}"


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def take_turns(contestants, repeats=REPEATS):
    """{name: its results}, after one call each that does not count; contestants are {name: function}."""
    results = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, work in contestants.items():
            result = work()
            if repeat:
                results[name].append(result)
    return results


# ---------------------------------------------------------------------------------------------------------------- models

def built_in():
    """The demo's model after a short warm start, so that its completions have their natural lengths."""
    args = ts.parse_args(["--updates-per-step", str(UPDATES), "--warmup-steps", "150"])
    problems = ts.load_problems(args)["train"]
    model, tokenizer = ts.load_model(args, 0)
    problems = ts.encode(args, tokenizer, problems)
    with tempfile.TemporaryDirectory() as args.out:
        ts.warm_up(args, 0, model, tokenizer, problems)
    return Setup("built-in", 1, args, model, tokenizer, problems[:args.prompts_per_step])


def random_model(name, threads, prompts, group_size, prompt_lengths, mean_length, longest, **config):
    """A random model whose completions have geometric lengths with this mean, cut off at `longest`. Its words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**config, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(config.hidden_size, config.vocab_size)
    torch.nn.init.zeros_(head.bias)
    head.weight = model.get_input_embeddings().weight
    head.bias.data[1] = math.log(config.vocab_size / mean_length) if mean_length < math.inf else -1e4
    model.set_output_embeddings(head)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    args = ts.parse_args(["--updates-per-step", str(UPDATES), "--group-size", str(group_size), "--prompts-per-step", str(prompts),
                          "--max-new-tokens", str(longest), "--learning-rate", "1e-6"])
    ids = [torch.randint(2, config.vocab_size, (int(length),)).tolist() for length in torch.linspace(*prompt_lengths, prompts)]
    problems = [ts.Problem(" ".join(map(str, prompt)), "", "", prompt) for prompt in ids]
    return Setup(name, threads, args, model, tokenizer, problems)


def smollm2(prompts, group_size, prompt_lengths, mean_length, longest):
    return random_model("135M", torch.get_num_threads(), prompts, group_size, prompt_lengths, mean_length, longest, vocab_size=49152,
                        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)


def parity(task, completion, gold):
    return float(len(completion.split()) % 2)  # a reward that costs nothing and is mixed in every group


def flops(setup, prompt_tokens, tokens):
    """Of a forward pass, attention's own products left out; the head is needed at completion tokens only."""
    head = setup.model.get_input_embeddings().weight.numel()
    layers = sum(p.numel() for p in setup.model.base_model.parameters()) - head
    return 2 * (layers * (prompt_tokens + tokens) + head * tokens)


def matrix_product(threads):
    """Floating-point operations per second of a 2048 x 2048 product."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / statistics.median(seconds(lambda: a @ a) for _ in range(2 * REPEATS))


# ------------------------------------------------------------------------------------------------------ rollouts and steps

def rollouts(setup):
    """Useful tokens per second: those up to and including the first end token."""
    torch.set_num_threads(setup.threads)
    model, args, eos = setup.model, setup.args, setup.tokenizer.eos_token_id
    prompts, G, rng = [problem.prompt for problem in setup.problems], args.group_size, torch.Generator().manual_seed(0)
    config = transformers.GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=args.max_new_tokens,
                                           num_return_sequences=G, eos_token_id=eos, pad_token_id=setup.tokenizer.pad_token_id)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Left to itself on a CPU it makes a cache as large as memory allows and is fifty times slower: size it to the work.
    pages = len(prompts) * G * (-(-(width + args.max_new_tokens) // 32) + 1)
    batching = transformers.ContinuousBatchingConfig(page_size=32, num_blocks=pages, max_batch_tokens=max(256, len(prompts) * G))

    def ours():
        return int(ts.sample(model, prompts, G, args.max_new_tokens, [eos], rng).mask.sum())

    def generate():
        ended = (model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:] == eos).long()
        return int((ended.cumsum(1) - ended == 0).sum())

    def generate_batch():
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        assert len(outputs) == len(prompts) * G, "generate_batch lost completions"
        return sum(len(output.generated_tokens) for output in outputs.values())

    def rate(work):
        started = time.perf_counter()
        return work() / (time.perf_counter() - started)

    rates = take_turns({work.__name__: lambda work=work: rate(work) for work in (ours, generate, generate_batch)})
    median = {name: statistics.median(values) for name, values in rates.items()}
    lengths = ts.sample(model, prompts, G, args.max_new_tokens, [eos], rng).mask.sum(1).float()
    where = f"{len(prompts)} x {G}, length {lengths.mean():.0f}, at most {args.max_new_tokens}"
    for name, target in (("ours", ""), ("generate", ">= 2.5"), ("generate_batch", ">= 1.2")):
        row("rollout", setup.name, f"{name} ({where})" if name == "ours" else name, median[name], "tokens/s", median["ours"] / median[name],
            target, setup.threads, REPEATS, spread(rates[name]))
    tokens, prompt_tokens = float(lengths.sum()), sum(map(len, prompts))
    limit(setup, "rollout", flops(setup, prompt_tokens, tokens) / tokens * median["ours"])


def limit(setup, what, achieved):
    peak = matrix_product(setup.threads)
    row("limit", setup.name, f"{what}, of a matrix product's {peak / 1e9:.0f}", achieved / 1e9, "GFLOP/s", achieved / peak, "", setup.threads, REPEATS)


def our_step(setup, optimizer, step):
    """Runs one training step; returns its metrics and the seconds of its rollout."""
    original, spent = ts.sample, []

    def timed(*args, **kwargs):
        started = time.perf_counter()
        result = original(*args, **kwargs)
        spent.append(time.perf_counter() - started)
        return result

    ts.sample = timed
    try:
        metrics = ts.train_step(setup.args, "etr", 0, step, setup.model, setup.tokenizer, optimizer, setup.problems)[0]
    finally:
        ts.sample = original
    return metrics, sum(spent)


def steps(setup):
    """One training step of ours and of TRL in turn: TRL's trainer runs, and we step in its callback, outside its clock."""
    torch.set_num_threads(setup.threads)
    args, ours, theirs, rollout, clock = setup.args, [], [], [], [0.0]
    P, G, T = args.prompts_per_step, args.group_size, args.max_new_tokens
    cuts = min(ts.MINIBATCHES, P)
    optimizer, ts.grade = ts.make_optimizer(setup.model), parity

    def step_ours():
        metrics, sampling = our_step(setup, optimizer, len(ours) + 1)
        ours.append(metrics["seconds"])
        rollout.append(sampling)
        return metrics

    try:
        import datasets
        import trl
    except ImportError:
        print("trl is not installed: its training step is left out")
        for _ in range(REPEATS + 1):
            metrics = step_ours()
    else:
        class Turns(transformers.TrainerCallback):
            def on_step_begin(self, _, state, *rest, **more):
                if state.global_step % UPDATES == 0:
                    clock[0] = time.perf_counter()

            def on_step_end(self, _, state, *rest, **more):
                nonlocal metrics
                if state.global_step % UPDATES == 0:
                    theirs.append(time.perf_counter() - clock[0])
                    metrics = step_ours()

        metrics = None
        with tempfile.TemporaryDirectory() as folder:
            config = trl.GRPOConfig(
                output_dir=folder, per_device_train_batch_size=P * G // cuts, steps_per_generation=cuts, num_iterations=UPDATES // cuts,
                num_generations=G, max_completion_length=T, max_steps=UPDATES * (REPEATS + 1), learning_rate=args.learning_rate,
                lr_scheduler_type="constant", temperature=1.0, top_k=0, top_p=1.0, beta=0.0, epsilon=0.2, loss_type="dapo",
                bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
                disable_tqdm=True, shuffle_dataset=False, dataloader_pin_memory=False)
            trainer = trl.GRPOTrainer(
                model=setup.model, args=config, processing_class=setup.tokenizer, callbacks=[Turns()],
                reward_funcs=lambda completions, **_: [parity("", text, "") for text in completions],
                train_dataset=datasets.Dataset.from_dict(dict(prompt=[problem.question for problem in setup.problems])))
            trainer.train()
        setup.model.eval()
    ours, rollout, theirs = ours[1:], rollout[1:], theirs[1:]
    median, what = statistics.median(ours), f"{P} x {G}, {metrics['completion_length_mean']:.0f} tokens, {UPDATES} updates"
    row("step", setup.name, f"ours ({what})", median, "s", 1.0, "", setup.threads, REPEATS, spread(ours))
    if theirs:
        row("step", setup.name, "TRL GRPOTrainer", statistics.median(theirs), "s", statistics.median(theirs) / median, ">= 2", setup.threads,
            REPEATS, spread(theirs))

    rewards = (torch.rand(P, G) < 0.5).float()
    def bounds():
        advantages = etr.group_advantages(rewards)
        etr.elastic_clip_bounds(advantages, etr.variance_budgets(rewards))
    own = statistics.median(seconds(bounds) for _ in range(100))
    row("step", setup.name, "ETR's advantages, budgets and bounds", own, "s", own / median, "<= 0.01", setup.threads, 100)
    updating = statistics.median(total - sampling for total, sampling in zip(ours, rollout))
    tokens, prompt_tokens = metrics["completion_length_mean"] * P * G, sum(len(problem.prompt) for problem in setup.problems)
    limit(setup, "update", 3 * flops(setup, prompt_tokens, tokens) * UPDATES / cuts / updating)


# ------------------------------------------------------------------------------------------------------- memory and growth

def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alone(work, *args):
    """Calls work(*args) in a process of its own, that has loaded the libraries and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "train_small"])
    with context.Pool(1) as pool:
        return pool.apply(work, args)


def loss_cost(vocabulary, whole, threads, length):
    """(seconds, bytes above what the model takes) of loss and gradient for 32 completions. The model has no layers: only a head."""
    torch.set_num_threads(threads)
    setup = random_model("", threads, 4, 8, (8, 8), math.inf, length, vocab_size=vocabulary, hidden_size=576, intermediate_size=576,
                         num_hidden_layers=0, num_attention_heads=9)
    setup.args.micro_batch_tokens = 10**9
    prompts = [problem.prompt for problem in setup.problems for _ in range(8)]
    tokens, mask = torch.randint(2, vocabulary, (32, length)), torch.ones(32, length, dtype=torch.bool)
    A, old = torch.linspace(-1, 1, 32), torch.full((32, length), -math.log(vocabulary))
    for parameter in setup.model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def backward(logprobs, i):
        etr.surrogate_loss(logprobs, old[i], A[i], 0.2, 0.2, mask[i], denominator=mask.sum())[0].backward()

    before, started = peak_memory(), time.perf_counter()
    if whole:
        hidden = setup.model.base_model(torch.cat([torch.tensor(prompts), tokens], 1)).last_hidden_state[:, 7:-1]
        logprobs = setup.model.get_output_embeddings()(hidden).log_softmax(-1)
        backward(logprobs.gather(-1, tokens[..., None])[..., 0], torch.arange(32))
    else:
        for i, logprobs in ts.score_in_pieces(setup.args, setup.model, prompts, range(32), tokens, mask):
            backward(logprobs, i)
    return time.perf_counter() - started, peak_memory() - before


def losses(threads, length=256):
    for vocabulary in (49152, 151936):
        results = {True: [], False: []}
        for _ in range(LOSS_REPEATS if vocabulary < 1e5 else 1):
            for whole in results:
                results[whole].append(alone(loss_cost, vocabulary, whole, threads, length))
        time_of, memory = ({whole: statistics.median(r[i] for r in results[whole]) for whole in results} for i in (0, 1))
        model, n = f"V={vocabulary}", len(results[True])
        row("loss", model, f"memory, ours (32 x {length} tokens)", memory[False] / 2**30, "GiB", memory[False] / memory[True], "<= 0.067", threads, n)
        row("loss", model, "memory, whole logits", memory[True] / 2**30, "GiB", 1.0, "", threads, n)
        row("loss", model, "time, ours", time_of[False], "s", time_of[False] / time_of[True], "<= 1", threads, n, spread([r[0] for r in results[False]]))
        row("loss", model, "time, whole logits", time_of[True], "s", 1.0, "", threads, n, spread([r[0] for r in results[True]]))


def step_cost(G, length, vocabulary):
    """(median seconds, bytes above what the model takes) of training steps in which all completions have this length."""
    torch.set_num_threads(1)
    setup = random_model("", 1, 4, G, (16, 32), math.inf, length, vocab_size=vocabulary, hidden_size=64, intermediate_size=192,
                         num_hidden_layers=2, num_attention_heads=4)
    ts.grade, optimizer, before = parity, ts.make_optimizer(setup.model), peak_memory()
    return statistics.median(our_step(setup, optimizer, step)[0]["seconds"] for step in range(1, GROWTH_REPEATS + 2)), peak_memory() - before


GROWTH = {"G": (0, [8, 16, 32, 64]), "length": (1, [32, 64, 128, 256]), "vocabulary": (2, [6144, 12288, 24576, 49152])}
BASE = (8, 64, 4096)


def growth():
    for name, (place, values) in GROWTH.items():
        costs = [alone(step_cost, *BASE[:place], value, *BASE[place + 1:]) for value in values]
        for what, unit, measured in (("seconds", "s", [c[0] for c in costs]), ("memory", "MiB", [c[1] / 2**20 for c in costs])):
            logs = [[math.log(x) for x in xs] for xs in (values, measured)]
            slope = statistics.linear_regression(*logs).slope
            for value, cost in zip(values, measured):
                row("growth", f"{name}={value}", what, cost, unit, cost / measured[0], "", 1, GROWTH_REPEATS)
            row("growth", name, f"{what}, slope", slope, "log/log", None, "<= 1", 1, GROWTH_REPEATS)


# ------------------------------------------------------------------------------------------------------------ GPU and plot

def on_gpu():
    """Decoding on a GPU: tokens per second by G, and weight bytes read per second as a share of what a large copy moves."""
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")

    def copy():
        block.clone()
        torch.cuda.synchronize()

    bandwidth = 2 * block.numel() / statistics.median(seconds(copy) for _ in range(2 * REPEATS))
    setup = smollm2(8, 8, (32, 64), math.inf, 128)
    model, rng = setup.model.cuda(), torch.Generator("cuda").manual_seed(0)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    for G in (8, 16, 32, 64):
        spent = [seconds(lambda: ts.sample(model, [p.prompt for p in setup.problems], G, 128, [1], rng).mask.sum().item())
                 for _ in range(REPEATS + 1)][1:]
        median = statistics.median(spent)
        row("gpu", "135M", f"rollout, 8 x {G}, length 128", 8 * G * 128 / median, "tokens/s", None, "", 0, REPEATS)
        row("gpu", "135M", f"weights read, of a copy's {bandwidth / 1e9:.0f}", weights * 128 / median / 1e9, "GB/s",
            weights * 128 / median / bandwidth, "", 0, REPEATS)


def draw():
    pick = lambda part, model: [r for r in rows if r["part"] == part and r["model"] == model]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    for axis, part, names, unit in ((axes[0, 0], "rollout", ["ours", "generate", "generate_batch"], "useful tokens/s, ours = 1"),
                                    (axes[0, 1], "step", ["ours", "TRL GRPOTrainer"], "time of a training step, ours = 1")):
        for at, model in enumerate(["built-in", "135M"]):
            for i, line in enumerate(pick(part, model)[:len(names)]):
                ratio = 1 / float(line["ratio"]) if part == "rollout" else float(line["ratio"])
                axis.bar(at + 0.27 * i, ratio, 0.25, color=([OURS] + THEIRS)[i], label=names[i] if at == 0 else None)
                axis.text(at + 0.27 * i, ratio, f"{float(line['value']):.3g}", ha="center", va="bottom", fontsize=12)
        axis.set_xticks([0.135 * (len(names) - 1) + at for at in (0, 1)], ["built-in model", "135M"])
        axis.set_ylabel(unit, fontsize=13)
        axis.legend(fontsize=12, frameon=False)
    axes[0, 0].set_title("Rollouts: useful tokens per second", fontsize=14)
    axes[0, 1].set_title("Training step: seconds", fontsize=14)
    for at, vocabulary in enumerate((49152, 151936)):
        for i, line in enumerate(pick("loss", f"V={vocabulary}")[:2]):
            axes[0, 2].bar(at + 0.3 * i, float(line["value"]), 0.28, color=(OURS, THEIRS[0])[i], label=(("ours", "whole logits")[i] if at == 0 else None))
            axes[0, 2].text(at + 0.3 * i, float(line["value"]), f"{float(line['value']):.2g}", ha="center", va="bottom", fontsize=12)
    axes[0, 2].set_xticks([0.15, 1.15], ["V = 49,152", "V = 151,936"])
    axes[0, 2].set_ylabel("GiB for 32 x 256 tokens", fontsize=13)
    axes[0, 2].set_title("Loss and gradient: peak memory", fontsize=14)
    axes[0, 2].legend(fontsize=12, frameon=False)
    colors = dict(zip(GROWTH, ["#D55E00", "#0072B2", "#009E73"]))
    for axis, what in ((axes[1, 0], "seconds"), (axes[1, 1], "memory")):
        for name, (_, values) in GROWTH.items():
            costs = [float(r["ratio"]) for r in rows if r["part"] == "growth" and r["model"].startswith(f"{name}=") and r["what"] == what]
            slope = next(float(r["value"]) for r in rows if r["model"] == name and r["what"] == f"{what}, slope")
            axis.plot([value / values[0] for value in values], costs, "o-", color=colors[name], lw=2.5, label=f"{name}: slope {slope:.2f}")
        axis.plot([1, 8], [1, 8], ls="--", color="#777777", label="linear")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("size, smallest = 1", fontsize=13)
        axis.set_ylabel("cost, smallest = 1", fontsize=13)
        axis.set_title(f"A training step's {what}", fontsize=14)
        axis.legend(fontsize=12, frameon=False)
    lines = [r for r in rows if r["part"] == "limit"]
    axes[1, 2].barh([f"{r['model']}, {r['what'].split(',')[0]}" for r in lines], [100 * float(r["ratio"]) for r in lines], color=OURS)
    for i, r in enumerate(lines):
        axes[1, 2].text(100 * float(r["ratio"]), i, f" {float(r['value']):.3g} GFLOP/s", va="center", fontsize=12)
    axes[1, 2].set_xlim(0, 100)
    axes[1, 2].set_xlabel("% of a large matrix product on the same cores", fontsize=13)
    axes[1, 2].set_title("Against the machine's limit", fontsize=14)
    for axis in axes.flat:
        axis.tick_params(labelsize=12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "benchmark.png", dpi=110)


def main():
    transformers.logging.set_verbosity_error()
    cores = torch.get_num_threads()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {cores} cores")
    print(f"{'part':8s} {'model':10s} {'what':44s} {'value':>9s} {'unit':9s} {'ratio':>7s} {'target':9s} thr rep  min..max")
    losses(cores)
    growth()
    small = built_in()
    rollouts(small)
    steps(small)
    rollouts(smollm2(4, 8, (32, 64), 32, 96))
    steps(smollm2(4, 4, (16, 32), 24, 64))
    if torch.cuda.is_available():
        on_gpu()
    draw()


if __name__ == "__main__":
    main()
