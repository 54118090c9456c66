"""The evidence: what elastic bounds do against GRPO on the built-in task. From nothing to every csv and png beside this file:

    OMP_NUM_THREADS=1 python plots/evidence.py all      run, collect and draw; resumable
    python plots/evidence.py run                        trains what is missing, under runs/evidence
    python plots/evidence.py run final 0 5              one stage, its first five seeds
    python plots/evidence.py collect                    runs -> plots/*.csv
    python plots/evidence.py draw                       plots/*.csv -> plots/*.png, in seconds

Stages. On tuning seeds: `map`, which tries elasticities, other readings of the abstract and fixed clip radii, and `regime-...`,
ETR and GRPO at other learning rates, updates per batch and group sizes. On fresh seeds: `final`, every arm at the learning
rate that suits GRPO best on the tuning seeds, and `fast`, ETR and the fixed radii at twice that rate.
All arms of a seed share the warm start and the prompts. One arm of one seed takes about a minute of one core, all of them 4.4
hours; two processes at a time, on different stages or seeds, halve that.
"""

import argparse
import csv
import json
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
from train_small import ARMS, Arm, panel  # noqa: E402

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
WIDE = "etr-0.4"  # ETR with fixed-0.4's mean squared radius; its scale is capped lower, so that the lower clip still acts
COLORS = {"fixed-0.1": "#999999", "fixed-0.4": "#56B4E9", "tanh": "#CC79A7", "only-wider": "#CC79A7", "right-only": "#CC79A7"}
for (micro, macro), name in POWERS.items():
    ARMS.setdefault(name, Arm(micro, macro, 1.0, 1.0, "#CC79A7"))
ARMS[WIDE] = Arm(1.0, 1.0, 2.0, 2.0, "#F0A070")
ARMS.update({name: Arm(0.0, 0.0, 1.0, 1.0, color) for name, color in COLORS.items()})
power_bounds, evaluate, surrogate_loss = train_small.clip_bounds, train_small.evaluate, etr.surrogate_loss


def clip_bounds(args, arm, rewards, advantages):
    if arm in FIXED:
        radius = torch.full_like(advantages, FIXED[arm])
    elif arm in FORMS:
        pass_rate = rewards.mean(1, keepdim=True).expand_as(advantages)
        radius = args.clip_low * FORMS[arm](advantages, pass_rate).clamp(max=args.scale_max)
    elif arm == WIDE:
        return power_bounds(argparse.Namespace(**{**vars(args), "scale_max": 2.4}), arm, rewards, advantages)
    else:
        return power_bounds(args, arm, rewards, advantages)
    return radius, radius


def evaluate_at_once(args, *rest):
    return evaluate(argparse.Namespace(**{**vars(args), "prompts_per_step": args.eval_problems}), *rest)  # 40 % faster


undecided = Counter()


def counting_loss(logprobs, old_logprobs, advantages, low, high, mask, denominator=None):
    """etr.surrogate_loss, which also counts what is clipped of the tokens that the sampling policy gave less than 0.9.

    Most tokens of the task are certain, whatever the policy does; their ratio stays 1 and dilutes the clip fraction.
    """
    A, mask_A = advantages[:, None], mask & (advantages != 0)[:, None]
    below, above = etr.clipped_tokens((logprobs - old_logprobs).exp(), A, low[:, None], high[:, None])
    open_ = mask_A & (old_logprobs < np.log(0.9))
    undecided.update(all=int(mask_A.sum()), tokens=int(open_.sum()), clipped=int(((below | above) & open_).sum()))
    return surrogate_loss(logprobs, old_logprobs, advantages, low, high, mask, denominator)


train_small.clip_bounds, train_small.evaluate, etr.surrogate_loss = clip_bounds, evaluate_at_once, counting_loss
train_small.draw = train_small.print_table = lambda *_: None  # the pictures of a single run

# ------------------------------------------------------------------------------------------------------------------ runs

RUNS = PLOTS.parent / "runs/evidence"
SETTING = "--steps=24 --eval-every=6".split()
Stage = namedtuple("Stage", "seeds arms learning_rate updates group_size", defaults=[1e-4, 16, 8])
TUNING = [100, 101, 102, 103]
# 256 completions a step, so 32 prompts where the group size is 8. The regime of `map` is not repeated.
REGIMES = [(16, 8, 2e-4, 4), (16, 8, 5e-5, 4), (8, 8, 1e-4, 2), (8, 8, 2e-4, 2), (8, 8, 4e-4, 2), (32, 8, 5e-5, 2), (32, 8, 1e-4, 2),
           (16, 16, 1e-4, 2), (16, 16, 2e-4, 2)]
