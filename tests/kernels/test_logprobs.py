"""Log-probabilities and entropies, from logits and from hidden states, against torch.distributions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tempo.kernels import Kernels, linear_logprobs
from tests.kernels.implementations import CUDA, Implementation, triton

VOCAB, PADDED, ROWS = 11, 14, 6


def case(
    rows: int = ROWS, spread: float = 3.0, vocab: int = VOCAB, padded: int = PADDED
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [rows, padded], targets, and the gradients that come from behind."""
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(rows, padded, generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[:2] = torch.tensor([0, vocab - 1])[:rows]
    return logits, targets, torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)


def expected(
    logits: Tensor, targets: Tensor, vocab: int, temperature: float, grad_logprob: Tensor, grad_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), entropy, and the gradient of the logits, padding included."""
    wide = logits.double().detach().clone().requires_grad_()
    distribution = torch.distributions.Categorical(logits=wide[:, :vocab] / temperature)
    logprobs, entropy = distribution.log_prob(targets), distribution.entropy()
    (logprobs @ grad_logprob.double() + entropy @ grad_entropy.double()).backward()
    assert wide.grad is not None
    return logprobs.detach(), entropy.detach(), wide.grad


def close(actual: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual.detach().cpu().double(), wanted.double(), rtol=2e-5, atol=3e-6 * scale)


def run(
    implementation: Implementation,
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    temperature: float,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's values, and the gradient that reaches what the logits were made from."""
    leaf = logits.detach().clone().to(implementation.device).requires_grad_()
    made = leaf * 1.0  # the kernel may write over them
    logprobs, entropy = implementation.kernels.logprobs_and_entropy(
        made, targets.to(implementation.device), vocab, temperature
    )
    assert logprobs.dtype == entropy.dtype
    grads = [grad.to(logprobs) for grad in (grad_logprob, grad_entropy)]
    (logprobs @ grads[0] + entropy @ grads[1]).backward()
    assert leaf.grad is not None
    return logprobs, entropy, leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("spread", [0.0, 3.0, 60.0])
