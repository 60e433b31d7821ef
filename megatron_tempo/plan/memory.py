"""Memory of the trainer's GPUs by phase, in parts, and of a GPU that only serves.

Both models and their optimizers stay on the trainer's GPUs all the time, as does the reference model once it is needed,
the embedded engine's weights, and a server that shares them: nothing is put to sleep. Of the pipeline's stages the one
that needs most is told, in each phase. Building the models needs less than using them, so the start is no phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megatron_tempo.config.schema import NEEDS, Config, EngineKind, EnginePrecision, Logits, StageConfig
from megatron_tempo.plan import activations, engine, head
from megatron_tempo.plan.layout import Layout, Machine, MicroBatch, layout_of, machine_of, micro_batch_of
from megatron_tempo.plan.parameters import Role, fp8_copies, layer_parameters, parameters, resident
from megatron_tempo.plan.shapes import Shape
from megatron_tempo.plan.split import Split, split_of

GB = 1e9


class Phase(Enum):
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


Parts = dict[Part, float]


@dataclass(frozen=True, slots=True)
class Over:
    """The first thing that does not fit."""

    phase: Phase
    part: Part
    bytes: float

    def __str__(self) -> str:
        return f"{self.phase.value}: the {self.part.value} {self.bytes / GB:.1f} GB over"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by phase and part. `room`: rows of full length that a server, or a process's engine, holds at a time."""

    phases: dict[Phase, Parts]
    room: float
    limit: float  # of a GPU, less the cluster's reserve
    starved: Over | None = None  # a server that has no room for a single row in the share that it takes of a GPU

    def total(self, phase: Phase) -> float:
        return sum(self.phases[phase].values())

    @property
    def largest(self) -> Phase:
        """The phase that needs most of a trainer's GPU."""
        return max((phase for phase in self.phases if phase is not Phase.serve), key=self.total)

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


def memory(config: Config, shape: Shape) -> Memory:
    """The configuration has passed `split.problems`."""
    assert config.cluster is not None
    split = split_of(config)
    stages = [stage for stage in config.stages().values() if stage.iterations > 0]
    kept, answering, room = _engine(config, shape, stages, split)
    found: dict[Phase, Parts] = {}
    if split.serving and not split.beside:
        served = engine.server(config, shape)
        found[Phase.serve] = {Part.engine: served.weights, Part.cache: served.cache}
        room = served.rows
    by_stage = [stage_memory(config, shape, stage) for stage in range(layout_of(config, split.trainers).pipeline)]
    for phase in by_stage[0]:
        candidates = [_joined(stage[phase], kept, answering if phase is Phase.generate else {}) for stage in by_stage]
        found[phase] = max(candidates, key=lambda parts: sum(parts.values()))
    starved = _starved(config, shape, Phase.generate if split.beside else Phase.serve) if split.servers else None
    return Memory(found, room, (config.cluster.memory_gb - config.cluster.reserve_gb) * GB, starved)


def stage_memory(config: Config, shape: Shape, stage: int, micro: MicroBatch | None = None) -> dict[Phase, Parts]:
    """Bytes of actor, critic and reference on a GPU of pipeline stage `stage`. `micro`: the micro-batch of every pass,
    for a comparison with a measurement; none: the largest that there can be."""
    layout = layout_of(config, split_of(config).trainers)
    stages = [one for one in config.stages().values() if one.iterations > 0]
    phases = _Phases(config, shape, layout, machine_of(config), stages, micro)
    return {phase: _joined(phases.residents(stage), phases.moment(phase, stage)) for phase in phases.happening()}


def _starved(config: Config, shape: Shape, phase: Phase) -> Over | None:
    assert config.cluster is not None
    one, share = engine.server(config, shape), engine.fraction_of(config) * config.cluster.memory_gb * GB
    needed = one.weights + one.sequence
    part = Part.engine if one.weights > share else Part.cache
    return Over(phase, part, needed - share) if needed > share else None


def _joined(*parts: Parts) -> Parts:
    sums = {part: sum(one.get(part, 0.0) for one in parts) for part in Part}
    return {part: size for part, size in sums.items() if size}


def least_rows(config: Config) -> int:
    """Rows that the embedded engine decodes together whatever its bound: one prompt's, of training or evaluation."""
    samples = [stage.responses_per_prompt for stage in config.stages().values() if stage.iterations > 0]
    return max(*samples, config.evaluation.samples if config.evaluation.sets else 0)


def _engine(config: Config, shape: Shape, stages: list[StageConfig], split: Split) -> tuple[Parts, Parts, float]:
    """What an engine holds on the trainer's GPUs all the time, and while it answers; the rows that it has room for."""
    if config.rollout.engine is EngineKind.embedded:
        rows = max(stage.count(stage.prompts()) * stage.responses_per_prompt for stage in stages)
        one = engine.embedded(config, shape, rows, least_rows(config), split)
        return {Part.engine: one.weights}, {Part.cache: one.cache, Part.head: one.sampling}, one.rows
    if not split.beside:
        return {}, {}, 0.0
    one = engine.server(config, shape)
    return {Part.engine: one.weights * split.beside, Part.cache: one.cache * split.beside}, {}, one.rows


