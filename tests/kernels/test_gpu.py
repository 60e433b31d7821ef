"""What only a GPU shows of the kernels: bfloat16 products, full sizes, launches, memory, races.

The other files here run on CUDA too, with `-m gpu`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig, Ratio
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.kernels.rows import Rows
from tests.kernels.implementations import CUDA, triton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA")]

VOCAB, HIDDEN = 151_936, 4096


def apart(actual: Tensor, exact: Tensor) -> float:
    """The distance over the length of what it should be, in float64."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, device="cuda", dtype=torch.float32)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int, *grads: Tensor) -> list[Tensor]:
    """Log-probabilities, entropies and gradients, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logs = ((leaves[0] @ leaves[1][:vocab].T) / 0.9).log_softmax(1)
    outputs = logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(1)
    sum(output @ grad.double() for output, grad in zip(outputs, grads, strict=True)).backward()
    return [*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    ("rows", "vocab", "padded", "hidden"), [(300, 1000, 1008, 256), (129, 5000, 5008, 4096), (1, 7, 16, 64)]
)
def test_bfloat16_hidden_states(rows: int, vocab: int, padded: int, hidden: int) -> None:
    torch.manual_seed(0)
    leaves = [x.bfloat16().requires_grad_() for x in (noise(rows, hidden), noise(padded, hidden, scale=hidden**-0.5))]
    targets, grads = torch.randint(0, vocab, (rows,), device="cuda"), (noise(rows), noise(rows))
    outputs = triton().kernels.linear_logprobs_and_entropy(*leaves, targets, vocab, 0.9)
    sum(output @ grad for output, grad in zip(outputs, grads, strict=True)).backward()
    wanted = exact(*leaves, targets, vocab, *grads)
    for actual, value in zip(outputs, wanted, strict=False):
        assert apart(actual, value) < 1e-5, "products of bfloat16 are summed in fp32, and never rounded"
    for leaf, value in zip(leaves, wanted[2:], strict=True):
        assert leaf.grad is not None
        assert apart(leaf.grad, value) < 1e-2
        assert leaf.grad[vocab:].abs().sum() == 0 or leaf is leaves[0]


def test_blocks_of_rows_and_columns_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows: the gradient of the weights is added up in float32."""
    from megatron_tempo.kernels import linear_logprobs_triton

    monkeypatch.setattr(linear_logprobs_triton, "_BLOCK_ROWS", 128)
    monkeypatch.setattr(linear_logprobs_triton, "_BLOCK_BYTES", 128 * 2 * 512)
    test_bfloat16_hidden_states(300, 1700, 1712, 256)


def test_the_paper_size_in_bfloat16_and_its_memory() -> None:
    """8,192 tokens of Qwen3-8B: the same results as from logits, in less memory than a block and the fp32 gradient."""
    torch.manual_seed(0)
    tokens = 8192
    leaves = [x.bfloat16().requires_grad_() for x in (noise(tokens, HIDDEN), noise(VOCAB, HIDDEN, scale=HIDDEN**-0.5))]
    targets, grads = torch.randint(0, VOCAB, (tokens,), device="cuda"), (noise(tokens), noise(tokens))
    kernels = triton().kernels

    def step(linear: bool) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        args = targets, VOCAB, 1.0
        if linear:
            outputs = kernels.linear_logprobs_and_entropy(*leaves, *args)
        else:
            outputs = kernels.logprobs_and_entropy(leaves[0] @ leaves[1].T, *args)
        sum(output @ grad for output, grad in zip(outputs, grads, strict=True)).backward()
        return [*(x.detach() for x in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    stored = step(linear=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    recomputed = step(linear=True)
    results = sum(leaf.numel() * 2 for leaf in leaves)
    peak = torch.cuda.max_memory_allocated() - before - results
    assert peak < (1 << 29) + 4 * tokens * HIDDEN + (64 << 20)
    for a, b, bound in zip(recomputed, stored, (1e-2, 1e-2, 2e-2, 2e-2), strict=True):
        assert apart(a, b) < bound


def test_full_rows_of_logits_in_bfloat16() -> None:
    torch.manual_seed(0)
    tokens = 512
    logits = noise(tokens, VOCAB, scale=3.0).bfloat16()
    targets, grads = torch.randint(0, VOCAB, (tokens,), device="cuda"), (noise(tokens), noise(tokens))
    leaf = logits.clone().requires_grad_()
    outputs = triton().kernels.logprobs_and_entropy(leaf * 1.0, targets, VOCAB, 1.0)
    sum(output @ grad for output, grad in zip(outputs, grads, strict=True)).backward()
    for rows in torch.arange(tokens, device="cuda").split(64):
        wide = logits[rows].double().requires_grad_()
        logs = wide.log_softmax(1)
        wanted = logs.gather(1, targets[rows, None])[:, 0], -(logs.exp() * logs).sum(1)
        sum(output @ grad[rows].double() for output, grad in zip(wanted, grads, strict=True)).backward()
        assert wide.grad is not None
        assert leaf.grad is not None
        assert apart(outputs[0][rows], wanted[0]) < 1e-6
        assert apart(outputs[1][rows], wanted[1]) < 1e-6
        assert apart(leaf.grad[rows], wide.grad) < 5e-3


def big_policy_step() -> tuple[Rows, list[Tensor]]:
    rows = Rows.of(torch.tensor([16384] * 60 + [65536, 1, 0]), torch.device("cuda"))
    old = -noise(rows.total).abs()
    return rows, [
        old + noise(rows.total, scale=1e-3),
        noise(rows.total).abs(),
        old,
        noise(rows.total + len(rows)),
        noise(len(rows)),
    ]


@pytest.mark.parametrize("ratio", list(Ratio))
def test_a_million_tokens_give_the_same_bits_each_time(ratio: Ratio) -> None:
    """A race between the blocks of a row would move them."""
    torch.manual_seed(0)
    rows, (logprobs, entropy, *given) = big_policy_step()
    kernels, seen = triton().kernels, []
    for _ in range(50):
        leaf = logprobs.clone().requires_grad_()
        moments = kernels.advantage_moments(given[1], given[2], rows, Baseline.before_token)
        experience = Experience(*given, moments=moments)
        config = ActorUpdateConfig(ratio=ratio)
        loss, metrics = kernels.policy_loss(leaf, entropy, experience, rows, Baseline.before_token, config)
        loss.sum().backward()
        assert leaf.grad is not None
        seen.append([moments, loss.detach(), metrics, leaf.grad])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(other, seen[0], strict=True))
    assert rows.tickets.abs().max() == 0


def test_the_policy_loss_is_three_launches_with_whitening() -> None:
    rows, (logprobs, entropy, *given) = big_policy_step()
    kernels, leaf = triton().kernels, logprobs.requires_grad_()

    def step() -> Tensor:
        moments = kernels.advantage_moments(given[1], given[2], rows, Baseline.before_token)
        experience = Experience(*given, moments=moments)
        loss, _ = kernels.policy_loss(leaf, entropy, experience, rows, Baseline.before_token, ActorUpdateConfig())
        return torch.autograd.grad(loss, leaf, grad)[0]

    grad = torch.ones(len(rows), device="cuda")
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(launched) == ["_backward", "_forward", "_moments"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on this machine")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.support.run_kernels"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer refuses this machine's device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
