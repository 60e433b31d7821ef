"""Memory of the trainer's GPUs by phase, in parts, and of a GPU that only serves.

Both models and their optimizers stay on the trainer's GPUs all the time, as does the reference model once it is needed,
the embedded engine's weights, and a server that shares them; with `parallel.offload` the one model that a phase works
with. Of the GPUs the one that needs most is told, in each phase: they differ by the pipeline stages that they have in
the two models. Building the models needs less than using them, so the start is no phase.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from megatron_tempo.config.choices import EngineKind, EnginePrecision, Logits, Precision
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.plan import activations, engine, head
from megatron_tempo.plan.layout import (
    PlannedLayout,
    PlannedMachine,
    PlannedMicroBatch,
    layout_of,
    machine_of,
    micro_batch_of,
)
from megatron_tempo.plan.parameters import Role, fp8_copies, layer_parameters, parameters, resident
from megatron_tempo.plan.shapes import PlannedShape
from megatron_tempo.plan.split import Split, split_of

GB = 1e9


class MemoryPhase(Enum):
    """In the order of an iteration, as metrics.jsonl names them; `serve` is a GPU that only serves."""

    serve = "serve"
    generate = "generate"
    values = "values"
    critic = "critic"
    logprobs = "logprobs"
    actor = "actor"
    sync = "sync"
    checkpoint = "checkpoint"


class Part(Enum):
    """What the memory is used for. A search looks parts up millions of times: they hash by identity, which Enum's own
    hash, a Python function, does not."""

    __hash__ = object.__hash__

    weights = "weights"
    fp8 = "FP8 weights"
    gradients = "gradients"
    optimizer = "optimizer"
    reference = "reference"
    engine = "engine weights"
    cache = "KV cache"
    batch = "batch"
    activations = "activations"
    head = "head"
    buffers = "buffers"


_PARTS = tuple(Part)
Parts = dict[Part, float]


@dataclass(frozen=True, slots=True)
class Over:
    """The first thing that does not fit."""

    phase: MemoryPhase
    part: Part
    bytes: float

    def __str__(self) -> str:
        return f"{self.phase.value}: the {self.part.value} {self.bytes / GB:.1f} GB over"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by phase and part. `room`: rows of full length that a server, or a process's engine, holds at a time."""

    phases: dict[MemoryPhase, Parts]
    room: float
    limit: float  # of a GPU, less the cluster's reserve
    starved: Over | None = None  # a server that has no room for a single row in the share that it takes of a GPU

    def total(self, phase: MemoryPhase) -> float:
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> MemoryPhase:
        """The phase that needs most of a trainer's GPU."""
        return max((phase for phase in self.phases if phase is not MemoryPhase.serve), key=self.total)

    def over(self) -> Over | None:
        """The first phase that does not fit, and the part with which it goes over the limit."""
        if self.starved is not None:
            return self.starved
        for phase, parts in self.phases.items():
            total = 0.0
            for part, size in parts.items():
                total += size
                if total > self.limit:
                    return Over(phase, part, self.total(phase) - self.limit)
        return None


def memory(config: Config, shape: PlannedShape) -> Memory:
    """The configuration has passed `split.problems`."""
    assert config.cluster is not None
    split = split_of(config)
    stages = [stage for stage in config.stages().values() if stage.iterations > 0]
    kept, answering, room = _engine(config, shape, stages, split)
    phases: dict[MemoryPhase, Parts] = {}
    if split.serving and not split.beside:
        served = engine.server(config, shape)
        phases[MemoryPhase.serve] = {Part.engine: served.weights, Part.cache: served.cache}
        room = served.rows
    by_place = [place_memory(config, shape, place) for place in places_of(config, split.trainers)]
    for phase in by_place[0]:
        candidates = [
            _joined(place[phase], kept, answering if phase is MemoryPhase.generate else {}) for place in by_place
        ]
        phases[phase] = max(candidates, key=_total)
    starved = (
        _starved(config, shape, MemoryPhase.generate if split.beside else MemoryPhase.serve) if split.servers else None
    )
    return Memory(phases, room, (config.cluster.memory_gb - config.cluster.reserve_gb) * GB, starved)


Place = dict[Role, int]  # a GPU's pipeline stage in each model


