"""The experts that the embedded engine's routers choose, recorded while it generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.rollout.experts import ExpertRows, continued, first_unread
from megatron_tempo.types import UNFINISHED, Completion


class RouterRecorder:
    """Sees what the routers of a transformers model return. `is_on`: whether it keeps it."""

    def __init__(self, model: Any, routing: RoutingFormat) -> None:
        """`model`: whose layers have a router each, at `mlp.gate`, that returns its choice last: int64 [tokens, k]."""
        self.form = ExpertRows(routing.layers, routing.per_token, routing.itemsize)
        self.is_on = False
        self._chosen: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep)

    def take(self, rows: int) -> Tensor:
        """The choices of the last forward pass over `rows` rows: uint8 or int16 [rows, tokens, layers, k]."""
        chosen, self._chosen = self._chosen, []
        assert len(chosen) == self.form.layers, "one forward pass"
        whole = torch.stack(chosen, 1).to(self.form.dtype)
        return whole.view(rows, -1, *whole.shape[1:])

    def _keep(self, module: object, given: object, result: tuple[Tensor, ...]) -> None:
        if self.is_on:
            self._chosen.append(result[-1])


@dataclass(slots=True)
class RecordedExperts:
    """The choices for rows that are being decoded. `chosen`: uint8 or int16 [rows, tokens, layers, k]."""

    chosen: Tensor

    @classmethod
    def begin(
        cls, prefill: Tensor, mask: Tensor, copies: Tensor, rows: Sequence[int], count: int, more: int
    ) -> RecordedExperts:
        """Those of the prefill, of `count` rows that get at most `more` tokens.

        Args:
            prefill: [prompts, longest, layers, k], with padding before each prompt.
            mask: int64 [prompts, longest], 0 where there is padding.
            copies: int64 [live], the prompt of each live row.
            rows: the number of each live row.
        """
        chosen = prefill.new_zeros(count, prefill.shape[1] + more, *prefill.shape[2:])
        for row, copy in zip(rows, copies.tolist(), strict=True):
            own = prefill[copy][mask[copy].bool()]
            chosen[row, : len(own)] = own
        return cls(chosen)

    def add(self, rows: Tensor, positions: Tensor, chosen: Tensor) -> None:
        """One more token of each live row: its row, its position there, int64 [live] each, and [live, 1, layers, k]."""
        self.chosen[rows, positions] = chosen[:, 0]

    def of(self, row: int, prompt: int, tokens: int, begun: Completion | None) -> Tensor | None:
        """The choices of a row with a prompt and a response of these lengths."""
        if begun is not None and begun.finish_reason != UNFINISHED:
            return begun.experts
        whole = self.chosen[row, : prompt + tokens - 1].cpu()
        if begun is None:
            return whole
        return continued(prompt, begun, whole[first_unread(prompt, begun) :])
