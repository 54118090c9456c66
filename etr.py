"""ETR (Elastic Trust Regions) for GRPO, in one file that imports torch only.

GRPO samples G completions per prompt, scores each, and uses the group as its own baseline:

    A_hat = (R - mean(R)) / std(R)                                  advantage of a completion in its group
    loss  = -mean over tokens of min(r * A_hat, clip(r, 1 - eps, 1 + eps) * A_hat),    r = pi_new / pi_old

The clip is a trust region: once a token's ratio r has left [1 - eps, 1 + eps] on the side A_hat pushes to, its gradient is
zero. GRPO gives every completion the same eps. How wide should it be? Write r = 1 + d. To second order the token gains
A*d of surrogate, with A = R - mean, and costs d^2/2 of KL, so at a price of 1/eta per unit of KL

    maximise A*d - d^2 / (2*eta)   =>   d* = eta*A,   |d*| = eta * |A_hat| * std(R)
                                                                   micro     macro

The best radius grows with how unusual the completion is inside its group (micro) and with how much signal the group carries
(macro). GRPO replaces that product by a constant. ETR puts it back, each level with an elasticity d(log radius)/d(log signal):

    budget = (var(R) / mean of var(R) over informative groups) ^ macro_elasticity           KL is quadratic in the radius, so
    scale  = min(|A_hat| ^ micro_elasticity * sqrt(budget), scale_max)                      a KL budget is a variance
    clip   = [1 - eps_low * scale, 1 + eps_high * scale]

Those are the two lines of code that differ from GRPO, each marked with an ETR comment. Elasticities (micro, macro) = (0, 0) are GRPO
bit for bit and (1, 1) is the optimum above. For (1, 0), (0, 1) and (1, 1) mean(scale^2) over the completions of informative
groups is 1 before the cap: ETR moves a fixed KL budget to where the signal is, it does not merely widen the clip.

What is whose. The paper (Zhang et al., "ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization", arXiv 2601.03723)
proposes the two levels: clip boundaries scaled by advantage magnitude, and larger update budgets for groups of higher reward
variance. Its formulas and constants were not available to us. The power forms, the second-order argument, the neutrality and
every constant below are OUR RECONSTRUCTION.

Left out on purpose: a KL penalty to a reference model (we only log KL), a critic, sequence-level ratios, dual clip, length
normalisation per sequence (the loss is one mean over all tokens, as in DAPO).

With one optimiser step per rollout batch r is exactly 1, nothing is clipped, and ETR is GRPO. Take several.

Shapes: P prompts, G completions each, B = P*G rows, T completion tokens.  `python etr.py` prints the bounds for every pass rate.
"""

import math

import torch


