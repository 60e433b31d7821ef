"""Seconds of each phase, from the cluster's configured rates. Use them to compare layouts, not to predict a run's time.

All responses are assumed to have their full length. Training passes are bound by arithmetic, at `compute_share` of the
peak, plus communication between tensor ranks and between replicas; decoding by memory, at `memory_share` of the
bandwidth; weight sync by the links, at `link_share`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tempo.config.choices import EngineKind, Logits, Recompute, Transport
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.method_settings import TempoSettings
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.schedule import has_reference
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.plan import engine
from megatron_tempo.plan.decoding import decode_costs
from megatron_tempo.plan.layout import PlannedLayout, machine_of, row_tokens
from megatron_tempo.plan.memory import (
    Memory,
    MemoryPhase,
    Place,
    host_bytes,
    layouts_of,
    places_of,
    weight_bytes,
)
from megatron_tempo.plan.parameters import Role, expert_parameters, parameters
from megatron_tempo.plan.split import split_of, takes_turns


@dataclass(frozen=True, slots=True)
class PassRows:
    """The rows of a pass: how many, and what one of them has on average.

    >>> PassRows(count=4, tokens=10.0, layers=2e9, ending=1e9).count
    4
    """

    count: int
    tokens: float  # of prompt and response
    layers: float  # operations of a forward pass in the layers
    ending: float  # operations of a forward pass in the actor's output layer; 0 for the critic


def rows_of(shape: ModelShape, lengths: Sequence[tuple[int, int]], role: Role) -> PassRows:
    """Rows with these tokens of prompt and response."""
    if not lengths:
        return PassRows(0, 0.0, 0.0, 0.0)
    count, work = len(lengths), [row_operations(shape, *row, role) for row in lengths]
    tokens = sum(prompt + response for prompt, response in lengths) / count
    return PassRows(count, tokens, sum(layers for layers, _ in work) / count, sum(ending for _, ending in work) / count)


def last_stage(config: Config) -> StageConfig:
    """The last stage that has iterations: times are of it."""
    return [stage for stage in config.stages().values() if stage.iterations > 0][-1]


def times(config: Config, shape: ModelShape, memory: Memory) -> dict[MemoryPhase, float]:
    """Seconds of the phases of one iteration of the last stage, without checkpoints, which are rare."""
    stage = last_stage(config)
    longest = (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)
    rows = {}
    for role, kinds in ((Role.actor, stage.actor_prompts()), (Role.critic, stage.critic_prompts())):
        count = stage.responses_per_prompt * stage.count(kinds)
        rows[role] = PassRows(count, row_tokens(config), *row_operations(shape, *longest, role))
    judged = rows[Role.actor].count  # the rows whose values are read
    if stage.method_settings.estep_when_ece_above is not None:
        judged += rows[Role.critic].count
    if isinstance(stage.settings, TempoSettings) and stage.settings.pessimism > 0:
        judged += rows[Role.actor].count
    read = PassRows(judged, row_tokens(config), *row_operations(shape, *longest, Role.critic))
    seconds_of = {MemoryPhase.generate: _generate(config, shape, memory.room)}
    seconds_of |= training_seconds(config, shape, rows[Role.actor], rows[Role.critic], read)
    seconds_of[MemoryPhase.sync] = sync_seconds(config, shape)
    for phase, seconds in turn_seconds(config, shape).items():
        seconds_of[phase] += seconds
    return {phase: seconds for phase, seconds in seconds_of.items() if seconds}


def training_seconds(
    config: Config, shape: ModelShape, of_actor: PassRows, of_critic: PassRows, valued: PassRows
) -> dict[MemoryPhase, float]:
    """Seconds of the trainer's phases, without moving models between host and GPU.

    of_actor, of_critic: the rows that each model is trained on; valued: those that the critic reads.
    """
    assert config.cluster is not None
    stage, layouts = last_stage(config), layouts_of(config, split_of(config).trainers)
    actor, critic = (_Passes(config, shape, config.cluster, layouts[role], stage) for role in Role)
    return {
        MemoryPhase.values: critic.read(valued) * stage.has_critic,
        MemoryPhase.critic: critic.update(of_critic, Role.critic) * stage.critic.epochs,
        MemoryPhase.logprobs: actor.read(of_actor) * (1 + (stage.actor.kl_coef > 0) + stage.needs.extra_pass),
        MemoryPhase.actor: actor.update(of_actor, Role.actor) * stage.actor.epochs,
    }


def turn_seconds(config: Config, shape: ModelShape) -> dict[MemoryPhase, float]:
    """Seconds in which models move between host and GPU, by the phase before which they do; zero if none moves.

    Swap to the critic and back to the actor; to the reference model and back. Colocated, the GPU is empty after
    generation: the first model is loaded alone. After the updates the actor leaves, and its weights come once more and
    leave again, for the sync (`rollout.placement`).
    """
    stage, turn = last_stage(config), _turn(config, shape) if takes_turns(config) else 0.0
    colocated = config.rollout.is_colocated
    weights = 2 * _moved(config, max(weight_bytes(config, shape, place) for place in _places(config)))
    return {
        MemoryPhase.values: turn * stage.has_critic,
        MemoryPhase.logprobs: turn * ((stage.has_critic or colocated) + 2 * (stage.actor.kl_coef > 0)),
        MemoryPhase.sync: (turn + weights) * colocated,
    }


def moving_seconds(config: Config, shape: ModelShape) -> tuple[float, float]:
    """Seconds of an iteration in which models move between host and GPU, and in which weights go to the engine."""
    return sum(turn_seconds(config, shape).values()), sync_seconds(config, shape)


def _turn(config: Config, shape: ModelShape) -> float:
    """Seconds to load one model onto the GPU while another is offloaded, both at the host link's rate."""
    models = 2 if config.has_critic or has_reference(config) else 1
    return _moved(config, max(host_bytes(config, shape, place) / models for place in _places(config)))


