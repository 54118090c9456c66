"""When does an elastic clip help? A laboratory of prompts whose truth is known.

`python plots/lab.py` makes csv and png in 6 minutes of one core, `... draw` png from csv.
A prompt is a softmax over actions, some of them right: accuracy, KL, entropy, part 1 are exact.
Part 1, closed form: a saturated clip moves the ratio of completion i by its radius s_i, towards its
  advantage. That gains E[s a] and costs E[s^2] / 2 of KL, a being the true advantage expected from
  what the group showed; E[s a]^2 / (E[s^2] E[a^2]), the KL efficiency, is 1 at s = |a| at most, and
  the gain at equal KL goes as its root. In a softmax likely actions weigh more, unless `equal`.
Part 2, one batch: accuracy gained by 64 updates at a true KL of 0.002. `push`: how many radii an
  advantage of 1 would go without a clip; `best`: chosen on one half of the seeds for the other.
Part 3, 40 batches, eps and rate tuned on other seeds. Intervals: two standard errors, paired.
"""

import sys
from collections import namedtuple
from pathlib import Path
import numpy as np
import torch

PLOTS = Path(__file__).resolve().parent
sys.path.insert(0, str(PLOTS.parent))
import etr
from train_small import ARMS, Figure, panel

GROUP, PROMPTS, SEEDS, SPREAD, ELASTIC = 8, 32, 96, (0.01, 0.99), ("ETR", "micro", "macro")
# missed: right answers that the verifier rejects; passed: wrong ones that it accepts
Setting = namedtuple(
    "Setting",
    "spread missed passed actions right chain equal optimizer",
    defaults=[SPREAD, 0, 0, 64, 8, 1, False, "SGD"],
)
SETTINGS = {
    "clean": Setting(),
    "equal": Setting(equal=True),
    "10 % missed": Setting(SPREAD, 0.1, 0),
    "hard": Setting((0.01, 0.2)),
    "middle": Setting((0.3, 0.7)),
    "easy": Setting((0.8, 0.99)),
    "5 % flipped": Setting(SPREAD, 0.05, 0.05),
    "10 % flipped": Setting(SPREAD, 0.1, 0.1),
    "20 % flipped": Setting(SPREAD, 0.2, 0.2),
    "10 % passed": Setting(SPREAD, 0, 0.1),
    "equal 10 % flipped": Setting(SPREAD, 0.1, 0.1, equal=True),
    "Adam": Setting(optimizer="Adam"),
    "chains of 4": Setting(actions=8, right=2, chain=4),
}


def between(place, spread):  # pass rates, uniform in their logit
    low, high = torch.logit(torch.tensor(spread))
    return torch.sigmoid(low + (high - low) * place)


GRID = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
MIXES = {
    ".01-.99": between(GRID, SPREAD),
    ".3-.7": between(GRID, (0.3, 0.7)),
    ".01-.2": between(GRID, (0.01, 0.2)),
    "0-1 evenly": GRID,
}


def efficiency(rule, rates, flip=0.0, chain=1, prior=1.0, group=GROUP):
    """KL efficiency over prompts with these pass rates, of equal weight or weighted by `prior`."""
    step = rates ** (1 / chain)  # a chain is right if its tokens, equally hard, all are
    shown = flip + (1 - 2 * flip) * rates  # the verifier says right
    shown_if = flip + (1 - 2 * flip) * rates / step  # the same, given that this token is right
    a_right = step * shown_if / shown * rates / step - rates  # true advantage if shown right
    a_wrong = step * (1 - shown_if) / (1 - shown) * rates / step - rates
    k = torch.arange(1, group)
    chance = prior * torch.distributions.Binomial(group, shown).log_prob(k[:, None]).exp()
    weight = chance.sum(1)  # of each k; a_right and a_wrong become what k shows
    a_right, a_wrong = (chance * a_right).sum(1) / weight, (chance * a_wrong).sum(1) / weight
    up, down = (radius[1:-1] for radius in etr.bounds_by_pass_rate(group)[1][rule])

    def mean(right, wrong):
        return (weight * (k * right + (group - k) * wrong)).sum()
    gain = mean(up * a_right, -down * a_wrong)
    return float(gain**2 / (mean(up**2, down**2) * mean(a_right**2, a_wrong**2)))


