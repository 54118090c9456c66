"""The evidence: what elastic bounds do against GRPO on the built-in task. From nothing to every csv and png beside this file:

    OMP_NUM_THREADS=1 python plots/evidence.py all      run, collect and draw: TIME_TOTAL, resumable
    python plots/evidence.py run                        trains what is missing, under runs/evidence
    python plots/evidence.py run final 0 5              one stage, its seeds 0 to 4: another process may take the others
    python plots/evidence.py collect                    runs -> plots/*.csv
    python plots/evidence.py draw                       plots/*.csv -> plots/*.png, in seconds

Stages. `regimes`: learning rate, updates per batch and group size, so that GRPO gets its best setting; one tuning seed.
`map`: micro and macro elasticity, other readings of the abstract and fixed clip radii in that setting; tuning seeds.
`final`: the arms on fresh seeds, by which nothing was chosen. Within a seed all arms share the warm start and the prompts.
"""

import argparse
import csv
import json
import os
import shutil
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch

PLOTS = Path(__file__).resolve().parent
sys.path.insert(0, str(PLOTS.parent))
import etr  # noqa: E402
import train_small  # noqa: E402
from train_small import ARMS, Arm  # noqa: E402

import matplotlib.pyplot as plt  # noqa: E402

# ------------------------------------------------------------------------------------------------------------------ arms

GRID = (0.0, 0.5, 1.0)  # elasticities of the map
SHARED = {(0.0, 0.0): "grpo", (1.0, 1.0): "etr", (1.0, 0.0): "micro", (0.0, 1.0): "macro"}
POWERS = {(micro, macro): SHARED.get((micro, macro), f"power-{micro:g}-{macro:g}") for micro in GRID for macro in GRID}
FIXED = {"fixed-0.1": 0.1, "fixed-0.4": 0.4}  # clip radii without elasticity: a gain that these show too is not ETR's
FORMS = {  # other readings of "scaled by advantage magnitude" and "group variance": factor on the radius, from A_hat and p
    "tanh": lambda A, p: torch.tanh(A.abs()) / 0.76 * (p * (1 - p) / 0.18).sqrt(),
    "only-wider": lambda A, p: 1 + 0.5 * A.abs() + 0.5 * 4 * p * (1 - p),
    "right-only": lambda A, p: torch.where(A > 0, A.abs() * (p * (1 - p) / 0.18).sqrt(), 1.0),
}
COLORS = {"fixed-0.1": "#999999", "fixed-0.4": "#56B4E9", "tanh": "#CC79A7", "only-wider": "#CC79A7", "right-only": "#CC79A7"}
for name in [*POWERS.values(), *FIXED, *FORMS]:
    ARMS.setdefault(name, Arm(0.0, 0.0, 1.0, 1.0, COLORS.get(name, "#CC79A7")))
for (micro, macro), name in POWERS.items():
    ARMS[name] = ARMS[name]._replace(micro=micro, macro=macro)
power_bounds, evaluate, surrogate_loss = train_small.clip_bounds, train_small.evaluate, etr.surrogate_loss


def clip_bounds(args, arm, rewards, advantages):
    if arm not in FIXED and arm not in FORMS:
        return power_bounds(args, arm, rewards, advantages)
    if arm in FIXED:
        radius = torch.full_like(advantages, FIXED[arm])
    else:
        pass_rate = rewards.mean(1, keepdim=True).expand_as(advantages)
        radius = args.clip_low * FORMS[arm](advantages, pass_rate).clamp(max=args.scale_max)
    return radius, radius


def evaluate_at_once(args, *rest):
    return evaluate(argparse.Namespace(**{**vars(args), "prompts_per_step": args.eval_problems}), *rest)  # 40 % faster


undecided = Counter()


def counting_loss(logprobs, old_logprobs, advantages, low, high, mask, denominator=None):
    """etr.surrogate_loss, which also counts what is clipped of the tokens that the sampling policy gave less than 0.9.

    Most tokens of the task are certain, whatever the policy does; their ratio stays 1 and dilutes the clip fraction.
    """
    ratio, A, open_ = (logprobs - old_logprobs).exp().detach(), advantages[:, None], mask & (old_logprobs < np.log(0.9))
    below, above = etr.clipped_tokens(ratio, A, low[:, None], high[:, None])
    undecided.update(tokens=int((open_ & (A != 0)).sum()), clipped=int(((below | above) & open_).sum()), all=int((mask & (A != 0)).sum()))
    return surrogate_loss(logprobs, old_logprobs, advantages, low, high, mask, denominator)


