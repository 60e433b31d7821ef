"""Compiles every kernel for Hopper as training calls it: `python -m tests.support.compile_kernels OUT`.

The cases vary everything that the machine code depends on: rows of Qwen3 and OLMo3, whole and as shards, in both types,
with every option and with none. OUT is a pickle of {case: [Compiled, ...]}.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig, Ratio
from megatron_tempo.kernels import kernels_for, policy_loss_triton
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.kernels.rows import Rows
from tests.support.hopper import Compiled, launches

KERNELS = kernels_for(torch.device("cuda"))
ROWS = Rows.of(torch.tensor([3000, 0, 70000]))
TOKENS, N = ROWS.total, len(ROWS)


def policy(ratio: Ratio, *, everything: bool) -> None:
    extra: dict[str, Tensor] = {}
    config = ActorUpdateConfig(ratio=ratio)
    if everything:
        config = ActorUpdateConfig(ratio=ratio, dual_clip=3.0, entropy_coef=0.1, kl_coef=0.1)
        moments = KERNELS.advantage_moments(torch.zeros(TOKENS + N), torch.zeros(N), ROWS, Baseline.paper)
        extra = {
            "weights": torch.zeros(TOKENS), "reference_logprobs": torch.zeros(TOKENS), "moments": moments,
        }  # fmt: skip
    leaves = [torch.zeros(TOKENS).requires_grad_() for _ in range(2)]
    given = Experience(torch.zeros(TOKENS), torch.zeros(TOKENS + N), torch.zeros(N), **extra)
    loss, metrics = KERNELS.policy_loss(*leaves, given, ROWS, Baseline.before_token, config)
    loss.sum().backward()
    if everything:  # the kernel that runs after ranks have exchanged a row's sums
        sums = torch.zeros(N, policy_loss_triton._COLUMNS.value)
        policy_loss_triton._finish[(N,)](
            sums, ROWS.lengths, loss, metrics, *policy_loss_triton._numbers(config),
            SEQUENCE=ratio is Ratio.sequence, DUAL=True, WEIGHT=True, num_warps=1,
        )  # fmt: skip


def value(clip: float | None) -> None:
    values = torch.zeros(TOKENS).requires_grad_()
    KERNELS.value_loss(values, torch.zeros(N), ROWS, clip=clip, old_values=torch.zeros(TOKENS))[0].sum().backward()


def logits(columns: int, dtype: torch.dtype) -> None:
    leaf = torch.zeros(2, columns, dtype=dtype).requires_grad_()
    logprobs, entropy = KERNELS.logprobs_and_entropy(leaf, torch.zeros(2, dtype=torch.int64), columns - 3, 0.9)
    (logprobs + entropy).sum().backward()


def linear(columns: int, hidden: int, dtype: torch.dtype) -> None:
    """Of the backward pass only the gradient of the logits: cuBLAS computes the products that follow it."""
    from megatron_tempo.kernels import linear_logprobs_triton

    linear_logprobs_triton._add_product = lambda *_: None  # type: ignore[assignment]
    leaves = torch.zeros(256, hidden, dtype=dtype).requires_grad_(), torch.zeros(columns, hidden, dtype=dtype)
    targets = torch.zeros(256, dtype=torch.int64)
    logprobs, entropy = KERNELS.linear_logprobs_and_entropy(*leaves, targets, columns - 3, 0.9)
    (logprobs + entropy).sum().backward()


CASES: dict[str, Callable[[], None]] = {
    **{f"policy {r.name} {e}": partial(policy, r, everything=e == "all") for r in Ratio for e in ("all", "plain")},
    "value": partial(value, None),
    "value clip": partial(value, 0.1),
    "logits bf16 151936": partial(logits, 151936, torch.bfloat16),
    "logits bf16 18992": partial(logits, 18992, torch.bfloat16),
    "logits bf16 100288": partial(logits, 100288, torch.bfloat16),
    "logits fp32 151936": partial(logits, 151936, torch.float32),
    "linear bf16 18992 x 4096": partial(linear, 18992, 4096, torch.bfloat16),
    "linear bf16 18992 x 5120": partial(linear, 18992, 5120, torch.bfloat16),
    "linear bf16 100278 x 4096": partial(linear, 100278, 4096, torch.bfloat16),
    "linear fp32 18992 x 4096": partial(linear, 18992, 4096, torch.float32),
}


def main(out: Path) -> None:
    compiled: dict[str, list[Compiled]] = {}
    for name, call in CASES.items():
        with launches() as compiled[name]:
            call()
    out.write_bytes(pickle.dumps(compiled))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
