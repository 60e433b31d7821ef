"""Truncated sampling: what is kept, against transformers' processors; log-probabilities and gradients against float64.

The reference runs on a CPU and, where there is one, on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_tempo.kernels import linear_logprobs
from megatron_tempo.kernels.linear_logprobs import linear_logprobs_and_entropy
from megatron_tempo.kernels.logprobs import logprobs_and_entropy
from megatron_tempo.kernels.truncated import truncate_logits_
from megatron_tempo.kernels.truncation import Shards, Truncation, lowest_kept
from megatron_tempo.rollout.sglang_truncation import TruncationProcessor

VOCAB = 151
TRUNCATIONS = [
    Truncation(0.95, 20),
    Truncation(0.9),
    Truncation(0.3),
    Truncation(top_k=1),
    Truncation(top_k=7),
    Truncation(top_k=10_000),
    Truncation(min_p=0.1),
    Truncation(0.8, 30, 0.02),
    Truncation(0.8, None, 0.02),
    Truncation(1e-6),
]


def kept_by_transformers(logits: Tensor, temperature: float, truncation: Truncation) -> Tensor:
    """The logits after transformers' processors, in vLLM's order: float [T, vocabulary]."""
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [MinPLogitsWarper(truncation.min_p)] if truncation.min_p else []
    warpers += [TopKLogitsWarper(truncation.top_k)] if truncation.top_k else []
    warpers += [TopPLogitsWarper(truncation.top_p)] if truncation.top_p < 1 else []
    return LogitsProcessorList(warpers)(torch.zeros(len(logits), 0, dtype=torch.int64), logits.clone())


def logits_of(rows: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    """float64 [rows, VOCAB]: without ties, and with sums that no rounding brings to a threshold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64) * spread


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tokens_of_transformers_processors_are_kept(truncation: Truncation, dtype: torch.dtype) -> None:
    for temperature, spread in ((0.6, 3.0), (1.0, 0.2), (1.7, 20.0)):
        x = logits_of(64, spread).to(dtype)
        wanted = kept_by_transformers(x.double(), temperature, truncation).isfinite()
        kept = x >= lowest_kept(x, temperature, truncation)[:, None]
        assert torch.equal(kept, wanted), (temperature, spread)
        assert torch.equal(kept.sum(1) == VOCAB, wanted.all(1))


def test_the_largest_of_32_bits_and_signs_are_ordered() -> None:
    """The search runs over the bits of the numbers: negative, zero, tiny and huge ones."""
    x = torch.tensor([[-3e38, -1.0, -1e-40, 0.0, 1e-40, 2.0, 3e38]])
    assert float(lowest_kept(x, 1e38, Truncation(0.5))) == pytest.approx(3e38)
    near = torch.tensor([[-5.0, -5.000001, -7.0, -6.0]])
    assert (near >= lowest_kept(near, 1.0, Truncation(0.35))[:, None]).tolist() == [[True, False, False, False]]


def test_ties_are_all_kept() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    for truncation in (Truncation(top_k=1), Truncation(top_p=0.1), Truncation(min_p=0.99), Truncation(0.1, 2)):
        assert (x >= lowest_kept(x, 1.0, truncation)[:, None]).tolist() == [[True, True, True, False]], truncation


def test_a_masked_logit_is_never_kept() -> None:
    x = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    for truncation in TRUNCATIONS:
        kept = x >= lowest_kept(x, 1.0, truncation)[:, None]
        masked = x.masked_fill(~kept, -torch.inf)
        assert masked.softmax(1)[0, 2] > 0
        assert masked.isfinite().sum() <= 2


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_shards_keep_what_the_whole_vocabulary_keeps(truncation: Truncation) -> None:
    """Each of three ranks computes with its columns; here their reductions are made by hand, one rank after another."""
    x = logits_of(32)
    wanted = lowest_kept(x, 0.7, truncation)
    parts = list(x.split(64, dim=1))
    assert [part.shape[1] for part in parts] == [64, 64, 23]
    results = in_lockstep([(part, Shards(64)) for part in parts], 0.7, truncation)
    for result in results:
        for part in parts:
            assert torch.equal(part >= result[:, None], part >= wanted[:, None])