def places_of(config: Config, world: int) -> list[Place]:
    """The different places that GPUs of the trainer have."""
    layouts = layouts_of(config, world)
    pairs = dict.fromkeys(tuple(layouts[role].stage_of(rank) for role in Role) for rank in range(world))
    return [dict(zip(Role, pair, strict=True)) for pair in pairs]


def layouts_of(config: Config, world: int) -> dict[Role, PlannedLayout]:
    """Actor's and critic's, over `world` processes."""
    own = {Role.actor: config.parallel, Role.critic: config.parallel.of_critic()}
    return {role: layout_of(parallel, world) for role, parallel in own.items()}


def place_memory(
    config: Config, shape: PlannedShape, place: Place, micro: PlannedMicroBatch | None = None
) -> dict[MemoryPhase, Parts]:
    """Bytes of actor, critic and reference on a GPU in `place`. `micro`: the micro-batch of every pass, for a
    comparison with a measurement; none: the largest that there can be."""
    stages = [one for one in config.stages().values() if one.iterations > 0]
    layouts = layouts_of(config, split_of(config).trainers)
    phases = _Phases(config, shape, layouts, place, machine_of(config), stages, micro)
    return {phase: phases.of(phase) for phase in phases.happening()}


def host_bytes(config: Config, shape: PlannedShape, place: Place) -> float:
    """Page-locked host memory of a process in `place`: with `parallel.offload` each model has its own for good, unless
    it is the only one."""
    layouts, machine = layouts_of(config, split_of(config).trainers), machine_of(config)
    held = [resident(shape, layouts[role], machine, role, place[role]) for role in _roles(config)]
    reference = [held[0].weights] if _has_reference(config) else []
    waiting = [model.weights + model.optimizer for model in held] + reference
    return sum(waiting) if config.parallel.offload and len(waiting) > 1 else 0.0


def saved_bytes(config: Config, shape: PlannedShape, place: Place) -> float:
    """Host memory of a process in `place` while its share of a checkpoint waits to be written: the weights, and the
    optimizer's main weights and moments in fp32, of all models. Of processes with the same weights one has it."""
    layouts = layouts_of(config, split_of(config).trainers)
    width = 4 if config.run.precision is Precision.fp32 else 2
    return sum((width + 12.0) * parameters(shape, layouts[role], role, place[role]) for role in _roles(config))


def _roles(config: Config) -> list[Role]:
    """The models that are trained: without a method that has a critic there is none."""
    return list(Role) if config.has_critic else [Role.actor]


def _has_reference(config: Config) -> bool:
    return any(stage.iterations > 0 and stage.actor.kl_coef > 0 for stage in config.stages().values())


def _total(parts: Parts) -> float:
    return sum(parts.values())


def _starved(config: Config, shape: PlannedShape, phase: MemoryPhase) -> Over | None:
    assert config.cluster is not None
    one, share = engine.server(config, shape), engine.fraction_of(config) * config.cluster.memory_gb * GB
    needed = one.weights + one.sequence
    part = Part.engine if one.weights > share else Part.cache
    return Over(phase, part, needed - share) if needed > share else None


def _joined(*parts: Parts) -> Parts:
    sums: Parts = {}
    for one in parts:
        for part, size in one.items():
            sums[part] = sums.get(part, 0.0) + size
    return {part: sums[part] for part in _PARTS if sums.get(part)}


def least_rows(config: Config) -> int:
    """Rows that the embedded engine decodes together whatever its bound: one prompt's, of training or evaluation."""
    samples = [stage.samples for stage in config.stages().values() if stage.iterations > 0]
    return max(*samples, config.evaluation.samples if config.evaluation.sets else 0)


def _engine(config: Config, shape: PlannedShape, stages: list[StageConfig], split: Split) -> tuple[Parts, Parts, float]:
    """What an engine holds on the trainer's GPUs all the time, and while it answers; the rows that it has room for."""
    if config.rollout.engine is EngineKind.embedded:
        rows = max(stage.count(stage.prompts()) * stage.samples for stage in stages)
        one = engine.embedded(config, shape, rows, least_rows(config), split)
        return {Part.engine: one.weights}, {Part.cache: one.cache, Part.head: one.sampling}, one.rows
    if not split.beside:
        return {}, {}, 0.0
    one = engine.server(config, shape)
    return {Part.engine: one.weights * split.beside, Part.cache: one.cache * split.beside}, {}, one.rows


