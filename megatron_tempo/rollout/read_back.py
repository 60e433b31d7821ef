"""Which tensors a read-back compares. `vllm_read_back.py` has a copy of the rule: it cannot import this package."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

# After an update one of this many selections of the tensors is read back, after the next one another.
SELECTIONS = 16


@dataclass(frozen=True, slots=True)
class Selection:
    """Tensors whose name has the remainder `index` when its CRC-32 is divided by `of`. Together they are all.

    >>> Selection(index=0, of=16)
    """

    index: int
    of: int

    def has(self, name: str) -> bool:
        """Whether the tensor of this name is selected."""
        return zlib.crc32(name.encode()) % self.of == self.index


EVERYTHING = Selection(0, 1)