STAGES = {
    "map": Stage(TUNING, [*POWERS.values(), *FORMS, *FIXED]),
    **{f"regime-{updates}-{group_size}-{rate:g}": Stage(TUNING[:seeds], ["grpo", "etr"], rate, updates, group_size)
       for updates, group_size, rate, seeds in REGIMES},
    "final": Stage([*range(10)], ["grpo", "etr", "micro", "macro", "clip-higher", "fixed-0.1", "fixed-0.4", WIDE]),
    "fast": Stage([*range(10)], ["grpo", "etr", "fixed-0.1", "fixed-0.4"], 2e-4),
}


def train(stage, arm, seed):
    """One arm of one seed, from the seed's warm start, unless it is there already."""
    out, shared = RUNS / stage / f"{arm}-{seed}", [f"warmup-seed{seed}.pt", f"before-seed{seed}.json"]
    if (out / "results.json").exists():
        return
    for directory in (out, RUNS / "warm"):
        directory.mkdir(parents=True, exist_ok=True)
    for name in shared:
        if (RUNS / "warm" / name).exists():
            shutil.copy(RUNS / "warm" / name, out)
    undecided.clear()
    resume = ["--resume"] * (out / "config.json").exists()
    _, _, rate, updates, group_size = STAGES[stage]
    code = train_small.main([*SETTING, f"--learning-rate={rate}", f"--updates-per-step={updates}", f"--group-size={group_size}",
                             f"--prompts-per-step={256 // group_size}", "--algos", arm, f"--seed={seed}", f"--out={out}", *resume])
    if code:
        sys.exit(code)
    for name in shared:
        shutil.copy(out / name, RUNS / "warm")
    (out / "undecided.json").write_text(json.dumps(undecided))


def sample_16(arm, seed):
    """pass@1 to pass@16 of a finished model on the test problems, for the figure of pass@k."""
    out = RUNS / "final" / f"{arm}-{seed}"
    if not (out / "pass16.json").exists():
        args, train_small.EVAL_SAMPLES = train_small.parse_args([*SETTING, "--out", str(out)]), 16
        model, tokenizer = train_small.load_model(args, seed)
        model = type(model).from_pretrained(out / f"{arm}-seed{seed}" / "model").eval()
        test = train_small.encode(args, tokenizer, train_small.load_problems(args)["test"])
        (out / "pass16.json").write_text(json.dumps(evaluate_at_once(args, seed, model, tokenizer, test)["passk"]))
        train_small.EVAL_SAMPLES = 8


def run(only=None, first=0, last=None):
    for name, stage in STAGES.items():
        for seed in stage.seeds[int(first):last and int(last)] if name == (only or name) else ():
            for arm in stage.arms:
                train(name, arm, seed)
    if only in (None, "samples"):
        for seed in STAGES["final"].seeds[int(first):last and int(last)]:
            sample_16("grpo", seed)
            sample_16("etr", seed)


# ------------------------------------------------------------------------------------------------------------------- csv

def save_csv(name, rows):
    short = lambda value: f"{value:.5g}" if isinstance(value, float) else value
    with open(PLOTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: short(value) for key, value in row.items()} for row in rows)