train_small.clip_bounds, train_small.evaluate, etr.surrogate_loss = clip_bounds, evaluate_at_once, counting_loss
train_small.draw = train_small.print_table = lambda *_: None  # the pictures of a single run

# ------------------------------------------------------------------------------------------------------------------ runs

RUNS = PLOTS.parent / "runs/evidence"
SETTING = (32, 8, 16, 2e-4)  # prompts in a batch, completions of each, updates per batch, learning rate
REGIMES = [(16, 8, 16, 1e-4), (16, 8, 16, 2e-4), (16, 16, 8, 3e-4), (32, 8, 8, 3e-4), (32, 8, 8, 6e-4), (32, 8, 16, 1e-4), SETTING,
           (32, 8, 16, 3e-4), (32, 8, 32, 1e-4), (32, 8, 32, 2e-4)]
Stage = namedtuple("Stage", "seeds steps eval_every settings arms")
STAGES = {
    "regimes": Stage([100], 20, 10, REGIMES, ["grpo"]),
    "map": Stage([100, 101], 24, 6, [SETTING], ["grpo", "etr", "fixed-0.4", "micro", "macro", *FORMS, "fixed-0.1",
                                                     *(name for name in POWERS.values() if name.startswith("power"))]),
    "final": Stage([*range(10)], 30, 5, [SETTING], ["grpo", "etr", "micro", "macro", "clip-higher", "fixed-0.4"]),
    "reuse": Stage([*range(5)], 20, 5, [(32, 8, 32, 2e-4)], ["grpo", "etr", "fixed-0.1", "fixed-0.4"]),
}


def folder(stage, setting, arm, seed):
    return RUNS / stage / "{}x{}-{}-{:g}".format(*setting) / f"{arm}-{seed}"


def train(stage, setting, arm, seed):
    """One arm of one seed, from the seed's warm start, unless it is there already."""
    out, shared = folder(stage, setting, arm, seed), [f"warmup-seed{seed}.pt", f"before-seed{seed}.json"]
    if (out / "results.json").exists():
        return
    for directory in (out, RUNS / "warm"):
        directory.mkdir(parents=True, exist_ok=True)
    for name in shared:
        if (RUNS / "warm" / name).exists():
            shutil.copy(RUNS / "warm" / name, out)
    undecided.clear()
    options = dict(zip(("prompts-per-step", "group-size", "updates-per-step", "learning-rate"), setting), steps=STAGES[stage].steps, seed=seed,
                   out=out, algos=arm)
    options["eval-every"] = STAGES[stage].eval_every
    code = train_small.main([f"--{name}={value}" for name, value in options.items()] + ["--resume"] * (out / "config.json").exists())
    if code:
        sys.exit(code)
    for name in shared:
        shutil.copy(out / name, RUNS / "warm")
    (out / "undecided.json").write_text(json.dumps(undecided))


def run(only=None, first=0, last=None):
    for name, stage in STAGES.items():
        if name == (only or name):
            for seed in stage.seeds[int(first):last and int(last)]:
                for setting in stage.settings:
                    for arm in stage.arms:
                        train(name, setting, arm, seed)
    if only in (None, "samples"):
        sample_16()


def sample_16():
    """pass@k up to k = 16 of the finished models, for figure (d): {seed: {arm: [pass@1, ..., pass@16]}}."""
    train_small.EVAL_SAMPLES, stage = 16, STAGES["final"]
    for arm in (None, "grpo", "etr", "fixed-0.4"):
        for seed in stage.seeds:
            out = folder("final", SETTING, arm or "grpo", seed)
            path = out / ("pass16.json" if arm else "pass16_before.json")
            if path.exists() or not (out / "results.json").exists():
                continue
            args = train_small.parse_args(["--out", str(out)])
            model, tokenizer = train_small.load_model(args, seed)
            if arm:
                model = type(model).from_pretrained(out / f"{arm}-seed{seed}" / "model").eval()
            else:
                train_small.warm_up(args, seed, model, tokenizer, [])  # finished, so it only loads
            test = train_small.encode(args, tokenizer, train_small.load_problems(args)["test"])
            path.write_text(json.dumps(evaluate_at_once(args, seed, model, tokenizer, test)["passk"]))


