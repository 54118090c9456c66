"""ETR (Elastic Trust Regions) for GRPO, in one file that imports torch only.

GRPO samples G completions per prompt, scores each, and takes
their mean as baseline:

    A_hat = (R - mean(R)) / std(R)                         advantage within the group
    loss  = -mean of min(r * A_hat, clip(r, 1 - eps, 1 + eps) * A_hat)    over tokens

with r = pi_new / pi_old. The clip is a trust region: once a
token's ratio has left the interval on the side A_hat pushes to,
its gradient is zero. GRPO gives every completion the same eps.
How wide should it be? Write r = 1 + d. To second order the token
gains A*d of surrogate, A = R - mean(R), and costs d^2/2 of KL. At
a price of 1/eta per unit of KL

    maximise A*d - d^2 / (2*eta)   =>   |d*| = eta * |A| = eta * |A_hat| * std(R)
                                                                micro     macro

The best radius grows with how unusual the completion is in its
group (micro) and with how much signal the group carries (macro).
GRPO replaces that product by a constant. ETR puts it back, each
level with an elasticity d(log radius) / d(log signal):

    budget = (var(R) / mean of var(R) over informative groups) ^ macro_elasticity
    scale  = min(|A_hat| ^ micro_elasticity * sqrt(budget), scale_max)
    clip   = [1 - eps_low * scale, 1 + eps_high * scale]

(KL is quadratic in the radius, so a KL budget is a variance.) The
two lines that differ from GRPO carry an ETR comment. Elasticities
(0, 0) are GRPO bit for bit, (1, 1) is the optimum above. For
(1, 0), (0, 1) and (1, 1) mean(scale^2) over informative groups is
1 before the cap: ETR moves a fixed KL budget to where the signal
is, it does not add to it.

What is whose. The paper (Zhang et al., "ETR: Outcome-Guided
Elastic Trust Regions for Policy Optimization", arXiv 2601.03723)
proposes the two levels: clip boundaries scaled by advantage
magnitude, larger update budgets for groups of higher reward
variance. Its formulas and constants were not available to us. The
power forms, the second-order argument, the neutrality and every
constant below are OUR RECONSTRUCTION.

Left out on purpose: a KL penalty (KL is only logged), a critic,
sequence-level ratios, dual clip, a mean per sequence (the loss is
one mean over all tokens, as in DAPO).

With one optimiser step per rollout batch r is 1, nothing is
clipped, and ETR is GRPO. Where the clip decides, completion i
moves by its radius s_i and the share of KL well spent is
E[s a]^2 / (E[s^2] E[a^2]), a its expected true advantage: 1 for
s = |a| (plots/lab.py).

Shapes: P prompts, G completions each, B = P*G rows, T completion
tokens. Bad input raises a ValueError that says what was expected
and what came.
"""

import math

import torch

EPS = 1e-6  # a group's std counts as signal above this share of its largest |reward|


def _expect(condition, what, got, hint=""):
    if not condition:
        raise ValueError(f"expected {what}, got {got}{hint}")


def _center(rewards, eps=EPS):
    """Rewards (P, G) -> (R - group mean (P, G), variance (P, 1), informative (P, 1))."""
    _expect(rewards.dim() == 2 and rewards.shape[1] > 1,
            "rewards of shape (P, G) with G >= 2 completions per prompt", tuple(rewards.shape))
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    # Larger ones have infinite squares; NaN is not smaller either.
    bad = int((~(rewards.abs() < 1e18)).sum())
    _expect(bad == 0, "rewards of sizes below 1e18", f"{bad} others",
            "; give failed completions a number (0 is usual)")
    # A mean rounds to the size of the rewards, so take one of them off first.
    centered = rewards - rewards[:, :1]
    centered = centered - centered.mean(dim=1, keepdim=True)
    variance = centered.square().mean(dim=1, keepdim=True)
    size = rewards.abs().amax(dim=1, keepdim=True)
    return centered, variance, variance.sqrt() > eps * size


