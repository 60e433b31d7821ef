"""Log-probabilities and entropies from sharded logits against torch's own, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.device import install_cpu_backend
from megatron_tempo.models.logprobs import logprobs_and_entropy
from megatron_tempo.models.parallel import parallel_groups
from tests.support.ranks import run_ranks

VOCAB, PADDED, ROWS = 11, 14, 6


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    install_cpu_backend()
    with parallel_groups(ParallelConfig(), torch.device("cpu"), 0):
        yield


def case(rows: int = ROWS, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [rows, PADDED], targets, and the gradients that come from behind."""
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(rows, PADDED, generator=generator)
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)
    targets[:2] = torch.tensor([0, VOCAB - 1])[:rows]
    return logits, targets, torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)


def expected(
    logits: Tensor, targets: Tensor, temperature: float, grad_logprob: Tensor, grad_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), entropy, and the gradient of the logits, padding included: from torch.distributions in float64."""
    wide = logits.double().requires_grad_()
    distribution = torch.distributions.Categorical(logits=wide[:, :VOCAB] / temperature)
    logprobs, entropy = distribution.log_prob(targets), distribution.entropy()
    (logprobs @ grad_logprob.double() + entropy @ grad_entropy.double()).backward()
    assert wide.grad is not None
    return logprobs.detach(), entropy.detach(), wide.grad


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("spread", [0.0, 3.0, 60.0])
def test_values_and_gradients_are_those_of_float64(temperature: float, spread: float) -> None:
    logits, targets, grad_logprob, grad_entropy = case(spread=spread)
    mine = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(mine, targets, VOCAB, temperature)
    (logprobs @ grad_logprob + entropy @ grad_entropy).backward()
    wanted = expected(logits, targets, temperature, grad_logprob, grad_entropy)
    assert mine.grad is not None
    for found, value in zip((logprobs, entropy, mine.grad), wanted, strict=True):
        close(found.detach(), value)
    by_log_softmax = (logits[:, :VOCAB].double() / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    close(logprobs.detach(), by_log_softmax)
    assert torch.equal(mine.detach(), logits), "the logits are left as they are"


@pytest.mark.parametrize("outputs", ["logprobs", "entropy"])
def test_each_output_alone_has_its_gradient(outputs: str) -> None:
    logits, targets, grad, _ = case()
    mine = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(mine, targets, VOCAB, 0.9)
    ((logprobs if outputs == "logprobs" else entropy) @ grad).backward()
    zero = torch.zeros(ROWS)
    _, _, wanted = expected(logits, targets, 0.9, *((grad, zero) if outputs == "logprobs" else (zero, grad)))
    assert mine.grad is not None
    close(mine.grad, wanted)


@pytest.mark.parametrize("weight", [1.0, 50.0, 1e6])
def test_padded_columns_have_no_effect_and_no_gradient(weight: float) -> None:
    """However large what stands in them, and however large the gradient from behind."""
    logits, targets, _, _ = case()
    hostile = logits.clone()
    hostile[:, VOCAB:] = torch.tensor([1e4, 3e38, -1e30])
    found, gradients = [], []
    for x in (logits, hostile):
        mine = x.clone().requires_grad_()
        logprobs, entropy = logprobs_and_entropy(mine, targets, VOCAB, 1.0)
        (weight * (logprobs.sum() + entropy.sum())).backward()
        assert mine.grad is not None
        found.append((logprobs.detach(), entropy.detach()))
        gradients.append(mine.grad)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0][:, VOCAB:], torch.zeros(ROWS, PADDED - VOCAB))
    _, _, wanted = expected(logits, targets, 1.0, torch.full((ROWS,), weight), torch.full((ROWS,), weight))
    torch.testing.assert_close(gradients[0].double(), wanted, rtol=1e-4, atol=1e-6 * weight)


def test_a_token_without_probability_has_no_nan_in_its_gradient() -> None:
    """A logit so low that its probability is 0 in fp32, as where an engine masks a token."""
    logits = torch.tensor([[0.0, 1.0, -1e9, float("-inf")]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1]), 4, 1.0)
    (3 * logprobs.sum() + 5 * entropy.sum()).backward()
    p = torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(0)
    h = float(-(p * p.log()).sum())
    assert entropy.item() == pytest.approx(h, rel=1e-5)
    assert logits.grad is not None
    wanted = [3 * (i - q) - 5 * q * (q.log() + h) for i, q in enumerate(p)]
    assert logits.grad[0].tolist() == pytest.approx([*map(float, wanted), 0.0, 0.0], rel=1e-5)


def test_no_rows_give_no_values_and_an_empty_gradient() -> None:
    logits = torch.zeros(0, PADDED, requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.zeros(0, dtype=torch.int64), VOCAB, 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, PADDED)


def test_bf16_logits_are_reckoned_in_fp32() -> None:
    logits, targets, grad_logprob, grad_entropy = case()
    mine = logits.bfloat16().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(mine, targets, VOCAB, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    (logprobs @ grad_logprob + entropy @ grad_entropy).backward()
    wanted = expected(logits.bfloat16(), targets, 1.0, grad_logprob, grad_entropy)
    close(logprobs.detach(), wanted[0])
    close(entropy.detach(), wanted[1])
    assert mine.grad is not None
    assert mine.grad.dtype == torch.bfloat16
    torch.testing.assert_close(mine.grad.double(), wanted[2], rtol=1e-2, atol=1e-3)


def lifted() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits so high that the ranks must agree on what they take off before exp()."""
    logits, targets, grad_logprob, grad_entropy = case()
    return logits + 150, targets, grad_logprob, grad_entropy


def shard(vocab: int) -> list[Tensor]:
    """On one of two tensor ranks: values, entropies and the gradient of this rank's columns."""
    install_cpu_backend()
    with parallel_groups(ParallelConfig(tensor=2), torch.device("cpu"), 0) as layout:
        logits, targets, grad_logprob, grad_entropy = lifted()
        mine = logits.chunk(2, dim=1)[layout.tensor_rank].clone().requires_grad_()
        logprobs, entropy = logprobs_and_entropy(mine, targets, vocab, 0.8)
        (logprobs @ grad_logprob + entropy @ grad_entropy).backward()
        assert mine.grad is not None
        none = logprobs_and_entropy(mine[:0], targets[:0], vocab, 0.8)
        assert [len(x) for x in none] == [0, 0]
        return [logprobs.detach(), entropy.detach(), mine.grad]


def test_two_tensor_ranks_give_the_unsharded_values_and_gradients(tmp_path: Path) -> None:
    first, second = run_ranks(shard, 2, tmp_path, VOCAB)
    logits, targets, grad_logprob, grad_entropy = lifted()
    logprobs, entropy, gradient = expected(logits, targets, 0.8, grad_logprob, grad_entropy)
    for rank in (first, second):
        close(rank[0], logprobs)
        close(rank[1], entropy)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    close(torch.cat([first[2], second[2]], dim=1), gradient)
