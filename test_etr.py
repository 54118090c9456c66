"""Tests: python -m pytest."""

import copy
import doctest
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import etr
import train_small as ts

# ---- etr.py and the README's code


HERE = Path(__file__).resolve().parent
STATS = "clip_fraction clip_fraction_low clip_fraction_high ratio_mean approx_kl".split()
ones, nan, inf, table, close = (
    torch.ones, math.nan, math.inf, pytest.mark.parametrize, torch.testing.assert_close)
torch.set_num_threads(1)


def example(rows=8, dtype=torch.float64):
    """Ragged (new, old, advantages, low, high, mask), ratios on both sides of both bounds."""
    torch.manual_seed(0)
    old = -3 * torch.rand(rows, 12, dtype=dtype)
    new = old + 0.3 * torch.randn(rows, 12, dtype=dtype)
    mask = torch.arange(12) < torch.randint(1, 13, (rows, 1))
    low, high = 0.05 + 0.3 * torch.rand(2, rows, dtype=dtype)
    return new, old, torch.randn(rows, dtype=dtype), low, high, mask


def run(logprobs, *args):
    """Tensors (loss, gradient, stats) of etr.surrogate_loss."""
    leaf = logprobs.detach().clone().requires_grad_()
    loss, stats = etr.surrogate_loss(leaf, *args)
    loss.backward()
    return loss.detach(), leaf.grad, torch.tensor([stats[name].item() for name in STATS])


def test_gradient_stops_only_where_a_token_has_left_the_way_it_was_pushed():
    new, old, A, low, high, mask = example()
    loss, gradient, stats = run(new, old.requires_grad_(), A.requires_grad_(), low, high, mask)
    assert old.grad is None and A.grad is None

    A, low, high = (x.detach()[:, None] for x in (A, low, high))
    n, r = mask.sum(), (new - old).detach().exp()
    pushed, side = A.sign() * mask, (r > 1 + high).int() - (r < 1 - low).int()
    assert len({*zip(pushed[mask].tolist(), side[mask].tolist())}) == 6
    stopped = (pushed == side) & mask
    reached = torch.where(stopped, 1 + torch.where(A > 0, high, -low), r)
    close(gradient, torch.where(stopped, 0, -A * r / n) * mask)
    close(loss, -(A * reached)[mask].mean())
    down, up = ((stopped & (side == sign)).sum() / n for sign in (-1, 1))
    means = down + up, down, up, r[mask].mean(), (r - 1 - r.log())[mask].mean()
    close(stats, torch.tensor(means).float())


def test_elasticities_of_zero_are_grpo_bit_for_bit():
    new, old, _, _, _, mask = example(dtype=torch.float32)
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    A = etr.group_advantages(rewards)
    bounds = etr.elastic_clip_bounds(A, etr.variance_budgets(rewards, 0), 0.2, 0.28, elasticity=0)
    elastic = run(new, old, *(x.flatten() for x in (A, *bounds)), mask)
    grpo = run(new, old, A.flatten(), 0.2, 0.28, mask)
    assert all(map(torch.equal, elastic, grpo)) and grpo[2][0] > 0.05


@table("micro, macro", [(1, 0), (0, 1), (1, 1)])
def test_bounds_are_budget_neutral(micro, macro):
    torch.manual_seed(0)
    binary = (torch.rand(64, 8) < torch.rand(64, 1)).float()
    rewards = torch.cat([binary, 3 + torch.rand(64, 1) * torch.randn(64, 8)])
    rewards[::3] = rewards[::3, :1]  # no signal
    A, budgets = etr.group_advantages(rewards), etr.variance_budgets(rewards, macro)
    _, scale = etr.elastic_clip_bounds(A, budgets, 0, 1, micro, scale_max=inf)
    scale = scale[rewards.amax(1) > rewards.amin(1)]
    assert scale.square().mean().item() == pytest.approx(1, abs=1e-5) and scale.std() > 0.1


@table("G", [2, 4, 8, 16])
def test_bounds_over_all_pass_rates_have_their_closed_forms(G):
    p = torch.arange(G + 1) / G
    c = 6 * G / (G + 1)  # mean of p(1-p) where informative: 1 / c
    right, wrong, macro = ((1 - p) / p).sqrt(), (p / (1 - p)).sqrt(), (c * p * (1 - p)).sqrt()
    scales = {"GRPO": (ones(G + 1),) * 2, "micro": (right, wrong), "macro": (macro, macro),
              "ETR": (c**0.5 * (1 - p), c**0.5 * p)}
    budgets, rules, A_right, A_wrong = etr.bounds_by_pass_rate(G, 0.2)
    close(budgets, macro.square())
    close((A_right[1:], A_wrong[:-1]), (right[1:], -wrong[:-1]))
    for rule, (up, down) in scales.items():
        close(rules[rule][0][1:], 0.2 * up[1:].clamp(max=3))  # the cap acts at G = 16
        close(rules[rule][1][:-1], 0.2 * down[:-1].clamp(max=3))


@table("elasticity", [0.5, 1.0, 2.0])
def test_an_elasticity_is_d_log_radius_by_d_log_signal(elasticity):
    _, high = etr.elastic_clip_bounds(torch.tensor([[0.5, -1.0]]), elasticity=elasticity)
    close(high[0, 1] / high[0, 0], torch.tensor(2**elasticity))
    budgets = etr.variance_budgets(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), elasticity)
    close((budgets[1] / budgets[0]).sqrt(), torch.tensor(2**elasticity))


@table("rewards", [
    [0.1] * 3, [1 / 3] * 7, [1e6 + 0.1] * 10, [0, 0], [0.1 + 0.2, 0.3],
    [1000, 1000.00006, 1000, 1000], [-1e6, -1e6 - 0.06]], ids=str)
def test_equal_rewards_carry_no_signal_however_they_round(rewards):
    rewards = torch.tensor([rewards, rewards])
    assert not etr.group_advantages(rewards).any() | etr.variance_budgets(rewards).any()
    assert not etr.group_advantages(rewards, False).any()


@table("unit", [1e-8, 1e8, -1, True])
def test_neither_unit_nor_type_of_the_rewards_matters(unit):
    rewards = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    same = rewards.bool() if unit is True else rewards * unit
    A = etr.group_advantages(rewards) * math.copysign(1, unit)
    close(etr.group_advantages(same), A)
    close(etr.variance_budgets(same), torch.tensor([6 / 7, 8 / 7, 0]))
    centered = etr.group_advantages(same, normalize=False)[0]
    close(centered, torch.tensor([3, -1, -1, -1]) / 4 * unit)


