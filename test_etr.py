"""Tests of etr.py, train_small.py and the README: python -m pytest. Long forms are named beside their tests."""

import argparse
import copy
import csv
import doctest
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it: no test may depend on a hub

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import etr
import train_small as ts

ROOT = Path(__file__).resolve().parent
torch.set_num_threads(1)


# -------------------------------------------------------------------------------------------------------------- etr.py


def example(rows=8, tokens=12, seed=0, dtype=torch.float64):
    """Random (logprobs, old_logprobs, advantages, low, high, mask): ragged completions, ratios on both sides of both bounds."""
    torch.manual_seed(seed)
    old = -3 * torch.rand(rows, tokens, dtype=dtype)
    logprobs = (old + 0.3 * torch.randn(rows, tokens, dtype=dtype)).requires_grad_()
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1))
    low, high = 0.05 + 0.3 * torch.rand(2, rows, dtype=dtype)
    return logprobs, old, torch.randn(rows, dtype=dtype), low, high, mask


def loss_and_gradient(logprobs, *args, **kwargs):
    leaf = logprobs.detach().clone().requires_grad_()
    loss, stats = etr.surrogate_loss(leaf, *args, **kwargs)
    loss.backward()
    return loss.detach(), leaf.grad, stats


def surrogate_by_hand(logprobs, old_logprobs, advantages, low, high, mask):
    """The same loss token by token, by cases instead of by minimum and clamp, and its gradient by hand."""
    total, gradient = 0.0, torch.zeros_like(old_logprobs)
    for i, t in mask.nonzero().tolist():
        A, ratio = advantages[i].item(), math.exp(logprobs[i, t].item() - old_logprobs[i, t].item())
        bound = 1 + float(high[i]) if A > 0 else 1 - float(low[i])
        clipped = ratio > bound if A > 0 else ratio < bound
        total += A * (bound if clipped else ratio)
        gradient[i, t] = 0.0 if clipped else -A * ratio
    return -total / int(mask.sum()), gradient / mask.sum()


# Elasticities of 0 are GRPO

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elasticities_of_zero_are_grpo_bit_for_bit(dtype):
    logprobs, old, _, _, _, mask = example(32, 12, dtype=dtype)
    rewards = torch.rand(4, 8, dtype=dtype).round()
    rewards[2] = 1.0  # a group without signal must not become an exception
    advantages = etr.group_advantages(rewards)
    low, high = etr.elastic_clip_bounds(advantages, etr.variance_budgets(rewards, 0.0), 0.2, 0.28, elasticity=0.0)
    elastic = loss_and_gradient(logprobs, old, advantages.flatten(), low.flatten(), high.flatten(), mask)
    grpo = loss_and_gradient(logprobs, old, advantages.flatten(), 0.2, 0.28, mask)
    assert torch.equal(elastic[0], grpo[0]) and torch.equal(elastic[1], grpo[1])
    assert grpo[2]["clip_fraction_low"] > 0.02 and grpo[2]["clip_fraction_high"] > 0.02


@pytest.mark.parametrize("seed", range(3))
def test_rewards_to_gradient_equal_grpo_computed_by_hand(seed):
    logprobs, old, _, low, high, mask = example(16, 12, seed)
    rewards = torch.rand(4, 4, dtype=torch.float64)
    by_hand = [(r - statistics.fmean(group)) / statistics.pstdev(group) for group in rewards.tolist() for r in group]
    advantages = etr.group_advantages(rewards).flatten()
    assert advantages.tolist() == pytest.approx(by_hand, rel=1e-9)
    for args, floats in (((0.2, 0.28), ([0.2] * 16, [0.28] * 16)), ((low, high), (low, high))):
        value, gradient = surrogate_by_hand(logprobs, old, torch.tensor(by_hand, dtype=torch.float64), *floats, mask)
        loss, ours, _ = loss_and_gradient(logprobs, old, advantages, *args, mask)
        assert loss.item() == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-12)


# Advantages, budgets and bounds

@pytest.mark.parametrize("micro, macro", [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["binary", "real", "binary and constant", "real and constant"])
def test_bounds_are_budget_neutral(kind, micro, macro):
    torch.manual_seed(0)
    real, binary = 3 + 5 * torch.rand(64, 1) * torch.randn(64, 8), (torch.rand(64, 8) < torch.rand(64, 1)).float()
    rewards = real if "real" in kind else binary
    if "constant" in kind:
        rewards[::3] = rewards[::3, :1]
    informative = rewards.amax(1) > rewards.amin(1)
    budgets = etr.variance_budgets(rewards, macro)
    low, high = etr.elastic_clip_bounds(etr.group_advantages(rewards), budgets, 0.2, 0.3, micro, scale_max=math.inf)
    for scale in (low[informative] / 0.2, high[informative] / 0.3):
        assert scale.square().mean().item() == pytest.approx(1, abs=1e-5)
        assert scale.std() > 0.1  # neutral, yet not constant
    assert budgets[informative].mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("G", [2, 4, 8, 16])
def test_table_over_pass_rates_has_its_closed_form(G):
    p, nan = [k / G for k in range(G + 1)], math.nan
    c = 6 * G / (G + 1)  # in a batch with one group of each k, the informative ones have mean p(1-p) = (G+1) / 6G
    right = [math.sqrt((1 - q) / q) if q > 0 else nan for q in p]
    wrong = [math.sqrt(q / (1 - q)) if q < 1 else nan for q in p]
    macro = [math.sqrt(c * q * (1 - q)) for q in p]
    scales = {"GRPO": ([1.0] * (G + 1),) * 2, "micro": (right, wrong), "macro": (macro, macro),
              "ETR": ([math.sqrt(c) * (1 - q) for q in p], [math.sqrt(c) * q for q in p])}
    close = lambda ours, expected: ours.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7, nan_ok=True)

    budgets, rules, A_right, A_wrong = etr.bounds_by_pass_rate(G, 0.2)
    assert close(budgets, [c * q * (1 - q) for q in p]) and close(A_right, right) and close(A_wrong, [-a for a in wrong])
    assert rules.keys() == scales.keys()
    for rule, radii in rules.items():
        for radius, scale, exists in zip(radii, scales[rule], (right, wrong)):
            assert close(radius, [nan if math.isnan(a) else 0.2 * min(s, 3) for s, a in zip(scale, exists)]), rule
    assert (max(right[1:]) > 3) == (G == 16)  # the cap of 3 acts in one of the four tables


@pytest.mark.parametrize("elasticity", [0.0, 0.5, 1.0, 2.0])
def test_an_elasticity_is_d_log_radius_by_d_log_signal(elasticity):
    low, high = etr.elastic_clip_bounds(torch.tensor([[0.5, -1.0]]), None, 0.1, 0.2, elasticity)
    assert (high[0, 1] / high[0, 0]).item() == pytest.approx(2**elasticity) and torch.equal(high, 2 * low)
    budgets = etr.variance_budgets(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), elasticity)  # a std twice as large
    assert (budgets[1] / budgets[0]).sqrt().item() == pytest.approx(2**elasticity)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, -2.7, 1e6 + 0.1])
@pytest.mark.parametrize("G", [2, 3, 7, 8, 10])
def test_equal_rewards_carry_no_signal_however_their_mean_rounds(G, value):
    rewards = torch.full((2, G), value)
    for normalize in (True, False):
        assert torch.equal(etr.group_advantages(rewards, normalize), torch.zeros(2, G))
    assert torch.equal(etr.variance_budgets(rewards), torch.zeros(2))
    assert torch.equal(etr.variance_budgets(rewards, 0.0), torch.ones(2))


def test_integer_and_boolean_rewards_and_advantages_without_the_std():
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]])
    for same in (rewards, rewards.bool()):
        assert torch.equal(etr.group_advantages(same), etr.group_advantages(rewards.float()))
        assert torch.equal(etr.variance_budgets(same), etr.variance_budgets(rewards.float()))
    assert etr.group_advantages(rewards, normalize=False).tolist() == [[0.75, -0.25, -0.25, -0.25], [0.25, 0.25, 0.25, -0.75]]
    assert torch.equal(etr.group_advantages(torch.tensor([[1e-7, 0.0]])), torch.zeros(1, 2))  # std below eps


# Gradients