def test_values_and_gradients_are_those_of_float64(
    implementation: Implementation, temperature: float, spread: float
) -> None:
    logits, targets, *grads = case(spread=spread)
    wanted = expected(logits, targets, VOCAB, temperature, *grads)
    for actual, value in zip(run(implementation, logits, targets, VOCAB, temperature, *grads), wanted, strict=True):
        close(actual, value)
    by_log_softmax = (logits[:, :VOCAB].double() / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    close(run(implementation, logits, targets, VOCAB, temperature, *grads)[0], by_log_softmax)


# A row is read 4096 columns at a time.
@pytest.mark.parametrize(
    ("vocab", "padded"), [(4096, 4096), (4095, 4096), (4097, 4104), (20000, 20003), (1, 1), (1, 9)]
)
def test_vocabularies_of_any_size(implementation: Implementation, vocab: int, padded: int) -> None:
    logits, targets, *grads = case(3, vocab=vocab, padded=padded)
    wanted = expected(logits, targets, vocab, 0.9, *grads)
    for actual, value in zip(run(implementation, logits, targets, vocab, 0.9, *grads), wanted, strict=True):
        close(actual, value)


@pytest.mark.parametrize("outputs", ["logprobs", "entropy"])
def test_each_output_alone_has_its_gradient(implementation: Implementation, outputs: str) -> None:
    logits, targets, grad, _ = case()
    leaf = implementation(logits).requires_grad_()
    logprobs, entropy = implementation.kernels.logprobs_and_entropy(leaf * 1.0, implementation(targets), VOCAB, 0.9)
    ((logprobs if outputs == "logprobs" else entropy) @ grad.to(logprobs)).backward()
    zero = torch.zeros(ROWS)
    wanted = expected(logits, targets, VOCAB, 0.9, *((grad, zero) if outputs == "logprobs" else (zero, grad)))
    assert leaf.grad is not None
    close(leaf.grad, wanted[2])


@pytest.mark.parametrize("weight", [1.0, 50.0, 1e6])
def test_padded_columns_have_no_effect_and_no_gradient(implementation: Implementation, weight: float) -> None:
    """Whatever they contain, and however large the incoming gradient is."""
    logits, targets, _, _ = case()
    hostile = logits.clone()
    hostile[:, VOCAB:] = torch.tensor([1e4, 3e38, float("nan")])
    grads = torch.full((ROWS,), weight), torch.full((ROWS,), weight)
    plain, with_hostile = (run(implementation, x, targets, VOCAB, 1.0, *grads) for x in (logits, hostile))
    assert all(torch.equal(a, b) for a, b in zip(plain, with_hostile, strict=True))
    assert torch.equal(plain[2][:, VOCAB:].cpu(), torch.zeros(ROWS, PADDED - VOCAB))
    close(plain[2], expected(logits, targets, VOCAB, 1.0, *grads)[2], scale=weight)


def test_a_token_without_probability_has_no_nan_in_its_gradient(implementation: Implementation) -> None:
    """A logit so low that its probability is 0 in fp32, as where an engine masks a token."""
    logits = torch.tensor([[0.0, 1.0, -1e9, float("-inf")]])
    grads = torch.tensor([3.0]), torch.tensor([5.0])
    actual = run(implementation, logits, torch.tensor([1]), 4, 1.0, *grads)
    p = torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(0)
    h = float(-(p * p.log()).sum())
    assert actual[1].item() == pytest.approx(h, rel=1e-5)
    wanted = [3 * (i - q) - 5 * q * (q.log() + h) for i, q in enumerate(p)]
    assert actual[2][0].tolist() == pytest.approx([*map(float, wanted), 0.0, 0.0], rel=1e-5)


def test_no_rows_give_no_values_and_an_empty_gradient(implementation: Implementation) -> None:
    actual = run(
        implementation, torch.zeros(0, PADDED), torch.zeros(0, dtype=torch.int64), VOCAB, 1.0, *torch.zeros(2, 0)
    )
    assert [x.shape for x in actual] == [(0,), (0,), (0, PADDED)]


def test_bf16_logits_are_reckoned_in_fp32(implementation: Implementation) -> None:
    logits, targets, *grads = case()
    actual = run(implementation, logits.bfloat16(), targets, VOCAB, 1.0, *grads)
    wanted = expected(logits.bfloat16(), targets, VOCAB, 1.0, *grads)
    assert actual[0].dtype == torch.float32
    close(actual[0], wanted[0])
    close(actual[1], wanted[1])
    assert actual[2].dtype == torch.bfloat16
    torch.testing.assert_close(actual[2].cpu().double(), wanted[2], rtol=1e-2, atol=1e-3)


def test_the_kernels_gradient_takes_the_place_of_the_logits_once() -> None:
    kernels = triton()
    logits, targets, *_ = case()
    leaf = kernels(logits).requires_grad_()
    made = leaf * 1.0
    logprobs, _ = kernels.kernels.logprobs_and_entropy(made, kernels(targets), VOCAB, 1.0)
    (gradient,) = torch.autograd.grad(logprobs.sum(), made, retain_graph=True)
    assert gradient.data_ptr() == made.data_ptr()
    with pytest.raises(RuntimeError, match="only one backward pass"):
        torch.autograd.grad(logprobs.sum(), made)


# From hidden states

HIDDEN = 16
LINEAR = {"recomputed": lambda kernels: kernels.linear_logprobs_and_entropy, "stored": lambda kernels: through(kernels)}


def through(kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor]]:
    """By way of the logits, as `model.logits=stored` goes."""

    def linear(hidden: Tensor, weight: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        return kernels.logprobs_and_entropy(hidden @ weight.T, *args)

    return linear


def linear_case(rows: int, vocab: int, padded: int, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(padded, hidden, generator=generator)
    _, *rest = case(rows, vocab=vocab, padded=1)
    return x, weight, rest


def linear_expected(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, temperature: float, *grads: Tensor
) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    distribution = torch.distributions.Categorical(logits=(leaves[0] @ leaves[1].T)[:, :vocab] / temperature)
    outputs = distribution.log_prob(targets), distribution.entropy()
    sum(output @ grad.double() for output, grad in zip(outputs, grads, strict=True)).backward()
    return [*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves)]


def linear_run(
    implementation: Implementation, way: str, hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int,
    temperature: float, *grads: Tensor,
) -> list[Tensor]:  # fmt: skip
    leaves = [implementation(x).requires_grad_() for x in (hidden, weight)]
    function = LINEAR[way](implementation.kernels)
    outputs = function(*leaves, implementation(targets), vocab, temperature)
    sum(output @ grad.to(output) for output, grad in zip(outputs, grads, strict=True)).backward()
    return [*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("way", LINEAR)
@pytest.mark.parametrize(
    ("rows", "vocab", "padded"), [(6, 11, 14), (1, 1, 1), (150, 200, 203), (64, 64, 64), (65, 800, 800)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_from_hidden_states(
    implementation: Implementation, way: str, rows: int, vocab: int, padded: int, temperature: float
) -> None:
    """The kernel's float32 tiles are of 64 rows by 64 columns, its shares of the columns eleven."""
    hidden, weight, rest = linear_case(rows, vocab, padded)
    targets, *grads = rest
    wanted = linear_expected(hidden, weight, targets, vocab, temperature, *grads)
    actual = linear_run(implementation, way, hidden, weight, targets, vocab, temperature, *grads)
    for mine, value in zip(actual, wanted, strict=True):
        close(mine, value, scale=5.0)


@pytest.mark.parametrize(("block_rows", "block_bytes"), [(1 << 16, 64 * 4 * 150), (64, 1 << 29), (64, 64 * 4 * 128)])
def test_blocks_of_rows_and_of_columns_add_up(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, block_bytes: int
) -> None:
    kernels = triton()
    from megatron_tempo.kernels import linear_logprobs_triton

    monkeypatch.setattr(linear_logprobs_triton, "_BLOCK_ROWS", block_rows)
    monkeypatch.setattr(linear_logprobs_triton, "_BLOCK_BYTES", block_bytes)
    hidden, weight, rest = linear_case(150, 300, 310)
    wanted = linear_expected(hidden, weight, rest[0], 300, 0.9, *rest[1:])
    actual = linear_run(kernels, "recomputed", hidden, weight, rest[0], 300, 0.9, *rest[1:])
    for mine, value in zip(actual, wanted, strict=True):
        close(mine, value, scale=5.0)


@pytest.mark.skipif(CUDA, reason="these tiles of float32 do not fit a multiprocessor")
@pytest.mark.parametrize("rows", [130, 300])
def test_the_tiles_of_bfloat16(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """128 by 256 by 64, on float32 numbers: Triton's interpreter multiplies bfloat16 wrongly."""
    kernels = triton()
    from megatron_tempo.kernels import linear_logprobs_triton

    tiles = linear_logprobs_triton._TILES[torch.bfloat16]
    monkeypatch.setattr(linear_logprobs_triton, "_TILES", {torch.float32: tiles})
    hidden, weight, rest = linear_case(rows, 3000, 3001, hidden=72)
    wanted = linear_expected(hidden, weight, rest[0], 3000, 0.9, *rest[1:])
    actual = linear_run(kernels, "recomputed", hidden, weight, rest[0], 3000, 0.9, *rest[1:])
    for mine, value in zip(actual, wanted, strict=True):
        close(mine, value, scale=20.0)


def test_without_gradient_nothing_is_kept(implementation: Implementation) -> None:
    hidden, weight, rest = linear_case(6, 11, 14)
    with torch.no_grad():
        actual = implementation.kernels.linear_logprobs_and_entropy(
            *(implementation(x) for x in (hidden, weight, rest[0])), 11, 1.0
        )
    wanted = linear_expected(hidden, weight, rest[0], 11, 1.0, *rest[1:])
    for mine, value in zip(actual, wanted, strict=False):
        assert not mine.requires_grad
        close(mine, value, scale=5.0)


@pytest.mark.parametrize("piece", [1, 30, 4000])
def test_pieces_of_the_plain_form_add_up(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    hidden, weight, rest = linear_case(23, 40, 41)
    args = weight.double(), rest[0], 40, 0.8
    whole = linear_logprobs.linear_logprobs_and_entropy(hidden.double(), *args)
    monkeypatch.setattr(linear_logprobs, "PIECE", piece)
    for mine, value in zip(linear_logprobs.linear_logprobs_and_entropy(hidden.double(), *args), whole, strict=True):
        close(mine, value.detach())


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that any operation gives."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        tensors = [x for x in (results if isinstance(results, tuple | list) else [results]) if isinstance(x, Tensor)]
        self.entries = max([self.entries, *(x.numel() for x in tensors)])
        return results


def test_the_plain_form_makes_no_more_than_a_piece_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_logprobs, "PIECE", 50_000)
    hidden, weight = torch.randn(400, 32).requires_grad_(), torch.randn(2000, 32).requires_grad_()
    with Largest() as largest:
        logprobs, entropy = linear_logprobs.linear_logprobs_and_entropy(hidden, weight, torch.arange(400), 2000, 1.0)
        (logprobs + entropy).sum().backward()
    assert largest.entries == weight.numel() == 64_000, "of 800,000 logits"


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of padded columns, which are cut off
@given(
    rows=st.integers(1, 5), vocab=st.integers(1, 40), padding=st.integers(0, 9), seed=st.integers(0, 99),
    way=st.sampled_from(sorted(LINEAR)),
)  # fmt: skip
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_order_nor_company_nor_padding_matters(
    implementation: Implementation, rows: int, vocab: int, padding: int, seed: int, way: str
) -> None:
    hidden, weight, rest = linear_case(rows, vocab, vocab)
    targets, *grads = rest
    actual = linear_run(implementation, way, hidden, weight, targets, vocab, 0.9, *grads)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    padded = torch.cat([weight, 100.0 * torch.ones(padding, HIDDEN)])
    other = linear_run(
        implementation, way, hidden[order], padded, targets[order], vocab, 0.9, *(g[order] for g in grads)
    )
    for mine, value in zip(other[:3], actual[:3], strict=True):
        close(mine, value[order].cpu(), scale=5.0)
    close(other[3][:vocab], actual[3].cpu(), scale=5.0)
    assert other[3][vocab:].abs().sum() == 0
    halves = [
        linear_run(implementation, way, hidden[at], weight, targets[at], vocab, 0.9, *(g[at] for g in grads))
        for at in (slice(0, rows // 2), slice(rows // 2, rows))
    ]
    close(halves[0][3] + halves[1][3], actual[3].cpu(), scale=5.0)


@pytest.mark.parametrize(("row_tiles", "tiles"), [(144, 594), (512, 594), (128, 75), (32, 594), (16, 75), (1, 594)])
def test_the_shares_of_the_columns_leave_few_multiprocessors_idle(row_tiles: int, tiles: int) -> None:
    """At the sizes of the targets, and at small micro-batches: the tiles of work over those that there was time for."""
    triton()
    from megatron_tempo.kernels import linear_logprobs_triton

    shares = linear_logprobs_triton._shares(row_tiles, tiles)
    rounds = -(-row_tiles * shares // 132) * -(-tiles // shares)
    busy = row_tiles * tiles / (132 * rounds)
    assert 1 <= shares <= 16
    assert busy > (0.9 if row_tiles > 8 else 0.1)
