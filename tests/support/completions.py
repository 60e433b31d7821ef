"""Completions from plain numbers, and as plain numbers to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tempo.types import Completion

Plain = tuple[tuple[int, ...], tuple[float, ...], str, tuple[tuple[int, int], ...]]


def completion(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    reason: str = "stop",
    versions: tuple[tuple[int, int], ...] | None = None,
) -> Completion:
    """`versions`: if not given, all tokens are of version 0."""
    versions = ((0, len(tokens)),) if versions is None else versions
    floats = torch.tensor(logprobs, dtype=torch.float32)
    return Completion(torch.tensor(tokens, dtype=torch.int32), floats, reason, versions)


def plain(one: Completion) -> Plain:
    """All that a completion holds, in values that compare with `==`. Asserts the types of its tensors."""
    assert (one.token_ids.dtype, one.token_ids.ndim) == (torch.int32, 1)
    assert (one.logprobs.dtype, one.logprobs.ndim) == (torch.float32, 1)
    return tuple(one.token_ids.tolist()), tuple(one.logprobs.tolist()), one.finish_reason, one.versions


def plains(rows: Sequence[Sequence[Completion]]) -> list[list[Plain]]:
    return [[plain(one) for one in row] for row in rows]