# ------------------------------------------------------------------------------------------------------------------- csv

def save_csv(name, rows):
    if not rows:
        return print(f"{name}.csv: no finished seed, left as it was")
    with open(PLOTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)


def load_csv(name):
    number = lambda text: float(text) if text.replace(".", "").replace("-", "").replace("e", "").isdigit() else text
    with open(PLOTS / f"{name}.csv", newline="") as file:
        return [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def finished(stage):
    """(setting, arm, seed, metrics of every step, row of results.json, folder) of the seeds whose arms are all there."""
    for setting in STAGES[stage].settings:
        for seed in STAGES[stage].seeds:
            outs = {arm: folder(stage, setting, arm, seed) for arm in STAGES[stage].arms}
            if all((out / "results.json").exists() for out in outs.values()):
                for arm, out in outs.items():
                    row = json.loads((out / "results.json").read_text())["arms"][arm][0]
                    yield setting, arm, seed, train_small.load_runs(out)[arm][seed], row, out


def area(lines):
    """Area under the validation pass@1 curve, divided by its length: the mean accuracy on the way."""
    points = [(line["step"], line["eval_pass1"]) for line in lines if "eval_pass1" in line]
    return float(np.trapezoid([y for _, y in points], [x for x, _ in points])) / points[-1][0]


def collect():
    save_csv("regimes", [dict(prompts=setting[0], group_size=setting[1], updates=setting[2], learning_rate=setting[3], arm=arm, seed=seed,
                              pass1=row["pass1_after"], auc=area(lines), clip_fraction=row["clip_fraction_mean"], entropy=lines[-1]["entropy"])
                         for setting, arm, seed, lines, row, _ in finished("regimes")])
    save_csv("map", [dict(arm=arm, micro=ARMS[arm].micro, macro=ARMS[arm].macro, seed=seed, pass1=row["pass1_after"], auc=area(lines),
                          clip_fraction=row["clip_fraction_mean"], radius=radius(lines)) for _, arm, seed, lines, row, _ in finished("map")])
    ends, curves, classes = [], [], []
    for _, arm, seed, lines, row, out in finished("final"):
        counts = json.loads((out / "undecided.json").read_text())
        before, after = (json.loads(path.read_text()) if path.exists() else [] for path in (out / "pass16_before.json", out / "pass16.json"))
        ends.append(dict(arm=arm, seed=seed, pass1=row["pass1_after"], greedy=row["greedy_after"], pass8=row["passk_after"], auc=area(lines),
                         reward=float(np.mean([line["reward_mean"] for line in lines[1:]])),
                         entropy=float(np.mean([line["entropy"] for line in lines[-5:]])), clip_fraction=row["clip_fraction_mean"],
                         undecided=counts["tokens"] / counts["all"], undecided_clipped=counts["clipped"] / counts["tokens"], radius=radius(lines),
                         seconds=row["seconds"], pass1_before=row["pass1_before"], greedy_before=row["greedy_before"],
                         pass8_before=row["passk_before"], passk=" ".join(f"{x:.4f}" for x in after),
                         passk_before=" ".join(f"{x:.4f}" for x in before)))
        at = [line["step"] for line in lines if "eval_pass1" in line]
        for last, step in zip([0, *at], at):
            window = lines[last + 1:step + 1] or lines[:1]
            curves.append(dict(arm=arm, seed=seed, step=step, pass1=lines[step]["eval_pass1"], greedy=lines[step]["eval_greedy"],
                               reward=float(np.mean([line["reward_mean"] for line in window])),
                               entropy=float(np.mean([line["entropy"] for line in window])),
                               clip_fraction=float(np.mean([line["clip_fraction"] for line in window]))))
        sums = {name: np.sum([line["by_correct"][name] for line in lines[1:]], 0) for name in train_small.BY_CORRECT}
        classes += [dict(arm=arm, seed=seed, k=k, **{name: float(values[k]) for name, values in sums.items()})
                    for k in range(1, len(sums["kl"]) - 1)]
    for name, rows in (("final", ends), ("curves", curves), ("classes", classes)):
        save_csv(name, rows)


def radius(lines):
    """Root of the mean squared clip radius on the side that acts, over the tokens of informative groups and all updates."""
    sums = {name: np.sum([line["by_correct"][name][1:-1] for line in lines[1:]]) for name in train_small.BY_CORRECT}
    return float((sums["radius_squared"] / (sums["tokens_right"] + sums["tokens_wrong"]))**0.5)


# --------------------------------------------------------------------------------------------------------------- figures

GREY = "#555555"


def interval(values):
    """(mean, half-width of its 95 % t-interval)."""
    _, mean, half = train_small.mean_and_band([{0: value} for value in values])
    return float(mean[0]), float(half[0])


def by_seed(rows, arm, column):
    return {row["seed"]: row[column] for row in rows if row["arm"] == arm}


def difference(rows, arm, column, against="grpo"):
    """Paired difference in points (hundredths): (mean, half-width)."""
    ours, theirs = by_seed(rows, arm, column), by_seed(rows, against, column)
    return interval([100 * (ours[seed] - theirs[seed]) for seed in ours])


def say(mean, half, unit=" points"):
    return f"{mean:+.1f} ± {half:.1f}{unit}"


def panel(axis, title, xlabel, ylabel):
    axis.set_title(title, fontsize=14)
    axis.set_xlabel(xlabel, fontsize=13)
    axis.set_ylabel(ylabel, fontsize=13)
    axis.tick_params(labelsize=13)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def label_ends(axis, ends):
    """Labels lines at their right ends, {arm: (x, y)}, pushed apart where ends meet."""
    bottom, top = axis.get_ylim()
    at = -np.inf
    for arm, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        at = max(y, at + 0.065 * (top - bottom))
        axis.annotate(arm, (x, at), xytext=(6, 0), textcoords="offset points", color=ARMS[arm].color, fontsize=13, weight="bold", va="center",
                      annotation_clip=False)


def save(figure, name, title, caption):
    figure.suptitle(title, fontsize=16, weight="bold")
    figure.supxlabel(caption, fontsize=13, color=GREY)
    figure.savefig(PLOTS / f"{name}.png", dpi=110)
    plt.close(figure)


def band(axis, arm, curves):
    x, mean, half = train_small.mean_and_band(curves)
    axis.plot(x, mean, color=ARMS[arm].color, lw=2.5)
    axis.fill_between(x, mean - half, mean + half, color=ARMS[arm].color, alpha=0.18, lw=0)
    return x[-1], mean[-1]


def over(rows, arm, x, y, factor=1):
    """One {x: y} per seed."""
    curves = {}
    for row in rows:
        if row["arm"] == arm:
            curves.setdefault(row["seed"], {})[row[x]] = factor * row[y]
    return list(curves.values())


def draw_curves(ends, curves, n):
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, column, title, ylabel in ((axes[0], "pass1", "Held-out accuracy", "pass@1"),
                                        (axes[1], "entropy", "Policy entropy", "nats per token")):
        last = {arm: band(axis, arm, over(curves, arm, "step", column)) for arm in ("grpo", "etr")}
        panel(axis, title, "step (rollout batch of 256)", ylabel)
        label_ends(axis, last)
    axes[1].set_ylim(0)
    save(figure, "curves", f"ETR − GRPO at the end: {say(*difference(ends, 'etr', 'pass1'))} of pass@1",
         f"{n} paired seeds, bands: 95 % t-interval of the mean")


def draw_differences(ends, n):
    arms = [arm for arm in STAGES["final"].arms[::-1] if arm != "grpo"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 5.2), sharey=True, layout="constrained")
    columns = (("pass1", "pass@1 at the end"), ("auc", "mean pass@1 on the way"), ("greedy", "greedy at the end"))
    better = 0
    for axis, (column, title) in zip(axes, columns):
        for y, arm in enumerate(arms):
            mean, half = difference(ends, arm, column)
            better += mean > half
            axis.errorbar(mean, y, xerr=half, fmt="o", color=ARMS[arm].color, ms=8, lw=2.5, capsize=4)
            axis.annotate(say(mean, half, ""), (mean, y), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=12,
                          color=ARMS[arm].color)
        axis.axvline(0, color="#000000", lw=1)
        panel(axis, title, "points against GRPO", "")
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(-0.5, len(arms) - 0.3)
    save(figure, "differences", f"{better} of {3 * len(arms)} differences from GRPO are above their 95 % interval",
         f"{n} paired seeds, bars: 95 % t-interval of the paired difference, not corrected for {3 * len(arms)} comparisons")