@dataclass(frozen=True, slots=True)
class _Phases:
    config: Config
    shape: Shape
    layout: Layout
    machine: Machine
    stages: list[StageConfig]
    micro: MicroBatch | None

    def happening(self) -> list[Phase]:
        critic = any(stage.trains_critic for stage in self.stages)
        valued = any(NEEDS[stage.method].critic is not None for stage in self.stages)
        skipped = {Phase.serve} | ({Phase.critic} if not critic else set()) | ({Phase.values} if not valued else set())
        return [phase for phase in Phase if phase not in skipped]

    def residents(self, stage: int) -> Parts:
        """Of actor and critic, and of the reference model where a stage has a KL term."""
        models = [resident(self.shape, self.layout, self.machine, role, stage) for role in Role]
        parts = {
            Part.weights: sum(model.weights for model in models),
            Part.gradients: sum(model.gradients for model in models),
            Part.optimizer: sum(model.optimizer for model in models),
        }
        if any(one.actor.kl_coef > 0 for one in self.stages):
            parts[Part.reference] = models[0].weights + self._fp8(stage, trained=False)
        if fp8 := len(models) * self._fp8(stage, trained=True):
            parts[Part.fp8] = fp8
        return parts

    def _fp8(self, stage: int, *, trained: bool) -> float:
        return fp8_copies(self.config, self.shape, self.layout, stage, trained=trained)

    def moment(self, phase: Phase, stage: int) -> Parts:
        """What a phase needs beyond what is resident, at its worst."""
        if phase is Phase.sync:
            return {Part.buffers: self._buckets(stage)}
        if phase is Phase.checkpoint:
            return {Part.buffers: self._gathered(stage)}
        if phase in (Phase.logprobs, Phase.values):
            return self._reading(Role.actor if phase is Phase.logprobs else Role.critic, stage)
        if phase in (Phase.actor, Phase.critic):
            return self._update(Role[phase.name], stage)
        return {}

    def _reading(self, role: Role, stage: int) -> Parts:
        """All rows that the actor learns from are read in one pass; the critic may read its own as well."""
        kinds = (StageConfig.actor_prompts, StageConfig.critic_prompts)[: 1 if role is Role.actor else 2]
        rows = max(one.responses_per_prompt * one.count(kind(one)) for one in self.stages for kind in kinds)
        micro = self.micro or micro_batch_of(self.config, self.layout, rows)
        layers = activations.reading(self.shape, self.layout, self.machine, micro, stage)
        left = activations.left_behind(self.shape, self.layout, self.machine, micro, stage)
        batch = {Part.batch: batch_bytes(micro, self.machine)}
        if stage == self.layout.pipeline - 1:
            logits = self.config.model.logits
            ending = head.reading(self.shape, self.layout, self.machine, micro, logits, role)
            if ending > layers:
                return batch | {Part.activations: left, Part.head: ending}
        return batch | {Part.activations: left + layers}

    def _update(self, role: Role, stage: int) -> Parts:
        """A mini-batch is one optimizer step. Its worst moment is in the head's backward pass or in the layers', or in
        the step itself, when the activations are gone: torch's Adam on CUDA then makes one fp32 tensor a parameter."""
        mini = [one.actor.mini_batch_prompts if role is Role.actor else one.critic.mini_batch_prompts
                for one in self.stages]  # fmt: skip
        rows = max(n * one.responses_per_prompt for n, one in zip(mini, self.stages, strict=True))
        micro = self.micro or micro_batch_of(self.config, self.layout, rows)
        batch = {Part.batch: batch_bytes(micro, self.machine)}
        held, layers, ending = update_moments(
            self.shape, self.layout, self.machine, micro, self.config.model.logits, role, stage
        )
        own = parameters(self.shape, self.layout, role, stage)
        step = 4.0 * own / (self.layout.data * self.layout.context) if self.machine.cuda else 0.0
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
        if config.rollout.engine is EngineKind.embedded or stage in (0, self.layout.pipeline - 1):
            slots.append(shape.vocab * shape.hidden)
        largest = max(config.parallel.bucket_mb << 20, size * max(slots))
        return min(largest, size * shape.layers * layer_parameters(shape) + size * slots[-1]) * (
            2.5 if precision is EnginePrecision.fp8 else 2
        )

    def _gathered(self, stage: int) -> float:
        """Megatron's fully reshardable form gathers a model's fp32 main weights and moments over the data-parallel
        ranks, one of the three at a time, on every rank's GPU, beside its own share; then they go to host memory."""
        count = max(parameters(self.shape, self.layout, role, stage) for role in Role)
        return 4.0 * count * (1 + 1 / (self.layout.data * self.layout.context))


def update_moments(
    shape: Shape, layout: Layout, machine: Machine, micro: MicroBatch, logits: Logits, role: Role, stage: int
) -> tuple[float, float, float]:
    """Bytes in an optimizer step: what is held when a backward pass begins, and on top of it what the layers' backward
    pass and what the head's needs."""
    held = activations.held(shape, layout, machine, micro, stage)
    held += activations.left_behind(shape, layout, machine, micro, stage)
    layers = activations.backward(shape, layout, machine, micro, stage)
    last = stage == layout.pipeline - 1
    ending = head.update(shape, layout, machine, micro, logits, role) if last else 0.0
    return held, layers, ending


def batch_bytes(micro: MicroBatch, machine: Machine) -> float:
    """All micro-batches of a pass are on the device from its beginning (models/packing.py). A token: its id, position,
    cell and grid, int64; a response token: where it is predicted, what it is, where its value is read. On a CPU also
    its places in the batch, which stay there."""
    return micro.count * (32.0 * micro.tokens + (24 if machine.cuda else 40) * micro.responses)
