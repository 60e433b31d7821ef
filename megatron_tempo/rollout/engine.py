"""What every engine does.

One is in `embedded.py`, one, over any number of servers, in `servers.py`; `imported.py` has the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_tempo.config.schema import RolloutConfig
from megatron_tempo.types import Completion, EngineHealth, TokenCount, Weights


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


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What an engine of the user's own is made with (docs/extending.md)."""

    model: Path  # Hugging Face folder: configuration, tokenizer, end tokens. The weights come by `load_weights`
    device: torch.device
    dtype: torch.dtype  # of the weights that `load_weights` gets
    folder: Path  # below `run.dir`, for what the engine writes; it need not exist
    config: RolloutConfig  # `batch_rows` and so on
    log: Callable[[str], None]  # one line of the run's log


class Engine(Protocol):
    """Generates with the weights it was last given. All methods are collective.

    `counted` is what went through its model, as far as it can tell. `replicas` is how many models answer.
    """

    counted: TokenCount
    replicas: int

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Begin to answer requests, the same on every rank.

        What comes back gives (number of the request, its completions) as they end, each on one rank, and is to be read
        to its end on all. Raises EngineError from there if no engine is left to answer.
        """
        ...

    def load_weights(self, weights: Weights, version: int) -> None:
        """Take the weights of `version`, also while requests are being answered.

        Raises ValueError or EngineError if any is missing or misfit.
        """
        ...

    def differences(self, weights: Weights) -> list[tuple[str, float]] | None:
        """Tensors that the engine holds otherwise than they are, the worst first, with the relative difference.

        The difference is NaN where only a checksum tells. None where the engine cannot tell.
        """
        ...

    def health(self) -> list[EngineHealth]:
        """How the models that answer are, as this rank knows it. Not collective, and from any thread."""
        ...

    def close(self) -> None: ...