def entropy_at(curves, arm, level):
    """{seed: entropy when the sampled accuracy first is `level`}, between the windows of training steps."""
    found = {}
    for seed in {row["seed"] for row in curves}:
        path = [(row["reward"], row["entropy"]) for row in curves if row["arm"] == arm and row["seed"] == seed]
        for (r0, e0), (r1, e1) in zip(path, path[1:]):
            if r0 < level <= r1:
                found[seed] = e0 + (e1 - e0) * (level - r0) / (r1 - r0)
                break
    return found


def draw_trade(curves, n):
    best = [max(row["reward"] for row in curves if (row["arm"], row["seed"]) == key) for key in {(row["arm"], row["seed"]) for row in curves}]
    level = np.floor(min(best) * 20) / 20  # a round accuracy that every run reached
    figure, axis = plt.subplots(figsize=(10, 5.6), layout="constrained")
    last = {}
    for arm in STAGES["final"].arms:
        reward, entropy = (train_small.mean_and_band(over(curves, arm, "step", column))[1] for column in ("reward", "entropy"))
        axis.plot(reward[1:], entropy[1:], "o-", color=ARMS[arm].color, lw=2.5, ms=5)
        last[arm] = reward[-1], entropy[-1]
    panel(axis, "", "accuracy of the sampled rollouts (means of 5 steps)", "entropy (nats per token)")
    label_ends(axis, last)
    ours, theirs = (entropy_at(curves, arm, level) for arm in ("etr", "grpo"))
    mean, half = interval([1000 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs])
    axis.axvline(level, color=GREY, ls="--", lw=1.5)
    save(figure, "trade", f"At accuracy {level:.2f}: ETR − GRPO {say(mean, half, ' millinats')} of entropy per token",
         f"means over {n} paired seeds; the first window reaches from the warm start to step 5")


