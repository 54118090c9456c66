"""The evidence: what elastic bounds do against GRPO on the built-in task.

    python plots/evidence.py ...

    all               run, collect and draw; resumable
    run final 0 5     one stage, its first five seeds
    collect           runs/evidence -> plots/*.csv
    gsm8k runs/gsm8k  -> plots/gsm8k*.csv
    tables            the READMEs' tables, from the csv
    draw              plots/*.csv -> plots/*.png
    pictures          the same, for runs of your own

`draw` refuses a number in the READMEs that is not the csv's.
"""

import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd  # comes with datasets
import torch

PLOTS = Path(__file__).resolve().parent
ROOT = PLOTS.parent
RUNS = ROOT / "runs/evidence"
sys.path.insert(0, str(ROOT))
import etr
import train_small as ts

# - arms, stages


def fixed(factor):
    """One radius for all: no elasticity."""
    def rule(rewards, advantages, eps):
        return [torch.full_like(advantages, factor * eps)] * 2
    return rule


def wide_etr(rewards, advantages, eps):
    """ETR at twice eps, its scale capped so that the lower clip still acts."""
    budgets = etr.variance_budgets(rewards)
    return etr.elastic_clip_bounds(advantages, budgets, 2 * eps, 2 * eps, scale_max=2.4)


ts.ARMS["fixed-0.1"] = ts.Arm(fixed(0.5), "#999999")
ts.ARMS["fixed-0.4"] = ts.Arm(fixed(2.0), "#56B4E9")
ts.ARMS["etr-0.4"] = ts.Arm(wide_etr, "#F0A070")

SETTING = "--steps=24 --eval-every=6"  # unless the stage says otherwise
BINDING = "--steps=8 --eval-every=4 --updates-per-step=32 --clip=0.05"  # the clip decides
LEVELS = ["grpo", "etr", "micro", "macro"]
PAIR, FIXED = LEVELS[:2], ["fixed-0.1", "fixed-0.4"]

Stage = namedtuple("Stage", "label seeds arms flags")
STAGES = {
    "final": Stage("lr 1e-4", range(10), [*LEVELS, "clip-higher", *FIXED, "etr-0.4"], ""),
    "fast": Stage("lr 2e-4", range(10), [*PAIR, *FIXED], "--learning-rate=2e-4"),
    "binding": Stage("honest rewards", range(300, 310), LEVELS, BINDING),
    "binding-flipped": Stage(
        "10 % flipped", range(300, 310), LEVELS, f"{BINDING} --flip-rewards=0.1"),
}
MAIN, CLIPPED = list(STAGES)[:2], list(STAGES)[2:]


def run(only=None, first=0, last=None):
    """Trains what has no results yet."""
    for name in [only] if only else STAGES:
        _, seeds, arms, flags = STAGES[name]
        for seed in seeds[int(first):last and int(last)]:
            out = RUNS / f"{name}-seed{seed}"
            if not (out / "results.json").exists():
                given = f"{SETTING} {flags} --seed={seed} --resume".split()
                if ts.main([*given, f"--out={out}", "--algos", *arms]):
                    sys.exit(1)


# - csv


def load(name):
    path = PLOTS / f"{name}.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["stage", "arm", "seed"])


def merge(name, frames):
    """Adds rows to a csv, for those of the same runs."""
    if not frames:
        return
    old, new = load(name), pd.concat(frames)
    keys = [key for key in ("stage", "arm", "seed") if key in new]
    stale = old.set_index(keys).index.isin(new.set_index(keys).index)
    rows = pd.concat([old[~stale], new]) if len(old) else new
    rows.to_csv(PLOTS / f"{name}.csv", index=False, float_format="%.5g")


def read_runs(folder):
    """Yields (arm, seed, metrics by step)."""
    for path in sorted(Path(folder).glob("*-seed*/metrics.jsonl")):
        arm, seed = path.parent.name.split("-seed")
        if arm in ts.ARMS:
            yield arm, int(seed), pd.read_json(path, lines=True).set_index("step")


def end_of(run):
    """Accuracy before, after and on the way; means over the steps."""
    accuracy = run.eval_pass1.dropna()
    row = dict(auc=np.trapezoid(accuracy, accuracy.index) / accuracy.index[-1])
    for name in ("pass1", "greedy", "passk"):
        row[f"{name}_before"], row[f"{name}_after"] = run[f"test_{name}"].dropna()
    for name in ("reward_mean", "clip_fraction", "approx_kl", "frac_reward_zero_std"):
        row[name] = run[name][1:].mean()
    return row | dict(entropy=run.entropy[-5:].mean(), seconds=run.seconds[1:].sum())


