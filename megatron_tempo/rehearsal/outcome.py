"""What a rehearsal found, next to the formulas of `plan`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tempo.config.choices import Layers
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.schema import Config
from megatron_tempo.plan.engine import embedded
from megatron_tempo.plan.memory import GB, Memory, Part, Parts, memory, place_memory
from megatron_tempo.plan.parameters import Role
from megatron_tempo.plan.split import split_of
from megatron_tempo.rehearsal.faults import OUT_OF_MEMORY, Fault
from megatron_tempo.rehearsal.ranks import RankKind


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """A phase of a rank: the largest of the stages that have it. Bytes on the GPU; the work of one iteration.

    `loading`: the peak until its model is loaded. `planned`: what `plan` computes for the rows that were rehearsed.
    `corrected`: the peak with all rows of the configuration, whose tokens lie on the GPU too: what is measured, and
    what `plan` adds for them.
    """

    phase: str
    before: int
    loading: int
    peak: int
    reserved: int
    after: int
    largest_free: int
    retries: int
    planned: float | None
    corrected: float
    limit: float
    counts: Mapping[str, float]
    roofline: float  # seconds

    @property
    def error(self) -> float | None:
        """By how much `plan` is above the measurement, relative to it."""
        return None if self.planned is None or not self.peak else self.planned / self.peak - 1

    @property
    def fits(self) -> bool:
        return self.corrected <= self.limit


@dataclass(frozen=True, slots=True)
class RankResult:
    """A rank: its phases up to the fault, if there is one. `seconds`, `cpu_seconds`, `host`: of this machine."""

    kind: RankKind
    machine: str
    phases: tuple[PhaseResult, ...]
    seconds: float
    cpu_seconds: float
    host: int
    fault: Fault | None
    ended: str | None = None  # why the rehearsal ended it: this machine's memory or the time given were used up
    layers: Layers | None = None  # as the rank chose them; None if it ended before

    @property
    def fits(self) -> bool:
        return self.fault is None and self.ended is None and all(phase.fits for phase in self.phases)

    @property
    def worst(self) -> PhaseResult | None:
        return max(self.phases, key=lambda phase: phase.corrected, default=None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All ranks that were rehearsed."""

    ranks: tuple[RankResult, ...]
    rows: int
    lengths: str
    seconds: float
    fault: Fault | None = None  # before any rank ran, such as an import that fails
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return self.fault is None and all(rank.fits for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class Planned:
    """The formulas of `plan` for a configuration, and for the few rows that are rehearsed."""

    config: Config
    small: Config
    shape: ModelShape
    whole: Memory

    @classmethod
    def of(cls, config: Config, small: Config, shape: ModelShape, world: int) -> Planned:
        config, small = (replace(one, parallel=replace(one.parallel, world_size=world)) for one in (config, small))
        return cls(config, small, shape, memory(config, shape))

    def with_layers(self, layers: Layers | None) -> Planned:
        """The same for the layers that the ranks chose. None: for those of the configuration."""
        if layers is None or layers is self.config.model.layers:
            return self
        config, small = (replace(one, model=replace(one.model, layers=layers)) for one in (self.config, self.small))
        return replace(self, config=config, small=small, whole=memory(config, self.shape))

    @property
    def server_bytes(self) -> float:
        """Bytes of the GPU that servers hold while the trainer works, in processes of their own."""
        if self.config.rollout.is_colocated:
            assert self.config.cluster is not None
            return self.config.cluster.asleep_gb * 1e9
        if not split_of(self.config).shared:
            return 0.0
        parts = (Part.engine, Part.cache)
        return max(sum(one.get(part, 0.0) for part in parts) for one in self.whole.phases.values())

    @property
    def limit(self) -> float:
        """Bytes of the GPU that the trainer's process may use."""
        return self.whole.limit - self.server_bytes

    def phases(self, kind: RankKind, *, small: bool) -> dict[str, Parts]:
        """The parts of each phase in the process of such a rank."""
        config = self.small if small else self.config
        place = {Role.actor: kind.actor_stage, Role.critic: kind.critic_stage}
        found = {phase.value: parts for phase, parts in place_memory(config, self.shape, place).items()}
        if config.rollout.is_served:
            return found
        weights = embedded(config, self.shape, 1, 1, split_of(config)).weights
        return {phase: parts | {Part.engine: weights} for phase, parts in found.items()}

    def results(self, kind: RankKind, measured: Iterable[Mapping[str, Any]]) -> tuple[PhaseResult, ...]:
        """The measured phases, by name, next to the plan's."""
        few, all_rows = (self.phases(kind, small=small) for small in (True, False))
        found: dict[str, list[Mapping[str, Any]]] = {}
        for one in measured:
            found.setdefault(one["name"].split()[-1], []).append(one)
        results = []
        for name, ones in found.items():
            planned = sum(few[name].values()) if name in few else None
            more = sum(all_rows[name].values()) - planned if planned is not None and name in all_rows else 0.0
            results.append(self._result(name, ones, planned, more))
        return tuple(results)

    def _result(self, name: str, ones: list[Mapping[str, Any]], planned: float | None, more: float) -> PhaseResult:
        largest = max(ones, key=lambda one: int(one["peak"]))
        assert self.config.cluster is not None
        across = split_of(self.config).trainers > self.config.cluster.gpus_per_node
        return PhaseResult(
            phase=name,
            before=largest["before"],
            loading=max(one["loading"] for one in ones),
            peak=largest["peak"],
            reserved=max(one["reserved"] for one in ones),
            after=largest["after"],
            largest_free=largest["largest_free"],
            retries=sum(one["retries"] for one in ones),
            planned=planned,
            corrected=max(largest["peak"] + max(more, 0.0), *(one["loading"] for one in ones)),
            limit=self.limit,
            counts=largest["counts"],
            roofline=roofline(largest["counts"], self.config.cluster, across=across),
        )


def roofline(counts: Mapping[str, float], cluster: ClusterConfig, *, across: bool) -> float:
    """Seconds of a phase if arithmetic, links and copies follow one another, each at its share of the peak.

    The rates and shares are the cluster's (`plan` uses the same). Attention's arithmetic is not counted: it is no
    matrix product of cuBLAS. `across`: ranks are on several nodes, so messages go over the network.
    """
    link = cluster.network_gbs if across else cluster.nvlink_gbs
    arithmetic = counts["flops"] / (cluster.bf16_tflops * 1e12 * cluster.compute_share)
    messages = counts["nccl_bytes"] / (link * 1e9 * cluster.link_share)
    copies = counts["host_bytes"] / (cluster.host_gbs * 1e9 * cluster.link_share)
    return arithmetic + messages + copies


_IN_PIECES = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, because the memory is free, but in pieces"
_TENSOR = "a larger parallel.tensor or parallel.pipeline"
_KNOBS = {
    Part.activations: f"parallel.recompute=layers, fewer micro_batch_tokens, more context ranks, or {_TENSOR}",
    Part.head: "model.logits=recomputed, or a smaller parallel.micro_batch_tokens",
    Part.batch: "fewer prompts or responses in an iteration",
    Part.optimizer: f"parallel.offload=true, more data-parallel ranks, or {_TENSOR}",
    Part.buffers: f"a smaller parallel.bucket_mb, or {_TENSOR}",
    Part.cache: "a smaller share of the GPU for the servers",
}


def helps(planned: Planned, kind: RankKind, phase: str) -> str:
    """What would make room in a phase: the setting of the largest part that one can change."""
    parts = planned.phases(kind, small=False).get(phase, {})
    movable = {part: size for part, size in parts.items() if part in _KNOBS}
    return _KNOBS[max(movable, key=lambda part: movable[part])] if movable else _TENSOR


def over(planned: Planned, rank: RankResult) -> list[str]:
    """What does not fit, and where: one line for each phase, or for the error of torch's allocator."""
    lines = []
    if rank.fault is not None and rank.fault.kind == OUT_OF_MEMORY:
        phase = rank.fault.phase.split()[-1]
        plan = sum(planned.phases(rank.kind, small=True).get(phase, {}).values())
        fault = rank.fault
        help_ = _IN_PIECES if fault.in_pieces else helps(planned, rank.kind, phase)
        lines.append(
            f"{fault.phase} runs out of memory at {fault.where}: it asks for {fault.wanted / GB:.2f} GB when "
            f"{fault.allocated / GB:.1f} GB are allocated and {fault.reserved / GB:.1f} GB reserved, of "
            f"{planned.limit / GB:.1f} GB (largest free piece: {fault.largest_free / GB:.2f} GB); plan says "
            f"{plan / GB:.1f} GB. What helps: {help_}"
        )
    lines += [
        f"{phase.phase} needs {phase.corrected / GB:.1f} GB with all rows, and a process has {phase.limit / GB:.1f}. "
        f"What helps: {helps(planned, rank.kind, phase.phase)}"
        for phase in rank.phases
        if not phase.fits
    ]
    return lines
