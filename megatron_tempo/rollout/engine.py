"""What every engine does. One is in `embedded.py`, one in `sglang.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_tempo.types import Completion, TokenCount


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be answered `samples` times.

    With the embedded engine equal seeds give equal completions, whatever else is asked with them. A server draws its
    own numbers.

    >>> Request(token_ids=(5, 7, 8), samples=8, seed=3)
    """

    token_ids: tuple[int, ...]
    samples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: softmax(logits / temperature), until an end token or `max_tokens` response tokens."""

    temperature: float
    max_tokens: int


class Engine(Protocol):
    """Generates with the weights it was last given. `counted` is what went through its model, as far as it can tell."""

    counted: TokenCount

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """The completions of each request, in order."""
        ...

    def load_weights(self, buckets: Iterable[Sequence[tuple[str, Tensor]]], version: int) -> None:
        """Take the whole model's weights, as Hugging Face names them.

        Raises ValueError or EngineError if any is missing or misfit.
        """
        ...

    def close(self) -> None: ...


def seed_of(*parts: object) -> int:
    """A seed, 0 <= seed < 2**63, that depends on the parts' text alone.

    All randomness of a run is drawn from such seeds, named by what it is for, so that no generator's state needs to be
    carried from one iteration, process or layout to another.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