@table("rows", [1, 2, 4])
def test_accumulation_is_exact_with_the_denominator(rows):
    *args, mask = example()
    mask[0] = False  # at one row a micro-batch without a token
    loss, gradient, _ = run(*args, mask)
    pieces = zip(*(x.split(rows) for x in (*args, mask)))
    exact = [run(*piece, mask.sum()) for piece in pieces]
    close(torch.cat([x[1] for x in exact]), gradient)
    close(sum(x[0] for x in exact), loss)
    assert rows > 1 or not exact[0][2].any()


@table("padding", [nan, -inf, inf, 1e30])
@table("where", ["new", "old"])
def test_padding_reaches_neither_loss_nor_gradient_nor_stats(where, padding):
    new, old, *rest, mask = example()
    clean = run(new, old, *rest, mask)
    (new if where == "new" else old)[~mask] = padding
    assert all(map(torch.equal, run(new, old, *rest, mask.float()), clean))


def test_the_log_ratio_is_clamped_to_20_before_the_exponential():
    new, old = torch.tensor([[[0.0, -500, -inf]], [[-500.0, 0, -1]]])
    loss, gradient, stats = run(new, old, torch.tensor([-1.0]), 0.2, 0.2, ones(1, 3))
    assert loss.item() == pytest.approx((math.exp(20) + 0.8 + 0.8) / 3)
    assert gradient.isfinite().all() and stats.isfinite().all()


@table("size", [1e-4, 1e-2])
def test_bf16_stats_are_those_of_fp32_and_a_small_kl_is_half_the_square(size):
    old = -3 * torch.rand(8, 12).bfloat16()
    new = (old.float() + size * torch.randn(8, 12)).bfloat16()
    rest = torch.linspace(-1, 1, 8), 0.2, 0.2, ones(8, 12)
    bf16, fp32 = run(new, old, *rest), run(new.float(), old.float(), *rest)
    close(bf16[2], fp32[2], rtol=1e-5, atol=0)
    kl = run(ones(8, 12) * size, 0 * ones(8, 12), *rest)[2][4]
    close(kl, torch.tensor(size**2 / 2), rtol=1e-3 + size, atol=0)


BAD = {
    etr.group_advantages: [({"rewards": ones(4, 1)}, r"G >= 2 .* got \(4, 1\)")],
    etr.variance_budgets: [
        ({"rewards": torch.tensor([[1, nan, 1e20]])}, "below 1e18, got 2 others"),
        ({"elasticity": nan}, "finite elasticity >= 0, got nan")],
    etr.elastic_clip_bounds: [
        ({"advantages": ones(8)}, r"shape \(P, G\), got \(8,\)"),
        ({"advantages": ones(2, 4) * nan}, "finite advantages, got NaN"),
        ({"budgets": ones(3)}, r"shape \(2,\), got \(3,\)"),
        ({"budgets": -ones(2)}, "budgets >= 0"),
        ({"clip_low": -0.1}, "clip_high >= 0 .* got -0.1, 0.2, 3.0"),
        ({"scale_max": 5.0}, r"scale_max < 1, got 0.2 \* 5.0")],
    etr.surrogate_loss: [
        ({"old_logprobs": ones(8, 5)}, r"got .*\(8, 12\), \(8, 5\)"),
        ({"high": ones(6)}, r"floats, got .*\(8,\), \(6,\).*flatten"),
        ({"mask": torch.zeros(8, 12)}, "completion token, got an empty one"),
        ({"denominator": 0}, "positive denominator, got 0")]}


@table("function, bad, words", [(f, *row) for f, rows in BAD.items() for row in rows])
def test_bad_input_is_answered_by_what_was_expected_and_what_came(function, bad, words):
    args = example() if function is etr.surrogate_loss else [ones(2, 4)]
    good = dict(zip(function.__code__.co_varnames, args))
    with pytest.raises(ValueError, match="^expected .*" + words):
        function(**good | bad)


README = (HERE / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def execute(code, **names):
    exec(code, names)
    return names


def test_docstring_examples_run():
    assert doctest.testmod(etr) == (0, 4)


def test_import_loads_torch_and_the_standard_library_only():
    code = "import sys, torch; old = {*sys.modules}; import etr; print({*sys.modules} - old)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True) == "{'etr'}\n"


def test_the_readme_table_is_what_etr_prints_beside_its_picture(tmp_path):
    printed = subprocess.check_output([sys.executable, etr.__file__], cwd=tmp_path, text=True)
    text, = blocks("text")
    assert text.strip("\n") in printed and (tmp_path / "plots/bounds.png").exists()


def test_the_readme_example_runs():
    names = execute(blocks("python")[0])
    assert names["logprobs"].grad.any() and names["stats"]["clip_fraction"] > 0


def test_the_readme_diff_ends_at_etr():
    new, old, *_ = example()
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.float64)
    A = etr.group_advantages(rewards)
    bounds = etr.elastic_clip_bounds(A, etr.variance_budgets(rewards))
    code = "\n".join(x[2:] for x in blocks("diff")[0].splitlines() if x[0] != "-")
    names = execute(code, torch=torch, rewards=rewards, logprobs=new.T.view(12, 2, 4),
                    old_logprobs=old.T.view(12, 2, 4))
    flat = (x.flatten() for x in (A, *bounds))
    close(names["loss"].mean(), run(new, old, *flat, ones(8, 12))[0])


def reward(ids):
    return nan if ids[0] > 40 else float(ids[0] % 4)  # nan: without a score


class Checked:
    """Compares loss and gradient with etr's; the bounds computed anew."""

    clipped = 0

    def _generate_and_score_completions(self, inputs):
        from accelerate.utils import gather_object
        batch = super()._generate_and_score_completions(inputs)
        mine = [reward(ids) for ids in batch["completion_ids"].tolist()]
        rewards = torch.tensor(gather_object(mine)).view(-1, 4)
        off = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num()
        variance = off.square().mean(1)
        scale = (off.abs() / variance[variance > 0].mean().sqrt()).clamp(max=3)
        batch["scale"] = scale.view(2, -1)[self.accelerator.process_index]
        return batch

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.new, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.new, *rest

    def _compute_loss(self, model, inputs):
        theirs = super()._compute_loss(model, inputs)
        low, high = 0.2 * inputs["scale"], 0.28 * inputs["scale"]
        ours, stats = etr.surrogate_loss(
            self.new, inputs["old_per_token_logps"], inputs["advantages"], low, high,
            inputs["completion_mask"], inputs["num_items_in_batch"] / 2 / 3)
        close(*((loss, *torch.autograd.grad(loss, self.model.parameters(), retain_graph=True))
                for loss in (ours, theirs)))
        self.clipped += stats["clip_fraction"] / 12
        return theirs