@pytest.mark.parametrize("position", ["below", "inside", "above"])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_stops_only_where_the_token_has_left_the_way_it_was_pushed(sign, position):
    advantages = sign * torch.tensor([2.0, 0.5])
    low, high = torch.tensor([0.4, 0.1]), torch.tensor([0.6, 0.05])  # just outside for the second row is inside for the first
    ratio = torch.stack({"below": (0.99 - low, 0.5 * (1 - low)), "inside": (1.01 - low, 0.99 + high),
                         "above": (1.01 + high, 2 * (1 + high))}[position], dim=1)
    loss, gradient, _ = loss_and_gradient(ratio.log(), torch.zeros(2, 2), advantages, low, high, torch.ones(2, 2))
    stopped = (sign, position) in ((1, "above"), (-1, "below"))
    reached = (1 + sign * (high if sign > 0 else low))[:, None].expand(2, 2) if stopped else ratio
    torch.testing.assert_close(gradient, torch.zeros(2, 2) if stopped else -advantages[:, None] * ratio / 4)
    torch.testing.assert_close(loss, -(advantages[:, None] * reached).mean())


@pytest.mark.parametrize("bounds", ["per row", (0.0, 0.0), (0.2, 0.2), (0.9, 100.0)], ids=str)
def test_first_inner_step_does_not_depend_on_the_bounds(bounds):
    logprobs, _, advantages, low, high, mask = example()
    low, high = (low, high) if bounds == "per row" else bounds
    loss, gradient, stats = loss_and_gradient(logprobs, logprobs.detach(), advantages, low, high, mask)
    policy_gradient = -advantages[:, None] * mask / mask.sum()
    torch.testing.assert_close(gradient, policy_gradient, rtol=1e-12, atol=0)
    assert loss.item() == pytest.approx(policy_gradient.sum().item())
    assert stats == {"clip_fraction": 0, "clip_fraction_low": 0, "clip_fraction_high": 0, "ratio_mean": 1, "approx_kl": 0}


def accumulated_gradient(rows_per_micro_batch, exact):
    *_, advantages, low, high, mask = example(8, 12)
    weight = torch.linspace(-1, 1, 100, dtype=torch.float64).view(20, 5).requires_grad_()  # a policy with shared parameters
    features, chosen = torch.randn(8, 12, 20, dtype=torch.float64), torch.randint(5, (8, 12, 1))
    score = lambda rows: (features[rows] @ weight).log_softmax(-1).gather(-1, chosen[rows]).squeeze(-1)
    old = score(slice(None)).detach() + 0.3 * torch.randn(8, 12)
    for rows in torch.arange(8).split(rows_per_micro_batch):
        loss, _ = etr.surrogate_loss(score(rows), old[rows], advantages[rows], low[rows], high[rows], mask[rows],
                                     denominator=int(mask.sum()) if exact else None)
        (loss if exact else loss * len(rows) / 8).backward()
    return weight.grad


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_accumulation_is_exact_with_the_denominator_and_wrong_as_a_mean_of_means(rows):
    whole = accumulated_gradient(8, exact=False)
    torch.testing.assert_close(accumulated_gradient(8, exact=True), whole, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(accumulated_gradient(rows, exact=True), whole, rtol=1e-10, atol=1e-12)
    assert (accumulated_gradient(rows, exact=False) - whole).norm() > 0.05 * whole.norm()


# Parity with TRL and verl

def trl_loss(loss_type, logprobs, old_logprobs, advantages, low, high, mask, num_items):
    """(loss, metrics) of TRL's own GRPOTrainer._compute_loss on given log-probs: a trainer without a model, TRL's default config.

    Whatever else a later TRL reads is missing here and raises AttributeError, so this cannot pass by testing nothing.
    """
    from trl import GRPOConfig, GRPOTrainer
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.args = GRPOConfig(output_dir="unused", loss_type=loss_type, bf16=False, use_cpu=True, steps_per_generation=1)
    for name in ("beta", "loss_type", "importance_sampling_level", "off_policy_mask_threshold", "top_entropy_quantile",
                 "use_vllm"):
        setattr(trainer, name, getattr(trainer.args, name))
    trainer.epsilon_low, trainer.epsilon_high = low, high
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.current_gradient_accumulation_steps, trainer._metrics = 1, {"train": defaultdict(list)}
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    loss = trainer._compute_loss(None, {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old_logprobs, "num_items_in_batch": num_items})
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("bounds", ["scalar", "per row"])
@pytest.mark.parametrize("loss_type, denominator", [("bnpo", None), ("dapo", torch.tensor(100))])
def test_loss_and_gradient_equal_those_of_trl(loss_type, denominator, bounds):
    pytest.importorskip("trl", reason="TRL is not installed, so the loss was NOT compared with TRL's: pip install trl")
    logprobs, old, advantages, low, high, mask = example(16, 20, seed=1, dtype=torch.float32)
    low, high = (0.2, 0.28) if bounds == "scalar" else (low, high)
    loss, gradient, stats = loss_and_gradient(logprobs, old, advantages, low, high, mask, denominator)
    column = lambda x: x if bounds == "scalar" else x[:, None]
    theirs, metrics = trl_loss(loss_type, logprobs, old, advantages, column(low), column(high), mask, denominator)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(gradient, logprobs.grad, rtol=1e-5, atol=1e-9)
    for side in ("low", "high"):
        assert stats[f"clip_fraction_{side}"].item() == pytest.approx(metrics[f"clip_ratio/{side}_mean"], rel=1e-5)
        assert stats[f"clip_fraction_{side}"] > 0.02


# What verl 0.9.1 (torch 2.13.0, CPU) answered; its dual clip is switched off by a huge clip_ratio_c:
#   from verl.trainer.ppo.core_algos import compute_policy_loss
#   loss, clip_fraction, _, _ = compute_policy_loss(old, new, adv[:, None].expand(2, 4), mask,
#                                                   cliprange_low=low, cliprange_high=high, clip_ratio_c=1e9)
#   loss.backward(); print(loss, clip_fraction, new.grad)       # per row: low and high as (2, 1) tensors
VERL_OLD = [[-1.0, -0.5, -2.0, -1.5], [-0.7, -1.2, -0.3, -2.5]]
VERL_NEW = [[-0.6, -1.0, -1.9, -3.0], [-0.4, -1.6, -0.35, -2.1]]  # ratios 1.49 .61 1.11 .22 and 1.35 .67 .95 1.49
VERL_ADV, VERL_MASK = [1.5, -0.5], [[1, 1, 1, 0], [1, 1, 1, 1]]
VERL = [  # low, high, loss, clip fraction, gradient
    (0.2, 0.28, -0.313014, 2 / 7, [[0, -0.129971, -0.236822, 0], [0.096418, 0, 0.067945, 0.106559]]),
    ([0.1, 0.04], [0.6, 0.2], -0.346350, 2 / 7, [[-0.319677, -0.129971, -0.236822, 0], [0.096418, 0, 0, 0.106559]])]


@pytest.mark.parametrize("low, high, loss, clip_fraction, gradient", VERL, ids=["scalar", "per row"])
def test_loss_and_gradient_equal_the_numbers_recorded_from_verl(low, high, loss, clip_fraction, gradient):
    old, new, advantages, low, high, mask = map(torch.tensor, (VERL_OLD, VERL_NEW, VERL_ADV, low, high, VERL_MASK))
    ours, ours_gradient, stats = loss_and_gradient(new, old, advantages, low, high, mask)
    assert ours.item() == pytest.approx(loss, abs=1e-6) and stats["clip_fraction"].item() == pytest.approx(clip_fraction)
    torch.testing.assert_close(ours_gradient, torch.tensor(gradient), rtol=0, atol=1e-6)


# Padding, the clamp of the log-ratio, stats

@pytest.mark.parametrize("padding", [math.nan, -math.inf, math.inf, 1e30])
@pytest.mark.parametrize("pad_new, pad_old", [(True, False), (False, True), (True, True)])
def test_padding_reaches_neither_loss_nor_gradient_nor_stats(pad_new, pad_old, padding):
    new, old, *rest, mask = example()
    clean = loss_and_gradient(new, old, *rest, mask)
    new, old = (x.detach().masked_fill(~mask & pad, padding) for x, pad in ((new, pad_new), (old, pad_old)))
    for kind in (mask, mask.long(), mask.float()):
        loss, gradient, stats = loss_and_gradient(new, old, *rest, kind)
        assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1]) and stats == clean[2]


@pytest.mark.parametrize("advantage, reached", [(-1.0, [math.exp(20), 0.8, 0.8]), (1.0, [1.2, math.exp(-20), math.exp(-20)])])
def test_log_ratio_is_clamped_to_20_before_the_exponential(advantage, reached):
    logprobs, old = torch.tensor([[0.0, -500.0, -math.inf]]), torch.tensor([[-500.0, 0.0, -1.0]])
    loss, gradient, stats = loss_and_gradient(logprobs, old, torch.tensor([advantage]), 0.2, 0.2, torch.ones(1, 3))
    assert loss.item() == pytest.approx(-advantage * sum(reached) / 3, rel=1e-5)
    assert gradient.isfinite().all() and all(x.isfinite() for x in stats.values())


