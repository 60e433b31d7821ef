"""Block-wise FP8, in the format of Hugging Face's FP8 checkpoints (Qwen3-8B-FP8, DeepSeek-V3).

A matrix becomes float8_e4m3fn with a float32 scale for each block of 128 x 128: weight = fp8 * scale. The rounding
error is at most |weight| / 16, or scale / 1024 if |weight| < scale / 64, where e4m3 is subnormal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tempo.types import Bucket, PartName, Share, Weights, whole_name

BLOCK = 128
_FP8 = torch.float8_e4m3fn


class Quantised:
    """A weight stream in FP8, for an FP8 engine. Quantises whole tensors, after the shards are gathered, or parts of
    them that have a multiple of `BLOCK` rows."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.sends, self.copies, self.copy = weights.sends, weights.copies, weights.copy

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        return quantised(self._weights.everywhere(parts=parts))

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        """`shared` is not supported: the configuration rules require `rollout.servers.transport=group`."""
        assert not shared
        return quantised(self._weights.from_stages(parts=parts, share=share))


def quantised(buckets: Iterable[Bucket]) -> Iterator[Bucket]:
    """The buckets with the matrices of the decoder layers' projections in FP8, each followed by its scales.

    NAME.weight [out, in] is followed by NAME.weight_scale_inv [ceil(out / 128), ceil(in / 128)]. Embeddings, norms and
    heads stay as they are. A part of a matrix is followed by its scales, which are a part of the matrix's scales.
    """
    return map(_quantised, buckets)


def _quantised(bucket: Bucket) -> Bucket:
    quantised: Bucket = []
    for name, tensor in bucket:
        if whole_name(name).endswith("_proj.weight"):
            weight, scales = _blockwise(tensor)
            quantised += [(name, weight), (_scale_name(name), scales)]
        else:
            quantised.append((name, tensor))
    return quantised


def _scale_name(name: str) -> str:
    if not isinstance(name, PartName):
        return f"{name}_scale_inv"
    assert name.start % BLOCK == 0
    start, stop, rows = (-(-number // BLOCK) for number in (name.start, name.stop, name.rows))
    return PartName(f"{name.whole}_scale_inv", start, stop, rows)


@torch.no_grad()
def _blockwise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> float8_e4m3fn [out, in], float32 [ceil(out / 128), ceil(in / 128)]."""
    rows, columns = matrix.shape
    padded = functional.pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [R, 128, C, 128]
    largest = blocks.abs().amax(dim=(1, 3))
    # A subnormal scale is rounded coarsely. Quotients would exceed e4m3's largest number and become NaN.
    scales = (largest / torch.finfo(_FP8).max).clamp(min=torch.finfo(torch.float32).tiny)
    scales = torch.where(largest == 0, 1.0, scales)
    weight = (blocks / scales[:, None, :, None]).view_as(padded)[:rows, :columns].to(_FP8).contiguous()
    return weight, scales