def train_with_trl():
    """Run by two processes that share groups of 4; trains a tiny model three times."""
    import datasets
    import trl
    elastic = execute(blocks("python")[1])["ETRTrainer"]
    checked = type("Elastic", (Checked, elastic), {})
    constant = type("Constant", (elastic,), {"micro": 0, "macro": 0})
    weights = []
    for trainer_class in checked, constant, trl.GRPOTrainer:
        model, tokenizer = ts.built_in_model(0)
        trainer = trainer_class(
            model, lambda completion_ids, **_: [*map(reward, completion_ids)],
            trl.GRPOConfig(
                "unused", use_cpu=True, bf16=False, save_strategy="no", learning_rate=0.003,
                epsilon_high=0.28, num_generations=4, max_completion_length=6, max_steps=12,
                per_device_train_batch_size=2, steps_per_generation=3, num_iterations=2),
            datasets.Dataset.from_dict({"prompt": [*ts.NAMES, "gets", "buys"]}),
            processing_class=tokenizer)
        trainer.train()
        assert getattr(trainer, "clipped", 1) > 0.02
        weights.append(torch.cat([x.flatten() for x in model.parameters()]))
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])
    for name in "loss_type", "multi_objective_aggregation":
        setattr(trainer, name, "cispo")
        with pytest.raises(ValueError, match=f"expected {name}"):
            elastic._generate_and_score_completions(trainer, [])


def test_the_trl_block_has_the_loss_of_etr_and_with_elasticity_0_of_trl(tmp_path):
    pytest.importorskip("trl", reason="TRL block NOT run")
    command = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    subprocess.run([sys.executable, *command, __file__], cwd=tmp_path, check=True)


# ---- train_small.py: the parts


@pytest.fixture(scope="module")
def warm():
    """(args, policy, problems), right sometimes and wrong mostly."""
    flags = "--warmup-steps 90 --train-problems 2000 --prompts-per-step 8 --device cpu"
    args, policy = ts.parse_args(flags.split()), ts.load_model("built-in", "cpu", 0)
    problems = ts.encode(policy, ts.load_problems(args)["train"], [])
    optimizer = ts.make_optimizer(policy.model)
    for step in range(1, 91):
        ts.warmup_step(args, 0, step, optimizer, policy, problems)
    return args, policy, problems


def roll(policy, problems, longest=20, group=4, temperature=1.0):
    prompts = [problem.prompt for problem in problems for _ in range(group)]
    return ts.sample(policy, prompts, longest, torch.Generator().manual_seed(0), temperature)


def plain(model, problems, rollouts, temperature=1.0):
    """(log-probabilities, entropies), by a forward on each sequence alone."""
    found, group = torch.zeros(2, *rollouts.mask.shape), len(rollouts.mask) // len(problems)
    for i, mask in enumerate(rollouts.mask):
        prompt, written = problems[i // group].prompt, rollouts.tokens[i, mask]
        logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits
        logits = logits[0, len(prompt) - 1:-1] / temperature
        softmax = torch.distributions.Categorical(logits=logits)
        found[:, i, mask] = torch.stack([softmax.log_prob(written), softmax.entropy()])
    return found


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(model, value):
    return flat(torch.autograd.grad(value, [*model.parameters()]))


def tied_with_bias(policy):
    model = copy.deepcopy(policy.model)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-0.5, 0.5, model.vocab_size))
    model.lm_head.weight = model.get_input_embeddings().weight
    return policy._replace(model=model)


@table("budget, chunk", [(1, 2**24), (200, 3000), (10**6, 1)])
@table("tied", [False, True])
@table("mixed", [False, True])
@table("heat", [1.0, 0.6])
def test_rollouts_scores_and_gradient_are_those_of_the_plain_forward(
        warm, monkeypatch, budget, chunk, tied, mixed, heat):
    monkeypatch.setattr(ts, "LOGITS_AT_ONCE", chunk)
    policy, problems = warm[1], warm[2][:6]  # ragged prompts
    policy = (tied_with_bias if tied else copy.deepcopy)(policy)
    model, policy.model.mixed = policy.model, mixed
    tokens, mask, *sampled = rollouts = roll(policy, problems, temperature=heat)
    prompts = [problem.prompt for problem in problems for _ in range(4)]
    weight = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
    scores = torch.zeros_like(weight)
    for i, logprobs in ts.score(model, prompts, tokens, mask, range(24), budget, heat):
        (logprobs * weight[i]).sum().backward()
        scores[i] = logprobs.detach()
    got = flat(parameter.grad for parameter in model.parameters())
    expected = plain(model, problems, rollouts, heat)
    slope = gradient(model, (expected[0] * weight).sum())
    if mixed:
        gap = (scores - sampled[0])[mask]
        assert 0 < (gap.exp() - 1 - gap).mean() < 1e-3
        assert torch.cosine_similarity(got, slope, dim=0) > 0.995
    else:
        close(scores, expected[0], atol=2e-5, rtol=1e-5)
        close(torch.stack(sampled), expected, atol=2e-5, rtol=1e-5)
        close(got, slope, atol=1e-4 * slope.abs().max(), rtol=1e-3)


@table("mixed", [False, True])
def test_before_the_first_update_the_ratio_is_one_in_bf16_exactly(warm, monkeypatch, mixed):
    monkeypatch.setattr(ts, "apply_gradients", lambda *_: 1.0)
    monkeypatch.setattr(warm[1].model, "mixed", mixed)
    metrics, _ = step_of(warm, "etr", updates_per_step=8, micro_batch_tokens=300)
    assert metrics["approx_kl"] < 1e-9 and metrics["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert not mixed or metrics["approx_kl"] == 0 and metrics["ratio_mean"] == 1
    monkeypatch.setattr(ts, "grade", lambda *_: 0.0)
    metrics, _ = step_of(warm, "etr")  # no group teaches
    assert {metrics[name] for name in STATS} == {None}


def test_in_bf16_the_cache_has_no_fp32(warm, monkeypatch):
    monkeypatch.setattr(warm[1].model, "mixed", True)
    with ts.mixed_precision(warm[1].model):
        cache, *_ = ts.prefill(warm[1].model, [warm[2][0].prompt])
    assert {(layer.keys.dtype, layer.values.dtype) for layer in cache.layers} == {
        (torch.bfloat16, torch.bfloat16)}


@table("steps", [3, 16, 300])
def test_the_warm_start_reaches_its_rate_however_short(warm, monkeypatch, steps):
    args, policy, problems = warm
    rates, given = [], Namespace(**vars(args) | dict(warmup_steps=steps, warmup_batch=1))
    monkeypatch.setattr(ts, "apply_gradients", lambda *at: rates.append(at[2]))
    for step in range(1, steps + 1):
        ts.warmup_step(given, 0, step, None, policy, problems)
    assert 0.6 < max(rates) / args.warmup_rate <= 1
    assert rates[-1] < 0.11 * args.warmup_rate


def test_completions_stop_at_the_first_end_token_and_no_draw_depends_on_who_has_left(warm):
    leaving = roll(warm[1], warm[2][:6])
    staying = roll(warm[1]._replace(stop=[-1]), warm[2][:6])
    ends = (staying.tokens == 1).long()
    expected = ends.cumsum(1) == ends  # no end token before
    assert expected.all(1).any() and not expected.all()
    assert torch.equal(leaving.mask, expected)
    assert torch.equal(leaving.tokens, staying.tokens * expected)


def test_sampling_is_from_the_full_softmax_and_greedy_its_maximum(warm, monkeypatch):
    policy, problems, n = tied_with_bias(warm[1]), warm[2][:1], 20000
    policy.model.lm_head.bias.data[[0, 1, -1]] = -math.inf
    p = policy.model(input_ids=torch.tensor([problems[0].prompt]))
    p = p.logits[0, -1].softmax(0)
    seen = roll(policy, problems, 1, n).tokens.flatten()
    seen = seen.bincount(minlength=len(p)) / n
    assert ((seen - p).abs() < 5 * (p / n).sqrt() + 1e-4).all()
    assert roll(policy, problems, 1, 1, temperature=0).tokens == p.argmax()
    for u in 0.0, 1 - 2.0**-24:
        monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, u))
        assert p[roll(policy, problems, 1).tokens].all()