def _center(rewards, who):
    """Rewards (P, G) -> deviations from the group mean (P, G); raises the ValueErrors about rewards."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"{who}: expected rewards of shape (P, G) with G >= 2 completions per prompt, got "
                         f"{tuple(rewards.shape)}; a group of one has no baseline, so sample at least 2 per prompt")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if not torch.isfinite(rewards).all():
        raise ValueError(f"{who}: expected finite rewards, got {int((~torch.isfinite(rewards)).sum())} that are NaN or "
                         "infinite; give failed completions a number (0 is usual)")
    # The mean of G equal floats can round to a neighbour of them. Subtracting one of them first makes equal rewards exactly 0.
    rewards = rewards - rewards[:, :1]
    return rewards - rewards.mean(dim=1, keepdim=True)


def group_advantages(rewards, normalize=True, eps=1e-6):
    """Advantage of each completion relative to its group (GRPO: Shao et al. 2024, arXiv 2402.03300, outcome supervision).

    rewards: (P, G). Returns (P, G): (R - mean) / std, exactly 0 in a group whose std is at most `eps` (it carries no signal), or
    R - mean with `normalize=False` (Dr. GRPO, arXiv 2503.20783).

    The std is the population one (ddof 0): it makes mean(A_hat^2) = 1 in each group, on which ETR's budget neutrality rests.
    TRL and verl use ddof 1 and add 1e-4 and 1e-6 to it; their |A_hat| is smaller by sqrt((G-1)/G), 6 % at G = 8.

    Raises ValueError if rewards are not (P, G >= 2) or not finite.

    >>> group_advantages(torch.tensor([[1., 0., 0., 0.], [1., 1., 1., 1.]]))
    tensor([[ 1.7321, -0.5774, -0.5774, -0.5774],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centered = _center(rewards, "group_advantages")
    if not normalize:
        return centered
    std = centered.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(std > eps, centered / std, 0.0)


def variance_budgets(rewards, elasticity=1.0):
    """KL budget of each group: its reward variance relative to the average informative group (macro level; our derivation).

    rewards: (P, G). Returns (P,), without unit: (var / mean of var over groups with std > 1e-6) ^ elasticity. With 0/1 rewards
    and pass rate p the variance is p(1-p): most budget at p = 1/2, none at 0 or 1, where there is nothing to learn.
    elasticity 0 returns ones. elasticity 1 averages 1 over the informative groups.

    Raises ValueError if rewards are not (P, G >= 2) or not finite, or if elasticity is negative.

    >>> variance_budgets(torch.tensor([[1., 1., 0., 0.], [1., 0., 0., 0.], [0., 0., 0., 0.]]))
    tensor([1.1429, 0.8571, 0.0000])
    """
    if not 0 <= elasticity < math.inf:
        raise ValueError(f"variance_budgets: expected a finite elasticity >= 0, got {elasticity}")
    variance = _center(rewards, "variance_budgets").square().mean(dim=1)
    informative = variance > 1e-12
    mean = (variance * informative).sum() / informative.sum().clamp(min=1)
    return torch.where(informative, variance / mean, 0.0) ** elasticity  # ETR: macro. 0^0 = 1, so elasticity 0 is GRPO


def elastic_clip_bounds(advantages, budgets=None, clip_low=0.2, clip_high=0.2, elasticity=1.0, scale_max=3.0):
    """Clip radii of each completion (micro level, times the macro budgets if given; our derivation).

    advantages: (P, G), normalised, from `group_advantages`. budgets: (P,), from `variance_budgets`, or None for ones.
    clip_low, clip_high: GRPO's eps below and above (0.2 and 0.28 are DAPO's clip-higher). Returns (low, high), both (P, G),
    in units of the ratio: it is kept in [1 - low, 1 + high]. `scale_max` caps how far a radius is stretched; math.inf leaves it
    uncapped, for analysis only, since a radius of 1 or more below switches the lower clip off (a ratio is never negative).

    Raises ValueError if shapes do not match, advantages or budgets are not finite, a clip radius is
    negative, scale_max is not positive, elasticity is negative, or clip_low * scale_max >= 1 with a finite scale_max.

    >>> low, high = elastic_clip_bounds(torch.tensor([[1.7321, -0.5774, -0.5774, -0.5774]]))
    >>> high
    tensor([[0.3464, 0.1155, 0.1155, 0.1155]])
    """
    who = "elastic_clip_bounds"
    if not 0 <= elasticity < math.inf:
        raise ValueError(f"{who}: expected a finite elasticity >= 0, got {elasticity}")
    if advantages.dim() != 2:
        raise ValueError(f"{who}: expected advantages of shape (P, G), got {tuple(advantages.shape)}")
    if budgets is None:
        budgets = torch.ones_like(advantages[:, 0])
    if budgets.shape != advantages.shape[:1]:
        raise ValueError(f"{who}: expected one budget per prompt, shape ({advantages.shape[0]},), got {tuple(budgets.shape)}")
    if not (torch.isfinite(advantages).all() and torch.isfinite(budgets).all() and (budgets >= 0).all()):
        raise ValueError(f"{who}: expected finite advantages and finite budgets >= 0, got others; check the rewards")
    if not (0 <= clip_low < math.inf and 0 <= clip_high < math.inf and scale_max > 0):
        raise ValueError(f"{who}: expected finite clip_low, clip_high >= 0 and scale_max > 0, got {clip_low}, {clip_high}, {scale_max}")
    if math.isfinite(scale_max) and clip_low * scale_max >= 1:
        raise ValueError(f"{who}: expected clip_low * scale_max < 1, got {clip_low} * {scale_max} = {clip_low * scale_max:g}, "
                         "which switches the lower clip off; lower one of them")
    scale = advantages.abs() ** elasticity * budgets.sqrt()[:, None]  # ETR: micro times macro; all ones is GRPO
    scale = scale.clamp(max=scale_max)
    return clip_low * scale, clip_high * scale


def clipped_tokens(ratio, advantages, low, high):
    """Which tokens the clip takes the gradient from. Only one side acts: below for A < 0, above for A > 0.

    ratio: (B, T). advantages, low, high: broadcastable to it, e.g. (B, 1). Returns (below, above), boolean (B, T).
    """
    return (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)


def surrogate_loss(logprobs, old_logprobs, advantages, low, high, mask, denominator=None):
    """The clipped surrogate (PPO: Schulman et al. 2017, eq. 7), averaged over tokens as in DAPO (arXiv 2503.14476).

    logprobs, old_logprobs: (B, T), of the sampled tokens under the current and the sampling policy. advantages: (B,).
    low, high: (B,) radii >= 0 from `elastic_clip_bounds(...)`, flattened, or floats: 0.2, 0.2 is GRPO. mask: (B, T), true (or 1) at
    completion tokens, the first EOS included. denominator: what the sum over tokens is divided by, default mask.sum(); when
    gradients are accumulated pass the token count of the whole batch, so that micro-batches add up to its exact gradient.

    Returns (loss, stats). loss: scalar to minimise. stats: detached scalars, means over the masked tokens of this call:
    clip_fraction (its parts clip_fraction_low: A < 0 below the bound, clip_fraction_high: A > 0 above it), ratio_mean, and
    approx_kl, in nats: KL(old || new) by the k3 estimator r - 1 - log r (Schulman 2020). Only `logprobs` carries gradient. The
    log-ratio is clamped to [-20, 20], beyond which it carries none.

    Raises ValueError if shapes do not match, the mask is empty, or the denominator is not positive.
    """
    who, rows = "surrogate_loss", logprobs.shape[:1]
    low, high = (torch.as_tensor(x, dtype=logprobs.dtype, device=logprobs.device) for x in (low, high))
    if logprobs.dim() != 2 or old_logprobs.shape != logprobs.shape or mask.shape != logprobs.shape:
        raise ValueError(f"{who}: expected logprobs, old_logprobs and mask of one shape (B, T), got {tuple(logprobs.shape)}, "
                         f"{tuple(old_logprobs.shape)}, {tuple(mask.shape)}")
    if advantages.shape != rows or any(x.dim() and x.shape != rows for x in (low, high)):
        raise ValueError(f"{who}: expected advantages of shape ({rows[0]},) and low, high of that shape or floats, got "
                         f"{tuple(advantages.shape)}, {tuple(low.shape)}, {tuple(high.shape)}; flatten (P, G) to (P*G,)")
    mask = mask.bool()
    if not mask.any():
        raise ValueError(f"{who}: expected a mask with at least one completion token, got an empty one")
    denominator = mask.sum() if denominator is None else denominator
    if not denominator > 0:
        raise ValueError(f"{who}: expected a positive denominator, got {denominator}")
    advantages, low, high = (x.detach().reshape(-1, 1) for x in (advantages, low, high))

    # Padding may hold anything, also -inf or NaN, and NaN * 0 is NaN: blank it out before the exponential, not after.
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    # The minimum keeps the gradient of a token that moved the wrong way: the clip never blocks the way back.
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    loss = -(objective * mask).sum() / denominator

    with torch.no_grad():
        below, above = (side[mask].float().mean() for side in clipped_tokens(ratio, advantages, low, high))
        stats = {"clip_fraction": below + above, "clip_fraction_low": below, "clip_fraction_high": above,
                 "ratio_mean": ratio[mask].mean(), "approx_kl": (ratio - 1 - log_ratio)[mask].mean()}
    return loss, stats


RULES = {"GRPO": (0.0, 0.0), "micro": (1.0, 0.0), "macro": (0.0, 1.0), "ETR": (1.0, 1.0)}  # (micro, macro) elasticities


def bounds_by_pass_rate(G, clip=0.2):
    """Everything ETR computes for 0/1 rewards, for one group with each number k = 0..G of correct completions.

    Returns (budgets, {rule: (up, down)}, advantages of right, of wrong): each (G+1,), NaN where no such completion exists.
    `up` is the radius above 1 of a right completion, `down` the radius below 1 of a wrong one: the only sides that act.
    """
    k = torch.arange(G + 1)
    rewards = (torch.arange(G) < k[:, None]).float()  # (G+1, G): row k has its k right completions first
    advantages = group_advantages(rewards)
    right = torch.where(k > 0, advantages[:, 0], math.nan)
    wrong = torch.where(k < G, advantages[:, -1], math.nan)
    rules = {}
    for rule, (micro, macro) in RULES.items():
        low, high = elastic_clip_bounds(advantages, variance_budgets(rewards, macro), clip, clip, micro)
        rules[rule] = (torch.where(k > 0, high[:, 0], math.nan), torch.where(k < G, low[:, -1], math.nan))
    return variance_budgets(rewards), rules, right, wrong


def main(G=8, path="plots/bounds.png"):
    import os

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    budgets, rules, right, wrong = bounds_by_pass_rate(G)
    cell = lambda x: f"{x:+7.2f}" if math.isfinite(x) else "      -"
    print(f"Clip bounds with eps = 0.2 for k right completions of G = {G}, in a batch with one group of each k (0/1 rewards).")
    print("A right completion has an upper bound (+), a wrong one a lower bound (-); the other sides never act.\n")
    print("  k |  A right  A wrong | budget |" + "|".join(f"{rule:^17s}" for rule in rules))
    for k in range(G + 1):
        bounds = "|".join(f" {cell(up[k])} {cell(-down[k])} " for up, down in rules.values())
        print(f"{k:3d} |  {cell(right[k])}  {cell(wrong[k])} | {budgets[k]:6.2f} |{bounds}")

    # Okabe-Ito colours, the same for the same rule in every picture of this project.
    colors = {"GRPO": "#000000", "micro": "#E69F00", "macro": "#009E73", "ETR": "#D55E00"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    for side, axis, title in ((0, axes[0], "Right answers: upper bound"), (1, axes[1], "Wrong answers: lower bound")):
        ks = range(1, G) if G > 2 else range(G + 1)  # k = 0 and k = G have no gradient, so no bound that matters
        for rule, radii in rules.items():
            axis.plot([k / G for k in ks], [radii[side][k] for k in ks], "o-", color=colors[rule], lw=2.5, ms=5)
        axis.set(title=title, xlabel="pass rate of the group, k/G", xlim=(0, 1), ylim=(0, 0.62))
        axis.title.set_size(14)
        axis.xaxis.label.set_size(13)
        axis.tick_params(labelsize=12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    labels = {"GRPO": (0.87, 0.214), "micro": (0.145, 0.52), "macro": (0.07, 0.11), "ETR": (0.035, 0.43)}
    for rule, (x, y) in labels.items():
        axes[0].text(x, y, rule, color=colors[rule], fontsize=14, weight="bold")
    axes[0].set_ylabel("clip radius |ratio - 1|", fontsize=13)
    figure.suptitle("ETR gives rare outcomes room and common ones little; GRPO treats all alike", fontsize=15, weight="bold")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"\nPicture: {path}")


if __name__ == "__main__":
    main()