def _places(config: Config) -> list[Place]:
    return places_of(config, split_of(config).trainers)


def _moved(config: Config, size: float) -> float:
    """Seconds of a transfer between host and GPU."""
    assert config.cluster is not None
    return size / (config.cluster.host_gbs * 1e9 * config.cluster.link_share)


def iteration(config: Config, seconds: dict[MemoryPhase, float]) -> float:
    """All phases in sequence; with `rollout.max_staleness`, servers on GPUs of their own generate meanwhile."""
    generate = seconds[MemoryPhase.generate]
    rest = sum(seconds.values()) - generate
    alone = config.rollout.engine is not EngineKind.embedded and not config.rollout.is_colocated
    overlapping = config.rollout.max_staleness > 0 and alone
    return max(generate, rest) if overlapping else generate + rest


def row_operations(shape: ModelShape, prompt: int, response: int, role: Role) -> tuple[float, float]:
    """Floating-point operations of a forward pass over one row: in the layers, and in the actor's output layer.

    Two per matrix parameter that a token uses (the 2 N D of Kaplan et al. 2020; 6 N D with the backward pass): of a
    mixture of experts, the router's and those of the chosen experts. Causal attention has two products of 2 q per pair
    of tokens: n^2 / 2 pairs, or n w - w^2 / 2 in a window of w.
    """
    n = prompt + response
    w = min(n, shape.window or n)
    pairs = (shape.layers - shape.windowed_layers) * n**2 / 2 + shape.windowed_layers * (n * w - w**2 / 2)
    layers = 2.0 * n * shape.layers * shape.token_matrices + 4.0 * shape.queries * pairs
    return layers, 2.0 * response * shape.hidden * shape.vocab if role is Role.actor else 0.0