def step_of(warm, arm, optimizer=ts.make_optimizer, **changes):
    """(metrics, change of the weights) of one step of an arm."""
    args, policy, problems = warm
    args, model = Namespace(**vars(args) | changes), copy.deepcopy(policy.model)
    policy, before = policy._replace(model=model), flat(model.parameters())
    metrics, _ = ts.train_step(args, arm, 0, 1, optimizer(model), policy, problems)
    return metrics, flat(model.parameters()) - before


def test_with_one_update_per_batch_nothing_is_clipped_and_etr_is_grpo(warm):
    for updates in 1, 8:
        changes = dict(updates_per_step=updates, learning_rate=1e-3)
        (metrics, grpo), (_, elastic) = (step_of(warm, arm, **changes) for arm in ("grpo", "etr"))
        assert torch.equal(grpo, elastic) == (metrics["clip_fraction"] == 0) == (updates == 1)


def test_a_step_does_not_depend_on_the_micro_batch_and_its_sums_add_up(warm):
    (metrics, whole), (_, cut) = (step_of(warm, "etr", micro_batch_tokens=n) for n in (4096, 300))
    close(whole, cut, atol=1e-5, rtol=1e-3)
    total = {name: sum(sums) for name, sums in metrics["by_correct"].items()}
    tokens = total["tokens_right"] + total["tokens_wrong"]
    for name, mean in ("clipped_right", "clip_fraction_high"), ("kl", "approx_kl"):
        assert total[name] / tokens == pytest.approx(metrics[mean], rel=1e-4)


def test_groups_with_equal_rewards_are_not_run_and_change_nothing(warm):
    args, policy, problems = warm
    batch = ts.seeded("prompts", 0, 1).sample(problems, 8)
    rollouts, _, rewards = ts.sample_and_grade(policy, args, batch, 8, ("rollout", 0, 1), 1.0)
    A = etr.group_advantages(rewards).view(64, 1)  # 0 in some groups
    logprobs, _ = plain(policy.model, batch, rollouts)
    slope = gradient(policy.model, (A * logprobs).sum() / rollouts.mask.sum())
    metrics, change = step_of(
        warm, "etr", lambda model: torch.optim.SGD(model.parameters()), updates_per_step=1,
        learning_rate=20)  # 1 after the warm-up
    close(change, slope / max(1, slope.norm()), atol=1e-5, rtol=1e-3)
    run = metrics["by_correct"]["tokens_right"] + metrics["by_correct"]["tokens_wrong"]
    assert sum(run) == (rollouts.mask * (A != 0)).sum() < rollouts.mask.sum()


# ---- train_small.py: runs

TINY = """--steps 4 --prompts-per-step 8 --group-size 4 --updates-per-step 4 --learning-rate 2e-3
    --eval-problems 4 --test-problems 4 --train-problems 64 --warmup-steps 60 --warmup-batch 32
    --max-new-tokens 24 --eval-every 2 --device cpu""".split()


def main(out, *more):
    return ts.main([*TINY, "--out", str(out), *more])


def start(out, *flags, **options):
    argv = [sys.executable, ts.__file__, *flags, "--out", str(out), "--resume"]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, **options)


