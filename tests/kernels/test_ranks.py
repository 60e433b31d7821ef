"""The kernels over real gloo processes: vocabularies spread over tensor ranks, sequences over context ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig, Ratio
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.kernels.self_certainty import self_certainty
from tests.kernels.implementations import CUDA, Implementation, plain, triton
from tests.kernels.test_logprobs import HIDDEN, LINEAR, case, close, expected, linear_case, linear_expected
from tests.kernels.test_policy_loss import loss_of, random_case, update, weights_of
from tests.kernels.test_self_certainty import wanted_certainty
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(CUDA, reason="the processes share one machine's CPU")
BOTH = {"plain": plain, "triton": triton}


def in_group(function: Any, *args: Any) -> Any:
    dist.init_process_group("gloo")
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


# Tensor parallelism: 1 and 3


def logits_shard(name: str, vocab: int, padded: int) -> list[Tensor]:
    """Values, entropies and the gradient of this rank's columns.

    The logits are so high that the ranks must agree on what they take off before exp().
    """
    implementation = BOTH[name]()
    logits, targets, *grads = case(vocab=vocab, padded=padded)
    mine = (logits + 150).chunk(2, dim=1)[dist.get_rank()].clone().requires_grad_()
    args = targets, vocab, 0.8, dist.group.WORLD
    logprobs, entropy = implementation.kernels.logprobs_and_entropy(mine * 1.0, *args)
    (logprobs @ grads[0].to(logprobs) + entropy @ grads[1].to(entropy)).backward()
    assert mine.grad is not None
    none = implementation.kernels.logprobs_and_entropy(mine[:0] * 1.0, targets[:0], *args[1:])
    assert [len(x) for x in none] == [0, 0]
    return [logprobs.detach(), entropy.detach(), mine.grad]


# The last: all the second rank's columns are padding.
@pytest.mark.parametrize(("vocab", "padded"), [(11, 14), (9000, 9002), (7, 14)])
@pytest.mark.parametrize("name", BOTH)
def test_logits_over_two_tensor_ranks(tmp_path: Path, name: str, vocab: int, padded: int) -> None:
    first, second = run_ranks(in_group, 2, tmp_path, logits_shard, name, vocab, padded)
    logits, targets, *grads = case(vocab=vocab, padded=padded)
    wanted = expected(logits + 150, targets, vocab, 0.8, *grads)
    for rank in (first, second):
        close(rank[0], wanted[0], scale=10.0)
        close(rank[1], wanted[1], scale=10.0)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    close(torch.cat([first[2], second[2]], dim=1), wanted[2], scale=10.0)


def linear_shard(name: str, way: str, axis: str, vocab: int, padded: int) -> list[Tensor]:
    """Of two tensor ranks, each with some rows of the weight; of two context ranks, each with some tokens."""
    implementation, rank = BOTH[name](), dist.get_rank()
    hidden, weight, rest = linear_case(70, vocab, padded)
    targets, *grads = rest
    if axis == "tensor":
        weight = weight.chunk(2)[rank]
    else:
        at = slice(0, 30) if rank == 0 else slice(30, 70)
        hidden, targets, grads = hidden[at], targets[at], [grad[at] for grad in grads]
    leaves = [implementation(x).requires_grad_() for x in (hidden, weight)]
    group = dist.group.WORLD if axis == "tensor" else None
    outputs = LINEAR[way](implementation.kernels)(*leaves, targets, vocab, 0.8, group)
    sum(output @ grad.to(output) for output, grad in zip(outputs, grads, strict=True)).backward()
    certainty = torch.zeros(0)
    if axis == "tensor":
        kernel = implementation.kernels.linear_logprobs_and_entropy
        certainty = self_certainty(*(leaf.detach() for leaf in leaves), vocab, 0.8, group, kernel)
    return [*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves), certainty]


@pytest.mark.parametrize(("vocab", "padded"), [(75, 76), (30, 64)])
@pytest.mark.parametrize("way", LINEAR)
@pytest.mark.parametrize("name", BOTH)
def test_hidden_states_over_two_tensor_ranks(tmp_path: Path, name: str, way: str, vocab: int, padded: int) -> None:
    first, second = run_ranks(in_group, 2, tmp_path, linear_shard, name, way, "tensor", vocab, padded)
    hidden, weight, rest = linear_case(70, vocab, padded)
    wanted = linear_expected(hidden, weight, rest[0], vocab, 0.8, *rest[1:])
    for rank in (first, second):
        close(rank[0], wanted[0], scale=5.0)
        close(rank[1], wanted[1], scale=5.0)
    assert torch.equal(first[0], second[0])
    assert first[2].shape == (70, HIDDEN)
    close(first[2] + second[2], wanted[2], scale=10.0)
    close(torch.cat([first[3], second[3]]), wanted[3], scale=10.0)
    close(first[4], wanted_certainty(hidden, weight, vocab, 0.8), scale=5.0)
    assert torch.equal(first[4], second[4])


@pytest.mark.parametrize("way", LINEAR)
@pytest.mark.parametrize("name", BOTH)
def test_hidden_states_over_two_context_ranks(tmp_path: Path, name: str, way: str) -> None:
    first, second = run_ranks(in_group, 2, tmp_path, linear_shard, name, way, "context", 75, 76)
    hidden, weight, rest = linear_case(70, 75, 76)
    wanted = linear_expected(hidden, weight, rest[0], 75, 0.8, *rest[1:])
    for i in range(3):
        close(torch.cat([first[i], second[i]]), wanted[i], scale=5.0)
    close(first[3] + second[3], wanted[3], scale=10.0)


# Context parallelism of the policy loss, and whitening over ranks

LENGTHS = [5, 0, 1, 1030, 7, 2]
CUTS = [2, 0, 1, 1025, 0, 7 - 5]  # the first rank's tokens of each row; some rows lie on one rank alone
CONFIGS = [update(ratio, dual_clip=1.2, entropy_coef=0.3, kl_coef=0.7, clip_low=0.05) for ratio in Ratio]


def stretch(flat: Tensor, rank: int, lengths: list[int], *, more: int = 0) -> Tensor:
    """This rank's part of each row; of values, `more` = 1 than of tokens."""
    parts = []
    for row, cut, length in zip(flat.split([n + more for n in lengths]), CUTS, lengths, strict=True):
        parts.append(row[: cut + more] if rank == 0 else row[cut : length + more])
    return torch.cat(parts)