@pytest.mark.parametrize("seed", range(3))
def test_stats_equal_a_count_over_the_tokens(seed):
    args = logprobs, old, advantages, low, high, mask = example(seed=seed)
    tokens = [(math.exp(logprobs[i, t].item() - old[i, t].item()), advantages[i].item(), 1 - low[i].item(), 1 + high[i].item())
              for i, t in mask.nonzero().tolist()]
    mean = lambda values: sum(values) / len(tokens)
    below, above = mean(r < lo and A < 0 for r, A, lo, hi in tokens), mean(r > hi and A > 0 for r, A, lo, hi in tokens)
    assert below > 0 and above > 0 and below + above < mean(not lo <= r <= hi for r, A, lo, hi in tokens)  # the sign matters
    expected = {"clip_fraction_low": below, "clip_fraction_high": above, "clip_fraction": below + above,
                "ratio_mean": mean(r for r, *_ in tokens), "approx_kl": mean(r - 1 - math.log(r) for r, *_ in tokens)}
    _, stats = etr.surrogate_loss(*args, denominator=1000)  # of the loss, not of the stats
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected, rel=1e-6)


def test_only_the_logprobs_and_the_loss_carry_gradient():
    args = logprobs, *constants, mask = example()
    for x in constants:
        x.requires_grad_()
    loss, stats = etr.surrogate_loss(*args)
    loss.backward()
    assert logprobs.grad.abs().sum() > 0 and all(x.grad is None for x in constants)
    assert all(x.dim() == 0 and not x.requires_grad for x in stats.values())


# Errors: what was expected and what came

def loss_with(**changes):
    names = ("logprobs", "old_logprobs", "advantages", "low", "high", "mask")
    return etr.surrogate_loss(**{**dict(zip(names, example(4, 6))), **changes})


ones, bounds = torch.ones, etr.elastic_clip_bounds


@pytest.mark.parametrize("call, message", [
    (lambda: etr.group_advantages(ones(4, 1)), r"G >= 2 .* got \(4, 1\)"),
    (lambda: etr.variance_budgets(ones(4, 1)), r"G >= 2 .* got \(4, 1\)"),
    (lambda: etr.group_advantages(ones(8)), r"shape \(P, G\).* got \(8,\)"),
    (lambda: etr.group_advantages(torch.tensor([[1, math.nan, math.inf]])), "finite rewards, got 2 that"),
    (lambda: etr.variance_budgets(ones(2, 4), -0.5), "elasticity >= 0, got -0.5"),
    (lambda: etr.variance_budgets(ones(2, 4), math.nan), "finite elasticity >= 0, got nan"),
    (lambda: bounds(ones(2, 4), elasticity=-1), "elasticity >= 0, got -1"),
    (lambda: bounds(ones(2, 4), elasticity=math.inf), "finite elasticity >= 0, got inf"),
    (lambda: bounds(ones(8)), r"advantages of shape \(P, G\), got \(8,\)"),
    (lambda: bounds(ones(2, 4), ones(3)), r"one budget per prompt, shape \(2,\), got \(3,\)"),
    (lambda: bounds(ones(2, 4) * math.nan), "finite advantages"),
    (lambda: bounds(ones(2, 4), ones(2) * math.inf), "finite budgets >= 0"),
    (lambda: bounds(ones(2, 4), -ones(2)), "finite budgets >= 0"),
    (lambda: bounds(ones(2, 4), clip_low=-0.1), "clip_low, clip_high >= 0 .* got -0.1, 0.2, 3.0"),
    (lambda: bounds(ones(2, 4), clip_high=-0.1), "clip_low, clip_high >= 0 .* got 0.2, -0.1, 3.0"),
    (lambda: bounds(ones(2, 4), scale_max=0.0), "scale_max > 0, got 0.2, 0.2, 0.0"),
    (lambda: bounds(ones(2, 4), clip_low=0.25, scale_max=4.0), r"clip_low \* scale_max < 1, got 0.25 \* 4.0 = 1"),
    (lambda: loss_with(old_logprobs=ones(4, 5)), r"one shape \(B, T\), got \(4, 6\), \(4, 5\), \(4, 6\)"),
    (lambda: loss_with(mask=ones(4, 1)), r"one shape \(B, T\), got \(4, 6\), \(4, 6\), \(4, 1\)"),
    (lambda: loss_with(logprobs=ones(4), old_logprobs=ones(4), mask=ones(4)), r"one shape \(B, T\), got \(4,\)"),
    (lambda: loss_with(advantages=ones(4, 6)), r"advantages of shape \(4,\) .* got \(4, 6\), \(4,\), \(4,\)"),
    (lambda: loss_with(low=ones(2, 2)), r"that shape or floats, got \(4,\), \(2, 2\), \(4,\); flatten"),
    (lambda: loss_with(high=ones(6)), r"that shape or floats, got \(4,\), \(4,\), \(6,\)"),
    (lambda: loss_with(mask=torch.zeros(4, 6)), "at least one completion token, got an empty one"),
    (lambda: loss_with(denominator=0), "positive denominator, got 0"),
    (lambda: loss_with(denominator=torch.tensor(-3)), "positive denominator, got -3"),
])
def test_bad_input_raises_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The file itself

def python(*args, cwd):
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=True).stdout


def run_code(code, **names):
    """What a piece of etr.py or of the README, both files of this repository, leaves behind: {name: value}."""
    exec(code, names)
    return names


def test_docstring_examples_run():
    result = doctest.testmod(etr)
    assert result.attempted >= 4 and result.failed == 0


def test_the_two_marked_lines_are_all_that_differs_from_grpo():
    source, macro = re.subn(r"return .*# ETR: .*", "return torch.ones_like(variance)", Path(etr.__file__).read_text())
    source, micro = re.subn(r"scale = .*# ETR: .*", "scale = torch.ones_like(advantages)", source)
    assert macro == micro == 1 and "# ETR:" not in source
    without = run_code(source, __name__="etr_without_its_two_lines")
    rules = torch.tensor([[radii.tolist() for radii in pair] for pair in without["bounds_by_pass_rate"](8)[1].values()])
    grpo = torch.stack(etr.bounds_by_pass_rate(8)[1]["GRPO"])
    assert len(rules) == 4 and torch.equal(rules.nan_to_num(), grpo.nan_to_num().expand(4, 2, 9))


def test_import_loads_torch_and_the_standard_library_only():
    code = ("import sys, torch; before = set(sys.modules); import etr; "
            "print({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)")
    assert python("-c", code, cwd=Path(etr.__file__).parent).strip() == "{'etr'}"


def test_python_etr_prints_the_table_and_saves_the_picture(tmp_path):
    out = python(etr.__file__, cwd=tmp_path)
    lines = [line.replace("|", " ").split() for line in out.splitlines()]
    table = {cells[0]: cells[1:] for cells in lines if cells and cells[0].isdigit()}
    assert list(table) == [str(k) for k in range(9)]
    # k = 1 of 8: advantages sqrt(7) and -1/sqrt(7), budget 42/72, radii 0.2 x (1, |A|, sqrt(budget), |A| sqrt(budget)), + and -
    assert table["1"] == "+2.65 -0.38 0.58 +0.20 -0.20 +0.53 -0.08 +0.15 -0.15 +0.40 -0.06".split()
    picture = (tmp_path / "plots" / "bounds.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


# ------------------------------------------------------------------------------------------------ train_small.py: the parts

# Few problems, seen often: the warm start must know some answers, or there is no gradient in RL and nothing to compare.
TINY = ["--steps", "4", "--prompts-per-step", "8", "--group-size", "4", "--updates-per-step", "4", "--learning-rate", "1e-3",
        "--eval-problems", "8", "--train-problems", "64", "--warmup-steps", "60", "--max-new-tokens", "32", "--eval-every", "2",
        "--device", "cpu"]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """(args, model, tokenizer, data) of the built-in task after a short warm start: right sometimes, wrong mostly."""
    args = ts.parse_args(["--warmup-steps", "120", "--train-problems", "2000", "--eval-problems", "64", "--device", "cpu",
                          "--out", str(tmp_path_factory.mktemp("warm"))])
    model, tokenizer = ts.load_model(args, 0)
    data = {name: ts.encode(args, tokenizer, part) for name, part in ts.load_problems(args).items()}
    ts.warm_up(args, 0, model, tokenizer, data["train"])
    return args, model, tokenizer, data


def roll(warm, problems=6, group_size=4, seed=0, **options):
    args, model, tokenizer, data = warm
    prompts = [problem.prompt for problem in data["train"][:problems]]
    return prompts, ts.sample(model, prompts, group_size, options.pop("max_new_tokens", 48), ts.stop_tokens(model, tokenizer),
                              ts.generator("cpu", "test", seed), **options)


def plain_logits(model, prompt, completion):
    """Logits (T, V) that predict the completion, from the model's own forward on one unpadded sequence."""
    return model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1]