class _Passes:
    """Passes of a stage's rows through the trainer's models."""

    def __init__(
        self, config: Config, shape: ModelShape, cluster: ClusterConfig, layout: PlannedLayout, stage: StageConfig
    ) -> None:
        self.config, self.shape, self.cluster, self.layout, self.stage = config, shape, cluster, layout, stage
        self.size = machine_of(config).size

    def read(self, rows: PassRows) -> float:
        return self._pass(rows, rows.layers + rows.ending, exchanges=2, steps=1) if rows.count else 0.0

    def update(self, rows: PassRows, role: Role) -> float:
        """A backward pass costs two forward passes. A recomputed head, and recomputed layers, cost one more each."""
        if not rows.count:
            return 0.0
        update = self.stage.actor if role is Role.actor else self.stage.critic
        again = self.layout.recompute is Recompute.layers
        head = 4 if self.config.model.logits is Logits.recomputed else 3
        operations = rows.layers * (4 if again else 3) + rows.ending * head
        steps = max(1, rows.count // (update.mini_batch_prompts * self.stage.responses_per_prompt))
        passes = self._pass(rows, operations, exchanges=6 if again else 4, steps=steps)
        micro = passes / (steps * self._micro_batches(rows, steps))
        return passes + steps * self._reduce(role, micro, again=again)

    def _micro_batches(self, rows: PassRows, steps: int) -> int:
        """Micro-batches of a replica in one of `steps` optimizer steps, if all rows had the mean length."""
        share = -(-max(1, rows.count // steps) // self.layout.data)
        return max(1, -(-share // max(1, int(self.config.parallel.micro_batch_tokens // rows.tokens))))

    def _pass(self, rows: PassRows, operations: float, exchanges: int, steps: int) -> float:
        """Seconds of arithmetic, and of `exchanges` all-reduces of the hidden states per layer over the tensor ranks
        (Shoeybi et al. 2019): 2 (t - 1) / t times their bytes. The pipeline idles for (stages - 1) / micro-batches, or
        the virtual stages' part of that (Narayanan et al. 2021). All stages wait for the one with most layers."""
        layout, cluster, shape = self.layout, self.cluster, self.shape
        rate = layout.world * cluster.bf16_tflops * 1e12 * cluster.compute_share
        states = self.size * rows.tokens * shape.hidden
        t = layout.tensor
        most = max(layout.pipeline_layers.counts(shape.layers))
        sent = exchanges * most * 2 * (t - 1) / t * states * rows.count / layout.data
        link = cluster.nvlink_gbs if t <= cluster.gpus_per_node else cluster.network_gbs
        waiting = most * layout.pipeline / shape.layers
        busy = rows.count * operations / rate * waiting + sent / (link * 1e9 * cluster.link_share)
        busy += exchanges * most * rows.count / layout.data * self._dispatch(states)
        return busy * (1 + (layout.pipeline - 1) / (layout.virtual_pipeline * self._micro_batches(rows, steps)))

    def _dispatch(self, states: float) -> float:
        """Seconds of one all-to-all over the expert ranks, of a row's hidden states in one layer: each token goes to
        `per_token` experts, of which (e - 1) / e are on other ranks. There is one to the experts and one back. The
        ranks of `tensor` divide the tokens, and so do those of `context`."""
        layout, cluster, own = self.layout, self.cluster, self.shape.experts
        if own is None or layout.expert == 1:
            return 0.0
        within = layout.expert * layout.expert_cut <= cluster.gpus_per_node
        link = cluster.nvlink_gbs if within else cluster.network_gbs
        away = own.per_token * (layout.expert - 1) / layout.expert
        return away * states / (layout.tensor * layout.context) / (link * 1e9 * cluster.link_share)

    def _reduce(self, role: Role, micro: float, *, again: bool) -> float:
        """Seconds per optimizer step in which the replicas only communicate: they reduce-scatter fp32 gradients and
        all-gather weights, in a ring. The former runs during the last micro-batch's backward pass, the latter during
        the first one's forward pass, if they overlap. `micro`: seconds of a micro-batch; `again`: it has two forward
        passes, the second in the backward pass."""
        layout, cluster, parallel = self.layout, self.cluster, self.config.parallel
        link = cluster.nvlink_gbs if layout.world <= cluster.gpus_per_node else cluster.network_gbs
        of_byte = max(self._sent(role, stage) for stage in range(layout.pipeline)) / (link * 1e9 * cluster.link_share)
        forward = micro / (4 if again else 3)
        behind_gradients = micro - forward if parallel.overlap_grad_reduce else 0.0
        behind_weights = forward if parallel.overlap_param_gather else 0.0
        return max(0.0, 4 * of_byte - behind_gradients) + max(0.0, self.size * of_byte - behind_weights)

    def _sent(self, role: Role, stage: int) -> float:
        """Parameters that a rank sends when they pass once over the ranks that have the same."""
        layout = self.layout
        of_experts = expert_parameters(self.shape, layout, stage)
        dense = parameters(self.shape, layout, role, stage) - of_experts
        copies = layout.expert_data
        return dense * (layout.data - 1) / layout.data + of_experts * (copies - 1) / copies


@dataclass(frozen=True, slots=True)
class _Decoding:
    """The work of one engine in an iteration."""

    responses: float  # of the engine
    rows: float  # that it decodes at a time; those that do not fit wait
    step: float  # seconds of a step of these, with half of the response length on average


def _decoding(config: Config, shape: ModelShape, room: float) -> _Decoding | None:
    """None: the servers are outside this cluster."""
    split, stage, alone = split_of(config), last_stage(config), not config.rollout.is_served
    engines = split.trainers if alone else split.servers
    if not engines:
        return None
    mine = max(1.0, stage.count(stage.prompts()) * stage.samples / engines)
    rows = max(1.0, min(room, mine, mine if alone else config.rollout.servers.concurrency * stage.samples))
    length, costs = (
        config.rollout.max_prompt_tokens + config.rollout.max_response_tokens / 2,
        decode_costs(config, shape),
    )
    return _Decoding(mine, rows, costs.step(rows, rows * length, rows * costs.inside(length)))


def response_seconds(config: Config, shape: ModelShape, memory: Memory) -> float:
    """Seconds from the first to the last token of a response of full length, among as many as an engine runs."""
    of = _decoding(config, shape, memory.room)
    return 0.0 if of is None else config.rollout.max_response_tokens * of.step


def _generate(config: Config, shape: ModelShape, room: float) -> float:
    """Seconds of prefill and decoding (decoding.py)."""
    of = _decoding(config, shape, room)
    if of is None:
        return 0.0
    prefill = of.responses / last_stage(config).samples * config.rollout.max_prompt_tokens
    decoding = of.responses / of.rows * config.rollout.max_response_tokens * of.step
    return decoding + prefill * decode_costs(config, shape).row


def sync_seconds(config: Config, shape: ModelShape) -> float:
    """Seconds of a weight sync. Each pipeline stage gathers its weights over its tensor ranks and sends them once to
    each server. The copies of the model divide the servers, and a copy gathers what it sends (rollout/transfer.py). A
    server's workers receive everything. For the embedded engine, the weights pass over all ranks twice."""
    cluster, split = config.cluster, split_of(config)
    assert cluster is not None
    size = engine.weight_bytes(config, shape)
    actor = layouts_of(config, split.trainers)[Role.actor]
    servers, own = max(1, split.servers), size / actor.pipeline
    taken = servers / (actor.data * actor.context)  # how often a copy sends all of its weights
    gathered = own * min(1.0, taken) if actor.tensor * actor.expert > 1 else 0.0
    inside, between = (gbs * 1e9 * cluster.link_share for gbs in (cluster.nvlink_gbs, cluster.network_gbs))
    if not config.rollout.is_served:
        return 2 * size / (inside if cluster.nodes == 1 else between)
    sent = max(own * taken, size)
    stays = cluster.nodes == 1 or config.rollout.servers.transport is Transport.shared
    return gathered / inside + sent / (inside if stays else between)
