"""Seconds of each phase, from the cluster's configured rates. Use them to compare layouts, not to predict a run's time.

All responses are assumed to have their full length. Training passes are bound by arithmetic, at `compute_share` of the
peak, plus communication between tensor ranks and between replicas; decoding by memory, at `memory_share` of the
bandwidth; weight sync by the links, at `link_share`.
"""

from __future__ import annotations

from megatron_tempo.config.choices import EngineKind, Logits, Recompute
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.schema import ClusterConfig, Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.plan import engine
from megatron_tempo.plan.layout import PlannedLayout, machine_of, micro_batch_of, row_tokens
from megatron_tempo.plan.memory import Memory, MemoryPhase, host_bytes, layouts_of, places_of
from megatron_tempo.plan.parameters import Role, parameters, total_parameters
from megatron_tempo.plan.split import Split, split_of


def times(config: Config, shape: ModelShape, memory: Memory) -> dict[MemoryPhase, float]:
    """Seconds of the phases of one iteration of the last stage, without checkpoints, which are rare."""
    assert config.cluster is not None
    split = split_of(config)
    stage = [stage for stage in config.stages().values() if stage.iterations > 0][-1]
    layouts = layouts_of(config, split.trainers)
    actor, critic = (_Passes(config, shape, config.cluster, layouts[role], stage) for role in Role)
    rows = stage.responses_per_prompt
    actor_rows, critic_rows = rows * stage.count(stage.actor_prompts()), rows * stage.count(stage.critic_prompts())
    seconds_of = {
        MemoryPhase.generate: _generate(config, shape, config.cluster, split, stage, memory.room),
        MemoryPhase.values: critic.read(actor_rows if stage.has_critic else 0, Role.critic),
        MemoryPhase.critic: critic.update(critic_rows, Role.critic) * stage.critic.epochs,
        MemoryPhase.logprobs: actor.read(actor_rows, Role.actor) * (2 if stage.actor.kl_coef > 0 else 1),
        MemoryPhase.actor: actor.update(actor_rows, Role.actor) * stage.actor.epochs,
        MemoryPhase.sync: _sync(config, shape, config.cluster, split),
    }
    if config.parallel.offload:
        # Swap to the critic and back to the actor; to the reference model and back.
        seconds_of[MemoryPhase.values] += _turn(config, shape, split) * stage.has_critic
        seconds_of[MemoryPhase.logprobs] += _turn(config, shape, split) * (
            stage.has_critic + 2 * (stage.actor.kl_coef > 0)
        )
    return {phase: seconds for phase, seconds in seconds_of.items() if seconds}


def _turn(config: Config, shape: ModelShape, split: Split) -> float:
    """Seconds to load one model onto the GPU while another is offloaded, both at the host link's rate."""
    assert config.cluster is not None
    most = max(host_bytes(config, shape, place) / 2 for place in places_of(config, split.trainers))
    return most / (config.cluster.host_gbs * 1e9 * config.cluster.link_share)


def iteration(config: Config, seconds: dict[MemoryPhase, float]) -> float:
    """All phases in sequence; with `rollout.max_staleness`, an engine with GPUs of its own works beside the others."""
    generate = seconds[MemoryPhase.generate]
    rest = sum(seconds.values()) - generate
    overlaps = config.rollout.max_staleness and config.rollout.engine is not EngineKind.embedded
    return max(generate, rest) if overlaps else generate + rest


def row_operations(shape: ModelShape, prompt: int, response: int, role: Role) -> tuple[float, float]:
    """Floating-point operations of a forward pass over one row: in the layers, and in the actor's output layer.

    Two per matrix parameter and token (the 2 N D of Kaplan et al. 2020; 6 N D with the backward pass). Causal attention
    has two products of 2 q per pair of tokens: n^2 / 2 pairs, or n w - w^2 / 2 in a window of w.
    """
    n = prompt + response
    matrices = (2 * shape.queries + 2 * shape.keys + 3 * shape.ffn) * shape.hidden
    w = min(n, shape.window or n)
    pairs = (shape.layers - shape.windowed_layers) * n**2 / 2 + shape.windowed_layers * (n * w - w**2 / 2)
    layers = 2.0 * n * shape.layers * matrices + 4.0 * shape.queries * pairs
    return layers, 2.0 * response * shape.hidden * shape.vocab if role is Role.actor else 0.0