def draw_pass_at_k(ends, n):
    rows = [row for row in ends if row["passk"]]
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    split = lambda text: [float(x) for x in str(text).split()]
    arms = [arm for arm in STAGES["final"].arms if any(row["arm"] == arm for row in rows)]
    curve = lambda arm, column: {row["seed"]: split(row[column]) for row in rows if row["arm"] == arm}
    ks = range(1, 17)
    grpo, last, gaps = curve("grpo", "passk"), {}, {}
    for arm in arms:
        last[arm] = band(axes[0], arm, [dict(zip(ks, values)) for values in curve(arm, "passk").values()])
        if arm != "grpo":
            gaps[arm] = band(axes[1], arm, [{k: 100 * (values[k - 1] - grpo[seed][k - 1]) for k in ks}
                                            for seed, values in curve(arm, "passk").items()])
    before = np.mean(list(curve("grpo", "passk_before").values()), 0)
    axes[0].plot(ks, before, color=GREY, lw=2, ls="--")
    axes[0].text(16, before[-1] - 0.04, "warm start", color=GREY, fontsize=13, ha="right", va="top")
    axes[1].axhline(0, color="#000000", lw=1)
    panel(axes[0], "After training", "k samples", "pass@k")
    panel(axes[1], "Paired difference", "k samples", "points against GRPO")
    label_ends(axes[0], last)
    label_ends(axes[1], gaps)
    mean, half = interval([100 * (values[-1] - grpo[seed][-1]) for seed, values in curve("etr", "passk").items()])
    save(figure, "pass_at_k", f"pass@16, ETR − GRPO: {say(mean, half)}", f"{n} paired seeds, 200 test problems, 16 samples each, 95 % t-intervals")


