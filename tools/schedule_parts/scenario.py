"""Schedules of a configuration, with the planner's costs and made-up lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.schema import Config
from megatron_tempo.plan import engine
from megatron_tempo.plan.decoding import decode_costs
from megatron_tempo.plan.parameters import Role
from megatron_tempo.plan.split import split_of
from megatron_tempo.plan.times import last_stage, moving_seconds, rows_of, training_seconds
from megatron_tempo.rehearsal.lengths import Lengths
from schedule_parts.schedule import Batch, Engine, Iteration, Schedule, Simulation, Spent
from schedule_parts.server import Group

PROMPTS = Lengths(200.0)  # tokens of a prompt, as in tests/unit/test_row_work.py
HEADROOM = 1000.0  # tokens by which each running row can grow when another one is admitted


@dataclass(frozen=True, slots=True)
class Drawn:
    """Lengths of responses: the same for a prompt whatever the schedule is."""

    responses: Lengths
    samples: int
    longest_prompt: int
    longest: int
    seed: int = 0

    def __call__(self, number: int, half: Prompts, times: int) -> Group:
        seed = 2 * (((self.seed * 100 + times) * 2 + (half is Prompts.labelled)) * 1_000_000 + number)
        prompt = PROMPTS.draw(1, self.longest_prompt, seed)[0]
        lengths = self.responses.draw(self.samples, self.longest, seed + 1)
        return Group.of(number, half is Prompts.labelled, prompt, lengths)


def schedule_of(
    config: Config, shape: ModelShape, lengths: Lengths, *, overhead: float = 0.0, seed: int = 0
) -> Schedule:
    """The last stage of a configuration with servers, which has passed the planner's rules.

    overhead: seconds of each decoding step beyond the planner's roofline: launches, scheduling, sampling, messages.
    """
    split, stage, rollout = split_of(config), last_stage(config), config.rollout
    turns, sync = moving_seconds(config, shape)
    one, costs = engine.server(config, shape), decode_costs(config, shape)
    servers = Engine(
        costs=replace(costs, weights=costs.weights + overhead, row=costs.row),
        servers=split.servers,
        tensor=rollout.servers.tensor,
        capacity=one.cache / engine.token_bytes(config, shape, rollout.servers.tensor),
        concurrency=rollout.servers.concurrency,
        headroom=HEADROOM,
    )
    return Schedule(
        servers,
        trainers=split.trainers,
        groups={half: stage.count({half}) for half in sorted(stage.prompts(), key=lambda half: half.name)},
        draw=Drawn(lengths, stage.samples, rollout.max_prompt_tokens, rollout.max_response_tokens, seed),
        train=lambda batch: _training(config, shape, batch),
        turns=turns,
        sync=sync,
        colocated=rollout.is_colocated,
    )


def _training(config: Config, shape: ModelShape, batch: Batch) -> float:
    """Seconds of the trainer's phases on the rows that each model is trained on."""
    stage = last_stage(config)
    rows = {
        half: [(group.prompt, row.length) for group in groups for row in group.rows[: stage.responses_per_prompt]]
        for half, groups in batch.items()
    }
    of = {kinds: [row for half in kinds for row in rows.get(half, [])] for kinds in map(frozenset, _kinds(config))}
    actor, critic = (of[frozenset(kinds)] for kinds in _kinds(config))
    phases = training_seconds(
        config,
        shape,
        rows_of(shape, actor, Role.actor),
        rows_of(shape, critic, Role.critic),
        rows_of(shape, actor, Role.critic),
    )
    return sum(phases.values())


def _kinds(config: Config) -> tuple[set[Prompts], set[Prompts]]:
    stage = last_stage(config)
    return stage.actor_prompts(), stage.critic_prompts()


@dataclass(frozen=True, slots=True)
class Result:
    """The mean of iterations of a run that has got going."""

    seconds: float
    generating: float
    engine: Spent  # GPU seconds
    trainer: Spent
    staleness: dict[int, float]  # share of the tokens trained on, by updates between making and use
    tokens: float  # of the responses that an iteration is trained on
    thrown_away: float  # share of the tokens that were made
    again: float  # tokens computed again by prefill, by those trained on
    rows: float  # that a server runs at a time, while it computes

    @property
    def idle(self) -> float:
        """The share of all GPU time in which a GPU has nothing to do."""
        return (self.engine.idle + self.trainer.idle) / (self.engine.total + self.trainer.total)


def simulate(schedule: Schedule, iterations: int, warm_up: int) -> Result:
    """`iterations` of a run, after `warm_up` others; as many again follow, so that the run's end does not show."""
    run = Simulation(schedule, iterations + 2 * warm_up).run()
    records = [next(run) for _ in range(iterations + warm_up)][warm_up:]
    return mean(records, schedule.engine.tensor)


def mean(records: Sequence[Iteration], tensor: int) -> Result:
    """`tensor`: GPUs of a server."""
    count = len(records)
    tokens = sum(one.tokens for one in records)
    stale: dict[int, float] = {}
    for one in records:
        for updates, made in one.staleness.items():
            stale[updates] = stale.get(updates, 0.0) + made / tokens
    engine, trainer = (
        Spent(*(sum(getattr(getattr(one, side), name) for one in records) / count for name in Spent.__slots__))
        for side in ("engine", "trainer")
    )
    thrown = sum(one.thrown_away for one in records)
    return Result(
        sum(one.seconds for one in records) / count,
        sum(one.generating for one in records) / count,
        engine,
        trainer,
        dict(sorted(stale.items())),
        tokens / count,
        thrown / (tokens + thrown),
        sum(one.again for one in records) / tokens,
        sum(one.row_seconds for one in records) * tensor / (count * engine.busy),
    )


def ahead(schedule: Schedule, max_staleness: int, *, runs_on: bool = True) -> Schedule:
    return replace(schedule, max_staleness=max_staleness, runs_on=runs_on)
