"""A parity gate whose engine and actor are stand-ins: how far apart they are is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from megatron_tempo.config.schema import Config
from megatron_tempo.models.actor import Actor
from megatron_tempo.training.parity import ParityGate
from megatron_tempo.types import Batch, UnlabelledPrompt
from tests.support.completions import batch_of, completion

TOKENS = 8  # of each row of a sample


class StandInActor:
    """All its log-probabilities are 0: a gap is the engine's log-probability."""

    gaps_by_row = Actor.gaps_by_row

    def __init__(self) -> None:
        self.model = SimpleNamespace(replay=None)
        self.own = 0.0  # its log-probabilities where its own routers choose, if it replays others' choices

    def logprobs(self, batch: Batch, *, replays: bool | None = None) -> Tensor:
        replays = self.model.replay is not None and self.model.replay.replays if replays is None else replays
        return torch.full((len(batch.response_tokens),), 0.0 if replays else self.own)

    def routing_agreement(self) -> None:
        return None

    def gather(self, batch: Batch, of_held: Tensor) -> Tensor:
        return of_held


class StandInEngine:
    """An engine of servers."""

    resynced, asleep = 0, False

    def __init__(self) -> None:
        self.gate: Any = None

    def probe(self) -> None: ...

    def sleep(self) -> None: ...

    def differences(self, weights: object) -> list[tuple[str, float]]:
        return []


class GateOf:
    """`gaps`: of each server, one after another, the gap at each time it is asked; the last one stays."""

    def __init__(self, config: Config, gaps: Mapping[int, Sequence[float]]) -> None:
        self.config, self.gaps = config, {server: list(of) for server, of in gaps.items()}
        self.engine, self.syncs = StandInEngine(), 0
        self.asked: list[tuple[int, bool]] = []  # tokens, whether only of restarted servers
        self.actor, self.has_experts = StandInActor(), False
        self.gate = ParityGate(cast(Any, self), cast(Any, self.actor), cast(Any, None), self.sync)

    def sync(self) -> None:
        self.syncs += 1

    def sample_for_parity(self, step: int, tokens: int, *, restarted: bool) -> tuple[Batch, Tensor] | None:
        self.asked.append((tokens, restarted))
        now = {server: of.pop(0) if len(of) > 1 else of[0] for server, of in self.gaps.items()}
        if not now:
            return None
        batch = rows_of([[(0, TOKENS)]] * len(now), list(now.values()))
        if self.has_experts:
            batch = replace(batch, experts=torch.zeros(int(batch.lengths.sum()), 1, 1, dtype=torch.uint8))
        return batch, torch.tensor(list(now))


def rows_of(versions: Sequence[Sequence[tuple[int, int]]], gaps: Sequence[float]) -> Batch:
    """A row for each entry: its runs of versions, and how far the engine is from the actor at all its tokens."""
    lengths = [sum(count for _, count in runs) for runs in versions]
    rows = [
        [completion([1] * length, [-gap] * length, versions=tuple(runs))]
        for length, runs, gap in zip(lengths, versions, gaps, strict=True)
    ]
    return batch_of([UnlabelledPrompt(id=str(i), token_ids=(1,), text="") for i in range(len(rows))], rows, None)