def efficiency_rows(flips=(0, 0.025, 0.05, 0.1, 0.15, 0.2)):
    yield ["mix", "flip", "chain", *etr.RULES]
    for mix, rates in MIXES.items():
        for at in [(0, 4), (0, 16), *((flip, 1) for flip in flips)]:
            yield [mix, *at, *(efficiency(rule, rates, *at) for rule in etr.RULES)]


def make_problem(setting, seeds, key):
    """Logits (seeds * PROMPTS, chain, actions), and which actions are right."""
    rng = torch.Generator().manual_seed(key)
    place = (torch.arange(PROMPTS) + torch.rand(seeds, PROMPTS, generator=rng)) / PROMPTS
    rates = between(place, setting.spread).reshape(-1, 1, 1) ** (1 / setting.chain)
    noise, n = (
        torch.randn(len(rates), setting.chain, setting.actions, generator=rng),
        setting.right,
    )
    if setting.equal:  # equally likely actions; prompts differ in how many of them are right
        return 0 * noise, torch.arange(setting.actions) < (rates * setting.actions).round()
    right, wrong = noise[..., :n].log_softmax(-1), noise[..., n:].log_softmax(-1)
    logits = torch.cat([right + rates.log(), wrong + (1 - rates).log()], -1)
    return logits, torch.arange(setting.actions) < torch.full_like(rates, n)


def train_batch(logits, is_right, setting, optimizer, rule, eps, updates, rng):
    """One rollout batch. Changes the logits, returns the share of informative tokens clipped."""
    prompts, chain, actions = logits.shape
    uniform = torch.rand(prompts, chain, GROUP, generator=rng)
    action = torch.searchsorted(logits.detach().softmax(-1).cumsum(-1), uniform)
    action = action.clamp(max=actions - 1)  # rounding may leave the last sum below 1
    success = is_right.expand(logits.shape).gather(-1, action).all(1)  # (prompts, GROUP)
    error = torch.rand(prompts, GROUP, generator=rng)
    rewards = torch.where(success, error >= setting.missed, error < setting.passed).float()
    A, (micro, macro) = etr.group_advantages(rewards), etr.RULES[rule]
    budgets = torch.cat([etr.variance_budgets(seed, macro) for seed in rewards.split(PROMPTS)])
    low, high = etr.elastic_clip_bounds(
        A, budgets, eps, eps, micro, torch.inf
    )  # no scale > 2.65
    rows = A.flatten(), low.flatten(), high.flatten(), (A != 0).reshape(-1, 1).expand(-1, chain)

    def logprobs():
        return logits.log_softmax(-1).gather(-1, action).mT.reshape(-1, chain)
    old, clipped = logprobs().detach(), 0
    for _ in range(updates):
        loss, stats = etr.surrogate_loss(logprobs(), old, *rows, denominator=GROUP)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clipped += float(stats["clip_fraction"]) / updates
    return clipped


def run(setting, rule, eps, rate, batches, updates, seeds, key):
    """(batches + 1, 4, seeds): accuracy, entropy if right, pass@8, KL so far; and share clipped."""
    logits, is_right = make_problem(setting, seeds, key)
    optimizer = getattr(torch.optim, setting.optimizer)([logits.requires_grad_()], rate)
    rng, kl, path = torch.Generator().manual_seed(key), torch.zeros(len(logits)), []
    for batch in range(batches + 1):
        policy = logits.detach().log_softmax(-1)
        kl = kl + (old.exp() * (old - policy)).sum((1, 2)) if batch else kl
        right = policy.exp() * is_right
        step, old = right.sum(-1, keepdim=True), policy
        accuracy, entropy = step.prod(1)[:, 0], torch.special.entr(right / step).sum((1, 2))
        values = torch.stack([accuracy, entropy, 1 - (1 - accuracy) ** 8, kl])
        path.append(values.view(4, seeds, PROMPTS).mean(-1))
        if batch < batches:
            clipped = train_batch(logits, is_right, setting, optimizer, rule, eps, updates, rng)
    return torch.stack(path), clipped