def classes_of(run):
    """Sums for groups with k = 1..7 right of 8."""
    sums = {name: np.sum([by[name] for by in run.by_correct[1:]], 0)[1:-1]
            for name in ts.BY_CORRECT if name != "ratio"}
    return pd.DataFrame(sums).assign(k=range(1, 8))


def curve_of(run):
    """A row per evaluation: accuracy, and means over the steps since the one before."""
    accuracy, names = run.eval_pass1.dropna(), ["reward_mean", "entropy"]
    means = run[names].groupby(lambda step: min(accuracy.index[accuracy.index >= step])).mean()
    means.loc[0] = run.loc[1, names]  # the first rollouts are the warm start's
    return means.assign(pass1=accuracy).reset_index()


def collect():
    csv = dict(ends=[], curves=[], classes=[])
    for folder in sorted(path.parent for path in RUNS.glob("*/results.json")):
        stage = folder.name.rpartition("-seed")[0]
        for arm, seed, run in read_runs(folder):
            about = dict(stage=stage, arm=arm, seed=seed)
            csv["ends"].append(pd.DataFrame([about | end_of(run)]))
            csv["curves"].append(curve_of(run).assign(**about))
            if stage == "final":
                csv["classes"].append(classes_of(run).assign(arm=arm, seed=seed))
    for name, frames in csv.items():
        merge(name, frames)


def collect_gsm8k(*folders):
    """A row per step, per k right of G, and per test problem."""
    csv = dict(gsm8k=[], gsm8k_classes=[], gsm8k_test=[])
    for arm, seed, run in (found for folder in folders for found in read_runs(folder)):
        before, after = run.test_right.dropna()
        lists = ["by_correct", "eval_right", "test_right"]
        csv["gsm8k"].append(run.drop(columns=lists).reset_index())
        csv["gsm8k_classes"].append(classes_of(run))
        right = dict(problem=range(len(after)), before=before, after=after)
        csv["gsm8k_test"].append(pd.DataFrame(right))
        for frames in csv.values():
            frames[-1] = frames[-1].assign(arm=arm, seed=seed)
    for name, frames in csv.items():
        merge(name, frames)


# - numbers


def values(arm, name, stage="final", source="ends"):
    rows = load(source).query("stage == @stage and arm == @arm")
    return rows.set_index("seed")[name]


def paired(arm, name, stage="final", source="ends"):
    """Differences from GRPO in points, one per seed."""
    ours, theirs = (values(arm, name, stage, source) for arm in (arm, "grpo"))
    return (100 * (ours - theirs)).dropna()


def interval(numbers):
    """Mean and half-width of its 95 % t-interval."""
    _, mean, half = ts.mean_and_band([{0: number} for number in numbers])
    return mean[0], half[0]


def say(numbers):
    mean, half = interval(numbers)
    return f"{round(mean, 1) + 0.0:+.1f} ± {half:.1f}".replace("-", "−")


def gap(*args, **named):
    return say(paired(*args, **named))


def series(rows, x, y, arms=PAIR):
    """{arm: one {x: y} per seed}"""
    rows = rows.dropna(subset=[x, y])
    return {
        arm: [dict(zip(run[x], run[y])) for _, run in rows[rows.arm == arm].groupby("seed")]
        for arm in arms}


def entropy_gap(stage):
    """ETR's minus GRPO's at the best accuracy that both reach, in millinats."""
    gaps = []
    for _, run in load("curves").query("stage == @stage").groupby("seed"):
        paths, found = [run[run.arm == arm] for arm in PAIR], []
        accuracy = min(path.reward_mean.max() for path in paths)
        for path in paths:  # where it first gets there
            first = path.index[path.reward_mean >= accuracy][0]
            near = path.loc[:first][-2:]
            found.append(np.interp(accuracy, near.reward_mean, near.entropy))
        gaps.append(1000 * (found[1] - found[0]))
    return say(gaps)


def gsm8k_gains():
    """Points of each arm, and ETR's lead, over test problems."""
    rows = load("gsm8k_test")
    rows["gain"] = 100 * (rows.after - rows.before) / ts.EVAL_SAMPLES
    gains = rows.pivot_table("gain", "problem", "arm")
    return [*map(say, (gains.grpo, gains.etr, gains.etr - gains.grpo))]