def last_words(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def left_by(out):
    """{file: content without times} of metrics, samples and weights."""
    assert not [*out.rglob("*.tmp")]
    files = [*out.glob("*/*s.jsonl"), *out.glob("*/*.txt"), *out.glob("*/*/*.safetensors")]
    assert len(files) >= 8
    times = rb'"seconds": [^,}]*'
    return {path.relative_to(out): re.sub(times, b"", path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(out, "--resume") == 0  # starts where there is nothing to continue
    return out


def test_a_run_leaves_what_it_promises_and_arms_share_their_start(undisturbed):
    grpo, elastic = (
        [json.loads(line) for line in (undisturbed / name / "metrics.jsonl").open()]
        for name in ("grpo-seed0", "etr-seed0"))
    hidden = {name for name in grpo[1] if f"`{name}`" not in README}
    assert hidden == {"step", "clip_fraction_low", "clip_fraction_high"} and len(grpo[1]) == 13
    assert (undisturbed / "accuracy_entropy.png").exists()
    assert ["eval_pass1" in line for line in grpo] == [True, False, True, False, True]
    for step, name in (0, "eval_pass1"), (1, "entropy"):
        assert grpo[step][name] == elastic[step][name]
    row = json.loads((undisturbed / "results.json").read_text())[1]
    assert (row["arm"], row["pass1_after"]) == ("etr", elastic[-1]["test_pass1"])


def test_a_run_killed_and_moved_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    kills, started = 2, time.time()
    assert not start(tmp_path / "timed", *TINY).wait()
    longest = time.time() - started
    out = tmp_path / "run"
    while not (out / "results.json").exists():
        process = start(out, *TINY)
        try:
            assert not process.wait(random.random() * longest if kills > 0 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills -= (out / "warmup-seed0").exists()
            out = out.rename(f"{out}+") if out.exists() else out
    assert left_by(out) == left_by(undisturbed)


def test_a_second_process_is_refused_and_ctrl_c_says_how_to_go_on(undisturbed, tmp_path, capsys):
    process = start(tmp_path, *TINY)
    while not (tmp_path / "etr-seed0/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert main(tmp_path, "--resume") == 2
    assert "no other process" in last_words(capsys)
    process.send_signal(signal.SIGINT)
    assert "--resume" in process.communicate()[1].splitlines()[-1]
    assert process.returncode == 130
    assert main(tmp_path, "--resume") == 0
    assert left_by(tmp_path) == left_by(undisturbed)


@table("seconds, steps, count", [(0.1, 1000, 6), (1, 100, 6), (100, 10, 11)])
def test_checkpoints_take_a_twentieth_of_the_time_whatever_a_step_takes(
        tmp_path, monkeypatch, seconds, steps, count):
    clock, saves = [0.0], []

    def save(path, _):
        saves.extend([path] * (path.suffix == ".pt"))
        clock[0] += path.suffix == ".pt"  # a second

    def step(*_):
        clock[0] += seconds
        return {}, ""
    monkeypatch.setattr(ts, "save", save)
    monkeypatch.setattr(ts.time, "perf_counter", lambda: clock[0])
    ts.train(tmp_path, torch.nn.Linear(1, 1), range(steps + 1), step)
    assert abs(len(saves) - count) <= 1


def test_a_resumed_run_lets_the_weights_of_its_checkpoint_go(tmp_path, monkeypatch):
    model, load, loaded = torch.nn.Linear(3, 3), torch.load, []

    def spy(*args, **options):
        content = load(*args, **options)
        loaded.extend(map(weakref.ref, content[0].values()))
        return content
    monkeypatch.setattr(torch, "load", spy)
    ts.train(tmp_path / "run", model, range(2), lambda *_: ({}, ""))
    ts.train(tmp_path / "run", model, range(3), lambda *_: (dict(x=[r() for r in loaded]), ""))
    line = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["x"] == [None, None]


def test_evaluation_has_no_more_rows_than_a_rollout_batch(warm, monkeypatch):
    args, policy, problems = warm
    rows, sample = [], ts.sample
    monkeypatch.setattr(ts, "sample", lambda *a: rows.append(len(a[1])) or sample(*a))
    scores, _ = ts.evaluate(args, 0, policy, dict(eval=problems[:20]), ["eval"])
    assert sum(rows) == 20 * 9 and max(rows) <= 64
    right = np.array(scores["eval_right"])
    means = right.mean() / 8, (right > 0).mean()
    close((scores["eval_pass1"], scores["eval_passk"]), means)
    assert len(right) == 20 and 0 < means[0] < means[1]


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(undisturbed, tmp_path):
    limit = resource.RLIMIT_FSIZE, (300_000, 300_000)  # bytes: a checkpoint is larger
    process = start(tmp_path, *TINY, preexec_fn=lambda: resource.setrlimit(*limit))
    message = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 2 and "add --resume" in message
    assert main(tmp_path, "--resume") == 0
    assert left_by(tmp_path) == left_by(undisturbed)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_arguments(undisturbed, capsys):
    before, config = left_by(undisturbed), undisturbed / "config.json"
    kept = config.read_text()
    for text, flags, words in (
            (kept, "", "add --resume"),
            (kept, "--resume --steps 9", "steps 4 instead of 9"),
            (kept.replace('weights": "', 'weights": "0'), "--resume", "problems"),
            ("", "--resume", "config.json"), ("[1]", "--resume", "config.json")):
        config.write_text(text)
        assert main(undisturbed, *flags.split()) == 2
        assert words in last_words(capsys)
    config.unlink()
    assert main(undisturbed, "--resume") == 2
    assert "config.json beside" in last_words(capsys)
    config.write_text(kept)
    assert left_by(undisturbed) == before
    stray = undisturbed / "foo-seed0"
    stray.mkdir()
    (stray / "metrics.jsonl").write_text("{")
    assert main(f"{undisturbed.parent}/./{undisturbed.name}/", "--resume") == 0


def test_more_seeds_and_arms_join_a_finished_run_and_each_row_has_its_own_numbers(
        undisturbed, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    assert main(out, "--resume", "--seeds", "2", "--algos", "grpo", "micro") == 0
    rows, old = (json.loads((x / "results.json").read_text()) for x in (out, undisturbed))
    assert rows[0] == old[0]
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("grpo", 0), ("grpo", 1), ("micro", 0), ("micro", 1)]
    metrics = out / "grpo-seed0/metrics.jsonl"
    for text in "", metrics.read_text()[:-9]:
        metrics.write_text(text)
        assert main(out, "--resume", "--seeds", "2") == 2
        assert "grpo-seed0" in last_words(capsys)


@table("flag", ["--learning-rate", "--warmup-rate"])
def test_a_rate_that_ruins_the_weights_is_one_sentence(tmp_path, capsys, flag):
    assert main(tmp_path, flag, "1e30") == 2
    assert "lower --" in last_words(capsys)
    assert "NaN" not in "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))


def test_main_gives_ctrl_c_back_and_runs_in_a_thread(tmp_path):
    torch.set_num_threads(2)
    before, codes = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: codes.append(main(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert codes + [main(tmp_path / "thread")] == [0, 2]
    assert signal.getsignal(signal.SIGINT) is before and torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_the_import_survives_a_notebooks_backend_and_help_shows_the_tasks_defaults(tmp_path):
    argv = [sys.executable, ts.__file__, "--task", "gsm8k", "--help"]
    text = subprocess.check_output(argv, text=True,
                                   env=os.environ | dict(MPLBACKEND="gone", COLUMNS="200"))
    assert "Qwen2.5-0.5B" in text and "2e-06" in text and "0.0001" not in text


os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it


# ---- train_small.py: problems and models


def test_arithmetic_problems_are_distinct_and_true():
    problems = ts.arithmetic_problems(2000, random.Random(0))
    assert len({problem.question for problem in problems}) == 2000
    for problem in problems:
        total = int(problem.question.split()[2])
        for verb, n in re.findall(r"(\w+) (\d+)", problem.question)[1:]:
            total += int(n) if verb in ts.GAIN else -int(n)
        assert str(total) == problem.answer


def a_row(task, i, level=1):
    if task == "math":
        return dict(problem=f"{i} + 1?", level=level, solution=f"$\\boxed{{{i + 1}}}$")
    return dict(question=f"{i} + 1?", answer="<<1+1=2>>" * level + f"#### {i + 1}")


def real_task(folder, task, *rows):
    """Arguments of a small run on these rows and 40 more, for training and for the test."""
    rows += tuple(json.dumps(a_row(task, i)) for i in range(40))
    for split in "train", "test":
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    flags = """--eval-problems 4 --test-problems 9 --prompts-per-step 4 --group-size 2
        --max-new-tokens 3 --device cpu"""
    return [*flags.split(), "--task", task, "--data", str(folder)]


@table("task, levels", [("gsm8k", [1, 2, 3]), ("math", ["Level 1", 2, 3.0])])
def test_problems_are_split_without_overlap_by_number_and_level(tmp_path, task, levels):
    rows = [json.dumps(a_row(task, i, levels[i % 3])) for i in range(99, 159)]
    argv = real_task(tmp_path, task, "\ufeff" + rows[0], *rows[1:])  # with a byte-order mark
    argv += "--levels 1 3 --train-problems 50".split()
    parts = ts.load_problems(ts.parse_args(argv))
    assert [*map(len, parts.values())] == [50, 4, 9, 2]
    train, held_out, test, shown = map(set, parts.values())
    assert not (train | shown) & (held_out | test) | train & shown
    answers = [int(problem.answer) for part in parts.values() for problem in part]
    assert all(answer < 99 or answer % 3 != 2 for answer in answers)


SIZE = dict(  # each architecture takes what it knows
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=1, head_dim=8,
    initializer_range=0.2, num_experts=4, moe_intermediate_size=16, num_heads=8, d_inner=48,
    d_head=8, full_attn_idxs=[1], logits_scaling=4.0, word_embed_proj_dim=32)
RIGHT = "GPT2 GPTNeoX OPT Phi Mistral Gemma3Text Qwen2 Qwen3 Qwen2Moe Mixtral Llama".split()
WRONG = "Gemma2 Granite Mamba Rwkv Lfm2 Qwen3Next MiniMax XLNet".split()
MORE = dict.fromkeys(["Mistral", "Gemma2", "Gemma3Text"], dict(sliding_window=8))


@table("name", RIGHT + WRONG)
@table("tied", [False, True])
def test_a_model_trains_right_or_is_refused(name, tied):
    config = getattr(transformers, f"{name}Config", None) or pytest.skip("a later transformers")
    config = config(**SIZE | MORE.get(name, {}), tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.mixed, message = False, ""
    try:
        ts.check_model(ts.Policy(model, None, [1]), name, 0.6)
    except ts.UserError as error:
        message = str(error)
    assert message.startswith(f"expected --model {name} to") == (name in WRONG)


CHATML = """{% for turn in messages %}<|im_start|>{{ turn.role }} \n {{ turn.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant \n {% endif %}"""


THINK = CHATML.replace("{% endif", "<think>{% endif")  # the prompt begins no chat


def save_model(folder, template=CHATML, **config):
    tokenizer = ts.built_in_model(0)[1]
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(**SIZE | config)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@table("name, change", [
    ("lm_head.weight", {}), ("layers.2.", dict(num_hidden_layers=3)), ("layers.3.x", {})])
def test_a_folder_with_other_weights_is_refused_by_name(tmp_path, capsys, name, change):
    folder = save_model(tmp_path / "model", **change)
    path = Path(folder, "model.safetensors")
    weights = safetensors.torch.load_file(path)
    extra = {f"model.{name}": ones(2)} if name == "layers.3.x" else {}
    weights = {key: value for key, value in weights.items() if name not in key} | extra
    safetensors.torch.save_file(weights, path, dict(format="pt"))
    argv = [*real_task(tmp_path, "gsm8k"), "--out", str(tmp_path / "out"), "--model", folder]
    assert ts.main(argv) == 2
    message = last_words(capsys)
    assert name in message and folder in message


def test_a_warm_start_learns_the_tokens_of_the_whole_chat(tmp_path):
    policy = ts.load_model(save_model(tmp_path, None), "cpu", 0)
    words = "? <eos> 5 \u25815 \u25814 \u2581Question: \u2581\nAnswer:".split(" ")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    policy = policy._replace(tokenizer=transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", chat_template=policy.tokenizer.chat_template))
    problem, = ts.encode(policy, [ts.Problem("4", "5", "5")], [])
    whole = policy.tokenizer(" Question: 4\nAnswer: 5<eos>")["input_ids"]
    assert problem.prompt + problem.target == whole


@table("template, chat", [
    (None, "Question: 4\nAnswer: 5<eos>"),
    (CHATML, "<|im_start|>user \n 4<|im_end|>\n<|im_start|>assistant \n 5<|im_end|>")])
def test_a_turn_ends_where_its_chat_template_ends_it(tmp_path, template, chat):
    policy = ts.load_model(save_model(tmp_path, template), "cpu", 0)
    problem, = ts.encode(policy, [ts.Problem("4", "5", "5")], [])
    chat = policy.tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert [problem.prompt, problem.target] == [chat[:-2], chat[-2:]]
    assert {1, chat[-1]} <= {*policy.stop}


GSM8K = '{"question": "?", "answer": %s}'
MATH = '{"problem": "?", "solution": "\\\\boxed{7}", "level": %s}'
ARGUMENTS = """--group-size 1: int in [2, inf); --learning-rate nan: float; --clip 0.4: 0.333;
    --model gpt2: built-in; --max-new-tokens 500: at most 128 tokens; --levels 3: gsm8k or math;
    --warmup-steps 0 --warmup-rate 1: only with --warmup-steps;
    --seed 9223372036854775808: in [0, 9.22337e+18);
    --train-problems 8: 32 problems beside --eval-problems 200; --task gsm8k: --data;
    --task gsm8k --data nowhere: train.jsonl"""
ROWS = [
    "{", "[1]", "[" * 10**5, '{"question": "?"}', '{"question": 5, "answer": "#### 7"}',
    *(GSM8K % answer for answer in ("7", "null", '"7"', '"#### 7\\ud800"')),
    *(MATH % level for level in ("null", '"easy"')), '{"problem": "?", "level": 1}']
REFUSING = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
TEMPLATES = [
    REFUSING, "{% if %}", "{{ messages[0].content[0].text }}", dict(one=CHATML, two=CHATML)]


@table("words, flags, text, changes", [
    *((case.split(": ")[1], case.split(": ")[0], None, {}) for case in ARGUMENTS.split(";")),
    *(("in line 2 of", "", text, {}) for text in ROWS),
    *(("chat template", "", "", dict(template=template)) for template in TEMPLATES),
    ("8 embeddings", "", "", dict(vocab_size=8)),
    ("at most 13 tokens", "--warmup-steps 1 --max-new-tokens 1", "",
     dict(max_position_embeddings=13)),
    ("right behind its prompt", "--warmup-steps 1", "", dict(template=THINK)),
    ("among 1, got [99]", "--levels 99", "", {})])
def test_a_mistake_gets_one_sentence_before_anything_is_written(
        words, flags, text, changes, capsys, tmp_path):
    argv = ["--out", str(tmp_path / "out")]
    if text is not None:
        argv += real_task(tmp_path, "math" if "problem" in text else "gsm8k", "", text)
        argv += ["--model", save_model(tmp_path / "model", **changes)]
    try:
        code = ts.main([*argv, *flags.split()])
    except SystemExit as stop:  # argparse
        code = stop.code
    message = last_words(capsys)
    assert code == 2 and message.startswith("train_small.py: ") and words in message
    assert not (tmp_path / "out").exists()


@table("task, row", [
    ("gsm8k", GSM8K % '"#### 18"'), ("math", MATH % "3.0")])
@table("how", ["--warmup-steps", "--shots"])
def test_a_real_task_runs_with_model_and_data_from_folders(tmp_path, capsys, task, row, how):
    argv = real_task(tmp_path, task, row) + [how, "1", "--steps", "2"]
    argv += ["--out", str(tmp_path / "out"), "--model", save_model(tmp_path / "model")]
    assert ts.main(argv) == 0
    assert len((tmp_path / "out/etr-seed0/metrics.jsonl").read_text().splitlines()) == 3
    save_model(tmp_path / "model", initializer_range=0.1)
    assert ts.main([*argv, "--resume"]) == 2
    assert "problems_and_weights" in last_words(capsys)


def test_running_out_of_gpu_memory_names_the_flag_to_lower(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(ts, "warmup_step", full)
    flags = "--train-problems 64 --device cpu --out".split()
    assert ts.main([*flags, str(tmp_path)]) == 2
    assert "--micro-batch-tokens" in last_words(capsys)


def test_the_readmes_name_commands_and_files_that_exist_and_numbers_of_the_csv(tmp_path):
    text = (README + (HERE / "plots/README.md").read_text()).replace("\\\n", "")
    commands = re.findall(r"python train_small\.py([^`\n|]*)", text)
    assert len(commands) >= 3
    assert abs(ts.mean_and_band([{0: 1}, {0: 2, 9: 5}, {0: 6}])[2] - 6.57) < 0.01
    for command in commands:
        ts.parse_args(command.split())
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (HERE / path).exists() or (HERE / "plots" / path).exists(), path
    copy = shutil.copytree(HERE, tmp_path / "copy", ignore=shutil.ignore_patterns("runs", ".*"))
    draw = [sys.executable, copy / "plots/evidence.py", "draw"]
    subprocess.run(draw, check=True)
    (copy / "README.md").write_text(README.replace("etr +0.9 ± 0.7", "etr +1.9 ± 0.7"))
    refused = subprocess.run(draw, capture_output=True, text=True)
    assert refused.returncode == 1 and "as the csv says" in refused.stderr


# ---- the verifier


DATA = HERE.parent / "shared/data"

# A line holds the gold answer and then answers, all right or all wrong.
MATH_RIGHT = r"""
42 ; {42} ; (42) ; 42\quad ; \boldsymbol{42} ; \textcolor{red}{42} ; x = 42 ; AB=42
42 ; \text{Answer: }42 ; m+n=42 ; 6 \times 7 = 42 ; \$42 ; 42\% ; 42.0 ; \color{blue}42
42 ; 42\text{ cm} ; $42$ ; \angle ABC=42 ; 21 x 2 = 42
\frac{1}{2} ; 0.5 ; .5 ; 1/2 ; \frac12 ; \dfrac{1}{2} ; x=\frac12 ; \left(\frac12\right)
1,-2 ; \{-2,1\} ; -2 \text{ and } 1
36\pi ; 36\pi\text{ cm}^2 ; 36π ; V = 36\pi
x^2+1 ; f(x)=x^2+1 ; 1+x^2 ; \textcolor{red}{x^2+1} ; (x^2+1)
2\sqrt{3} ; 2√3 ; \sqrt{12} ; 2\sqrt3
(1,2) ; (x,y)=(1,2) ; (1, 2) ; \left(1,2\right)
(-\infty,3] ; x ≤ 3 ; x\le 3 ; 3 \ge x ; x \in (-\infty,3]
\frac72 ; 3 1/2 ; 3\frac12 ; 3.5 ; \frac{14}{4}
45 ; 45\degree ; 45^\circ ; 45° ; 45^{\circ}
\text{(A)} ; A ; \textbf{(A)} ; {a}
\begin{pmatrix}1\\2\end{pmatrix} ; \begin{bmatrix}1\\2\end{bmatrix}
2516_8 ; 2516_{8}
1 \pm \sqrt{2} ; 1+\sqrt2,1-\sqrt2
1,000 ; 1000 ; 1{,}000 ; 1\,000 ; 1,\!000
y=2x+1 ; 2x+1 ; 1+2x=y
"""
MATH_WRONG = r"""
12 ; 6+6 ; 3\times4 ; x=13=12 ; 12 or 13 ; \{12,13\} ; 12x ; \sqrt{144} ; 2x=12 ; 12\pi ; 13 = 12
12 ; 12\text{ thousand} ; 12\text{ or 13} ; 12 dozens ; -(12) ; 1 2 ; 12!
\pi ; \pi h ; 3.141593 ; 3.14159265358979323846 ; 2x=\pi
4t ; 4 ; 4s
11_2 ; 11_3 ; 3 ; 11
\frac{1}{2004!} ; \frac1{2005!}
(3,4) ; \{3,4\} ; 3,4 ; (4,3)
(3,400) ; 3400 ; 400
0.56 = 56\% ; 1 = 56\% ; 0.56 = 57\%
x+1 ; x-1 ; y+1 ; -(x+1)
[0,1) ; [0,1] ; (0,1)
\{1,2\} ; \{1\} ; 1,2,3
(-\infty,3] ; x < 3 ; x \ge 3
y=2x+1 ; y=2x-1 ; x=2y+1
\text{east} ; \text{seat}
"""
GSM8K_RIGHT = r"""
1,234 ; #### 1234 ; so #### $1,234 ; #### 1 234 ; \boxed{1,234} dozens ; #### 234 + 1000 = 1234
18 ; #### 18. ; #### 18.00 ; #### **18** ; ####18 ; #### \boxed{18} ; The answer is 18. ; #### +18
18 ; #### 36/2 ; #### \frac{36}{2} ; **The answer is:** 18 ; #### 18 m² ; #### x = 18 ; #### 18</s>
18 ; The answer is <answer> 18 </answer> ; The final answer is 18. I hope it is. ; ### Answer: 18
18 ; #### 18°C ; #### $18/day ; #### 18\% ; #### "18" ; #### `18` ; #### 18€ ; #### 18"
18 ; #### Step 1: | 7 | #### 18 ; <think>#### 7 \boxed{5}</think>#### 18 ; #### 18 clips, altogether
-10 ; #### -10°F ; #### -$10 ; #### −10
"""
GSM8K_WRONG = r"""
1,234 ; #### 1.234 ; #### 1234 or 1235 ; #### 1, 234 ; #### 1 or 234 ; #### 1234 1234
18 ; 18 ; #### 118 ; #### -18 ; #### 18 #### 19 ; \boxed{1} or \boxed{18} ; #### 11 + 7
18 ; #### not 18 ; The total of 18 is 12 ; #### 18e0 ; #### ; #### 18 and a half ; #### 18 thousand
18 ; #### 18/0 ; #### 18 to 19 ; #### Sarah has 18 pens.
"""


def boxed(answer):
    return f"No \\boxed{{7}}: so \\boxed{{{answer}}}."


@table("written", ["{}", "${}$", "{}.", " {}\n"])
@table("task, right, rows", [
    ("math", 1, MATH_RIGHT), ("math", 0, MATH_WRONG),
    ("gsm8k", 1, GSM8K_RIGHT), ("gsm8k", 0, GSM8K_WRONG)])
def test_answers(task, right, rows, written):
    def completion(answer):
        if task == "math":
            return boxed(written.format(answer))
        return answer.replace(" | ", "\n") + written.format("").strip("$")
    rows = [line.split(" ; ") for line in rows.strip().split("\n")]
    cases = [(gold, completion(answer)) for gold, *answers in rows for answer in answers]
    assert not [case for case in cases if ts.grade(task, case[1], case[0]) != right]


def real(name):
    if not DATA.exists():
        pytest.skip("needs ../shared/data")
    return [json.loads(line) for line in (DATA / name).open()]


def test_real_golds_equal_themselves():
    for row in real("math/test.jsonl"):
        gold = ts.stated_answer("math", row["solution"])
        assert ts.grade("math", boxed(gold), gold) == 1 or not gold
    for row in real("gsm8k/test.jsonl"):
        assert ts.grade("gsm8k", row["answer"], row["answer"].split("#### ")[1]) == 1


def test_answers_that_real_models_wrote():
    refused, total = Counter(), Counter()
    for row in real("answers.jsonl"):
        task, verdict = row["task"], ts.grade(row["task"], row["answer"], row["gold"])
        assert row["right"] or not verdict, row
        total[task] += row["count"] * row["right"]
        refused[task] += row["count"] * (row["right"] - verdict)
    assert refused["math"] <= 0.003 * total["math"] and refused["gsm8k"] <= 0.002 * total["gsm8k"]


HOSTILE = [
    "1" * 10**5, "{" * 10**4, "\\frac{" * 5000, "1e400", "__import__('os').abort()", "\x00",
    "\u202e21", "\\boxed{" * 3000, "(" * 250, "1/0", "\ud800", "1_2", "١٢", "9^{9^{9^9}}=x",
    "9^{9^{9^{9^9}}}", "\\sum_{n=1}^{10^{12}} n^{n}"]


def test_hostile_answers_earn_nothing_and_take_no_time():
    for answer in HOSTILE:
        for text in f"\\boxed{{{answer}}}", f"#### {answer}", f"{answer}\n#### 13":
            started = time.perf_counter()
            assert ts.grade("gsm8k", text, "12") == ts.grade("math", text, "12") == 0
            assert ts.grade("math", text, "\\frac{x}{12}") == 0
            assert time.perf_counter() - started < 20, text[:60]


PIECES = [
    "12", "13", "####", "\\boxed{", "}", "{", "\\frac", "^", "!", "_", " ", "\n", ",", ".", "$",
    "%", "-", "/", "or", "=", "\\sqrt", "\x00", "\u202e", "answer is", "**", "9" * 40, "\\text{"]


def test_the_verifier_answers_any_text_with_0_or_1():
    rng = random.Random(0)
    for length in [*range(15)] * 40:
        text = "".join(rng.choices([*PIECES, chr(rng.randrange(0xFFFF))], k=length))
        for task in ("arithmetic", "gsm8k"):
            reward = ts.grade(task, text, "12")
            assert reward == 0.0 or reward == 1.0 and "12" in text
        assert ts.grade("math", f"\\boxed{{{text}}}", "\\frac{x}{7}") == 0.0


def test_where_the_answer_stands():
    stated = ts.stated_answer
    assert stated("math", "\\boxed{3}, \\boxed{5} and $\\boxed{3}$") == "3, 5"
    assert stated("math", "\\boxed{5} so \\boxed{5") == stated("math", "\\boxed{}") == ""
    assert stated("math", "so \\boxed 5$") == "5"
    assert stated("math", "#### 5") is None
    with pytest.raises(ValueError, match="expected arithmetic, gsm8k, math, got maths"):
        ts.grade("maths", "5", "5")


def verdict_is_right(number):
    answer = f"\\boxed{{x+{number - number % 2}}}"
    return ts.grade("math", answer, f"{number}+x") == 1 - number % 2


@table("error", [TimeoutError, KeyboardInterrupt])
def test_an_exception_in_a_verdict_harms_no_other_verdict(error):
    def strike(*_):
        raise error
    usual = signal.signal(signal.SIGALRM, strike)
    try:
        for number in range(12):
            with pytest.raises(error):
                signal.setitimer(signal.ITIMER_REAL, 0.002 + number / 40)
                while True:
                    ts.grade("math", "\\boxed{x^{200}+1}", f"x+{number}")
            assert verdict_is_right(number)
    finally:
        signal.signal(signal.SIGALRM, usual)


def test_a_fork_asks_its_own_process():
    assert verdict_is_right(1)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        waiting = pool.map_async(verdict_is_right, range(40))
        assert all(map(verdict_is_right, range(20)))
        assert all(waiting.get(60))


def test_a_process_that_was_killed_is_followed_by_another():
    for number in range(4):
        assert verdict_is_right(number)
        for pool in ts.idle_pools[os.getpid()]:
            for worker in [*pool._processes]:
                os.kill(worker, signal.SIGKILL)


GRADES = """
import sys
sys.path.insert(1, sys.argv[1])
import train_small as ts
try:
    print([ts.grade("math", "\\\\boxed{1+x}", gold) for gold in ("x+1", "x+2", "x/x+x")])
except ts.UserError as error:
    print(error)
"""


NAMES = "random.py json.py sympy.py math_verify.py fractions.py numbers.py".split()
MISSING = "raise ModuleNotFoundError(\"No module named 'math_verify'\")"


@table("path, files, expected", [
    ("", dict.fromkeys(NAMES, "x = 1"), r"\[1.0, 0.0, 1.0\]\n"),
    (".", {"math_verify.py": MISSING}, "expected math-verify to work, got .*No module named.*\n"),
    (".", {"math_verify.py": "raise KeyboardInterrupt"}, "expected math-verify .*Interrupt.*\n"),
])
def test_the_worker_works_or_says_why_not(tmp_path, path, files, expected):
    for name, content in {**files, "main/grades.py": GRADES}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    shown = subprocess.run([sys.executable, "main/grades.py", HERE], text=True, cwd=tmp_path,
                           capture_output=True, env={**os.environ, "PYTHONPATH": path}).stdout
    assert re.fullmatch(expected, shown)


if __name__ == "__main__":
    train_with_trl()