def at_equal_kl(setting, rule, push, target=0.002):
    """Points of accuracy gained by one batch (seeds,), and the share clipped."""
    eps = 0.1
    for _ in range(3):  # KL grows about as eps^2, and the gain as its root
        rate = push * eps / 64 * (GROUP if setting.optimizer == "SGD" else 1)
        path, clipped = run(setting, rule, eps, rate, 1, 64, SEEDS, key=1)
        rest = float(target / path[1, 3].mean()) ** 0.5
        eps *= rest
    return 100 * rest * (path[1, 0] - path[0, 0]), clipped


def batch_rows(pushes=(0.25, 0.5, 1, 2, 4, 8), half=SEEDS // 2):
    yield "setting push clipped GRPO ETR ETR_half micro micro_half macro macro_half".split()
    for name, setting in SETTINGS.items():
        runs = {r: [at_equal_kl(setting, r, push) for push in pushes] for r in etr.RULES}
        for results in runs.values():
            results.append(max(results, key=lambda result: result[0][:half].mean()))
        for i, push in enumerate([*map(str, pushes), "best"]):
            gains = {r: results[i][0][half * (push == "best") :] for r, results in runs.items()}
            grpo = gains["GRPO"]
            row = [name, push, runs["GRPO"][i][1], grpo.mean()]
            for rule in ELASTIC:
                ratio = gains[rule].mean() / grpo.mean()
                error = (gains[rule] - ratio * grpo).std() / len(grpo) ** 0.5 / grpo.mean()
                row += [100 * (ratio - 1), 200 * error]
            yield row


def long_run(rule, at, setting, level, seeds, key):
    """(4, seeds): accuracy after 40 batches; the others where accuracy first is `level`."""
    path, _ = run(SETTINGS[setting], rule, *at, 40, 16, seeds, key)
    accuracy = path[:, 0].cummax(0).values

    def at_level(i, s):
        return np.interp(level, accuracy[:, s], path[:, i, s], right=np.nan)
    there = [[at_level(i, seed) for seed in range(seeds)] for i in (1, 2, 3)]
    return torch.tensor([path[-1, 0].tolist(), *there])


def long_rows(epsilons=(0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8), rates=(0.3, 1, 3, 10, 30)):
    yield "setting tuned_for GRPO_eps GRPO_rate ETR_eps ETR_rate measure GRPO gap half".split()
    grid, rules = [(eps, rate) for eps in epsilons for rate in rates], ("GRPO", "ETR")
    for task in (("clean", 0.9), ("10 % flipped", 0.8)):
        scores = [
            torch.stack([long_run(r, a, *task, 24, 3).mean(1) for a in grid]) for r in rules
        ]
        for i, goal in enumerate(("accuracy", "entropy", "nothing")):
            best = [
                (0.2, 1) if i == 2 else grid[s[:, i].nan_to_num(-1).argmax()] for s in scores
            ]
            grpo, elastic = (long_run(*pair, *task, SEEDS, 4) for pair in zip(rules, best))
            gap = elastic - grpo
            columns = grpo.mean(1), gap.mean(1), 2 * gap.std(1) / SEEDS**0.5
            for measure, *values in zip(("accuracy", "entropy", "pass@8", "KL"), *columns):
                yield [task[0], goal, *best[0], *best[1], measure, *values]


def table(name, rows=()):
    """Writes the rows, if there are any, to NAME.csv; returns what it holds."""
    path = PLOTS / f"{name}.csv"
    if rows:
        rows = [[x if isinstance(x, str) else f"{float(x):.4g}" for x in row] for row in rows]
        path.write_text("\n".join(map(",".join, rows)) + "\n")
    return np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")


def predict(batch):
    """ETR's gain by parts 1 and 2 on train_small.py's task, from its groups and what it clips."""
    groups, ends = table("classes"), table("ends")
    groups, clean = groups[groups["arm"] == "grpo"], batch[batch["setting"] == "clean"][:-1]
    grpo, elastic = (
        ends[(ends["stage"] == "final") & (ends["arm"] == x)] for x in ("grpo", "etr")
    )
    seen = np.bincount(groups["k"], groups["tokens_right"] + groups["tokens_wrong"])[1:]

    def edge(*mix):
        return (efficiency("ETR", *mix) / efficiency("GRPO", *mix)) ** 0.5 - 1
    scale = edge(torch.arange(1, GROUP) / GROUP, 0, 1, torch.tensor(seen)) / edge(
        MIXES[".01-.99"]
    )
    scale *= (grpo["pass1_after"] - grpo["pass1_before"]).mean()  # per percent, in points
    measured = 100 * (elastic["pass1_after"] - grpo["pass1_after"]).mean()
    for name in ("clip_fraction", "undecided_clipped"):
        gain = scale * np.interp(grpo[name].mean(), clean["clipped"], clean["ETR"])
        print(f"{name} {grpo[name].mean():.3f}: {gain:+.2f} points; measured {measured:+.2f}")


def picture(name, title, caption, panels):
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axis, (x, lines, *labels) in zip(figure.subplots(1, len(panels)), panels):
        curves = {arm: [dict(zip(100 * x, y))] for arm, (y, _) in lines.items()}
        ylim = (0.3, 1.05) if "efficiency" in labels[-1] else (-20, 32)
        panel(axis, curves, *labels, ylim)
        for arm, (y, half) in lines.items():
            axis.fill_between(
                100 * x, y - half, y + half, alpha=0.18, lw=0, color=ARMS[arm].color
            )
    figure.suptitle(title, size=17)
    figure.supxlabel(caption, size=12)
    figure.savefig(PLOTS / f"{name}.png")


def draw(efficiencies, batch):
    single = efficiencies[efficiencies["chain"] == 1]
    picture(
        "lab_efficiency",
        "A constant clip wastes KL on spread pass rates, less so under noise",
        "closed form, G = 8; 1 is the best rule there is",
        [
            (
                part["flip"],
                {rule.lower(): (part[rule], 0) for rule in etr.RULES},
                f"pass rates {mix}",
                "rewards flipped (%)",
                "KL efficiency",
            )
            for mix in [*MIXES][:3]
            for part in [single[single["mix"] == mix]]
        ],
    )
    rows = {name: batch[batch["setting"] == name][:-1] for name in ("clean", "10 % flipped")}
    picture(
        "lab_gain",
        "Elastic bounds gain where the clip decides, if rewards are true",
        f"one batch at equal KL, {SEEDS} seeds, bands: 95 % interval",
        [
            (
                part["clipped"],
                {r.lower(): (part[r], part[f"{r}_half"]) for r in ELASTIC},
                f"rewards {name}",
                "samples GRPO clips (%)",
                "gain over GRPO (%)",
            )
            for name, part in rows.items()
        ],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, rows in (
        ("efficiency", efficiency_rows),
        ("batch", batch_rows),
        ("long", long_rows),
    ):
        table(f"lab_{name}", () if "draw" in sys.argv else list(rows()))
        print((PLOTS / f"lab_{name}.csv").read_text().replace(",", "\t").expandtabs(14))
    predict(table("lab_batch"))
    draw(table("lab_efficiency"), table("lab_batch"))
