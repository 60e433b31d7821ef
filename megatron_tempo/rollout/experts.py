"""The experts that an engine's routers chose, as tensors: uint8 or int16 [tokens, layers, k], see `config.routing`."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.runtime.row_windows import row_windows
from megatron_tempo.types import UNKNOWN_EXPERT, Completion, known_experts

DTYPES = {1: torch.uint8, 2: torch.int16}


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The form of the experts of a batch's rows, the same on every rank: `layers` * `per_token` of each token."""

    layers: int
    per_token: int
    itemsize: int

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.per_token * self.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.itemsize]

    def empty(self, tokens: int) -> Tensor:
        return torch.empty(tokens, self.layers, self.per_token, dtype=self.dtype)

    def unknown(self, tokens: int) -> Tensor:
        return self.empty(tokens).fill_(UNKNOWN_EXPERT[self.itemsize])


# Gets some rows of a batch, and the experts of each one's tokens.
ExpertWatch = Callable[[range, Sequence[Tensor]], None]


def form_of(completion: Completion) -> tuple[int, int, int]:
    """Layers, experts per token and bytes of each: zeros if they are not recorded."""
    experts = completion.experts
    return (0, 0, 0) if experts is None else (*experts.shape[1:], experts.itemsize)


def received(
    form: ExpertRows,
    lengths: Tensor,
    sources: Tensor,
    completions: MutableMapping[int, Completion],
    held: Tensor,
    layers: Tensor | None,
    window: int,
    watch: ExpertWatch | None,
) -> Tensor:
    """The experts of the held rows' tokens, in the given layers: [sum of held lengths, layers, k]. Collective.

    Each row moves as whole numbers of 4 bytes, in windows of `window` of these. A row whose experts are not recorded
    has unknown ones, and so has the last token of each.

    Args:
        form: the form of all rows.
        lengths: int64 [n], tokens of each row, prompt and response.
        sources: int64 [n], the rank that has each row.
        completions: this rank's rows, which lose their experts.
        held: int64 [m], ascending: the rows that this rank keeps.
        layers: int64, what it keeps of them; None: all.
        window, watch: as `batches.receive`.
    """
    words = (lengths * form.bytes_per_token + 3) // 4
    own = lengths[held]
    kept = (form if layers is None else replace(form, layers=len(layers))).empty(int(own.sum()))
    parts = dict(zip(held.tolist(), kept.split(own.tolist()), strict=True))

    def fill(row: int) -> tuple[Tensor] | None:
        one = completions.get(row)
        if one is None:
            return None
        completions[row] = replace(one, experts=None)
        whole = form.unknown(int(lengths[row])) if one.experts is None else filled(one.experts, int(lengths[row]))
        raw = whole.view(torch.uint8).flatten()
        return (torch.nn.functional.pad(raw, (0, 4 * int(words[row]) - len(raw))).view(torch.int32),)

    for rows, moved in row_windows(words, fill, 1, sources, window):
        sizes = words[rows.start : rows.stop].tolist()
        of_rows = [
            part.view(torch.uint8)[: int(lengths[row]) * form.bytes_per_token]
            .view(kept.dtype)
            .view(int(lengths[row]), form.layers, form.per_token)
            for row, part in zip(rows, moved[0].split(sizes), strict=True)
        ]
        for row, experts in zip(rows, of_rows, strict=True):
            if (part := parts.get(row)) is not None:
                part.copy_(experts if layers is None else experts[:, layers])
        if watch is not None:
            watch(rows, of_rows)
    return kept


def filled(experts: Tensor, tokens: int) -> Tensor:
    """The choices of exactly `tokens` tokens: some left out at the end, or unknown ones added."""
    missing = tokens - len(experts)
    if missing <= 0:
        return experts[:tokens]
    return torch.cat([experts, experts.new_full((missing, *experts.shape[1:]), UNKNOWN_EXPERT[experts.itemsize])])


def continued(prompt: int, begun: Completion, more: Tensor | None) -> Tensor | None:
    """The choices of a response in two parts. `prompt`: its tokens. `more`: from `first_unread` on.

    Those of the first part stay, as its log-probabilities do. What the engine did not return of it is unknown.
    """
    if more is None and begun.experts is None:
        return None
    if more is None:
        return begun.experts
    first = more[:0] if begun.experts is None else begun.experts
    return torch.cat([filled(first, first_unread(prompt, begun)), more])


def first_unread(prompt: int, begun: Completion) -> int:
    """The first token whose pass computes a log-probability that a begun response does not have."""
    return prompt + len(begun.token_ids) - 1 if len(begun.token_ids) else 0


def doubts(experts: Tensor, form: RoutingFormat) -> list[str]:
    """What is invalid in choices of all tokens, in a few words. Unknown ones are valid."""
    wanted = (form.layers, form.per_token, DTYPES[form.itemsize])
    if experts.dim() != 3 or (*experts.shape[1:], experts.dtype) != wanted:
        return [
            f"experts are {experts.dtype} {list(experts.shape)}, not {wanted[2]} [tokens, {wanted[0]}, {wanted[1]}]"
        ]
    chosen = experts[known_experts(experts)]
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < form.experts:
        return [f"an expert that is none of {form.experts}"]
    return []