def group_advantages(rewards, normalize=True, eps=EPS):
    """Advantage of each completion in its group (GRPO: arXiv 2402.03300).

    rewards: (P, G). Returns (P, G): (R - mean) / std, or R - mean
    with `normalize=False` (Dr. GRPO, arXiv 2503.20783).

    A group whose std is at most `eps` times its largest |R| gets
    exactly 0: what differs there is rounding. The unit does not
    matter from 1e-18 to 1e18: [1e-8, 0] is as informative as [1,
    0], and [1000, 1000.0001] is not.

    The std is the population one (ddof 0): it makes mean(A_hat^2)
    = 1 in each group, on which budget neutrality rests. TRL and
    verl use ddof 1, so their |A_hat| is smaller by sqrt((G-1)/G),
    6 % at G = 8.

    >>> group_advantages(torch.tensor([[1., 0., 0., 0.], [1., 1., 1., 1.]]))
    tensor([[ 1.7321, -0.5774, -0.5774, -0.5774],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centered, variance, informative = _center(rewards, eps)
    advantages = centered / variance.sqrt() if normalize else centered
    return torch.where(informative, advantages, 0.0)


def variance_budgets(rewards, elasticity=1.0):
    """KL budget of each group (macro level; our derivation).

    rewards: (P, G). Returns (P,): the group's reward variance
    relative to the average informative group, to the power of the
    elasticity; 0 for a group without signal (as in
    `group_advantages`). With 0/1 rewards and pass rate p the
    variance is p(1-p): most budget at p = 1/2. Elasticity 0
    returns ones.

    >>> variance_budgets(torch.tensor([[1., 1., 0., 0.], [1., 0., 0., 0.], [0., 0., 0., 0.]]))
    tensor([1.1429, 0.8571, 0.0000])
    """
    _expect(0 <= elasticity < math.inf, "a finite elasticity >= 0", elasticity)
    _, variance, informative = _center(rewards)
    mean = (variance * informative).sum() / informative.sum().clamp(min=1)
    share = torch.where(informative, variance / mean, 0.0).squeeze(1)
    return share**elasticity  # ETR: macro. 0^0 = 1, so elasticity 0 is GRPO


def elastic_clip_bounds(advantages, budgets=None, clip_low=0.2, clip_high=0.2,
                        elasticity=1.0, scale_max=3.0):
    """Clip radii (micro level, times the macro budgets; our derivation).

    advantages: (P, G), normalized, from `group_advantages`.
    budgets: (P,), from `variance_budgets`, or None for ones.
    clip_low, clip_high: GRPO's eps below and above (DAPO: 0.2, 0.28).
    scale_max: caps how far a radius is stretched. math.inf is for
        analysis only: a low radius of 1 switches the lower clip
        off.

    Returns (low, high), both (P, G): the ratio is kept in
    [1 - low, 1 + high].

    >>> low, high = elastic_clip_bounds(torch.tensor([[1.7321, -0.5774, -0.5774, -0.5774]]))
    >>> high
    tensor([[0.3464, 0.1155, 0.1155, 0.1155]])
    """
    if budgets is None:
        budgets = advantages.new_ones(advantages.shape[:1])
    _expect(0 <= elasticity < math.inf, "a finite elasticity >= 0", elasticity)
    _check_bounds(advantages, budgets, clip_low, clip_high, scale_max)
    scale = advantages.abs() ** elasticity * budgets.sqrt()[:, None]  # ETR: micro times macro
    scale = scale.clamp(max=scale_max)
    return clip_low * scale, clip_high * scale


def _check_bounds(advantages, budgets, clip_low, clip_high, scale_max):
    _expect(advantages.dim() == 2, "advantages of shape (P, G)", tuple(advantages.shape))
    _expect(budgets.shape == advantages.shape[:1],
            f"one budget per prompt, shape ({len(advantages)},)", tuple(budgets.shape))
    _expect(torch.isfinite(advantages).all(), "finite advantages", "NaN or infinity")
    _expect((torch.isfinite(budgets) & (budgets >= 0)).all(), "finite budgets >= 0", "others")
    _expect(
        0 <= clip_low < math.inf and 0 <= clip_high < math.inf and scale_max > 0,
        "finite clip_low, clip_high >= 0 and scale_max > 0",
        f"{clip_low}, {clip_high}, {scale_max}")
    _expect(clip_low * scale_max < 1 or scale_max == math.inf,
            "clip_low * scale_max < 1", f"{clip_low} * {scale_max}",
            ", which switches the lower clip off; lower one of them")


def clipped_tokens(ratio, advantages, low, high):
    """Tokens from which the clip takes the gradient: (below, above), boolean (B, T).

    Only one side acts: below for A < 0, above for A > 0.
    advantages, low, high: broadcastable to ratio (B, T), e.g. (B, 1).
    """
    below = (ratio < 1 - low) & (advantages < 0)
    above = (ratio > 1 + high) & (advantages > 0)
    return below, above


def surrogate_loss(logprobs, old_logprobs, advantages, low, high, mask, denominator=None):
    """PPO's clipped surrogate (arXiv 1707.06347), one mean over tokens (DAPO).

    logprobs, old_logprobs: (B, T), of the sampled tokens, current and sampling policy.
    advantages: (B,). low, high: (B,) radii, or floats: 0.2, 0.2 is GRPO.
    mask: (B, T), true (or 1) at completion tokens, the first EOS included.
    denominator: default mask.sum(). To accumulate gradients
        exactly pass the token count of the whole batch; a
        micro-batch without a token has loss, gradient, stats 0.

    Returns (loss, stats): a scalar to minimise, and detached
    means over masked tokens: clip_fraction = clip_fraction_low
    (A < 0, below its bound) + clip_fraction_high, ratio_mean, and
    approx_kl = KL(old || new) in nats, by k3 = r - 1 - log r.
    """
    # bf16 would round away a small KL.
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    logprobs, old_logprobs = logprobs.to(dtype), old_logprobs.to(dtype)
    low, high = (torch.as_tensor(x, dtype=dtype, device=logprobs.device) for x in (low, high))
    mask = mask.bool()
    _check_loss(logprobs, old_logprobs, advantages, low, high, mask, denominator)
    advantages, low, high = (x.detach().reshape(-1, 1) for x in (advantages, low, high))

    # Padding may be NaN, and NaN * 0 is NaN: blank it out.
    # Beyond the clamp, no gradient.
    log_ratio = logprobs - old_logprobs.detach()
    log_ratio = log_ratio.masked_fill(~mask, 0.0).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    # The minimum keeps the gradient of a token that moved the wrong way.
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -(objective * mask).sum() / (denominator or mask.sum())
    with torch.no_grad():
        below, above = clipped_tokens(ratio, advantages, low, high)
        per_token = {
            "clip_fraction": below | above,
            "clip_fraction_low": below,
            "clip_fraction_high": above,
            "ratio_mean": ratio,
            "approx_kl": log_ratio.expm1() - log_ratio,
        }
        tokens = mask.sum().clamp(min=1)
        stats = {name: (x * mask).sum() / tokens for name, x in per_token.items()}
    return loss, stats


def _check_loss(logprobs, old_logprobs, advantages, low, high, mask, denominator):
    rows = logprobs.shape[:1]
    shapes = [tuple(x.shape) for x in (logprobs, old_logprobs, mask)]
    _expect(logprobs.dim() == 2 and shapes[0] == shapes[1] == shapes[2],
            "logprobs, old_logprobs and mask of one shape (B, T)", shapes)
    shapes = [tuple(x.shape) for x in (advantages, low, high)]
    _expect(shapes[0] == rows and all(x in ((), rows) for x in shapes[1:]),
            f"advantages of shape ({rows[0]},) and low, high of that shape or floats",
            shapes, "; flatten (P, G) to (P*G,)")
    if denominator is None:
        _expect(mask.any(), "a mask with at least one completion token", "an empty one")
    else:
        _expect(denominator > 0, "a positive denominator", denominator)


RULES = {  # (micro, macro) elasticities
    "GRPO": (0.0, 0.0),
    "micro": (1.0, 0.0),
    "macro": (0.0, 1.0),
    "ETR": (1.0, 1.0),
}


def bounds_by_pass_rate(G, clip=0.2):
    """What ETR computes for 0/1 rewards and k = 0..G right completions in a group.

    Returns (budgets, {rule: (up, down)}, advantages of right, of
    wrong), each (G+1,), NaN where no such completion exists. `up`
    is the radius above 1 of a right completion, `down` the radius
    below 1 of a wrong one: the only sides that act.
    """
    k = torch.arange(G + 1)
    rewards = (torch.arange(G) < k[:, None]).float()  # right ones first
    advantages = group_advantages(rewards)
    rules = {}
    for rule, (micro, macro) in RULES.items():
        budgets = variance_budgets(rewards, macro)
        low, high = elastic_clip_bounds(advantages, budgets, clip, clip, micro)
        up = torch.where(k > 0, high[:, 0], math.nan)
        down = torch.where(k < G, low[:, -1], math.nan)
        rules[rule] = up, down
    right = torch.where(k > 0, advantages[:, 0], math.nan)
    wrong = torch.where(k < G, advantages[:, -1], math.nan)
    return variance_budgets(rewards), rules, right, wrong


def main(G=8, path="plots/bounds.png"):
    budgets, rules, right, wrong = bounds_by_pass_rate(G)
    print(
        f"Clip bounds with eps = 0.2 for k right completions of G = {G}, "
        "in a batch with one group of each k (0/1 rewards).\n"
        "A right completion has an upper bound (+), "
        "a wrong one a lower bound (-); the other sides never act.\n")
    print("  k |  A right  A wrong | budget |" + "|".join(f"{rule:^17s}" for rule in rules))
    for k in range(G + 1):
        radii = "|".join(f" {up[k]:+7.2f} {-down[k]:+7.2f} " for up, down in rules.values())
        row = f"{k:3d} |  {right[k]:+7.2f}  {wrong[k]:+7.2f} | {budgets[k]:6.2f} |{radii}"
        print(row.replace("+nan", "   -"))
    draw(rules, G, path)
    print(f"\nPicture: {path}")


def draw(rules, G, path):
    import os
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's may be missing here
    import matplotlib.pyplot as plt

    # Okabe-Ito colours, as in every picture of this project.
    colors = {"GRPO": "#000000", "micro": "#E69F00", "macro": "#009E73", "ETR": "#D55E00"}
    places = {"GRPO": (0.87, 0.214), "micro": (0.145, 0.52), "macro": (0.07, 0.11),
              "ETR": (0.035, 0.43)}
    titles = "Right answers: upper bound", "Wrong answers: lower bound"
    plt.rcParams["font.size"] = 12.5
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    ks = torch.arange(1, G)  # k = 0 and k = G have no gradient
    for side, axis in enumerate(axes):
        for rule, radii in rules.items():
            axis.plot(ks / G, radii[side][ks], "o-", color=colors[rule], lw=2.5, ms=5)
        axis.set(title=titles[side], xlabel="pass rate of the group, k/G")
        axis.set(xlim=(0, 1), ylim=(0, 0.62))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    for rule, place in places.items():
        axes[0].text(*place, rule, color=colors[rule], size=14, weight="bold")
    axes[0].set_ylabel("clip radius |ratio - 1|")
    figure.suptitle(
        "ETR gives rare outcomes room and common ones little; GRPO treats all alike",
        weight="bold")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
