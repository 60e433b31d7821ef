"""The length penalty: rewards fall as a response comes near the limit at which it is cut off."""

from __future__ import annotations

from torch import Tensor


def length_penalty(lengths: Tensor, limit: int, interval: int) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, Eq. 13), to be added to the rewards.

        0                                         |y| <= limit - interval
        ((limit - interval) - |y|) / interval     limit - interval < |y| <= limit

    So it is -1 at the limit, at which every response ends. `lengths`: int64 [n], in tokens. Returns float32 [n].
    """
    over = (lengths - (limit - interval)).clamp(min=0, max=interval)
    return -over.float() / interval
