"""Memory of the trainer's GPUs by phase and part, and of a GPU that only serves.

Both models and their optimizers stay on the trainer's GPUs all the time. So do the reference model once it is needed,
the weights of the embedded engine, and a disaggregated server whose GPU the trainer uses too. With `parallel.offload`,
only the model that a phase uses is on the GPU. So it is with `rollout.placement=colocated`: there the trainer leaves
the GPU while servers generate, they leave all but a remainder while it trains, and only during a weight sync both have
their weights there. GPUs differ in the pipeline stages that they have of the two models; for each phase, the GPU that
needs most is reported. Building the models needs less memory than using them, so the start is not a phase.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from megatron_tempo.config.choices import EngineKind, EnginePrecision, Precision
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.config.schedule import has_reference
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
    row_tokens,
)
from megatron_tempo.plan.parameters import Role, experts, fp8_copies, layer_parameters, owned, resident
from megatron_tempo.plan.passes import batch_bytes, update_moments
from megatron_tempo.plan.split import Split, split_of, takes_turns

GB = 1e9


class MemoryPhase(Enum):
    """Phases in the order of an iteration, named as in metrics.jsonl; `serve`: a GPU that only serves."""

    serve = "serve"
    generate = "generate"
    values = "values"
    critic = "critic"
    logprobs = "logprobs"
    actor = "actor"
    sync = "sync"
    checkpoint = "checkpoint"


class Part(Enum):
    """What the memory is used for. Members hash by identity: a search looks them up millions of times, and Enum's own
    hash is a slow Python function."""

    __hash__ = object.__hash__

    weights = "weights"
    fp8 = "FP8 weights"
    gradients = "gradients"
    optimizer = "optimizer"
    reference = "reference"
    engine = "engine weights"
    cache = "KV cache"
    asleep = "sleeping engine"
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
        return f"{self.phase.value}: the {self.part.value} {self.bytes / GB:.1f} GB over the limit"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by phase and part. `room`: rows of full length that fit in a server or a process's engine at a time."""

    phases: dict[MemoryPhase, Parts]
    room: float
    limit: float  # of a GPU, minus the cluster's reserve
    starved: Over | None = None  # set if not even one row fits in a server's share of the GPU

    def total(self, phase: MemoryPhase) -> float:
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> MemoryPhase:
        """The phase that needs most memory of a trainer's GPU."""
        return max((phase for phase in self.phases if phase is not MemoryPhase.serve), key=self.total)

    def over(self) -> Over | None:
        """The first phase that does not fit, and the part that crosses the limit."""
        if self.starved is not None:
            return self.starved
        for phase, parts in self.phases.items():
            total = 0.0
            for part, size in parts.items():
                total += size
                if total > self.limit:
                    return Over(phase, part, self.total(phase) - self.limit)
        return None


def memory(config: Config, shape: ModelShape) -> Memory:
    """The memory of a configuration, which has passed `split.problems`."""
    assert config.cluster is not None
    split = split_of(config)
    stages = [stage for stage in config.stages().values() if stage.iterations > 0]
    kept, answering, room = _engine(config, shape, stages, split)
    phases: dict[MemoryPhase, Parts] = {}
    if split.serving and not split.shared:
        served = engine.server(config, shape)
        phases[MemoryPhase.serve] = {Part.engine: served.weights, Part.cache: served.cache}
        room = served.rows
    by_place = [place_memory(config, shape, place) for place in places_of(config, split.trainers)]
    for phase in by_place[0]:
        of_servers = _colocated(config, shape, phase) if config.rollout.is_colocated else kept
        candidates = [
            _joined(place[phase], of_servers, answering if phase is MemoryPhase.generate else {}) for place in by_place
        ]
        phases[phase] = max(candidates, key=_total)
    starved = (
        _starved(config, shape, MemoryPhase.generate if split.shared else MemoryPhase.serve) if split.servers else None
    )
    return Memory(phases, room, (config.cluster.memory_gb - config.cluster.reserve_gb) * GB, starved)


Place = dict[Role, int]  # the pipeline stage of a GPU in each model