class _Passes:
    """Passes of a stage's rows through the trainer's models."""

    def __init__(
        self, config: Config, shape: ModelShape, cluster: ClusterConfig, layout: PlannedLayout, stage: StageConfig
    ) -> None:
        self.config, self.shape, self.cluster, self.layout, self.stage = config, shape, cluster, layout, stage
        self.size = machine_of(config).size
        self.lengths = (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens)

    def read(self, rows: int, role: Role) -> float:
        layers, ending = row_operations(self.shape, *self.lengths, role)
        return self._pass(rows, layers + ending, exchanges=2, steps=1) if rows else 0.0

    def update(self, rows: int, role: Role) -> float:
        """A backward pass costs two forward passes. A recomputed head, and recomputed layers, cost one more each."""
        if not rows:
            return 0.0
        layers, ending = row_operations(self.shape, *self.lengths, role)
        update = self.stage.actor if role is Role.actor else self.stage.critic
        again = self.layout.recompute is Recompute.layers
        operations = layers * (4 if again else 3) + ending * (4 if self.config.model.logits is Logits.recomputed else 3)
        steps = max(1, rows // (update.mini_batch_prompts * self.stage.responses_per_prompt))
        passes = self._pass(rows, operations, exchanges=6 if again else 4, steps=steps)
        count = micro_batch_of(self.config, self.layout, max(1, rows // steps)).count
        return passes + steps * self._reduce(role, passes / (steps * count), again=again)

    def _pass(self, rows: int, operations: float, exchanges: int, steps: int) -> float:
        """Seconds of arithmetic, and of `exchanges` all-reduces of the hidden states per layer over the tensor ranks
        (Shoeybi et al. 2019): 2 (t - 1) / t times their bytes. The pipeline idles for (stages - 1) / micro-batches, or
        the virtual stages' part of that (Narayanan et al. 2021). All stages wait for the one with most layers."""
        layout, cluster, shape = self.layout, self.cluster, self.shape
        rate = layout.world * cluster.bf16_tflops * 1e12 * cluster.compute_share
        states = self.size * row_tokens(self.config) * shape.hidden
        t = layout.tensor
        most = max(layout.pipeline_layers.counts(shape.layers))
        sent = exchanges * most * 2 * (t - 1) / t * states * rows / layout.data
        link = cluster.nvlink_gbs if t <= cluster.gpus_per_node else cluster.network_gbs
        micro = micro_batch_of(self.config, layout, max(1, rows // steps))
        waiting = most * layout.pipeline / shape.layers
        busy = rows * operations / rate * waiting + sent / (link * 1e9 * cluster.link_share)
        return busy * (1 + (layout.pipeline - 1) / (layout.virtual_pipeline * micro.count))

    def _reduce(self, role: Role, micro: float, *, again: bool) -> float:
        """Seconds per optimizer step in which the replicas only communicate: they reduce-scatter fp32 gradients and
        all-gather weights, in a ring. The former runs during the last micro-batch's backward pass, the latter during
        the first one's forward pass, if they overlap. `micro`: seconds of a micro-batch; `again`: it has two forward
        passes, the second in the backward pass."""
        layout, cluster, parallel = self.layout, self.cluster, self.config.parallel
        count = max(parameters(self.shape, layout, role, stage) for stage in range(layout.pipeline))
        link = cluster.nvlink_gbs if layout.world <= cluster.gpus_per_node else cluster.network_gbs
        of_byte = count * (layout.data - 1) / layout.data / (link * 1e9 * cluster.link_share)
        forward = micro / (4 if again else 3)
        behind_gradients = micro - forward if parallel.overlap_grad_reduce else 0.0
        behind_weights = forward if parallel.overlap_param_gather else 0.0
        return max(0.0, 4 * of_byte - behind_gradients) + max(0.0, self.size * of_byte - behind_weights)


def _generate(
    config: Config, shape: ModelShape, cluster: ClusterConfig, split: Split, stage: StageConfig, room: float
) -> float:
    """Seconds of prefill and decoding.

    Each decoding step reads the weights, and the keys and values of the running rows, at half the response length on
    average; or it takes as long as its arithmetic, if that is longer. Rows that do not fit wait.

    The embedded engine accesses its cache more than once per step: it repeats it to the number of query heads (read,
    written, and read as often).
    """
    servers = config.rollout.servers
    alone = not config.rollout.is_served
    engines = split.trainers if alone else split.servers
    if not engines:  # servers outside this cluster
        return 0.0
    tensor = 1 if alone else servers.tensor
    requests, samples = stage.count(stage.prompts()), stage.samples
    mine = max(1.0, requests * samples / engines)
    rows = max(1.0, min(room, mine, mine if alone else servers.concurrency * samples))
    prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
    length = prompt + response / 2
    seen = min(length, shape.window or length)
    tokens = length + (seen - length) * shape.windowed_layers / shape.layers
    handled = 1 + 2 * shape.heads / shape.groups if alone else 1
    cache = handled * rows * tokens * engine.token_bytes(config, shape, tensor)
    read = engine.weight_bytes(config, shape) / tensor + cache
    rate = tensor * cluster.bf16_tflops * 1e12 * cluster.compute_share
    arithmetic = 2.0 * total_parameters(shape) / rate
    step = max(read / (cluster.memory_tbs * 1e12 * cluster.memory_share), rows * arithmetic)
    return mine / rows * response * step + requests / engines * prompt * arithmetic


def _sync(config: Config, shape: ModelShape, cluster: ClusterConfig, split: Split) -> float:
    """Seconds of a weight sync. Each pipeline stage gathers its weights over its tensor ranks and sends them once to
    each server (rollout/transfer.py). For the embedded engine, they pass over all ranks twice."""
    size = engine.weight_bytes(config, shape)
    gathered = size / config.parallel.pipeline if config.parallel.tensor > 1 else 0.0
    inside, between = (gbs * 1e9 * cluster.link_share for gbs in (cluster.nvlink_gbs, cluster.network_gbs))
    if not config.rollout.is_served:
        return 2 * size / (inside if cluster.nodes == 1 else between)
    sent = size / config.parallel.pipeline * max(1, split.servers)
    return gathered / inside + sent / (inside if cluster.nodes == 1 else between)