def middle_gap(name):
    """ETR's minus GRPO's share in groups with 3 to 5 right, in points."""
    rows, run = load("classes"), ["arm", "seed"]
    middle = rows[rows.k.between(3, 5)].groupby(run)[name].sum()
    share = 100 * middle / rows.groupby(run)[name].sum()
    return say(share["etr"] - share["grpo"])


# - texts

MEASURES = {"pass1_after": "pass@1", "auc": "mean pass@1 on the way",
            "greedy_after": "greedy", "passk_after": "pass@8"}


def markdown(*lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(stage, arms):
    """GRPO, and points against it."""
    lines = [["arm", "setting", *MEASURES.values()], ["---"] * 6]
    for arm in arms:
        cells = [gap(arm, name, stage) for name in MEASURES]
        if arm == "grpo":
            cells = [f"{values(arm, name, stage).mean():.3f}" for name in MEASURES]
        lines.append([arm, STAGES[stage].label, *cells])
    return markdown(*lines)


def gsm8k_table():
    """Before and after RL, means over seeds."""
    rows = load("gsm8k").dropna(subset="test_pass1")
    arms = rows.arm.where(rows.step > 0, "before RL")
    means = rows.groupby(arms)[["test_pass1", "test_greedy", "test_passk"]].mean()
    lines = [[arm, *map("{:.3f}".format, means.loc[arm])] for arm in ("before RL", *PAIR)]
    return markdown(["arm", "pass@1", "greedy", "pass@8"], ["---"] * 4, *lines)


def tables():
    found = load("ends").stage.unique()
    real = [gsm8k_table()] if len(load("gsm8k")) else []
    return real + [table(stage, STAGES[stage].arms) for stage in STAGES if stage in found]


def at_the_end(stage, arms):
    return ", ".join(f"{arm} {gap(arm, 'pass1_after', stage)}" for arm in arms)


def on_the_way():
    return f"{gap('etr', 'auc')} points at 1e-4, {gap('etr', 'auc', 'fast')} at 2e-4"


def sentences():
    """What the READMEs say in words, every number computed from the csv."""
    first, again = (paired("etr", "pass1_after", source=name) for name in ("ends", "again"))
    clipped = 100 * values("grpo", "clip_fraction").mean()
    gsm8k = []
    if len(load("gsm8k_test")):
        grpo, elastic, lead = gsm8k_gains()
        clips = load("gsm8k").groupby("arm").clip_fraction.mean()
        gsm8k = [f"grpo {grpo} points, etr {elastic}", f"ETR's lead is {lead} points",
                 f"grpo clips {100 * clips.grpo:.1f} % of its tokens, etr {100 * clips.etr:.1f} %"]
    return gsm8k + [
        at_the_end("final", [*LEVELS[1:], *FIXED, "etr-0.4"]), on_the_way(),
        f"{entropy_gap('final')} and {entropy_gap('fast')} thousandths of a nat",
        f"{middle_gap('radius_squared')} points of the budget",
        f"{middle_gap('kl')} points of the KL spent",
        f"the second series has {say(again)}",
        f"a correlation of {first.corr(again):.2f}", f"clips {clipped:.1f} % of all tokens",
        *(f"{STAGES[name].label}: {at_the_end(name, LEVELS[1:])}" for name in CLIPPED)]


def check():
    """Exits if a README lacks a number of the csv."""
    texts = [(folder / "README.md").read_text() for folder in (ROOT, PLOTS)]
    text = " ".join(" ".join(texts).split())
    number = r"(?<![-\w])[+−]?\d+\.\d+"
    lines = [line for table in tables() for line in table.splitlines()[2:]]
    for wanted in lines + sentences():
        alike = number.join(map(re.escape, re.split(number, wanted)))
        for said in re.findall(alike, text) or ["nothing like it"]:
            if said != wanted:
                sys.exit(f"READMEs: expected {wanted!r}, as the csv says, got {said!r}")


# - pictures


def save(figure, name, title, caption):
    figure.suptitle(title, fontsize=15, weight="bold")
    figure.supxlabel(caption, fontsize=12, color="#555555")
    figure.savefig(PLOTS / f"{name}.png", dpi=110)


def draw_lines(name, title, caption, panels):
    """panels: (curves of `series`, title, label of x, label of y), two in a row."""
    half = len(panels) // 2
    figure = ts.Figure(figsize=(11, 0.4 + 4.4 * half), layout="constrained")
    for axis, panel in zip(figure.subplots(half, 2).flat, panels):
        ts.panel(axis, *panel)
    save(figure, name, title, caption)


ENTROPY, RATE = "entropy (nats per token)", "pass rate of the group, k/G"
BANDS = "95 % t-intervals: bands of the mean, title of the paired difference"


def draw_curves():
    panels = []
    for stage in MAIN:
        rows, label = load("curves").query("stage == @stage"), STAGES[stage].label
        panels.append((series(rows, "step", "pass1"), label, "step", "held-out pass@1"))
        panels.append((series(rows, "step", "entropy"), label, "step", ENTROPY))
    draw_lines(
        "curves", f"ETR against GRPO, mean pass@1 on the way: {on_the_way()}",
        f"ten paired seeds, each with its own warm start; {BANDS}", panels)


def draw_binding():
    """Paired differences from GRPO."""
    figure, arms = ts.Figure(figsize=(11, 4.2), layout="constrained"), LEVELS[1:]
    for axis, stage in zip(figure.subplots(1, 2), CLIPPED):
        for y, arm in enumerate(arms):
            mean, half = interval(paired(arm, "pass1_after", stage))
            axis.errorbar(mean, y, xerr=half, fmt="o", color=ts.ARMS[arm].color, lw=2.5, capsize=4)
        axis.axvline(0, color="#000000", lw=1)
        axis.set(title=STAGES[stage].label, xlabel="points against GRPO", ylim=(2.5, -0.6))
        axis.set_yticks(range(len(arms)), at_the_end(stage, arms).split(", "))
    clean, flipped = (at_the_end(stage, arms) for stage in CLIPPED)
    save(figure, "binding", f"pass@1, clean: {clean}\nflipped: {flipped}",
         "8 steps of 32 updates, eps 0.05; 95 % t-intervals, ten seeds")


def by_rate(rows):
    """Panels of the squared radius and KL per token by pass rate."""
    tokens = rows.tokens_right + rows.tokens_wrong
    return [(rows.radius_squared / tokens, "The budget", "mean squared radius"),
            (1000 * rows.kl / tokens, "The KL spent", "KL (1e-3 nats per token)")]


def draw_mechanism():
    rows = load("classes")
    rows["rate"] = rows.k / 8
    panels = [
        (100 * rows.clipped_right / rows.tokens_right, "Right, clipped above", "tokens (%)"),
        (100 * rows.clipped_wrong / rows.tokens_wrong, "Wrong, clipped below", "tokens (%)"),
        *by_rate(rows)]
    budget, kl = middle_gap("radius_squared"), middle_gap("kl")
    draw_lines(
        "mechanism", f"ETR at pass rates 3/8 to 5/8: {budget} points of budget, {kl} of KL",
        f"shares in all groups, ten paired seeds; {BANDS}",
        [(series(rows.assign(y=y), "rate", "y"), title, RATE, ylabel)
         for y, title, ylabel in panels])


def draw_gsm8k():
    rows, classes, (grpo, elastic, _) = load("gsm8k"), load("gsm8k_classes"), gsm8k_gains()
    draw_lines(
        "gsm8k", f"GSM8K, test pass@1: grpo {grpo} points, etr {elastic}",
        f"seeds: {rows.seed.nunique()}; title: 95 % intervals over test problems",
        [(series(rows, "step", "test_pass1"), "Test accuracy", "step", "pass@1"),
         (series(rows, "step", "entropy"), "Entropy", "step", ENTROPY),
         *((series(classes.assign(rate=classes.k / 8, y=y).dropna(), "rate", "y"), title, RATE,
            ylabel) for y, title, ylabel in by_rate(classes))])


def draw():
    stages = {*load("ends").stage}
    if {*MAIN} <= stages:
        draw_curves()
        draw_mechanism()
    if {*CLIPPED} <= stages:
        draw_binding()
    if len(load("gsm8k")):
        draw_gsm8k()


COMMANDS = dict(
    all=[run, collect, draw], run=[run], collect=[collect], gsm8k=[collect_gsm8k],
    tables=[lambda: print(*tables(), sep="\n\n")], draw=[check, draw], pictures=[draw])

if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    if command not in COMMANDS:
        sys.exit(__doc__)
    for step in COMMANDS[command]:
        step(*rest)