def test_rollout_logprobs_and_entropies_are_those_of_the_plain_forward(warm):
    model = warm[1]
    prompts, rollouts = roll(warm)
    assert len({len(prompt) for prompt in prompts}) > 1  # ragged, so padding and positions matter
    for i, (tokens, mask) in enumerate(zip(rollouts.tokens, rollouts.mask)):
        with torch.no_grad():
            softmax = torch.distributions.Categorical(logits=plain_logits(model, prompts[i // 4], tokens[mask].tolist()))
        torch.testing.assert_close(rollouts.logprobs[i, mask], softmax.log_prob(tokens[mask]), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(rollouts.entropies[i, mask], softmax.entropy(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("budget, at_once", [(1, 2**24), (200, 2**24), (10**6, 2**24), (10**6, 1), (10**6, 10**4), (200, 5000)])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_the_rollout_logprobs_and_their_gradient_that_of_full_logits(warm, monkeypatch, budget, at_once, tied):
    args, model = warm[0], copy.deepcopy(warm[1])
    if tied:  # the head's gradient meets the embedding's; a bias, too
        model.lm_head.weight = model.get_input_embeddings().weight
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-0.5, 0.5, model.config.vocab_size))
    monkeypatch.setattr(ts, "LOGITS_AT_ONCE", at_once)
    prompts, rollouts = roll((args, model, *warm[2:]))
    tokens, mask, weights = rollouts.tokens, rollouts.mask, torch.linspace(-1, 1, rollouts.mask.numel()).view(rollouts.mask.shape)
    pieces, B, calls = [], len(mask), 2
    for _ in range(calls):  # gradients add up
        pieces.clear()
        for i, logprobs in ts.score_in_pieces(argparse.Namespace(micro_batch_tokens=budget), model, [prompts[i // 4] for i in range(B)],
                                              range(B), tokens, mask):
            (logprobs * weights[i]).sum().backward()
            pieces.append((i, logprobs.detach()))
    assert torch.cat([i for i, _ in pieces]).tolist() == list(range(B))
    expected_count = {(1, 2**24): B, (10**6, 1): B, (10**6, 2**24): 1}
    assert len(pieces) == expected_count.get((budget, at_once), len(pieces)) and (len(pieces) > 1 or (budget, at_once) == (10**6, 2**24))
    torch.testing.assert_close(torch.cat([logprobs for _, logprobs in pieces]), rollouts.logprobs, atol=2e-5, rtol=1e-5)
    plain = sum((plain_logits(model, prompts[i // 4], row[on].tolist()).log_softmax(-1).gather(1, row[on][:, None])[:, 0]
                 * weights[i, on]).sum() for i, (row, on) in enumerate(zip(tokens, mask)))
    expected = torch.autograd.grad(calls * plain, list(model.parameters()), materialize_grads=True)
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-7, rtol=1e-3)


def test_scoring_without_gradients_leaves_none(warm):
    args, model = warm[0], copy.deepcopy(warm[1])
    prompts, rollouts = roll(warm)
    with torch.no_grad():
        scores = [logprobs for _, logprobs in ts.score_in_pieces(args, model, [prompt for prompt in prompts for _ in range(4)],
                                                                 range(24), rollouts.tokens, rollouts.mask)]
    torch.testing.assert_close(torch.cat(scores), rollouts.logprobs, atol=2e-5, rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(warm, monkeypatch, u):
    model = copy.deepcopy(warm[1])
    impossible = torch.zeros(model.config.vocab_size)
    impossible[:3] = impossible[-3:] = -math.inf
    model.lm_head.bias = torch.nn.Parameter(impossible)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, u))
    rollouts = ts.sample(model, [problem.prompt for problem in warm[3]["train"][:6]], 2, 9, [], None)
    assert 3 <= rollouts.tokens.min() and rollouts.tokens.max() < len(impossible) - 3
    assert rollouts.logprobs.isfinite().all() and rollouts.entropies.isfinite().all()


def test_what_a_completion_draws_does_not_depend_on_when_others_leave(warm):
    end = ts.stop_tokens(warm[1], warm[2])
    prompts, leaving = roll(warm)
    staying = ts.sample(warm[1], prompts, 4, 48, [], ts.generator("cpu", "test", 0))
    assert len(leaving.mask.sum(1).unique()) > 2 and bool(staying.mask.all())
    for row, on, kept in zip(leaving.tokens, leaving.mask, staying.tokens):
        assert row[on].tolist() == kept[:int(on.sum())].tolist()
        assert int(on.sum()) == 48 or int(row[on][-1]) in end


def test_a_completion_ends_with_its_first_end_token_or_is_cut(warm):
    end = warm[2].eos_token_id
    for rollouts in (roll(warm)[1], roll(warm, max_new_tokens=20)[1]):
        lengths = rollouts.mask.sum(1)
        assert torch.equal(rollouts.mask, torch.arange(rollouts.mask.shape[1]) < lengths[:, None])  # no holes
        for tokens, length in zip(rollouts.tokens, lengths):
            assert end not in tokens[:length - 1]
            assert tokens[length - 1] == end or length == rollouts.mask.shape[1]
    assert (lengths == 20).any() and (lengths < 20).any()


def test_sampling_uses_the_full_softmax_whatever_the_generation_config_says(warm):
    args, model, tokenizer, data = warm
    prompt, config = data["train"][0].prompt, model.generation_config
    with torch.no_grad():
        expected = (plain_logits(model, prompt[:3], [0])[0] / 2).softmax(-1)  # flattened, so that every token has a chance
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=3.0, temperature=0.1)
    try:
        rollouts = ts.sample(model, [prompt[:3]], 20000, 1, [], ts.generator("cpu", "full"), temperature=2.0)
    finally:
        model.generation_config = config
    seen = torch.bincount(rollouts.tokens[:, 0], minlength=len(expected)) / 20000
    assert (seen - expected).abs().max() < 5 * (expected.max() / 20000).sqrt()
    assert (seen > 0).sum() > 5


def test_temperature_zero_is_greedy(warm):
    model = warm[1]
    prompts, rollouts = roll(warm, group_size=1, temperature=0)
    for prompt, tokens, mask in zip(prompts, rollouts.tokens, rollouts.mask):
        assert plain_logits(model, prompt, tokens[mask].tolist()).argmax(-1).tolist() == tokens[mask].tolist()


def step_of(warm, arm, **changes):
    args, model, tokenizer, data = warm
    model = copy.deepcopy(model)
    args = argparse.Namespace(**{**vars(args), "prompts_per_step": 8, **changes})
    metrics, norms, _ = ts.train_step(args, arm, 0, 1, model, tokenizer, ts.make_optimizer(model), data["train"])
    return metrics, norms, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_with_one_update_per_batch_nothing_is_clipped_and_etr_is_grpo(warm):
    (metrics, _, grpo), (_, _, elastic) = (step_of(warm, arm, updates_per_step=1) for arm in ("grpo", "etr"))
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-4) and metrics["clip_fraction"] == 0
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6) and metrics["frac_reward_zero_std"] < 1 and metrics["grad_norm"] > 0
    assert torch.equal(grpo, elastic)
    many = [step_of(warm, arm, updates_per_step=8, learning_rate=1e-3) for arm in ("grpo", "etr")]
    assert not torch.equal(many[0][2], many[1][2]) and all(metrics["clip_fraction"] > 0.005 for metrics, _, _ in many)


def test_a_step_is_the_same_whatever_the_micro_batch(warm):
    whole, cut = (step_of(warm, "etr", updates_per_step=2, micro_batch_tokens=n) for n in (10**6, 300))
    torch.testing.assert_close(whole[2], cut[2], atol=1e-5, rtol=1e-4)
    assert whole[0]["entropy"] == cut[0]["entropy"] and whole[0]["approx_kl"] == pytest.approx(cut[0]["approx_kl"], rel=1e-3, abs=1e-7)


def test_counts_by_correct_add_up_to_the_step(warm):
    metrics = step_of(warm, "etr", updates_per_step=8, learning_rate=1e-3)[0]
    by = {name: np.array(values) for name, values in metrics["by_correct"].items()}
    tokens = (by["tokens_right"] + by["tokens_wrong"]).sum()
    assert tokens == 2 * metrics["completion_length_mean"] * 64  # two passes over 8 prompts x 8
    assert by["clipped_right"].sum() / tokens == pytest.approx(metrics["clip_fraction_high"], rel=1e-4)
    assert by["clipped_wrong"].sum() / tokens == pytest.approx(metrics["clip_fraction_low"], rel=1e-4)
    assert by["kl"].sum() / tokens == pytest.approx(metrics["approx_kl"], rel=1e-3)
    assert by["tokens_right"][0] == by["tokens_wrong"][-1] == by["clipped_wrong"][0] == by["radius_squared"][0] == 0


def test_three_updates_without_finite_gradient_stop_the_run_and_leave_the_weights(warm, monkeypatch, tmp_path, capsys):
    loss = etr.surrogate_loss
    broken = lambda when: lambda *args, **kw: (lambda value, stats: (value * (math.nan if next(when) else 1), stats))(*loss(*args, **kw))
    monkeypatch.setattr(etr, "surrogate_loss", broken(iter([False, True, False, False])))
    metrics, norms, weights = step_of(warm, "grpo", updates_per_step=4)
    assert metrics["updates_skipped"] == 1 and math.isnan(norms[1]) and weights.isfinite().all()
    monkeypatch.setattr(etr, "surrogate_loss", broken(itertools.cycle([True])))
    assert ts.main([*TINY, "--out", str(tmp_path / "run")]) == 2
    assert "three in a row" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("n, correct", [(8, 0), (8, 1), (8, 5), (8, 8), (5, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, correct):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
        assert ts.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_band_is_students_interval_of_the_mean():
    x, mean, half = ts.mean_and_band([{0: 1.0, 10: 2.0}, {0: 2.0, 10: 2.0, 20: 5.0}, {0: 6.0, 10: 2.0}])
    assert list(x) == [0, 10] and mean.tolist() == [3.0, 2.0]
    assert half[0] == pytest.approx(4.3027 * np.std([1, 2, 6], ddof=1) / 3**0.5, rel=1e-3) and half[1] == 0


# --------------------------------------------------------------------------------------------- train_small.py: problems

def test_arithmetic_problems_are_distinct_and_their_answers_true():
    problems = ts.arithmetic_problems(3000, random.Random(0))
    vocabulary, misled = ts.built_in_tokenizer().get_vocab(), 0
    assert len({problem.question for problem in problems}) == 3000
    for problem in problems:
        assert set(re.split("[ ]", f"{problem.question} {problem.solution}")) <= set(vocabulary)
        words = problem.question.split()
        total = int(words[2])
        for verb, number in re.findall(r", (\w+) (\d+)", problem.question):
            total += int(number) * (1 if verb in ts.GAIN else -1)
        assert str(total) == problem.answer and 0 <= total <= ts.LARGEST
        misled += ts.grade("arithmetic", problem.solution, problem.answer) == 0
    assert 0.3 < misled / 3000 < 0.8  # the textbook is wrong about half the time
    assert problems == ts.arithmetic_problems(3000, random.Random(0)) != ts.arithmetic_problems(3000, random.Random(1))


def gsm8k_row(i):
    return {"question": f"What is {i} + 1,000?", "answer": f"We add.\nThat is <<{i}+1000={i + 1000}>>{i + 1000:,}.\n#### {i + 1000:,}"}


def math_row(i):
    return {"problem": f"Halve {i}.", "level": f"Level {i % 5 + 1}", "type": "Algebra", "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$."}


def write_data(folder, row, train=60, test=20):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", range(train)), ("test", range(1000, 1000 + test))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in numbers))
    return str(folder)


def test_problems_from_a_folder_are_split_without_overlap_and_by_level(tmp_path):
    for task, row in (("gsm8k", gsm8k_row), ("math", math_row)):
        folder = write_data(tmp_path / task, row)
        parts = ts.load_problems(ts.parse_args(["--task", task, "--data", folder, "--eval-problems", "8", "--prompts-per-step", "4",
                                                "--levels", "1", "3", "--train-problems", "10"]))
        questions = [{problem.question for problem in parts[name]} for name in ("train", "validation", "test")]
        assert [len(part) for part in questions] == [10, 8, 8] and len(set.union(*questions)) == 26
        for problem in itertools.chain(*parts.values()):
            assert ts.grade(task, problem.solution, problem.answer) == 1.0 and "<<" not in problem.solution
            assert task == "gsm8k" or int(re.search(r"\d+", problem.question)[0]) % 5 in (0, 2)


def test_real_problems_are_read_and_their_solutions_are_right():
    shared = Path(__file__).resolve().parent.parent / "shared/data"
    if not shared.exists():
        pytest.skip("needs real GSM8K and MATH in ../shared/data")
    for task, least in (("gsm8k", 7473 + 1319 - 400), ("math", 4000)):
        parts = ts.load_problems(ts.parse_args(["--task", task, "--data", str(shared / task), "--eval-problems", "500", "--train-problems", "0"]))
        problems = [*parts["train"][:3000], *parts["validation"], *parts["test"]]
        assert len(problems) >= 4000 and all(ts.grade(task, problem.solution, problem.answer) for problem in problems)
        others = problems[1:] + problems[:1]
        wrong = [(a, b) for a, b in zip(problems, others) if a.answer != b.answer][:300]
        assert sum(ts.grade(task, a.solution, b.answer) for a, b in wrong) <= 2 * (task == "math")  # \frac12 is 0.5


# ---------------------------------------------------------------------------------------------- train_small.py: verifier

RIGHT = ["#### 1234", "#### 1,234", "so\n#### $1,234", "#### 1234.", "#### 1234.00", "#### **1234**", "#### \\boxed{1234}", "#### 1234 apples",
         "#### 1,234 dollars", "####1234", "The answer is 1234.", "The answer is: $1,234", "\\boxed{1,234}", "It is $\\boxed{1234}$.",
         "#### +1234", "#### 1 234".replace(" 2", ",2"), "#### 2468/2", "#### \\frac{2468}{2}"]
WRONG = ["", "1234", "#### 123", "#### 12345", "#### -1234", "#### 1.234", "#### 1234 or 1235", "#### 1234 #### 1235", "#### 1233\n#### 1234",
         "#### 1000 + 234", "#### 1234 thousand", "#### 1234 1234", "The total of 1234 is 12", "\\boxed{1} and \\boxed{1234}",
         "#### 1234e0", "#### x = 1235", "#### one", "####", "#### 1234/0", "#### not 1234", "#### 1234 to 1240", "#### 1, 234"]


@pytest.mark.parametrize("text", RIGHT)
def test_gsm8k_takes_every_spelling_of_the_right_answer(text):
    assert ts.grade("gsm8k", text, "1,234") == 1.0


@pytest.mark.parametrize("text", WRONG)
def test_gsm8k_takes_no_wrong_answer_and_no_list_of_guesses(text):
    assert ts.grade("gsm8k", text, "1,234") == 0.0


EQUAL = [("\\frac{1}{2}", "\\dfrac12"), ("\\frac{1}{2}", "0.5"), ("\\frac{1}{2}", "1/2"), ("10", "10\\text{ cm}"), ("1,000", "1000"),
         ("90", "90^\\circ"), ("2\\sqrt{3}", "\\sqrt{12}"), ("x+1", "1+x"), ("(1,2)", "(1, 2)"), ("[0,1)", "\\left[0,1\\right)"),
         ("\\{1,2\\}", "\\{2,1\\}"), ("5", "x=5"), ("\\text{east}", "east"), ("-\\frac{3}{4}", "\\frac{-3}{4}"), ("50\\%", "50\\%"),
         ("101_2", "101_{2}"), ("\\pi", "\\pi"), ("x^2-1", "(x-1)(x+1)"), ("(-\\infty,3]", "x \\le 3"),
         ("[-2,7]", "-2 \\le x \\le 7"), ("111, \\! 111", "111111")]
UNEQUAL = [("12", "6+6"), ("12", "12\\%"), ("12", "12 or 13"), ("12", "x=13=12"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), ("101_2", "101_3"),
           ("\\frac{1}{2}", "2"), ("x+1", "x-1"), ("5", "55"), ("\\{1,2\\}", "\\{1\\}"), ("2\\sqrt{3}", "2\\sqrt{2}"), ("12", ""), ("(3,4)", "3,4"), ("(3,4)", "\\{3,4\\}"),
           ("1,2", "(1,2)"), ("\\pi", "3.141593"), ("\\sqrt{2}", "1.414214"), ("111, \\! 111", "111"), ("(-\\infty,3]", "x < 3")]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_math_takes_equal_answers(gold, answer):
    assert ts.grade("math", f"Hence \\boxed{{{answer}}}.", gold) == 1.0


@pytest.mark.parametrize("gold, answer", UNEQUAL)
def test_math_takes_no_unequal_answers(gold, answer):
    assert ts.grade("math", f"\\boxed{{{gold}}} no: \\boxed{{{answer}}}", gold) == 0.0
    assert ts.grade("math", gold, gold) == 0.0  # no box, no answer


HOSTILE = ["9^{9^{9^{9^9}}}", "10^{10^{10}}!", "1" * 10**5, "{" * 10**4, "\\frac{" * 5000, "1e400", "100000!!", "__import__('os').system('true')",
           "\x00", "\u202e21", "\\boxed{" * 3000, "(" * 250, "1/0", "\\sqrt[9^9^9]{2}", "\\binom{10^9}{10^8}", "\\int_0^1 x^{x^{x^x}} dx",
           "\\sum_{n=1}^{10^{12}} n^{n}", "12 or 13", "1,2,3,4", "\ud800", "∞", "\\infty-\\infty", "½", "1_000", "0x10", "١٢"]


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_hostile_answers_earn_nothing_and_take_no_time(task):
    for answer in HOSTILE:
        for text in (f"\\boxed{{{answer}}}", f"#### {answer}", f"#### {answer}\n#### 12", answer * 3):
            started = time.perf_counter()
            assert ts.grade(task, text, "12") == 0.0 or text.endswith("\n#### 12") and task == "gsm8k", text[:60]
            assert ts.grade(task, text, "\\frac{x}{12}" if task == "math" else "0.5") == 0.0, text[:60]
            assert time.perf_counter() - started < 10, text[:60]  # a hang, not a slow machine: the limit itself is a second of CPU
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert children.count("math_verify") <= 1


pieces = st.sampled_from(["12", "13", "####", "\\boxed{", "}", "{", "\\frac", "^", "!", "_", " ", "\n", ",", ".", "$", "%", "-", "/", "or", "=",
                          "\\sqrt", "\x00", "\u202e", "answer is", "**", "e9", "9" * 40])


@given(st.one_of(st.text(max_size=60), st.lists(pieces, max_size=14).map("".join)))
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_the_verifier_answers_any_text_with_0_or_1(text):
    for task in ("arithmetic", "gsm8k"):
        reward = ts.grade(task, text, "12")
        assert reward == 0.0 or reward == 1.0 and "12" in text


@given(st.lists(pieces, max_size=14).map("".join))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_math_verifier_answers_any_box_with_0_or_1(text):
    assert ts.grade("math", f"\\boxed{{{text}}}", "\\frac{x}{7}") == 0.0


# ------------------------------------------------------------------------------------------- train_small.py: whole runs

def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(lines):
    return [{name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert ts.main([*TINY, "--seeds", "2", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_everything_it_promises(undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    assert set(results) == {"task", "total_seconds", "warmup_seconds", "arms"} and list(results["arms"]) == ["grpo", "etr"]
    fields = {"seed", "pass1_before", "pass1_after", "greedy_before", "greedy_after", "passk_before", "passk_after", "entropy_first",
              "entropy_last", "clip_fraction_mean", "seconds"}
    per_step = {"step", "reward_mean", "entropy", "clip_fraction", "clip_fraction_low", "clip_fraction_high", "approx_kl",
                "frac_reward_zero_std", "completion_length_mean", "grad_norm", "tokens_per_second", "seconds"}
    evaluated = {"eval_pass1", "eval_greedy", "eval_passk"}
    for arm, rows in results["arms"].items():
        assert [row["seed"] for row in rows] == [0, 1] and all(fields <= set(row) for row in rows)
        for seed in (0, 1):
            lines = lines_of(undisturbed / f"{arm}-seed{seed}")
            assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and all(per_step <= set(line) for line in lines)
            assert [evaluated <= set(line) for line in lines] == [True, False, True, False, True]
            assert "reward" in (undisturbed / f"{arm}-seed{seed}/samples.txt").read_text()
            assert sum(line["grad_norm"] > 0 for line in lines) >= 2 and max(line["clip_fraction"] for line in lines) > 0
    for seed in (0, 1):  # every arm of a seed: one warm start, and the same rollouts until the first bound binds
        assert without_time(lines_of(undisturbed / f"grpo-seed{seed}"))[:1] == without_time(lines_of(undisturbed / f"etr-seed{seed}"))[:1]
        first = [lines_of(undisturbed / f"{arm}-seed{seed}")[1] for arm in ("grpo", "etr")]
        assert first[0]["reward_mean"] == first[1]["reward_mean"] and first[0]["entropy"] == first[1]["entropy"]
    assert all((undisturbed / name).read_bytes()[:4] == b"\x89PNG" for name in ("accuracy_entropy.png", "mechanism.png"))
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["arguments"]["steps"] == 4 and config["versions"]["torch"] == torch.__version__


def command(out, *more):
    return [sys.executable, str(ROOT / "train_small.py"), *TINY, "--out", str(out), *more]


def run_with_kills(argv, out, kills, rng, longest):
    """Runs the command to its end; up to `kills` times it is killed after a random time and resumed. Returns how often."""
    hits = 0
    while not (out / "results.json").exists():
        resume = ["--resume"] if (out / "config.json").exists() else []
        process = subprocess.Popen([*argv, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(rng.uniform(0.1, 1) * longest if hits < kills else None) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            hits += 1
    return hits


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    out = tmp_path / "run"
    assert run_with_kills(command(out), out, 3, random.Random(3), 14) >= 1
    compare(undisturbed, out)


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes half an hour: KILLS=20 python -m pytest -s -k default_run")
def test_the_default_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    """As many kills as KILLS says, over as many default runs as that takes, each compared with the undisturbed one."""
    kills, started = int(os.environ["KILLS"]), time.perf_counter()
    default = lambda name: [sys.executable, str(ROOT / "train_small.py"), "--device", "cpu", "--out", str(tmp_path / name)]
    subprocess.run(default("undisturbed"), check=True)
    longest, rng = (time.perf_counter() - started) / 4, random.Random(kills)
    for run in range(kills):
        hits = run_with_kills(default(f"run{run}"), tmp_path / f"run{run}", kills, rng, longest)
        compare(tmp_path / "undisturbed", tmp_path / f"run{run}")
        kills -= hits
        print(f"run {run}: killed {hits} times, the same as the undisturbed one")
        if kills <= 0:
            break


def compare(expected, got):
    folders = sorted(expected.glob("*-seed0"))
    assert len(folders) == len(list(got.glob("*-seed0"))) == 2
    for folder in folders:
        assert without_time(lines_of(got / folder.name)) == without_time(lines_of(folder))
        assert (got / folder.name / "samples.txt").read_text() == (folder / "samples.txt").read_text()
        a, b = (safetensors.torch.load_file(root / folder.name / "model/model.safetensors") for root in (expected, got))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(got.rglob("*.tmp")) and not list(got.rglob("checkpoint.pt"))


def test_ctrl_c_saves_draws_and_says_how_to_resume(undisturbed, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    while not (out / "etr-seed0/metrics.jsonl").exists():  # a whole arm is done, another is under way
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "--resume" in process.communicate(timeout=60)[1].splitlines()[-1] and process.returncode == 130
    assert (out / "accuracy_entropy.png").exists() and not (out / "results.json").exists()
    assert ts.main(command(out, "--resume")[2:]) == 0
    compare(undisturbed, out)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(undisturbed, tmp_path):
    out, limit = tmp_path / "run", 300_000  # bytes per file: the warm start's checkpoint is larger
    process = subprocess.run(command(out), capture_output=True, text=True,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 2 and "--resume" in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr
    assert ts.main(command(out, "--resume")[2:]) == 0
    compare(undisturbed, out)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_arguments(undisturbed, capsys, tmp_path):
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    base = [*command(undisturbed)[2:], "--seeds", "2"]
    for argv, words in ((base, "add --resume"), ([*base, "--resume", "--steps", "9"], "steps was 4, is 9"),
                        ([*TINY, "--out", str(tmp_path), "--resume"], "got none")):
        assert ts.main(argv) == 2
        assert words in capsys.readouterr().err
    assert ts.main([*base, "--resume"]) == 0  # a finished run has nothing left to do
    assert {path: path.read_bytes() for path in before if path.suffix != ".png"} == {
        path: content for path, content in before.items() if path.suffix != ".png"}


BAD_ARGUMENTS = [(["--task", "chess"], "chess"), (["--algos", "ppo"], "ppo"), (["--group-size", "1"], "at least 2"), (["--steps", "0"], "at least 1"),
                 (["--steps", "many"], "many"), (["--learning-rate", "-1"], "positive"), (["--learning-rate", "nan"], "positive"),
                 (["--clip-low", "0.5", "--scale-max", "2"], "lower one"), (["--model", "gpt2"], "--task"), (["--device", "abacus"], "cpu"),
                 (["--prompts-per-step", "500"], "at least --prompts-per-step 500"), (["--max-new-tokens", "500"], "lower it"),
                 (["--task", "gsm8k", "--data", "nowhere"], "train.jsonl")]
if not torch.cuda.is_available():
    BAD_ARGUMENTS.append((["--device", "cuda"], "cpu"))


def fails_with(argv, words, capsys, out):
    """The run must end with code 2 and one line that holds `words`, and write nothing."""
    try:
        code = ts.main([*argv, "--out", str(out)])
    except SystemExit as stop:  # argparse
        code = stop.code
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and message.startswith("train_small.py: ") and words in message, message
    assert not out.exists()


@pytest.mark.parametrize("argv, words", BAD_ARGUMENTS)
def test_a_bad_argument_gets_one_sentence(argv, words, capsys, tmp_path):
    fails_with([*TINY, *argv], words, capsys, tmp_path / "out")


@pytest.mark.parametrize("task, content, words", [
    ("gsm8k", None, "train.jsonl"), ("gsm8k", "", "empty"), ("gsm8k", "{\n", "train.jsonl, line 1"), ("gsm8k", '{"question": "?"}\n', "answer"),
    ("gsm8k", '{"question": "?", "answer": "7"}\n', "####"), ("gsm8k", "[1]\n", "line 1"), ("math", '{"problem": "?", "solution": "7", "level": "1"}\n', "boxed"),
    ("math", '{"problem": "?", "solution": "\\\\boxed{7}"}\n', "level"), ("gsm8k", "\xff", "UTF-8")])
def test_a_bad_data_file_is_named_with_its_line(task, content, words, capsys, tmp_path):
    folder = write_data(tmp_path / "data", {"gsm8k": gsm8k_row, "math": math_row}[task])
    path = Path(folder) / "train.jsonl"
    path.unlink() if content is None else path.write_bytes(content.encode("latin-1"))
    fails_with(["--task", task, "--data", folder, "--model", "nowhere"], words, capsys, tmp_path / "out")


def save_model(folder, vocabulary=64, **config):
    tokenizer = ts.built_in_tokenizer()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_bad_model_folder_gets_one_sentence(capsys, tmp_path):
    data, good = write_data(tmp_path / "data", gsm8k_row), save_model(tmp_path / "good", max_position_embeddings=600)
    base = ["--task", "gsm8k", "--data", data, "--eval-problems", "4", "--prompts-per-step", "4", "--device", "cpu"]
    no_tokenizer = save_model(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    for model, words in ((no_tokenizer, "tokenizer"), (save_model(tmp_path / "small", vocabulary=8), "at most 8 tokens"),
                         (str(tmp_path), "hub id"), ("nobody/nothing", "hub id"), (save_model(tmp_path / "short", max_position_embeddings=64), "context")):
        fails_with([*base, "--model", model], words, capsys, tmp_path / "out")
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file/deeper"):
        assert ts.main([*base, "--model", good, "--out", str(out), "--max-new-tokens", "2"]) == 2
        assert "expected to write" in capsys.readouterr().err.splitlines()[-1]
    fails_with(["--task", "gsm8k", "--model", good, "--device", "cpu"], "--data", capsys, tmp_path / "out")  # the hub is off


def test_running_out_of_gpu_memory_names_the_flag_to_lower(monkeypatch, capsys, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(ts, "train_step", full)
    assert ts.main([*TINY, "--out", str(tmp_path / "run")]) == 2
    assert "--micro-batch-tokens" in capsys.readouterr().err.splitlines()[-1]


def test_a_real_task_runs_with_a_model_and_data_from_folders(tmp_path):
    for task, row in (("gsm8k", gsm8k_row), ("math", math_row)):
        out = tmp_path / f"{task}-run"
        assert ts.main(["--task", task, "--data", write_data(tmp_path / task, row), "--model", save_model(tmp_path / "model"), "--algos", "etr",
                        "--steps", "2", "--prompts-per-step", "4", "--group-size", "2", "--max-new-tokens", "3", "--eval-problems", "4",
                        "--warmup-steps", "1", "--device", "cpu", "--out", str(out)]) == 0
        assert len(lines_of(out / "etr-seed0")) == 3


# --------------------------------------------------------------------------------------------------------------- README

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_readme_example_runs():
    namespace = run_code(blocks("python")[0])
    assert namespace["logprobs"].grad.abs().sum() > 0 and namespace["stats"]["clip_fraction"] > 0


def test_the_readme_diff_turns_grpo_into_etr():
    diff, = blocks("diff")
    logprobs, old_logprobs, *_ = example(8, 12)
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.float64)
    budgets = etr.variance_budgets(rewards)
    bounds = {"+": etr.elastic_clip_bounds(etr.group_advantages(rewards), budgets), "-": torch.full((2, 2, 4), 0.2, dtype=torch.float64)}
    for sign, other in ("+-", "-+"):
        code = "\n".join(line[2:] for line in diff.splitlines() if line[0] != other)
        namespace = run_code(code, torch=torch, rewards=rewards, logprobs=logprobs.view(2, 4, 12).permute(2, 0, 1),
                             old_logprobs=old_logprobs.view(2, 4, 12).permute(2, 0, 1))
        ours, _ = etr.surrogate_loss(logprobs, old_logprobs, etr.group_advantages(rewards).flatten(), *(x.flatten() for x in bounds[sign]),
                                     torch.ones(8, 12))
        torch.testing.assert_close(namespace["loss"].mean(), ours)


def test_the_readme_table_is_what_etr_prints(tmp_path):
    printed = subprocess.run([sys.executable, str(ROOT / "etr.py")], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    table, = blocks("text")
    assert table.strip("\n") in printed and len(table.splitlines()) == 10


def test_the_readme_names_commands_flags_tests_and_files_that_exist():
    commands = re.findall(r"python train_small\.py([^`\n|#]*)", README)
    assert len(commands) >= 5
    for command_line in commands:
        ts.parse_args(command_line.split())
    options = {option for line in commands + re.findall(r"`(--[a-z-]+)", README) for option in re.findall(r"--[a-z-]+", line)}
    assert options <= set(re.findall(r"--[a-z-]+", (ROOT / "train_small.py").read_text()))
    names = [name for name in globals() if name.startswith("test_")]
    for start in re.findall(r"`(test_\w+?)(?:\.\.\.)?`", README):
        assert any(name.startswith(start) for name in names), start
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"(?:python|`)\s*((?:plots/)[\w.]+)", README):
        assert (ROOT / path).exists(), path


def test_the_readme_results_are_computed_from_the_committed_runs():
    with open(ROOT / "plots/ends.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    stages = {"1e-4": "final", "2e-4": "fast"}
    lines = re.findall(r"^\| ([\w.-]+)(?:, absolute)?(?: against ([\w.-]+))? \| (\de-\d) \| (.*) \|$", README, re.M)
    assert len(lines) == 13
    for arm, base, rate, cells in lines:
        for column, cell in zip(("pass1_after", "auc", "greedy_after", "passk_after"), cells.split(" | "), strict=True):
            grpo, ours = ({row["seed"]: float(row[column]) for row in rows if row["stage"] == stages[rate] and row["arm"] == name}
                          for name in (base or "grpo", arm))
            assert len(ours) == len(grpo) == 10
            _, mean, half = ts.mean_and_band([{0: ours[seed] if arm == "grpo" else 100 * (ours[seed] - grpo[seed])} for seed in ours])
            printed = [float(number) for number in cell.replace("\u2212", "-").split(" ± ")]
            expected = mean.tolist() if arm == "grpo" else [*mean, *half]
            assert printed == pytest.approx(expected, abs=0.0006 if arm == "grpo" else 0.06), (arm, rate, column)


def test_the_readmes_second_series_is_that_of_the_committed_runs():
    def gains(name, column):
        with open(ROOT / f"plots/{name}.csv", newline="") as file:
            runs = {(row["arm"], row["seed"]): 100 * float(row[column]) for row in csv.DictReader(file) if row["stage"] == "final"}
        return [runs["etr", str(seed)] - runs["grpo", str(seed)] for seed in range(10)]
    printed = re.search(r"pass@1 \+(.+?) ± (.+?) points, greedy \+(.+?) ± (.+?)\. The differences", README).groups()
    expected = [float(x[0]) for name in ("pass1_after", "greedy_after") for x in ts.mean_and_band([{0: gain} for gain in gains("again", name)])[1:]]
    assert [float(number) for number in printed] == pytest.approx(expected, abs=0.06)
    r = statistics.correlation(gains("ends", "pass1_after"), gains("again", "pass1_after"))
    assert f"have a correlation of {r:.2f}:" in README


def test_every_figure_of_the_evidence_is_drawn_from_the_committed_csv_and_prints_the_readmes_table(tmp_path):
    for path in (ROOT / "plots").glob("*.csv"):
        shutil.copy(path, tmp_path)
    draw = "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import evidence; evidence.PLOTS = pathlib.Path(sys.argv[2]); evidence.draw()"
    printed = subprocess.run([sys.executable, "-c", draw, str(ROOT / "plots"), str(tmp_path)], check=True, capture_output=True, text=True)
    assert len(printed.stdout.splitlines()) == 15 and printed.stdout in README
    drawn, others = {path.name for path in tmp_path.glob("*.png")}, {"bounds.png", "benchmark.png"}
    assert drawn | others == {path.name for path in (ROOT / "plots").glob("*.png")}


# Past one GPU: the two code blocks

def run_block(package):
    """The namespace left by the README code block that imports the package."""
    code, = (block for block in blocks("python") if re.search(rf"^(import|from) {package}\b", block, re.M))
    return run_code(compile(code, f"README.md, {package}", "exec"))


def reward(completion):
    return float(completion[0] % 4)


def checked(trainer_class):
    """A trainer that compares each of its losses, value and gradient, with etr.surrogate_loss's.

    The bounds for that are computed anew: by prompt, from the completions of all processes, in no order, with sigma cancelled.
    """
    from accelerate.utils import gather_object
    tokens = lambda batch, name: [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch[f"{name}_ids"], batch[f"{name}_mask"])]

    class Checked(trainer_class):
        losses, clipped = 0, 0.0

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            everyone = gather_object(list(zip(tokens(batch, "prompt"), tokens(batch, "completion"))))
            self.rewards = {prompt: torch.tensor([reward(y) for x, y in everyone if x == prompt]) for prompt, _ in everyone}
            self.mean_variance = torch.stack([x.var(correction=0) for x in self.rewards.values() if x.var() > 0]).mean()
            self.groups_are_split = len(inputs) < self.num_generations * len(set(tokens(batch, "prompt")))
            share = self.args.gradient_accumulation_steps / self.args.steps_per_generation / self.accelerator.num_processes
            self.denominator = sum(len(completion) for _, completion in everyone) * share
            return batch

        def _compute_loss(self, model, inputs):
            theirs = super()._compute_loss(model, inputs)
            pairs = zip(tokens(inputs, "prompt"), tokens(inputs, "completion"))
            centered = torch.stack([reward(completion) - self.rewards[prompt].mean() for prompt, completion in pairs])
            scale = (centered.abs() / self.mean_variance.sqrt()).clamp(max=3.0)
            ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            start, policy = inputs["prompt_ids"].shape[1], self.accelerator.unwrap_model(model)
            logprobs = policy(ids, mask).logits[:, start - 1:-1].log_softmax(-1).gather(2, ids[:, start:, None])[..., 0]
            ours, stats = etr.surrogate_loss(logprobs, inputs["old_per_token_logps"], inputs["advantages"], 0.2 * scale,
                                             0.28 * scale, mask[:, start:], self.denominator)
            assert theirs.item() == pytest.approx(ours.item(), rel=1e-5, abs=1e-6)
            gradients = [torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)])
                         for loss in (ours, theirs)]
            assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()
            self.losses, self.clipped = self.losses + 1, max(self.clipped, stats["clip_fraction"].item())
            return theirs

    return Checked


def train_with_trl(out, trainer_class, **options):
    """Six optimiser steps of a tiny random model; the reward depends on a completion's first token. Returns the trainer."""
    import datasets
    import tokenizers
    import trl
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}, unk_token="<pad>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3,
        bos_token_id=None, eos_token_id=1, pad_token_id=0))
    trainer = trainer_class(
        model, lambda completion_ids, **unused: [reward(ids) for ids in completion_ids],
        args=trl.GRPOConfig(
            output_dir=str(out), use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, learning_rate=0.03, lr_scheduler_type="constant", epsilon_high=0.28, num_generations=4,
            max_completion_length=6, per_device_train_batch_size=2, max_steps=6, **options),
        train_dataset=datasets.Dataset.from_dict({"prompt": list("abcdefgh")}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>"))
    trainer.train()
    return trainer


NO_TRL = "TRL is not installed, so the README's TRL block was NOT run: pip install trl"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 6, "num_iterations": 2},
                                     {"gradient_accumulation_steps": 2, "steps_per_generation": 6}], ids=["iterations", "steps"])
def test_etr_in_trl_has_the_loss_of_etr_and_without_elasticity_is_trl_bit_for_bit(options, tmp_path):
    trl = pytest.importorskip("trl", reason=NO_TRL)
    elastic = run_block("trl")["ETRTrainer"]
    constant = type("Constant", (elastic,), {"micro": 0.0, "macro": 0.0})
    trainers = [train_with_trl(tmp_path, trainer, **options) for trainer in (checked(elastic), constant, trl.GRPOTrainer)]
    weights = [torch.cat([x.detach().flatten() for x in trainer.model.parameters()]) for trainer in trainers]
    assert trainers[0].losses == 6 * options["gradient_accumulation_steps"] and trainers[0].clipped > 0.05
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[2])


def test_etr_in_trl_with_groups_split_over_two_processes(tmp_path):
    pytest.importorskip("trl", reason=NO_TRL)
    (tmp_path / "two.py").write_text(f"""if True:
        import {Path(__file__).stem} as test
        trainer_class = test.checked(test.run_block("trl")["ETRTrainer"])
        trainer = test.train_with_trl("two", trainer_class, gradient_accumulation_steps=3, num_iterations=2)
        found = trainer.accelerator.num_processes, trainer.losses, trainer.groups_are_split, trainer.clipped > 0.05
        test.Path(f"process{{trainer.accelerator.process_index}}").write_text(str(found))  # on stdout their lines would mix
        """)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two.py"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).resolve().parent}{os.pathsep}{Path(etr.__file__).parent}",
             "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"process{i}").read_text() for i in range(2)] == ["(2, 18, True, True)"] * 2


def test_etr_in_verl_equals_etr_and_without_elasticity_is_verl_bit_for_bit():
    core_algos = pytest.importorskip(
        "verl.trainer.ppo.core_algos", reason="verl is not installed, so the README's verl block was NOT run: pip install verl")
    from verl.workers.config import ActorConfig
    core_algos.ADV_ESTIMATOR_REGISTRY.pop("etr", None)
    block = run_block("verl")
    torch.manual_seed(0)
    order = torch.randperm(26)  # six groups of 4, scattered, and two of the empty rows with which verl fills up a batch
    scores = torch.randint(0, 4, (6, 4)).float()
    index = np.array([f"prompt {i // 4}" for i in range(24)] + ["padding"] * 2, dtype=object)[order]
    mask = ((torch.arange(7) < torch.randint(1, 8, (26, 1))) * (torch.arange(26) < 24)[:, None])[order]
    rewards = torch.cat([scores.flatten(), torch.zeros(2)])[order, None] * torch.eye(7)[0]
    old = -torch.rand(26, 7)
    new = (old + 0.4 * torch.randn(26, 7)).requires_grad_()
    config = ActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=2, clip_ratio_low=0.2, clip_ratio_high=0.28,
                         clip_ratio_c=1e9, global_batch_info={"batch_num_tokens": mask.sum()})

    def loss_and_gradient(estimator, mode):
        advantages, _ = core_algos.get_adv_estimator_fn(estimator)(rewards, mask, index)
        loss = sum(core_algos.get_policy_loss_fn(mode)(*rows, "token-mean", config)[0]
                   for rows in zip(*(x.split(4) for x in (old, new, advantages, mask))))
        return loss, *torch.autograd.grad(loss, new)

    advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)  # verl's, ddof 1
    bounds = etr.elastic_clip_bounds(etr.group_advantages(scores), etr.variance_budgets(scores), 0.2, 0.28)
    ours, stats = etr.surrogate_loss(
        new, old, *(torch.cat([x.flatten(), torch.zeros(2)])[order] for x in (advantages, *bounds)), mask)
    loss, gradient = loss_and_gradient("etr", "etr")
    assert loss.item() == pytest.approx(ours.item(), abs=1e-6) and stats["clip_fraction"] > 0.05
    torch.testing.assert_close(gradient, *torch.autograd.grad(ours, new), rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="expected float64 advantages"):
        loss_and_gradient("grpo", "etr")
    block["etr_advantages"].__globals__.update(MICRO=0.0, MACRO=0.0)
    assert all(map(torch.equal, loss_and_gradient("etr", "etr"), loss_and_gradient("grpo", "vanilla")))
