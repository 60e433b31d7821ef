"""The operations that bench_kernels.py compares: their inputs, their variants, and a lower bound of their time.

`eager` is the plain function of `megatron_tempo.kernels`. `compile` is that function under torch.compile or, for
logprobs and linear, a formulation without autograd functions. Liger's most similar operations compute less, or differ:

    policy          GRPO with the sequence's ratio. It starts from logits, so it gets a vocabulary of two, in which
                    token 0 has the log-probability. This is its loss with the smallest possible softmax. A row has one
                    advantage and no baseline, rows are padded to one length, and the only metric is clipped tokens.
    logprobs        cross entropy per token, rounded to the logits' type; no entropy, temperature or tensor ranks.
    linear          the same from hidden states. `liger mean` returns only the mean and computes the gradient in the
                    forward pass. A policy gradient cannot use it, because it weights each token, but it is the fastest.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig
from megatron_tempo.kernels import REFERENCE, Kernels, kernels_for
from megatron_tempo.kernels.policy_loss import ROW_METRICS, Experience
from megatron_tempo.kernels.rows import Rows
from megatron_tempo.kernels.value_loss import VALUE_METRICS

Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Setup:
    """The device, and the choices of the command line."""

    device: torch.device
    cuda: bool
    dtype: torch.dtype  # of logits, hidden states and weights
    vocab: int
    hidden: int
    repeats: int
    no_liger: str  # why liger-kernel cannot run, or ""

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    call: Call
    exact: Call  # the expected results, in plain PyTorch
    leaves: int  # the number of inputs, from the first, that get a gradient
    convert: Callable[[list[Tensor]], list[Tensor]] = list  # makes its inputs from the operation's; not timed
    operations: tuple[float, float] = (0.0, 0.0)  # of matrix products: forward, with the backward pass
    missing: str = ""  # why it cannot run here, or ""


@dataclass(frozen=True, slots=True)
class Operation:
    sets: list[list[Tensor]]  # sets of inputs, used in turn
    variants: list[Variant]  # ours first
    floor: tuple[float, float]  # bytes or operations: forward, with the backward pass
    logits: bool = False  # the first input is logits: the backward pass may overwrite it; SAMPLE rows are compared


def policy(tokens: int, setup: Setup) -> Operation:
    """Some rows are clipped and some are not; none is so near a bound that rounding decides.

    Only the log-probabilities have a gradient, because the entropy's coefficient is 0 by default.
    """
    rows, config = Rows.of(ragged(tokens), setup.device), ActorUpdateConfig()
    drift = torch.tensor([2e-3, 2e-4, -1e-4, -2e-3], device=setup.device).repeat(len(rows))[: len(rows)]

    def inputs() -> list[Tensor]:
        logprobs, noise = -2 * setup.uniform(tokens) - 0.01, 0.1 * setup.uniform(tokens)
        old = logprobs - noise - rows.spread(drift - rows.mean(noise))
        return [logprobs, setup.uniform(tokens), old, setup.uniform(tokens + len(rows)), setup.uniform(len(rows))]

    def by(kernels: Kernels) -> Call:
        return lambda logprobs, entropy, *given: kernels.policy_loss(
            logprobs, entropy, Experience(*given), rows, Baseline.before_token, config
        )

    sets = filling(inputs, setup)
    variants = [*usual(by, by(REFERENCE), 1, setup), liger_policy(rows, config, setup)]
    floor = size(sets[0]) + 4 * len(rows) * (1 + len(ROW_METRICS))
    return Operation(sets, variants, (floor, floor + 4 * tokens))


def value(tokens: int, setup: Setup) -> Operation:
    rows = Rows.of(ragged(tokens), setup.device)

    def by(kernels: Kernels) -> Call:
        return lambda values, targets: kernels.value_loss(values, targets, rows)

    sets = filling(lambda: [setup.uniform(tokens), setup.uniform(len(rows)).round()], setup)
    floor = size(sets[0]) + 4 * len(rows) * (1 + len(VALUE_METRICS))
    return Operation(sets, usual(by, by(REFERENCE), 1, setup), (floor, floor + 4 * tokens))


def logprobs(tokens: int, setup: Setup) -> Operation:
    logits = setup.normal(tokens, setup.vocab).mul_(2)
    targets = torch.randint(setup.vocab, (tokens,), device=setup.device)

    def by(kernels: Kernels) -> Call:
        return lambda *given: kernels.logprobs_and_entropy(*given, setup.vocab, 1.0)

    call = liger_cross_entropy("cross_entropy", "LigerCrossEntropyFunction", [None], "none")
    theirs = Variant("liger", call, lambda *given: by(REFERENCE)(*given)[:1], 1, missing=setup.no_liger)
    variants, floor = [*usual(by, plain_logprobs, 1, setup), theirs], size([logits])
    return Operation([[logits, targets]], variants, (floor, 3 * floor), logits=True)


def linear(tokens: int, setup: Setup) -> Operation:
    hidden, weight = setup.normal(tokens, setup.hidden), setup.normal(setup.vocab, setup.hidden)
    weight.mul_(2 / math.sqrt(setup.hidden))
    targets = torch.randint(setup.vocab, (tokens,), device=setup.device)
    product = 2.0 * tokens * setup.vocab * setup.hidden
    once, twice, missing = (product, 3 * product), (product, 4 * product), setup.no_liger

    def by(kernels: Kernels) -> Call:
        return lambda *given: kernels.linear_logprobs_and_entropy(*given, setup.vocab, 1.0)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return plain_logprobs(hidden @ weight.T, targets)

    def mean(*given: Tensor) -> tuple[Tensor, ...]:
        return (by(REFERENCE)(*given)[0].mean(),)

    kind = "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", [None, None]
    each, whole = liger_cross_entropy(*kind, "none"), liger_cross_entropy(*kind, "mean")
    variants = [replace(x, operations=once if x.name == "compile" else twice) for x in usual(by, plain, 2, setup)]
    variants += [
        Variant("liger", each, lambda *given: by(REFERENCE)(*given)[:1], 2, operations=twice, missing=missing),
        Variant("liger mean", whole, mean, 2, operations=once, missing=missing),
    ]
    return Operation([[hidden, weight, targets]], variants, twice)


# With their default --tokens: on CUDA the sizes of the performance targets, elsewhere sizes that take seconds.
OPERATIONS: dict[str, tuple[Callable[[int, Setup], Operation], dict[bool, tuple[int, ...]]]] = {
    "policy": (policy, {True: (18432, 65536, 1 << 20), False: (16384,)}),
    "value": (value, {True: (18432, 65536, 1 << 20), False: (16384,)}),
    "logprobs": (logprobs, {True: (18432,), False: (256,)}),
    "linear": (linear, {True: (18432, 65536), False: (256,)}),
}


def plain_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Only differentiable operations, for torch.compile."""
    wide = logits.float()
    log_total = wide.logsumexp(1)
    mean = ((wide - log_total[:, None]).exp() * wide).sum(1)
    return wide.gather(1, targets[:, None]).squeeze(1) - log_total, log_total - mean


