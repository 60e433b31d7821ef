"""SGLang's checksums of a mixture's experts on a GPU, of which no sender has more than some.

SGLang 0.5.23 has all experts of a layer in two parameters: `w13_weight`, with gate and up projection of each expert one
below the other, and `w2_weight`. Its checksum on a GPU is a sum over tiles of a parameter (`gpu_hash` of
`sglang_checksums.py`). So each sender computes the part of the sum that its experts' tiles have, if these begin and end
with them. The CPU's checksum, a SHA-256, has no parts.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_tempo.rollout.answer_checks import differing
from megatron_tempo.rollout.sglang_checksums import TILE, final_hash, of_rank, tile_total
from megatron_tempo.types import Bucket, PartName

log = logging.getLogger(__name__)

EXPERTS = ".mlp.experts."  # in the names of experts' tensors and of SGLang's parameters of them
_TENSOR = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_PIECE = " of "  # between a part of a sum and its parameter; parameters' names have no blanks but of `of_rank`
_PIECES = {"w13_weight": 2, "w2_weight": 1}  # of each expert

Sums = dict[str, tuple[str, float]]


def expert_sums(bucket: Bucket, ranks: int, experts: int) -> Sums:
    """The parts of the sums that a bucket's experts have, on each tensor rank; "" for one that is not known.

    `experts`: of a layer. Parts of tensors and FP8 weights, which kernels may hold otherwise, are not known.
    """
    sums: Sums = {}
    for name, tensor in bucket:
        found = _TENSOR.fullmatch(name.whole if isinstance(name, PartName) else name)
        if found is None:
            continue
        layer, expert, part = found[1], int(found[2]), found[3]
        own = "w2_weight" if part == "down" else "w13_weight"
        for rank in range(ranks):
            whole = of_rank(f"{layer}.{own}", rank, ranks)
            known = not isinstance(name, PartName) and tensor.itemsize > 1
            total = _total(tensor, expert, part, rank, ranks, experts) if known else None
            sums[f"{expert}.{part}{_PIECE}{whole}"] = "" if total is None else f"{total:016x}", math.nan
    return sums


def _total(tensor: Tensor, expert: int, part: str, rank: int, ranks: int, experts: int) -> int | None:
    """An expert's part of a parameter's sum; None if its tiles have numbers of others too."""
    dim, pieces = (1, 1) if part == "down" else (0, 2)
    if tensor.shape[dim] % ranks:
        return None
    words = tensor.chunk(ranks, dim)[rank].contiguous().view(torch.uint8).flatten()
    if len(words) % (4 * TILE):
        return None
    words = words.view(torch.int32)
    first = (expert * pieces + (part == "up")) * len(words)
    return tile_total(words, first, experts * pieces * len(words))


def is_piece(name: str) -> bool:
    """Whether a name of `expert_sums`."""
    return _PIECE in name


def whole_sums(expected: Mapping[str, tuple[str, float]], experts: int) -> Sums:
    """The checksums of SGLang's parameters, from the parts of all senders; "" for one that is not known."""
    parts: dict[str, list[str]] = {}
    for name, (total, _) in expected.items():
        if is_piece(name):
            parts.setdefault(name.partition(_PIECE)[2], []).append(total)
    return {name: (_whole(name, totals, experts), math.nan) for name, totals in parts.items()}


def _whole(name: str, totals: list[str], experts: int) -> str:
    pieces = next(number for own, number in _PIECES.items() if own in name)
    if "" in totals or len(totals) != experts * pieces:
        return ""
    return final_hash(sum(int(total, 16) for total in totals) % 2**64)


class ExpertSums:
    """Compares what SGLang's servers say of their experts, as long as it is known how these are laid out.

    Some kernels reorder experts or put the up projection first, and no endpoint says which one computes. So if no
    layer's `w13_weight`, or `w2_weight`, is as expected, and none has ever been, it has another layout and is not
    compared.
    """

    def __init__(self, experts: int) -> None:
        """`experts`: of a layer."""
        self._experts = experts
        self._is_known: dict[str, bool] = {}  # by kind of parameter: whether SGLang's layout is ours

    def differing(self, expected: Mapping[str, tuple[str, float]], held: Mapping[str, str]) -> list[tuple[str, float]]:
        """As `answer_checks.differing`. `held`: checksums by `of_rank`'s names."""
        whole = whole_sums(expected, self._experts)
        wrong: list[tuple[str, float]] = []
        for own in _PIECES:
            wrong += self._of_kind(own, {name: one for name, one in whole.items() if own in name and one[0]}, held)
        return wrong

    def _of_kind(self, own: str, wanted: Sums, held: Mapping[str, str]) -> list[tuple[str, float]]:
        if not wanted or self._is_known.get(own) is False:
            return []
        wrong = differing(wanted, {name: (held[name], math.nan) for name in wanted if name in held})
        if own not in self._is_known:
            self._is_known[own] = len(wrong) < len(wanted)
            if not self._is_known[own]:
                log.info("SGLang's kernel has another layout of %s than expected: it is not compared", own)
                return []
        return wrong