def load_csv(name):
    def value(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(PLOTS / f"{name}.csv", newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def collect():
    ends, curves, classes = [], [], []
    mean = lambda lines, name: float(np.mean([line[name] for line in lines]))
    for stage, arm, seed in [(name, arm, seed) for name, stage in STAGES.items() for seed in stage.seeds for arm in stage.arms]:
        out = RUNS / stage / f"{arm}-{seed}"
        if not (out / "results.json").exists():
            print(f"{out}: not run")
            continue
        result = json.loads((out / "results.json").read_text())["arms"][arm][0]
        lines, counts = train_small.load_runs(out)[arm][seed], json.loads((out / "undecided.json").read_text())
        at = [line["step"] for line in lines if "eval_pass1" in line]
        sums = {name: np.sum([line["by_correct"][name] for line in lines[1:]], 0)[1:-1] for name in train_small.BY_CORRECT}
        tokens = sums["tokens_right"] + sums["tokens_wrong"]  # of informative groups, once per update
        passk = json.loads((out / "pass16.json").read_text()) if (out / "pass16.json").exists() else []
        ends.append(dict(
            stage=stage, arm=arm, seed=seed,
            # area under the validation pass@1 curve divided by its length: the mean accuracy on the way
            auc=float(np.trapezoid([lines[step]["eval_pass1"] for step in at], at)) / at[-1],
            **{name: result[name] for name in ("pass1_before", "pass1_after", "greedy_before", "greedy_after", "passk_before",
                                            "passk_after")},
            **{name: mean(lines[1:], name) for name in ("reward_mean", "clip_fraction", "approx_kl", "frac_reward_zero_std",
                                                        "completion_length_mean")},
            entropy=mean(lines[-5:], "entropy"), undecided=counts["tokens"] / counts["all"],
            undecided_clipped=counts["clipped"] / counts["tokens"],
            radius=float((sums["radius_squared"].sum() / tokens.sum())**0.5),  # root mean square on the side that acts
            seconds=result["seconds"], pass_1_to_16=" ".join(f"{value:.4f}" for value in passk)))
        if stage in ("final", "fast"):
            for last, step in zip([0, *at], at):
                window = lines[last + 1:step + 1] or lines[:1]  # the steps since the last evaluation
                curves.append(dict(stage=stage, arm=arm, seed=seed, step=step, pass1=lines[step]["eval_pass1"],
                                   **{name: mean(window, name) for name in ("reward_mean", "entropy")}))
        if stage == "final":
            classes += [dict(arm=arm, seed=seed, k=k + 1, **{name: float(values[k]) for name, values in sums.items()})
                        for k in range(len(tokens))]
    for name, rows in (("ends", ends), ("curves", curves), ("classes", classes)):
        save_csv(name, rows)


# --------------------------------------------------------------------------------------------------------------- figures

GREY = "#555555"


def interval(values):
    """(mean, half-width of its 95 % t-interval)."""
    _, mean, half = train_small.mean_and_band([{0: value} for value in values])
    return float(mean[0]), float(half[0])


def rate(stage):
    return f"{STAGES[stage].learning_rate:.0e}".replace("e-0", "e-")


def column(rows, arm, name):
    return {row["seed"]: row[name] for row in rows if row["arm"] == arm}


def paired(rows, arm, name, base="grpo"):
    """Difference between two arms in points (hundredths), one per seed."""
    ours, theirs = column(rows, arm, name), column(rows, base, name)
    return [100 * (ours[seed] - theirs[seed]) for seed in ours]


def difference(*args):
    """(mean, half-width) of the paired difference."""
    return interval(paired(*args))


def say(mean, half, unit=" points"):
    return f"{round(mean, 1) + 0.0:+.1f} ± {half:.1f}{unit}".replace("-", "−")


def label_ends(axis, ends):
    """Names lines at their right ends, {arm: (x, y)}, beyond the last of them and pushed apart where ends meet."""
    bottom, top = axis.get_ylim()
    at, edge, apart = [], max(x for x, _ in ends.values()), 0.07 * (top - bottom)
    ordered = sorted(ends.items(), key=lambda item: item[1][1])
    for _, (_, y) in ordered:
        at.append(max(y, at[-1] + apart) if at else y)
    for i in range(len(at) - 1, -1, -1):  # and back below the upper edge
        at[i] = min(at[i], top - apart / 2 - apart * (len(at) - 1 - i))
    for (arm, (x, y)), height in zip(ordered, at):
        if x < edge:
            axis.plot([x, edge], [y, height], color=ARMS[arm].color, lw=1, ls=":")
        axis.annotate(arm, (edge, height), xytext=(7, 0), textcoords="offset points", color=ARMS[arm].color, fontsize=13,
                      weight="bold", va="center", annotation_clip=False)


def save(figure, name, title, caption):
    figure.suptitle(title, fontsize=16, weight="bold")
    figure.supxlabel(caption, fontsize=13, color=GREY)
    figure.savefig(PLOTS / f"{name}.png", dpi=110)
    plt.close(figure)


def band(axis, arm, curves):
    """Draws the mean and its 95 % band of one {x: y} per seed; returns the end of the line."""
    x, mean, half = train_small.mean_and_band(curves)
    axis.plot(x, mean, color=ARMS[arm].color, lw=2.5)
    axis.fill_between(x, mean - half, mean + half, color=ARMS[arm].color, alpha=0.18, lw=0)
    return x[-1], mean[-1]


def over(rows, arm, x, y):
    """One {x: y} per seed."""
    curves = {}
    for row in rows:
        if row["arm"] == arm:
            curves.setdefault(row["seed"], {})[row[x]] = row[y]
    return list(curves.values())


def dots(axis, entries, name, title):
    """Paired differences from GRPO with their intervals; entries: (label, rows, arm)."""
    gaps = [difference(rows, arm, name) for _, rows, arm in entries]
    for y, ((mean, half), (_, _, arm)) in enumerate(zip(gaps, entries)):
        axis.errorbar(mean, y, xerr=half, fmt="o", color=ARMS[arm].color, ms=8, lw=2.5, capsize=4)
        axis.annotate(say(mean, half, ""), (mean, y), xytext=(0, 10), textcoords="offset points", ha="center", fontsize=13,
                      color=ARMS[arm].color, bbox=dict(fc="white", ec="none", pad=1))
    axis.axvline(0, color="#000000", lw=1)
    axis.margins(x=0.2)
    panel(axis, title, "points against GRPO", "")
    axis.set_yticks(range(len(entries)), [label for label, _, _ in entries])
    axis.set_ylim(len(entries) - 0.5, -0.6)


def draw_curves(stage, curves):
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for pair, name in zip(axes, ("final", "fast")):
        for axis, y, ylabel in zip(pair, ("pass1", "entropy"), ("held-out pass@1", "entropy (nats per token)")):
            part = [row for row in curves if row["stage"] == name]
            ends = {arm: band(axis, arm, over(part, arm, "step", y)) for arm in ("grpo", "etr")}
            panel(axis, f"learning rate {rate(name)}", "step (rollout batch of 256)", ylabel)
            label_ends(axis, ends)
    gaps = (say(*difference(stage[name], "etr", "auc"), "") for name in ("final", "fast"))
    save(figure, "curves", f"ETR against GRPO, mean pass@1 on the way: {' and '.join(gaps)} points",
         f"{len(column(stage['final'], 'etr', 'auc'))} paired seeds, 95 % t-intervals: bands of the mean (warm starts differ), "
         "title of the paired difference")


def draw_differences(stage):
    entries = [*((arm, stage["final"], arm) for arm in STAGES["final"].arms[1:]),
               (f"etr, lr {rate('fast')}", stage["fast"], "etr")]
    figure, axes = plt.subplots(1, 3, figsize=(11, 8), sharey=True, layout="constrained")
    titles = dict(auc="mean pass@1 on the way", pass1_after="pass@1 at the end", greedy_after="greedy at the end")
    for axis, (name, title) in zip(axes, titles.items()):
        dots(axis, entries, name, title)
    gaps = [f"{arm} {say(*difference(stage['final'], arm, 'pass1_after'), '')}" for arm in ("etr", "fixed-0.1", "fixed-0.4")]
    save(figure, "differences", f"pass@1: {', '.join(gaps)}",
         f"{len(STAGES['final'].seeds)} paired seeds, lr 1e-4 unless named; 95 % t-intervals, not corrected for "
         f"{3 * len(entries)} comparisons")


def entropy_at(path, level):
    """Entropy where a run's accuracy first reaches `level`; path: its (accuracy, entropy) windows."""
    i = max(1, next(i for i, (accuracy, _) in enumerate(path) if accuracy >= level))
    return float(np.interp(level, *zip(path[i - 1], path[i])))


def draw_trade(curves):
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    titles = []
    for axis, stage in zip(axes, ("final", "fast")):
        path = {arm: {} for arm in ("grpo", "etr", "fixed-0.4")}
        for row in curves:
            if row["stage"] == stage and row["arm"] in path:
                path[row["arm"]].setdefault(row["seed"], []).append((row["reward_mean"], row["entropy"]))
        means = {arm: np.mean(list(runs.values()), 0) for arm, runs in path.items()}
        for arm, mean in means.items():
            axis.plot(*mean.T, "o-", color=ARMS[arm].color, lw=2.5, ms=6)
        panel(axis, f"learning rate {rate(stage)}", "accuracy of the rollouts", "entropy (nats per token)")
        label_ends(axis, {arm: tuple(mean[-1]) for arm, mean in means.items()})
        gaps = []
        for grpo, ours in zip(path["grpo"].values(), path["etr"].values()):
            level = min(max(grpo)[0], max(ours)[0])  # the best accuracy that both reach
            gaps.append(1000 * (entropy_at(ours, level) - entropy_at(grpo, level)))
        titles.append(say(*interval(gaps), ""))
    save(figure, "trade", f"Entropy at equal accuracy, ETR against GRPO: {titles[0]} and {titles[1]} millinats",
         f"warm start and means of 6 steps, over {len(gaps)} paired seeds; title: at the best accuracy both reach, 95 % t")


def draw_pass_at_k(rows):
    curve = lambda arm: {seed: np.array(text.split(), float) for seed, text in column(rows, arm, "pass_1_to_16").items() if text}
    grpo, ks = curve("grpo"), range(1, 17)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    ends, gaps = {}, {}
    for arm in ("grpo", "etr"):
        curves = curve(arm)
        ends[arm] = band(axes[0], arm, [dict(zip(ks, values)) for values in curves.values()])
        if arm != "grpo":
            gaps[arm] = band(axes[1], arm, [dict(zip(ks, 100 * (values - grpo[seed]))) for seed, values in curves.items()])
    axes[0].set_ylim(0, 1)
    axes[1].axhline(0, color="#000000", lw=1)
    for axis in axes:
        axis.set_xticks((1, 4, 8, 12, 16))
    panel(axes[0], "After training", "k samples", "pass@k")
    panel(axes[1], "Paired difference", "k samples", "points against GRPO")
    label_ends(axes[0], ends)
    label_ends(axes[1], gaps)
    gap = interval([100 * (values[-1] - grpo[seed][-1]) for seed, values in curve("etr").items()])
    save(figure, "pass_at_k", f"ETR against GRPO: {say(*gap)} of pass@16",
         f"learning rate 1e-4, {len(grpo)} paired seeds, 200 test problems, 16 samples of each, bands: 95 % t-interval")


def draw_mechanism(classes):
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    ks = sorted({row["k"] for row in classes})
    table = lambda arm, name: np.array([row[name] for row in classes if row["arm"] == arm]).reshape(-1, len(ks))  # (seeds, k)
    ends, share = [{}, {}, {}, {}], {}
    for arm in ("grpo", "etr"):
        tokens = table(arm, "tokens_right") + table(arm, "tokens_wrong")
        values = [*(100 * table(arm, f"clipped_{kind}") / table(arm, f"tokens_{kind}") for kind in ("right", "wrong")),
                  table(arm, "radius_squared") / tokens, 1000 * table(arm, "kl") / tokens]
        for axis, end, by_seed in zip(axes.flat, ends, values):
            end[arm] = band(axis, arm, [dict(zip(np.array(ks) / (len(ks) + 1), row)) for row in by_seed])
        for name in ("radius_squared", "kl"):  # of the groups with pass rates from 3/8 to 5/8
            share[arm, name] = 100 * (table(arm, name)[:, 2:5].sum(1) / table(arm, name).sum(1))
    titles = ("Right answers, clipped above", "tokens (%)"), ("Wrong answers, clipped below", "tokens (%)"), (
        "Allowed: squared radius", "mean squared radius"), ("Spent: KL to the sampling policy", "KL (1e-3 nats per token)")
    for axis, end, (title, ylabel) in zip(axes.flat, ends, titles):
        panel(axis, title, "pass rate of the group, k/G", ylabel)
        axis.set_ylim(0)
        label_ends(axis, end)
    budget, kl = (say(*interval(share["etr", name] - share["grpo", name])) for name in ("radius_squared", "kl"))
    save(figure, "mechanism",
         f"ETR at pass rates 3/8 to 5/8: share of budget {budget}, of KL {kl}",
         f"{len(tokens)} paired seeds, all updates; 95 % t-intervals: bands of the mean, title of the difference from GRPO")


def draw_map(rows):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    gaps = {arm: difference(rows, arm, "auc") for arm in STAGES["map"].arms}
    cells = np.array([[gaps[POWERS[micro, macro]][0] for micro in GRID] for macro in GRID])
    left.imshow(cells, cmap="PuOr", vmin=-2, vmax=2, origin="lower")
    for y, x in np.ndindex(3, 3):
        left.text(x, y, say(*gaps[POWERS[GRID[x], GRID[y]]], "") if x or y else "GRPO", ha="center", va="center", fontsize=13)
    panel(left, "Power form", "micro elasticity", "macro elasticity")
    left.grid(False)
    left.set_xticks(range(3), GRID)
    left.set_yticks(range(3), GRID)
    others = [*FORMS, *FIXED]
    dots(right, [(arm, rows, arm) for arm in others], "auc", "Other forms and fixed radii")
    clear = [arm for arm in POWERS.values() if gaps[arm][0] > gaps[arm][1]]
    save(figure, "map", f"{len(clear)} of 8 elasticities are ahead of GRPO beyond the noise of {len(TUNING)} tuning seeds",
         f"mean pass@1 on the way, points against GRPO, 95 % t-intervals over {len(TUNING)} paired tuning seeds")


def draw_regimes(stage):
    """ETR against GRPO in each regime, beside how far GRPO comes there."""
    names = ["map", *(name for name in STAGES if name.startswith("regime"))]
    names.sort(key=lambda name: (STAGES[name].group_size, STAGES[name].updates, STAGES[name].learning_rate))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6.5), sharey=True, layout="constrained")
    ahead = 0
    for y, name in enumerate(names):
        grpo, gaps = list(column(stage[name], "grpo", "auc").values()), paired(stage[name], "etr", "auc")
        ahead += min(gaps) > 0
        for axis, values, color in ((left, grpo, ARMS["grpo"].color), (right, gaps, ARMS["etr"].color)):
            axis.plot(values, [y] * len(values), "o", color=color, ms=8, alpha=0.6)
            axis.plot(np.mean(values), y, "|", color=color, ms=22, mew=3)
    right.axvline(0, color="#000000", lw=1)
    panel(left, "GRPO", "mean pass@1 on the way", "")
    panel(right, "ETR", "points against GRPO", "")
    labels = [f"{STAGES[name].updates} updates, G = {STAGES[name].group_size}, lr {rate(name)}" for name in names]
    left.set_yticks(range(len(names)), labels)
    left.set_ylim(len(names) - 0.5, -0.5)
    chance = sum(0.5 ** len(STAGES[name].seeds) for name in names)
    save(figure, "regimes", f"ETR is ahead of GRPO on each tuning seed in {ahead} of {len(names)} regimes",
         f"one dot per tuning seed, bar: their mean; if nothing differed, {chance:.0f} of {len(names)} would be expected")


