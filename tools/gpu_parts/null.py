"""What the null GPU needs to run to the end: nothing computes there, so no number may decide what happens next.

Only `__main__` calls this, and only where the null GPU is loaded (`setting.is_null_gpu`). Results are read from memory
that no kernel has written. They may be NaN, which a run refuses, so all numbers are taken to be finite.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def prepare(*, trains: bool) -> None:
    """Take all numbers to be finite and, if the process `trains`, all gradient norms to be 1.

    Where the trainer refuses the null GPU, this process is declared a rehearsal.
    """
    if importlib.util.find_spec("megatron_tempo.nullgpu") is not None:
        importlib.import_module("megatron_tempo.nullgpu.guard").rehearse()

    def isfinite(tensor: Tensor) -> Tensor:
        return torch.ones(tensor.shape, dtype=torch.bool)

    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN asks the real driver; flash attention needs only launches
    os.environ["NVTE_DISABLE_NVRTC"] = "1"  # Transformer Engine would compile for the driver
    torch.Tensor.isfinite = torch.isfinite = isfinite  # type: ignore[method-assign, assignment]
    if not trains:
        return
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    for optimizer in (MegatronOptimizer, ChainedOptimizer):
        original = optimizer.get_grad_norm

        def grad_norm(self: object, original: object = original) -> float:
            original(self)  # type: ignore[operator]
            return 1.0

        optimizer.get_grad_norm = grad_norm
    if HAVE_TE:
        answer_te_attention()


def answer_te_attention() -> None:
    """Transformer Engine 2.11's attention is cuDNN's, which asks the real driver: answer with tensors of its shapes."""
    te = importlib.import_module("transformer_engine_torch")
    queries = 13  # the position of queries, before keys and values, among the arguments of both calls

    def forward(*given: Any) -> list[Tensor]:
        query = given[queries]
        seed = torch.empty(2, dtype=torch.int64, device=query.device)
        return [torch.empty_like(query), torch.empty(*query.shape[:2], 1, device=query.device), seed]

    def backward(*given: Any) -> list[Tensor]:
        return [torch.empty_like(tensor) for tensor in given[queries : queries + 3]]

    te.fused_attn_fwd, te.fused_attn_bwd = forward, backward


def make_up_rollouts() -> None:
    """Random responses in place of the embedded engine's: decoding reads what it has drawn, and shapes follow from it.

    The check that engine and trainer agree is left out, for it compares numbers.
    """
    from megatron_tempo.rollout.embedded import EmbeddedEngine
    from megatron_tempo.rollout.engine import Request, Sampling
    from megatron_tempo.training import parity
    from megatron_tempo.types import Completion

    def generate(
        self: EmbeddedEngine, requests: Sequence[Request], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        count = sampling.max_tokens
        for index, request in enumerate(requests):
            generator = torch.Generator().manual_seed(request.seed)
            tokens = torch.randint(self._model.config.vocab_size, (request.samples, count), generator=generator)
            versions = ((self._version or 0, count),)
            yield index, [Completion(row, torch.full((count,), -1.0), "length", versions) for row in tokens.int()]

    EmbeddedEngine.generate = generate  # type: ignore[method-assign]
    parity.exceeds = lambda *_: False
