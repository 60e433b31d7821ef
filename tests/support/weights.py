"""Weights read from a Hugging Face folder, and weights that replace a Megatron model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file

from megatron_tempo.types import Bucket, Share


def tensors(folder: Path) -> Iterator[Bucket]:
    """Every tensor of a folder, one file per bucket."""
    for path in sorted(folder.glob("*.safetensors")):
        yield list(load_file(path).items())


class Given:
    """`Weights` of these buckets, on a single rank."""

    sends, copies, copy = True, 1, 0

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        yield from self.buckets

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        assert not shared
        yield from self.buckets