def in_lockstep(ranks: list[tuple[Tensor, Shards]], temperature: float, truncation: Truncation) -> list[Tensor]:
    """`lowest_kept` on all ranks, in threads that wait for one another in each reduction."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    barrier, slots = threading.Barrier(len(ranks)), [torch.empty(0)] * len(ranks)

    def run(rank: int) -> Tensor:
        def all_of(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait()
            every = torch.stack(slots)
            barrier.wait()
            return every

        shards = Shards(ranks[rank][1].columns, lambda t: all_of(t).amax(0), lambda t: all_of(t).sum(0), all_of)
        return lowest_kept(ranks[rank][0], temperature, truncation, shards)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, range(len(ranks))))


def expected(logits: Tensor, targets: Tensor, temperature: float, truncation: Truncation) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the truncated distribution in float64; a target is kept with all above it."""
    least = kept_by_transformers(logits.detach(), temperature, truncation)
    lowest = logits.detach().masked_fill(least.isinf(), torch.inf).amin(1, keepdim=True)
    lowest = lowest.minimum(logits.detach().gather(1, targets[:, None]))
    masked = (logits / temperature).masked_fill(logits < lowest, -torch.inf)
    distribution = torch.distributions.Categorical(logits=masked)
    p = distribution.probs
    return distribution.log_prob(targets), -(p * p.clamp(min=1e-300).log()).sum(1)


@pytest.mark.parametrize("truncation", [TRUNCATIONS[0], TRUNCATIONS[1], TRUNCATIONS[6], TRUNCATIONS[7]], ids=str)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_logprobs_and_gradients_are_of_the_truncated_distribution(
    monkeypatch: pytest.MonkeyPatch, truncation: Truncation, stored: bool, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA")
    monkeypatch.setattr(linear_logprobs, "PIECE", 9 * VOCAB)  # several pieces
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB + 9, 16, generator=generator, dtype=torch.float64)  # nine rows of padding
    grads = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    # Some targets are in the set, others are not.
    targets = torch.randint(0, VOCAB, (40,), generator=generator)
    targets[::2] = (hidden @ weight.T)[::2, :VOCAB].argmax(1)

    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = expected((leaves[0] @ leaves[1].T)[:, :VOCAB], targets, 0.7, truncation)
    (wanted[0] @ grads[0] + wanted[1] @ grads[1]).backward()

    own = [x.detach().clone().to(device).requires_grad_() for x in (hidden, weight)]
    on_device = targets.to(device)
    if stored:
        logits = own[0] @ own[1].T
        truncate_logits_(logits, on_device, VOCAB, 0.7, None, truncation)
        actual = logprobs_and_entropy(logits, on_device, VOCAB, 0.7)
    else:
        actual = linear_logprobs_and_entropy(*own, on_device, VOCAB, 0.7, None, truncation)
    (actual[0] @ grads[0].to(device) + actual[1] @ grads[1].to(device)).backward()
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other.detach(), atol=1e-9, rtol=1e-9)
    for leaf, other in zip(own, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.cpu(), other.grad, atol=1e-9, rtol=1e-9)
    assert actual[0].isfinite().all(), "the sampled token is always in the set"


def test_sglangs_processor_treats_each_row_by_its_own_parameters() -> None:
    logits = logits_of(6).float()
    given = [Truncation(0.95, 20), Truncation(0.5), Truncation(0.95, 20), Truncation(min_p=0.1)]
    given += [Truncation(0.95, 20), Truncation(top_k=3)]
    parameters = [
        {"temperature": 0.6, "top_p": one.top_p, "top_k": one.top_k or 0, "min_p": one.min_p, "__req__": object()}
        for one in given
    ]
    result = TruncationProcessor()(logits.clone(), parameters)
    for row, one in enumerate(given):
        wanted = kept_by_transformers(logits[row : row + 1], 0.6, one).isfinite()
        assert torch.equal(result[row : row + 1].isfinite(), wanted)
        assert torch.equal(result[row][wanted[0]], logits[row][wanted[0]])
    alike = TruncationProcessor()(logits.clone(), parameters[:1] * 6)
    assert torch.equal(alike.isfinite(), kept_by_transformers(logits, 0.6, given[0]).isfinite())