def places_of(config: Config, world: int) -> list[Place]:
    """The distinct pairs of pipeline stages that the trainer's GPUs have."""
    layouts = layouts_of(config, world)
    stages = {role: layouts[role].pipeline for role in Role}
    firsts = {-(-stage * world // stages[role]) for role in Role for stage in range(stages[role])}  # of each stage
    pairs = dict.fromkeys(tuple(layouts[role].stage_of(rank) for role in Role) for rank in sorted(firsts))
    return [dict(zip(Role, pair, strict=True)) for pair in pairs]


def layouts_of(config: Config, world: int) -> dict[Role, PlannedLayout]:
    """The layouts of actor and critic over `world` processes."""
    own = {Role.actor: config.parallel, Role.critic: config.parallel.of_critic()}
    return {role: layout_of(parallel, world) for role, parallel in own.items()}


def place_memory(
    config: Config, shape: ModelShape, place: Place, micro: PlannedMicroBatch | None = None
) -> dict[MemoryPhase, Parts]:
    """Bytes of actor, critic and reference on a GPU with the stages `place`. `micro`: the micro-batch of every pass, to
    compare with a measurement; None: the largest possible one."""
    stages = [one for one in config.stages().values() if one.iterations > 0]
    layouts = layouts_of(config, split_of(config).trainers)
    phases = _Phases(config, shape, layouts, place, machine_of(config), stages, micro)
    return {phase: phases.of(phase) for phase in phases.happening()}


def host_bytes(config: Config, shape: ModelShape, place: Place) -> float:
    """Page-locked host memory of a process with the stages `place`: with models that take turns each has its own
    buffers for the whole run, unless it is the only one and no colocated server takes turns with it. A server keeps
    nothing there: it throws its weights away when it sleeps, and gets the next ones from the trainer."""
    layouts, machine = layouts_of(config, split_of(config).trainers), machine_of(config)
    held = [resident(shape, layouts[role], machine, role, place[role]) for role in _roles(config)]
    reference = [held[0].weights] if has_reference(config) else []
    waiting = [model.weights + model.optimizer for model in held] + reference
    alone = len(waiting) == 1 and not config.rollout.is_colocated
    return sum(waiting) if takes_turns(config) and not alone else 0.0


def saved_bytes(config: Config, shape: ModelShape, place: Place) -> float:
    """Host memory of a process with the stages `place` for its share of checkpoints, page-locked and kept for the whole
    run: weights, fp32 main weights and moments of all models, shared out among the ranks with the same weights."""
    layouts = layouts_of(config, split_of(config).trainers)
    width = 4 if config.run.precision is Precision.fp32 else 2
    return sum((width + 12.0) * owned(shape, layouts[role], role, place[role]) for role in _roles(config))


def routed_bytes(config: Config, shape: ModelShape) -> float:
    """Host memory of the first rank for the experts that an engine's routers chose, of all rows of an iteration at full
    length (`config.routing`)."""
    routing = RoutingFormat.of(shape)
    stages = [stage for stage in config.stages().values() if stage.iterations > 0]
    rows = max(stage.count(stage.prompts()) * stage.samples for stage in stages)
    return float(rows) * row_tokens(config) * routing.bytes_per_token if routing else 0.0


def weight_bytes(config: Config, shape: ModelShape, place: Place) -> float:
    """Bytes of the actor's weights on a GPU with the stages `place`."""
    layouts = layouts_of(config, split_of(config).trainers)
    return resident(shape, layouts[Role.actor], machine_of(config), Role.actor, place[Role.actor]).weights


def _roles(config: Config) -> list[Role]:
    """The trained models: no critic if no method needs one."""
    return list(Role) if config.has_critic else [Role.actor]


def _total(parts: Parts) -> float:
    return sum(parts.values())


def _starved(config: Config, shape: ModelShape, phase: MemoryPhase) -> Over | None:
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
    """Rows that the embedded engine always decodes together: those of one prompt, of training or evaluation."""
    samples = [stage.samples for stage in config.stages().values() if stage.iterations > 0]
    return max(*samples, config.evaluation.samples if config.evaluation.sets else 0)


def _engine(config: Config, shape: ModelShape, stages: list[StageConfig], split: Split) -> tuple[Parts, Parts, float]:
    """Parts that an engine holds on the trainer's GPUs all the time, and only while it generates; the rows that fit."""
    if not config.rollout.is_served:
        rows = max(stage.count(stage.prompts()) * stage.samples for stage in stages)
        one = engine.embedded(config, shape, rows, least_rows(config), split)
        return {Part.engine: one.weights}, {Part.cache: one.cache, Part.head: one.sampling}, one.rows
    if not split.shared:
        return {}, {}, 0.0
    one = engine.server(config, shape)
    return {Part.engine: one.weights * split.shared, Part.cache: one.cache * split.shared}, {}, one.rows


def _colocated(config: Config, shape: ModelShape, phase: MemoryPhase) -> Parts:
    """What a colocated server has on a GPU. What stays when it sleeps is in its share of the GPU while it generates."""
    assert config.cluster is not None
    one = engine.server(config, shape)
    if phase is MemoryPhase.generate:
        return {Part.engine: one.weights, Part.cache: one.cache}
    awake = {Part.engine: one.weights} if phase is MemoryPhase.sync else {}
    return awake | {Part.asleep: config.cluster.asleep_gb * GB}


@dataclass(frozen=True, slots=True)
class _Phases:
    config: Config
    shape: ModelShape
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
        """What is resident, plus the peak of the phase beyond it."""
        if phase is MemoryPhase.generate and self.config.rollout.is_colocated:
            return self._residents(None)
        if phase is MemoryPhase.checkpoint:  # models are copied to host memory, one after the other
            return max((self._residents(role) for role in _roles(self.config)), key=_total)
        # During generation the actor is on the GPU: it was the last model to be trained and sent.
        role = Role.critic if phase in (MemoryPhase.values, MemoryPhase.critic) else Role.actor
        parts = _joined(self._residents(role), self._moment(phase, role))
        if phase is MemoryPhase.sync and self.config.rollout.is_colocated:  # only weights come back
            return {part: size for part, size in parts.items() if part not in (Part.gradients, Part.optimizer)}
        return parts

    def _residents(self, working: Role | None) -> Parts:
        """Bytes of the models on the GPU while `working` is in use, and of the reference model if there is a KL term.
        An offloaded reference model needs less than the actor when it is loaded. None: no model of those that take
        turns."""
        loaded = [] if working is None else [working] if takes_turns(self.config) else _roles(self.config)
        models = [resident(self.shape, self.layouts[role], self.machine, role, self.place[role]) for role in loaded]
        parts = {
            Part.weights: sum(model.weights for model in models),
            Part.gradients: sum(model.gradients for model in models),
            Part.optimizer: sum(model.optimizer for model in models),
        }
        if has_reference(self.config) and not takes_turns(self.config):
            role = Role.actor
            weights = resident(self.shape, self.layouts[role], self.machine, role, self.place[role]).weights
            parts[Part.reference] = weights + self._fp8(role, trained=False)
        if fp8 := sum(self._fp8(role, trained=True) for role in _roles(self.config)):
            parts[Part.fp8] = fp8  # also of an offloaded model: Transformer Engine keeps them
        return {part: size for part, size in parts.items() if size}

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
        """Bytes that remain from the other model's last pass: its stage's input and, if its process groups and so
        Megatron's buffer for gathered states are its own, that buffer."""
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
        """A pass without gradient reads all rows that the actor is trained on; the critic may also read its own."""
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
        """A mini-batch is one optimizer step.

        Its peak is in the backward pass of the head or of the layers, or in the step itself, after the activations are
        freed. On CUDA, torch's Adam then allocates an fp32 tensor per parameter; Transformer Engine's does not.
        """
        if role is Role.actor:
            rows = max(one.actor.mini_batch_prompts * one.responses_per_prompt for one in self.stages)
        else:
            training = [one for one in self.stages if one.trains_critic]
            rows = max(one.critic.mini_batch_prompts * one.responses_per_prompt for one in training)
        layout, stage = self.layouts[role], self.place[role]
        micro = self.micro or micro_batch_of(self.config, layout, rows)
        batch = {Part.batch: batch_bytes(micro, self.machine)}
        held, layers, ending = update_moments(
            self.shape, layout, self.machine, micro, self.config.model.logits, role, stage
        )
        held += self._left_behind(role, micro)
        step = 4.0 * owned(self.shape, layout, role, stage) if self.machine.cuda and not self.machine.te else 0.0
        if step > held + max(layers, ending):
            return batch | {Part.optimizer: step}
        if ending > layers:
            return batch | {Part.activations: held, Part.head: ending}
        return batch | {Part.activations: held + layers}

    def _buckets(self, stage: int) -> float:
        """A bucket of `parallel.bucket_mb` and the messages that fill it, at most as much again (weights/pieces.py).

        The embedded engine receives every bucket on every rank. It, vLLM and SGLang take a large tensor in parts.
        Engines of the user's own take it whole: their largest bucket is the largest mapping, often the embedding. So
        may SGLang servers that others have started. An FP8 bucket is built next to its bf16 bucket."""
        config, shape = self.config, self.shape
        precision = engine.precision_of(config)
        size = 4 if precision is EnginePrecision.fp32 else 2
        ffn = shape.ffn if shape.experts is None else shape.experts.ffn  # a mapping holds one expert
        slots = [2 * ffn * shape.hidden, (shape.queries + 2 * shape.keys) * shape.hidden]
        if not config.rollout.is_served or stage in (0, self.layouts[Role.actor].pipeline - 1):
            slots.append(shape.vocab * shape.hidden)
        bound = largest = config.parallel.bucket_mb << 20
        is_foreign = config.rollout.engine is EngineKind.sglang and config.rollout.servers.addresses is not None
        if is_foreign or not isinstance(config.rollout.engine, EngineKind):
            largest = max(bound, size * max(slots))
        whole = size * shape.layers * (layer_parameters(shape) + experts(shape)) + size * slots[-1]
        fp8 = 0.5 if precision is EnginePrecision.fp8 else 0.0
        return min(largest, whole) * (1 + fp8) + min(bound, whole)
