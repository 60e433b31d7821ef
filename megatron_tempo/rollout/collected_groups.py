"""Prompt groups of collected answers: some of them, or those of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tempo.rollout.batches import Collected
from megatron_tempo.types import Batch


def picked_groups(collected: Collected, groups: Sequence[int]) -> Collected:
    """The given prompt groups, by their numbers, in this order. They are numbered from 0 again."""
    whole = collected.columns
    parts = [(whole.group == group).nonzero().flatten() for group in groups]
    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    columns = replace(whole.select(rows), group=torch.repeat_interleave(torch.arange(len(groups)), sizes))
    places = {row: place for place, row in enumerate(rows.tolist())}
    completions = {places[row]: one for row, one in collected.completions.items() if row in places}
    prompts = [collected.prompts[group] for group in groups]
    return Collected(prompts, columns, collected.sources[rows], completions, collected.experts)


def joined_groups(first: Collected, second: Collected) -> Collected:
    """The prompt groups of both, with their verdicts and classes."""
    a, b, shift = first.columns, second.columns, len(first.columns)
    columns = replace(
        Batch.join(a, b),
        group=torch.cat([a.group, b.group + len(first.prompts)]),
        correct=_both(a.correct, b.correct),
        answer_class=_both(a.answer_class, b.answer_class),
    )
    completions = first.completions | {row + shift: one for row, one in second.completions.items()}
    sources = torch.cat([first.sources, second.sources])
    experts = first.experts or second.experts
    return Collected([*first.prompts, *second.prompts], columns, sources, completions, experts)


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])