def usual(by: Callable[[Kernels], Call], plain: Call, leaves: int, setup: Setup) -> list[Variant]:
    ours, eager = by(kernels_for(setup.device)), by(REFERENCE)
    compiled = Variant("compile", torch.compile(plain, dynamic=False), eager, leaves)
    if not setup.cuda:
        return [Variant("ours (reference)", ours, eager, leaves), compiled]
    return [Variant("ours", ours, eager, leaves), Variant("eager", eager, eager, leaves), compiled]


def liger_policy(rows: Rows, config: ActorUpdateConfig, setup: Setup) -> Variant:
    longest = int(ragged(rows.total).max())  # the rows' own lengths are on the GPU
    is_token = torch.arange(longest, device=setup.device) < rows.lengths[:, None]

    def convert(given: list[Tensor]) -> list[Tensor]:
        logprobs, _, old, _, rewards = given
        logits = logprobs.new_zeros(len(rows), is_token.shape[1] + 1, 2)  # liger ignores a row's last position
        logits[:, :-1][is_token] = torch.stack([logprobs, (-logprobs.expm1()).log()], dim=1)
        padded = torch.zeros_like(logits[:, :-1, 0]).masked_scatter(is_token, old)
        return [logits, padded, torch.zeros_like(is_token, dtype=torch.int64), rewards, is_token.int()]

    def call(logits: Tensor, old: Tensor, ids: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        loss, _, _ = liger("grpo_loss", "GrpoLossFunction").apply(
            logits, old, None, ids, rewards, mask, 1.0, 0.0, config.clip_low, config.clip_high,
            False, "grpo", None, False, "sequence",
        )  # fmt: skip
        return (loss.sum(1) / rows.lengths,)

    def exact(logits: Tensor, old: Tensor, _ids: Tensor, rewards: Tensor, _mask: Tensor) -> tuple[Tensor, ...]:
        logprobs = logits[:, :-1].log_softmax(2)[..., 0][is_token]
        given = Experience(old[is_token], rewards.new_zeros(rows.total + len(rows)), rewards)
        return REFERENCE.policy_loss(logprobs, logprobs.detach(), given, rows, Baseline.before_token, config)[:1]

    return Variant("liger", call, exact, 1, convert, missing=setup.no_liger)


def liger_cross_entropy(module: str, name: str, unused: list[None], reduction: str) -> Call:
    """Liger's cross entropy as a log-probability. `unused`: arguments such as class weights."""
    return lambda *given: (-liger(module, name).apply(*given, *unused, -100, 0.0, 0.0, reduction)[0].float(),)


def liger(module: str, name: str) -> Any:
    """Liger's Triton function, from its own module, because `liger_kernel.ops` may replace it with another."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def ragged(tokens: int) -> Tensor:
    """Row lengths of 2000 to 6000 tokens; the last row gets the rest."""
    lengths = torch.randint(2000, 6001, (tokens // 2000 + 1,), generator=torch.Generator().manual_seed(0))
    lengths = lengths.cumsum(0).clamp(max=tokens).diff(prepend=torch.zeros(1, dtype=torch.int64))
    return lengths[lengths > 0]


def filling(inputs: Callable[[], list[Tensor]], setup: Setup) -> list[list[Tensor]]:
    """Sets of inputs, at most 64, with twice the size of the GPU's cache in total, so that none is cached when used."""
    first, count = inputs(), 1
    if setup.cuda:
        count = math.ceil(2 * torch.cuda.get_device_properties(setup.device).L2_cache_size / size(first))
    return [first, *(inputs() for _ in range(min(64, count) - 1))]


def size(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