def context_part(name: str, config: ActorUpdateConfig, baseline: Baseline) -> list[Tensor | None]:
    implementation, rank = BOTH[name](), dist.get_rank()
    whole = random_case(LENGTHS, 5, 0.3, config)
    experience: Experience = whole["experience"]
    assert experience.weights is not None
    assert experience.reference_logprobs is not None
    mine = [cut if rank == 0 else n - cut for n, cut in zip(LENGTHS, CUTS, strict=True)]
    given = Experience(
        old_logprobs=implementation(stretch(experience.old_logprobs, rank, LENGTHS)),
        values=implementation(stretch(experience.values, rank, LENGTHS, more=1)),
        rewards=implementation(experience.rewards),
        weights=implementation(stretch(experience.weights, rank, LENGTHS)),
        reference_logprobs=implementation(stretch(experience.reference_logprobs, rank, LENGTHS)),
    )
    rows, group = implementation.rows(mine), dist.group.WORLD
    moments = implementation.kernels.advantage_moments(given.values, given.rewards, rows, baseline, group)
    assert moments.shape == (2, 3)
    given = replace(given, moments=moments)
    leaves = [implementation(stretch(whole[x], rank, LENGTHS)).requires_grad_() for x in ("logprobs", "entropy")]
    loss, metrics = implementation.kernels.policy_loss(*leaves, given, rows, baseline, config, group)
    (loss * implementation(weights_of(LENGTHS))).sum().backward()
    return [loss.detach(), metrics, *(leaf.grad for leaf in leaves)]


def undivided(implementation: Implementation, config: ActorUpdateConfig, baseline: Baseline) -> list[Tensor | None]:
    whole = random_case(LENGTHS, 5, 0.3, config)
    values, rewards = (implementation(getattr(whole["experience"], name)) for name in ("values", "rewards"))
    rows = implementation.rows(LENGTHS)
    moments = implementation.kernels.advantage_moments(values, rewards, rows, baseline)
    whole["experience"] = replace(whole["experience"], moments=moments)
    return list(loss_of(implementation, LENGTHS, config, **whole, baseline=baseline))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.ratio.name)
@pytest.mark.parametrize("baseline", [Baseline.before_token, Baseline.paper], ids=lambda baseline: baseline.name)
@pytest.mark.parametrize("name", BOTH)
def test_sequences_over_two_context_ranks(
    tmp_path: Path, name: str, config: ActorUpdateConfig, baseline: Baseline
) -> None:
    ranks = run_ranks(in_group, 2, tmp_path, context_part, name, config, baseline)
    implementation = BOTH[name]()
    loss, metrics, *grads = undivided(plain(), config, baseline)
    assert loss is not None
    assert metrics is not None
    for i, rank in enumerate(ranks):
        implementation.close(rank[0], loss.detach())
        implementation.close(rank[1], metrics)
        for actual, grad in zip(rank[2:], grads, strict=True):
            assert grad is not None
            implementation.close(actual, stretch(grad, i, LENGTHS))
