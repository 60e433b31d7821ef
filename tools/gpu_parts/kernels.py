"""Each kernel against float64 at full size, with its time and its memory.

Log-probabilities and entropies, from logits and from hidden states, are compared with products and sums in float64, a
block of rows at a time: all of them at once would take 20 GB for the logits alone. The losses are compared with the
plain functions in float64, on the inputs of bench_kernels.py, of which none is so near a clip bound that rounding
decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from bench_kernels import Bound, error_of
from bench_operations import OPERATIONS, Setup
from torch import Tensor

from gpu_parts.measured import apart, peak_bytes, seconds_of
from gpu_parts.records import Records
from gpu_parts.setting import Setting
from megatron_tempo.kernels import Kernels, kernels_for

TEMPERATURE = 0.9
# Relative errors. Products of bfloat16 are summed in float32; gradients are rounded to bfloat16.
OUTPUTS, GRADIENTS, LOSSES = 1e-5, 1e-2, 1e-4
Outputs = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    device: torch.device
    dtype: torch.dtype
    tokens: int
    vocab: int
    hidden: int
    block: int  # rows that are compared at a time
    loss_tokens: int

    @classmethod
    def of(cls, setting: Setting) -> Sizes:
        device = torch.device(setting.device)
        dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
        if setting.small:
            return cls(device, dtype, 96, 1000, 64, 40, 4096)
        room = torch.cuda.get_device_properties(0).total_memory
        return cls(device, dtype, 16384 if room > 70e9 else 2048, 151_936, 4096, 512, 1 << 20)


def run(setting: Setting, records: Records) -> None:
    sizes, kernels = Sizes.of(setting), kernels_for(torch.device(setting.device))
    words = f"{sizes.tokens} tokens, vocabulary {sizes.vocab}, hidden size {sizes.hidden}, {sizes.dtype}"
    records.note("sizes", words)
    for check in (losses, from_logits, from_hidden):
        torch.manual_seed(0)
        check(sizes, kernels, records)
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def losses(sizes: Sizes, _: Kernels, records: Records) -> None:
    cuda = sizes.device.type == "cuda"
    setup = Setup(sizes.device, cuda, sizes.dtype, sizes.vocab, sizes.hidden, 1, "not compared here")
    for name in ("policy", "value"):
        operation = OPERATIONS[name][0](sizes.loss_tokens, setup)
        ours = operation.variants[0]
        bound = Bound(ours, ours.convert(operation.sets[0]), backward=True, overwritten=False)
        records.at_most(f"{name} loss, {sizes.loss_tokens} tokens: error", error_of(bound, operation), LOSSES)
        records.figure(f"{name} loss: forward and backward", 1e6 * seconds_of(bound.call), "us")


def from_logits(sizes: Sizes, kernels: Kernels, records: Records) -> None:
    logits = noise(sizes, sizes.tokens, sizes.vocab).mul_(2)
    targets, grads = targets_and_grads(sizes)

    def call(leaf: Tensor) -> Outputs:
        return kernels.logprobs_and_entropy(leaf * 1.0, targets, sizes.vocab, TEMPERATURE)

    def blocks(found: list[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        for rows in blocks_of(sizes):
            leaf = logits[rows].double().requires_grad_()
            outputs = of_logits(leaf, targets[rows])
            (grad,) = torch.autograd.grad(outputs, [leaf], wide(grads, rows))
            yield from zip(NAMES, (*picked(found[:2], rows), found[2][rows]), (*outputs, grad), strict=False)

    compare("from logits", call, [logits], grads, blocks, records)


def from_hidden(sizes: Sizes, kernels: Kernels, records: Records) -> None:
    hidden, weight = noise(sizes, sizes.tokens, sizes.hidden), noise(sizes, sizes.vocab, sizes.hidden)
    weight.mul_(2 * sizes.hidden**-0.5)
    targets, grads = targets_and_grads(sizes)

    def call(*leaves: Tensor) -> Outputs:
        return kernels.linear_logprobs_and_entropy(*leaves, targets, sizes.vocab, TEMPERATURE)

    def blocks(found: list[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        wide_weight = weight.double().requires_grad_()
        total = torch.zeros_like(wide_weight)
        for rows in blocks_of(sizes):
            leaf = hidden[rows].double().requires_grad_()
            outputs = of_logits(leaf @ wide_weight.T, targets[rows])
            grad, of_weight = torch.autograd.grad(outputs, [leaf, wide_weight], wide(grads, rows))
            total += of_weight
            yield from zip(NAMES, (*picked(found[:2], rows), found[2][rows]), (*outputs, grad), strict=False)
        yield NAMES[3], found[3], total

    compare("from hidden states", call, [hidden, weight], grads, blocks, records)


NAMES = ("log-probabilities", "entropies", "gradient", "gradient of the weights")


def compare(
    what: str,
    call: Callable[..., Outputs],
    inputs: Sequence[Tensor],
    grads: Outputs,
    blocks: Callable[[list[Tensor]], Iterator[tuple[str, Tensor, Tensor]]],
    records: Records,
) -> None:
    """Record time, memory, and the largest relative error over blocks. `blocks`: (name, found, exact) of each block."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def both() -> list[Tensor]:
        outputs = call(*leaves)
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]

    def forward() -> None:
        with torch.no_grad():
            call(*leaves)

    records.figure(f"{what}: forward", 1e3 * seconds_of(forward), "ms")
    records.figure(f"{what}: forward and backward", 1e3 * seconds_of(both), "ms")
    records.figure(f"{what}: forward, peak in addition to inputs", peak_bytes(forward) / 1e9, "GB")
    records.figure(f"{what}: forward and backward, peak in addition to inputs", peak_bytes(both) / 1e9, "GB")
    worst: dict[str, float] = {}
    for name, found, exact in blocks(both()):
        error = apart(found, exact)
        if not error <= worst.get(name, -1.0):  # NaN is the worst
            worst[name] = error
    for name, error in worst.items():
        records.at_most(f"{what}: error of the {name}", error, GRADIENTS if "gradient" in name else OUTPUTS)


def of_logits(logits: Tensor, targets: Tensor) -> Outputs:
    """Log-probabilities of the targets and entropies, by torch alone."""
    logs = (logits / TEMPERATURE).log_softmax(1)
    return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(1)


def noise(sizes: Sizes, *shape: int) -> Tensor:
    return torch.randn(shape, device=sizes.device, dtype=sizes.dtype)


def targets_and_grads(sizes: Sizes) -> tuple[Tensor, Outputs]:
    targets = torch.randint(sizes.vocab, (sizes.tokens,), device=sizes.device)
    first, second = torch.randn(2, sizes.tokens, device=sizes.device)
    return targets, (first, second)


def blocks_of(sizes: Sizes) -> Iterator[slice]:
    return (slice(start, start + sizes.block) for start in range(0, sizes.tokens, sizes.block))


def wide(pair: Outputs, rows: slice) -> Outputs:
    """Of these rows, in float64."""
    first, second = picked(pair, rows)
    return first.double(), second.double()


def picked(pair: Sequence[Tensor], rows: slice) -> Outputs:
    first, second = pair
    return first[rows], second[rows]