def print_table(stage):
    """The README's table of results."""
    print("| arm | learning rate | pass@1 | mean pass@1 on the way | greedy | pass@8 |\n|---|---|---|---|---|---|")
    lines = [(name, arm, "grpo") for name in ("final", "fast") for arm in STAGES[name].arms]
    for name, arm, base in [*lines, ("final", WIDE, "fixed-0.4")]:
        values = ("pass1_after", "auc", "greedy_after", "passk_after")
        cells = [f"{np.mean(list(column(stage[name], arm, value).values())):.3f}" if arm == "grpo" else
                 say(*difference(stage[name], arm, value, base), "") for value in values]
        label = f"{arm}, absolute" if arm == "grpo" else arm if base == "grpo" else f"{arm} against {base}"
        print(f"| {label} | {rate(name)} | {' | '.join(cells)} |")


def draw():
    rows, curves, classes = load_csv("ends"), load_csv("curves"), load_csv("classes")
    stage = {name: [row for row in rows if row["stage"] == name] for name in STAGES}
    draw_curves(stage, curves)
    draw_differences(stage)
    draw_trade(curves)
    draw_pass_at_k(stage["final"])
    draw_mechanism(classes)
    draw_map(stage["map"])
    draw_regimes(stage)
    print_table(stage)


if __name__ == "__main__":
    command = (sys.argv[1:] or [None])[0]
    if command not in ("all", "run", "collect", "draw"):
        sys.exit(__doc__)
    if command in ("all", "run"):
        run(*sys.argv[2:])
    if command in ("all", "collect"):
        collect()
    if command in ("all", "draw"):
        draw()