def draw_mechanism(classes, n):
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    total = lambda arm, column, k: sum(row[column] for row in classes if row["arm"] == arm and row["k"] == k)
    ks = sorted({row["k"] for row in classes})
    G = int(ks[-1]) + 1
    for arm in ("grpo", "etr"):
        for axis, kind in ((axes[0, 0], "right"), (axes[0, 1], "wrong")):
            axis.plot([k / G for k in ks], [100 * total(arm, f"clipped_{kind}", k) / total(arm, f"tokens_{kind}", k) for k in ks], "o-",
                      color=ARMS[arm].color, lw=2.5)
        tokens = np.array([total(arm, "tokens_right", k) + total(arm, "tokens_wrong", k) for k in ks])
        for axis, column in ((axes[1, 0], "radius_squared"), (axes[1, 1], "kl")):
            values = np.array([total(arm, column, k) for k in ks])
            axis.plot([k / G for k in ks], values / tokens * (1 if column == "radius_squared" else 1000), "o-", color=ARMS[arm].color, lw=2.5)
    for axis, title, ylabel in zip(axes.flat, ("Right answers clipped above", "Wrong answers clipped below", "KL budget: squared radius",
                                               "KL spent"), ("tokens (%)", "tokens (%)", "mean squared radius", "KL (millinats per token)")):
        panel(axis, title, "pass rate of the group, k/G", ylabel)
        axis.set_ylim(0)
        label_ends(axis, {arm: (line.get_xdata()[-1], line.get_ydata()[-1]) for arm, line in zip(("grpo", "etr"), axis.lines)})
    save(figure, "mechanism", mechanism_title(classes), f"sums over {n} seeds, all steps and updates; G = {G}")


def middle_share(classes, arm, column):
    """Share of a column's sum, in per cent, that goes to groups with pass rates from 3/8 to 5/8; one value per seed."""
    shares = []
    for seed in sorted({row["seed"] for row in classes}):
        rows = [row for row in classes if row["arm"] == arm and row["seed"] == seed]
        shares.append(100 * sum(row[column] for row in rows if 3 <= row["k"] <= 5) / sum(row[column] for row in rows))
    return shares


def mechanism_title(classes):
    radius, kl = (np.mean(middle_share(classes, "etr", column)) - np.mean(middle_share(classes, "grpo", column)) for column in ("radius_squared", "kl"))
    return f"Groups at 3/8 to 5/8: ETR gives {radius:+.1f} % of the budget, they spend {kl:+.1f} % of the KL"


def draw_map(rows):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained", width_ratios=(1, 1))
    n = len({row["seed"] for row in rows})
    cells = np.array([[difference(rows, POWERS[micro, macro], "auc") for micro in GRID] for macro in GRID])
    limit = max(1.0, abs(cells[..., 0]).max())
    left.imshow(cells[..., 0], cmap="PuOr", vmin=-limit, vmax=limit, origin="lower")
    for y, x in np.ndindex(3, 3):
        text = f"{cells[y, x, 0]:+.1f}\n± {cells[y, x, 1]:.1f}" if x or y else "GRPO"
        left.text(x, y, text, ha="center", va="center", fontsize=14, color="white" if abs(cells[y, x, 0]) > 0.6 * limit else "black")
    panel(left, "power form", "micro elasticity", "macro elasticity")
    left.grid(False)
    left.set_xticks(range(3), GRID)
    left.set_yticks(range(3), GRID)
    arms = [*FIXED, *FORMS][::-1]
    for y, arm in enumerate(arms):
        mean, half = difference(rows, arm, "auc")
        right.errorbar(mean, y, xerr=half, fmt="o", color=ARMS[arm].color, ms=8, lw=2.5, capsize=4)
        right.annotate(say(mean, half, ""), (mean, y), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=13)
    right.axvline(0, color="#000000", lw=1)
    panel(right, "other forms and fixed radii", "points against GRPO", "")
    right.set_yticks(range(len(arms)), arms)
    right.set_ylim(-0.5, len(arms) - 0.3)
    clear = sum(abs(mean) > half for mean, half in cells.reshape(-1, 2)[1:])
    save(figure, "map", f"Of 8 elasticities, {clear} differ from GRPO by more than their 95 % interval",
         f"mean pass@1 on the way, points against GRPO, {n} paired tuning seeds, 95 % t-intervals")


def draw():
    ends, curves, classes = load_csv("final"), load_csv("curves"), load_csv("classes")
    n = len({row["seed"] for row in ends})
    draw_curves(ends, curves, n)
    draw_differences(ends, n)
    draw_trade(curves, n)
    draw_pass_at_k(ends, n)
    draw_mechanism(classes, n)
    draw_map(load_csv("map"))


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in ("all", "run", "collect", "draw"):
        sys.exit(__doc__)
    if command in ("all", "run"):
        run(*sys.argv[2:])
    if command in ("all", "collect"):
        collect()
    if command in ("all", "draw"):
        draw()
