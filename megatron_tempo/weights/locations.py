"""Where each of a model's tensors is in a distributed checkpoint of Megatron's (`distributed.py`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_tempo.weights.param_mapping import ParamMapping

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(?:mlp\.experts\.(\d+)\.)?")


@dataclass(frozen=True, slots=True)
class CheckpointLocation:
    """Where a mapping's tensor is in a distributed checkpoint.

    >>> CheckpointLocation("decoder.layers.mlp.linear_fc2.weight", at=(18,), of=(36,), shape=(4096, 12288))
    """

    key: str
    at: tuple[int, ...]  # the number of the layer, and of the expert, where there is one
    of: tuple[int, ...]  # how many there are
    shape: tuple[int, ...]  # of the mapping's whole tensor

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the key's tensor."""
        return (*self.of, *self.shape)

    def chunk(self, rows: tuple[int, int] | None = None) -> ChunkStorageMetadata:
        """The mapping's part of the key's tensor, or only these rows of it: of one that is not in a layer."""
        start, end = rows or (0, self.shape[0])
        offsets = (*self.at, start, *(0 for _ in self.shape[1:]))
        sizes = (*(1 for _ in self.at), end - start, *self.shape[1:])
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def locations(mappings: list[ParamMapping]) -> dict[ParamMapping, CheckpointLocation]:
    """The location of each mapping. The table is one without pipeline and expert parallelism."""
    places = {mapping: _place(mapping.megatron) for mapping in mappings}
    ends: dict[str, list[tuple[int, ...]]] = {}
    for key, at in places.values():
        ends.setdefault(key, []).append(at)
    counts = {key: tuple(max(numbers) + 1 for numbers in zip(*of, strict=True)) for key, of in ends.items()}
    located = {}
    for mapping, (key, at) in places.items():
        whole = mapping.sharding.shard([torch.empty(shape, device="meta") for shape in mapping.shapes], 0, 1)
        located[mapping] = CheckpointLocation(key, at, counts[key], tuple(whole.shape))
    return located


def _place(name: str) -> tuple[str, tuple[int, ...]]:
    """A parameter's key, and where in the key's tensor it is."""
    match = _LAYER.match(name)
    if match is None:
        return name, ()
    numbers = tuple(int(number) for number in match.groups() if number is not None)
    within = "mlp.experts.experts." if len(numbers) > 1 else ""
    return f"decoder.layers.{within}{name[match.end() :]}", numbers
