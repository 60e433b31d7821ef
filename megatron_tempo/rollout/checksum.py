"""Checksums that show that a tensor arrived as it was sent (`tensor_sums.py`), for buckets and for whole tensors."""

from __future__ import annotations

from torch import Tensor

from megatron_tempo.rollout.tensor_sums import tensor_sums
from megatron_tempo.types import Bucket, PartName


def checksum(tensor: Tensor) -> str:
    """The checksum of a whole tensor."""
    return tensor_sums([tensor], [0])[0][0]


def checksums_of(bucket: Bucket) -> dict[str, tuple[str, float]]:
    """(checksum, root mean square) of each tensor. That of a part counts from the part's place (`whole_checksums`)."""
    before = [name.start * tensor[0].nbytes if isinstance(name, PartName) else 0 for name, tensor in bucket]
    for (name, _), nbytes in zip(bucket, before, strict=True):
        assert nbytes % 4 == 0, f"{name} does not begin at a multiple of four bytes"
    sums = tensor_sums([tensor for _, tensor in bucket], [nbytes // 4 for nbytes in before])
    return {name: one for (name, _), one in zip(bucket, sums, strict=True)}


def whole_checksums(found: dict[str, tuple[str, float]]) -> dict[str, tuple[str, float]]:
    """The same with those of a tensor's parts joined under the tensor's name."""
    joined: dict[str, tuple[str, float]] = {}
    for name, (total, size) in found.items():
        if not isinstance(name, PartName):
            joined[name] = total, size
            continue
        before, square = joined.get(name.whole, ("0", 0.0))
        share = (name.stop - name.start) / name.rows
        joined[name.whole] = f"{(int(before, 16) + int(total, 16)) % 2**64:016x}", square + share * size**2
    parts = {name.whole for name in found if isinstance(name, PartName)}
    return {name: (total, size**0.5 if name in parts else size) for name, (total, size) in joined.items()}
