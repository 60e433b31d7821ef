"""The gate of log-probabilities: the engine's have to be the actor's, at starts, after syncs and after restarts.

It compares tokens that were generated with the weights that the actor has now: those of a few prompts that are asked
for this, and, at no cost, those of each iteration's own rollouts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_tempo.config.choices import EnginePrecision, OnDrift
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import DriftError, EngineError, RejectedRolloutsError
from megatron_tempo.models.actor import Actor, mean_gap
from megatron_tempo.rollout.build import engine_precision
from megatron_tempo.rollout.engine import AnswersByServer
from megatron_tempo.training.rollout_requests import RolloutRequests
from megatron_tempo.types import Batch, Weights

log = logging.getLogger(__name__)

# Nats, by the number of sides that compute in FP8. docs/gpu.md derives them.
TOLERANCES = (0.05, 0.1, 0.15)
# Tokens for each response: of a start or restart, and after a sync.
START_TOKENS, SYNC_TOKENS = 256, 64
# Tokens of an iteration's rollouts that are enough for a mean to be compared with the tolerance.
OWN_TOKENS = 256
# Metrics: the gaps of a check with and without the replay of recorded experts.
REPLAYED, OWN_ROUTING = "engine/parity_gap_replayed", "engine/parity_gap_own_routing"


def exceeds(gap: float, tolerance: float) -> bool:
    """Whether the engine has drifted. A gap that is not a number has."""
    return not gap <= tolerance


@dataclass(slots=True)
class ParityGate:
    """Raises DriftError, or sends the weights again, when the engine's log-probabilities are not the actor's.

    The run would train on rollouts of another policy than the actor. All methods are collective.
    """

    requests: RolloutRequests
    actor: Actor
    weights: Weights
    sync: Callable[[], None]  # sends all weights to the engine
    resyncs: int = 0  # not yet counted by `take_counts`
    gaps: dict[str, float] = field(default_factory=dict)  # of the last check, not yet taken
    _syncs: int = field(default=0, init=False)
    _is_forced: bool = field(default=False, init=False)  # the next sync is one against a drift
    _oldest: int = field(default=-1, init=False)  # the oldest version that rollouts to train on may have

    @property
    def config(self) -> Config:
        return self.requests.config

    def at_start(self, step: int) -> None:
        """Ask every server, after the first sync of a start. From now on, restarted servers are asked too.

        Not those on the trainer's GPUs: while they generate, the actor has no memory.
        """
        self._require(step, START_TOKENS, restarted=False)
        engine = self.requests.engine
        if isinstance(engine, AnswersByServer) and not self.config.rollout.is_colocated:
            engine.gate = self._of_restarted

    def after_sync(self, step: int) -> None:
        """Ask every server, if the schedule requires it after this sync, or if the sync was one against a drift.

        An engine that sleeps is not woken for it: its next rollouts show whether it has drifted; or see `before_sleep`.
        """
        if not self.requests.engine.asleep:
            self._ask_if_due(step, trusted_from=step)

    def before_sleep(self, step: int) -> None:
        """Ask every colocated server before it sleeps, if the schedule requires it, and it has generated ahead.

        The iteration's rollouts may then have no token of the weights that the actor has now, and `accepts` would have
        nothing to compare. What was generated in this turn is not trusted if a server has drifted.
        """
        config = self.config.rollout
        if config.is_colocated and config.max_staleness and not self.requests.engine.asleep:
            self._ask_if_due(step, trusted_from=step + 1)

    def _ask_if_due(self, step: int, *, trusted_from: int) -> None:
        self._syncs += 1
        every = self.config.rollout.parity_every
        if self._is_forced or (every and self._syncs % every == 0):
            is_last, self._is_forced = self._is_forced, False
            self._require(step, SYNC_TOKENS, restarted=False, resyncs=not is_last, trusted_from=trusted_from)

    def accepts(self, batch: Batch, logprobs: Tensor, step: int) -> bool:
        """Whether the actor may be trained on these rollouts. `logprobs` [T]: its own, with the weights of `step`.

        With `rollout.on_drift=resync`, rollouts of an engine that has drifted are not trained on, nor are those that
        were generated with older weights than the ones that were sent again. With `stop`: RejectedRolloutsError.
        """
        config = self.config.rollout
        if config.replay is not None:
            return True
        if len(batch.versions) and int(batch.versions[:, 1].min()) < self._oldest:
            log.warning("the actor is not trained on rollouts from before the weights were sent again")
            return False
        table = self.actor.gaps_by_row(batch, logprobs, of_version(batch, step))
        tokens, gap = int(table[:, 2].sum()), mean_gap(table)
        if tokens < OWN_TOKENS:
            return True
        if not exceeds(gap, self._tolerance()[0]):
            self._is_forced = False
            return True
        message = self._message(gap, tokens, f"of iteration {step + 1}")
        if config.on_drift is OnDrift.stop or self._is_forced:  # the last sync was one against a drift already
            raise RejectedRolloutsError(message)
        log.warning("%s; the actor is not trained on these rollouts, and gets other ones after the next sync", message)
        self._is_forced, self._oldest = True, step + 1
        self.resyncs += 1
        return False

    def take_resyncs(self) -> int:
        """How often weights were sent again against a drift, since the last call, as the gate or the engine found."""
        engine, count = self.requests.engine, self.resyncs
        self.resyncs = 0
        if isinstance(engine, AnswersByServer):
            count, engine.resynced = count + engine.resynced, 0
        return count

    def take_gaps(self) -> dict[str, float]:
        """With recorded experts: the gaps of the last check since the last call, with and without replaying them."""
        gaps, self.gaps = self.gaps, {}
        return gaps

    def _of_restarted(self) -> None:
        """The gate of the servers that have just got the weights. The engine's version is the last one sent."""
        self._require(-1, START_TOKENS, restarted=True)

    def _require(
        self, step: int, tokens: int, *, restarted: bool, resyncs: bool = True, trusted_from: int | None = None
    ) -> None:
        """Ask the servers. If one has drifted, stop, or send the weights again and ask once more.

        `trusted_from`: the oldest version whose tokens are then still trained on; None: `step`.
        """
        drift = self._drift(step, tokens, restarted=restarted)
        if drift is not None and resyncs and self.config.rollout.on_drift is OnDrift.resync:
            log.warning("%s; all weights are sent again", drift)
            self.resyncs += 1
            self._oldest = max(self._oldest, step if trusted_from is None else trusted_from)
            self.sync()
            drift = self._drift(step, tokens, restarted=restarted)
        if drift is not None:
            raise DriftError(drift)

    def _drift(self, step: int, tokens: int, *, restarted: bool) -> str | None:
        """What is wrong with the server that is furthest from the actor; None if all are within the tolerance."""
        sample = self.requests.sample_for_parity(step, tokens, restarted=restarted)
        if sample is None:
            if not restarted:
                raise EngineError("no server answered the requests of the parity check")
            return None  # they are restarted, and are asked when they are back
        batch, servers = sample
        self.requests.engine.sleep()  # one on the trainer's GPUs: the actor needs them
        table = self._gaps_by_row(batch)
        worst, counted, where = 0.0, 0, ""
        for server in servers.unique().tolist():
            rows = table[servers == server]
            gap = mean_gap(rows)
            if not gap <= worst or not counted:
                worst, counted = gap, int(rows[:, 2].sum())
                where = f"of server {server}" if server >= 0 else ""
            if math.isnan(worst):
                break
        log.debug("parity: %.2g nats over %d tokens", worst, counted)
        return self._message(worst, counted, where) if exceeds(worst, self._tolerance()[0]) else None

    def _gaps_by_row(self, batch: Batch) -> Tensor:
        """The gaps as the run is trained, `Actor.gaps_by_row`. With recorded experts they are measured both ways."""
        table = self.actor.gaps_by_row(batch, self.actor.logprobs(batch))
        if batch.experts is not None and self.actor.model.replay is not None:
            replays = self.actor.model.replay.replays
            self.actor.routing_agreement()  # of these few tokens: not an iteration's
            other = self.actor.gaps_by_row(batch, self.actor.logprobs(batch, replays=not replays))
            self.actor.routing_agreement()
            both = (table, other) if replays else (other, table)
            self.gaps = dict(zip((REPLAYED, OWN_ROUTING), map(mean_gap, both), strict=True))
        return table

    def _message(self, gap: float, tokens: int, where: str) -> str:
        tolerance, origin = self._tolerance()
        return (
            f"the engine's log-probabilities are {gap:.2g} nats from the actor's, a mean over {tokens} tokens"
            f"{where and ' '}{where}, but rollout.parity_tolerance={tolerance:g}{origin}: "
            f"{self._routing() or _cause(self.requests.engine.differences(self.weights))}"
        )

    def _routing(self) -> str | None:
        """That the gap is due to other experts, if the last check has shown it."""
        replayed, replay = self.gaps.get(REPLAYED), self.actor.model.replay
        if replayed is None or replay is None or replay.replays or exceeds(replayed, self._tolerance()[0]):
            return None
        return (
            f"its routers choose other experts than the actor's, and with the same ones the gap is {replayed:.2g}; set "
            "model.router_replay=on"
        )

    def _tolerance(self) -> tuple[float, str]:
        """The tolerance in nats. If it is the default, also a text: of which precisions."""
        config = self.config
        if config.rollout.parity_tolerance is not None:
            return config.rollout.parity_tolerance, ""
        trainer, engine = config.run.precision, engine_precision(config)
        sides = (trainer in RECIPES) + (engine is EnginePrecision.fp8)
        return TOLERANCES[sides], f" (default for {trainer.name} in the trainer, {engine.name} in the engine)"


def of_version(batch: Batch, version: int) -> Tensor:
    """Which response tokens of the held rows were generated with the weights of `version`: bool [T]."""
    held = batch.places[batch.versions[:, 0]] >= 0
    runs = batch.versions[held]
    return torch.repeat_interleave(runs[:, 1] == version, runs[:, 2])


def _cause(differences: list[tuple[str, float]] | None) -> str:
    """The likely cause of a gap, from the tensors that differ in the engine."""
    if differences is None:
        return "its tensors cannot be compared here, so its weights, temperature or reading of config.json may be wrong"
    if not differences:
        return "every tensor is as it should be, so its temperature or its reading of config.json is wrong"
    name, difference = differences[0]
    size = "" if not math.isfinite(difference) else f", off by {difference:.1%} of its size"
    return f"{len(differences)} of its tensors are not the actor's, the worst {name}{size}"