@dataclass(frozen=True, slots=True)
class _Phases:
    config: Config
    shape: PlannedShape
    layouts: dict[Role, PlannedLayout]
    place: Place
    machine: PlannedMachine
    stages: list[StageConfig]
    micro: PlannedMicroBatch | None

    def happening(self) -> list[MemoryPhase]:
        critic = any(stage.trains_critic for stage in self.stages)
        valued = self.config.has_critic
        skipped = (
            {MemoryPhase.serve}
            | ({MemoryPhase.critic} if not critic else set())
            | ({MemoryPhase.values} if not valued else set())
        )
        return [phase for phase in MemoryPhase if phase not in skipped]

    def of(self, phase: MemoryPhase) -> Parts:
        """What is resident, and beyond it what the phase needs at its worst."""
        if phase is MemoryPhase.checkpoint:  # one model after the other
            return max(
                (_joined(self._residents(role), self._gathered(role)) for role in _roles(self.config)), key=_total
            )
        # The actor is there while prompts are answered, since it was the last to learn and to be sent.
        role = Role.critic if phase in (MemoryPhase.values, MemoryPhase.critic) else Role.actor
        return _joined(self._residents(role), self._moment(phase, role))

    def _residents(self, working: Role) -> Parts:
        """Of the models that are there while one is at work, and of the reference where there is a KL term. A reference
        that waits in host memory needs less than the actor when its turn comes."""
        there = [working] if self.config.parallel.offload else _roles(self.config)
        models = [resident(self.shape, self.layouts[role], self.machine, role, self.place[role]) for role in there]
        parts = {
            Part.weights: sum(model.weights for model in models),
            Part.gradients: sum(model.gradients for model in models),
            Part.optimizer: sum(model.optimizer for model in models),
        }
        if _has_reference(self.config) and not self.config.parallel.offload:
            role = Role.actor
            weights = resident(self.shape, self.layouts[role], self.machine, role, self.place[role]).weights
            parts[Part.reference] = weights + self._fp8(role, trained=False)
        if fp8 := sum(self._fp8(role, trained=True) for role in _roles(self.config)):
            parts[Part.fp8] = fp8  # those of a model that waits stay: Transformer Engine holds them
        return parts

    def _fp8(self, role: Role, *, trained: bool) -> float:
        return fp8_copies(self.config, self.shape, self.layouts[role], self.place[role], trained=trained)

    def _moment(self, phase: MemoryPhase, role: Role) -> Parts:
        if phase is MemoryPhase.sync:
            return {Part.buffers: self._buckets(self.place[role])}
        if phase in (MemoryPhase.logprobs, MemoryPhase.values):
            return self._reading(role)
        if phase in (MemoryPhase.actor, MemoryPhase.critic):
            return self._update(role)
        return {}

    def _left_behind(self, role: Role, micro: PlannedMicroBatch) -> float:
        """Of the other model's last pass: its stage's input, and where its process groups are others, and with them
        Megatron's one buffer for gathered states, that buffer."""
        other = Role.critic if role is Role.actor else Role.actor
        if other not in _roles(self.config):
            return 0.0
        own, layout = self.layouts[role], self.layouts[other]
        if own.context != layout.context:
            micro = replace(micro, tokens=micro.tokens * own.context // layout.context)
        left = activations.left_behind(self.shape, layout, self.machine, micro, self.place[other])
        apart = layout != own and layout.sequence and layout.tensor > 1
        return left + (self.machine.size * self.shape.hidden * micro.tokens if apart else 0)

    def _reading(self, role: Role) -> Parts:
        """All rows that the actor learns from are read in one pass; the critic may read its own as well."""
        kinds = (StageConfig.actor_prompts, StageConfig.critic_prompts)[: 1 if role is Role.actor else 2]
        stages = [one for one in self.stages if role is Role.actor or one.has_critic]
        rows = max(one.responses_per_prompt * one.count(kind(one)) for one in stages for kind in kinds)
        layout, stage = self.layouts[role], self.place[role]
        micro = self.micro or micro_batch_of(self.config, layout, rows)
        layers = activations.reading(self.shape, layout, self.machine, micro, stage)
        left = self._left_behind(role, micro)
        batch = {Part.batch: batch_bytes(micro, self.machine)}
        if stage == layout.pipeline - 1:
            ending = head.reading(self.shape, layout, self.machine, micro, self.config.model.logits, role)
            if ending > layers:
                return batch | {Part.activations: left, Part.head: ending}
        return batch | {Part.activations: left + layers}

    def _update(self, role: Role) -> Parts:
        """A mini-batch is one optimizer step. Its worst moment is in the head's backward pass or in the layers', or in
        the step itself, when the activations are gone: torch's Adam on CUDA then makes one fp32 tensor a parameter."""
        if role is Role.actor:
            rows = max(one.actor.mini_batch_prompts * one.responses_per_prompt for one in self.stages)
        else:
            taught = [one for one in self.stages if one.trains_critic]
            rows = max(one.critic.mini_batch_prompts * one.responses_per_prompt for one in taught)
        layout, stage = self.layouts[role], self.place[role]
        micro = self.micro or micro_batch_of(self.config, layout, rows)
        batch = {Part.batch: batch_bytes(micro, self.machine)}
        held, layers, ending = update_moments(
            self.shape, layout, self.machine, micro, self.config.model.logits, role, stage
        )
        held += self._left_behind(role, micro)
        own = parameters(self.shape, layout, role, stage)
        step = 4.0 * own / (layout.data * layout.context) if self.machine.cuda else 0.0
        if step > held + max(layers, ending):
            return batch | {Part.optimizer: step}
        if ending > layers:
            return batch | {Part.activations: held, Part.head: ending}
        return batch | {Part.activations: held + layers}

    def _buckets(self, stage: int) -> float:
        """Two buckets (weights/stream.py): of `parallel.bucket_mb`, or of the largest slot where that is more, as the
        embedding often is. The embedded engine gets every bucket on every rank. FP8 is made beside its bf16 bucket."""
        config, shape = self.config, self.shape
        precision = engine.precision_of(config)
        size = 4 if precision is EnginePrecision.fp32 else 2
        slots = [2 * shape.ffn * shape.hidden, (shape.queries + 2 * shape.keys) * shape.hidden]
        if config.rollout.engine is EngineKind.embedded or stage in (0, self.layouts[Role.actor].pipeline - 1):
            slots.append(shape.vocab * shape.hidden)
        largest = max(config.parallel.bucket_mb << 20, size * max(slots))
        return min(largest, size * shape.layers * layer_parameters(shape) + size * slots[-1]) * (
            2.5 if precision is EnginePrecision.fp8 else 2
        )

    def _gathered(self, role: Role) -> Parts:
        """Megatron's fully reshardable form gathers a model's fp32 main weights and moments over the data-parallel
        ranks, one of the three at a time, on every rank's GPU, beside its own share; then they go to host memory."""
        layout = self.layouts[role]
        count = parameters(self.shape, layout, role, self.place[role])
        return {Part.buffers: 4.0 * count * (1 + 1 / (layout.data * layout.context))}


def update_moments(
    shape: PlannedShape,
    layout: PlannedLayout,
    machine: PlannedMachine,
    micro: PlannedMicroBatch,
    logits: Logits,
    role: Role,
    stage: int,
) -> tuple[float, float, float]:
    """Bytes in an optimizer step: what is held when a backward pass begins, and on top of it what the layers' backward
    pass and what the head's needs."""
    held = activations.held(shape, layout, machine, micro, stage)
    layers = activations.backward(shape, layout, machine, micro, stage)
    last = stage == layout.pipeline - 1
    ending = head.update(shape, layout, machine, micro, logits, role) if last else 0.0
    return held, layers, ending


def batch_bytes(micro: PlannedMicroBatch, machine: PlannedMachine) -> float:
    """All micro-batches of a pass are on the device from its beginning (models/packing.py). A token: its id, position,
    cell and grid, int64; a response token: where it is predicted, what it is, where its value is read. On a CPU also
    its places in the batch, which stay there."""
    return micro.count * (32.0 * micro.tokens + (24 if machine.cuda else 40) * micro.responses)
