"""What stand-ins for rollout engines have in common."""

from __future__ import annotations

from megatron_tempo.rollout.engine import EngineWork
from megatron_tempo.types import EngineHealth, TokenCount, Weights


class AnsweringEngine:
    """An `Engine` without `start`, which a stand-in adds: it has no weights."""

    counted, replicas, work = TokenCount(), 1, EngineWork()
    asleep = False

    def sleep(self) -> None: ...

    def load_weights(self, weights: Weights, version: int) -> None:
        raise NotImplementedError

    def differences(self, weights: Weights) -> list[tuple[str, float]]:
        raise NotImplementedError

    def health(self) -> list[EngineHealth]:
        raise NotImplementedError

    def close(self) -> None: ...
