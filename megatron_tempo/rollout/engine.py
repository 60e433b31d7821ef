"""The interface of rollout engines.

Implementations: `embedded.py`; `servers.py`, for any number of servers; `imported.py`, for the user's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_tempo.config.schema import RolloutConfig
from megatron_tempo.types import Completion, EngineHealth, TokenCount, Weights


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be answered `samples` times.

    With the embedded engine, equal seeds give equal completions, whatever other requests there are. A server draws its
    own random numbers.

    >>> Request(token_ids=(5, 7, 8), samples=8, seed=3)
    """

    token_ids: tuple[int, ...]
    samples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings: softmax(logits / temperature), until an end token or `max_tokens` response tokens."""

    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """The argument of a user's engine (docs/extending.md)."""

    model: Path  # Hugging Face folder: configuration, tokenizer, end tokens. `load_weights` provides the weights
    device: torch.device
    dtype: torch.dtype  # of the weights that `load_weights` gets
    folder: Path  # below `run.dir`, for what the engine writes; it need not exist
    config: RolloutConfig  # `batch_rows` and so on
    log: logging.Logger  # its warnings are shown by `status` and the report too


class Engine(Protocol):
    """Generates with the weights that it loaded last. All methods are collective, unless they say otherwise.

    `counted`: what went through its model, as far as it knows. `replicas`: how many copies of the model answer.
    """

    counted: TokenCount
    replicas: int

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Begin to answer requests, the same on every rank.

        Returns an iterator of (index of the request, its completions) as they end, each on one rank. Every rank must
        read it to its end. The iterator raises EngineError if no engine is left to answer.
        """
        ...

    def load_weights(self, weights: Weights, version: int) -> None:
        """Load the weights of `version`. It may be called while requests are being answered.

        Raises ValueError or EngineError if a tensor is missing or does not fit.
        """
        ...

    def differences(self, weights: Weights) -> list[tuple[str, float]] | None:
        """Tensors that differ between engine and `weights`, the worst first, with the relative difference.

        The difference is NaN if only the checksums are known. Returns None if the engine cannot compare.
        """
        ...

    def health(self) -> list[EngineHealth]:
        """The state of the models that answer, as this rank knows it. Not collective; callable from any thread."""
        ...

    def close(self) -> None: ...
