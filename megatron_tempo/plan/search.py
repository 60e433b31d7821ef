"""Searches the layouts of a cluster that satisfy the rules: which fit, how fast they are, which needs fewest changes.

The search varies tensor and pipeline parallelism (data parallelism follows), how ranks share a mixture's experts, how
many GPUs of each node serve and with which tensor parallelism, and, if that saves memory, the token budget,
recomputation, offload and the embedded engine's rows. The layers of the pipeline's ends, and its virtual stages, stay
as configured while the number of stages does. Context parallelism stays as configured. A tensor-parallel group stays
inside a node, and sequence parallelism follows tensor parallelism. Servers that are colocated with the trainer are
tried too, on all GPUs. On several nodes each must then hold a whole copy of the model, which leaves no pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megatron_tempo.config.choices import EngineKind, EnginePrecision, Placement, Recompute, Transport
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.problem import show
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.config.rules.layout import divisors
from megatron_tempo.config.schema import Config
from megatron_tempo.plan import engine
from megatron_tempo.plan.layout import PlannedLayout, row_tokens
from megatron_tempo.plan.memory import Memory, MemoryPhase, Over, layouts_of, least_rows, memory
from megatron_tempo.plan.parameters import Role, total_parameters
from megatron_tempo.plan.split import Split, laid_out, split_of
from megatron_tempo.plan.times import iteration, moving_seconds, response_seconds, times

SERVERS = EngineKind.vllm  # the served engine that is tried if the configuration has the embedded one
# Parameters from which on it is tried: a smaller model generates in no time, and a server takes a minute to start.
SERVED = 100_000_000

# What follows `rollout.placement` in the presets: a suggestion that changes it states all of these.
_FOLLOWING = tuple(f"rollout.servers.{name}" for name in ("devices", "replicas", "transport", "each_node"))

LESS = 0.8  # share of a GPU's memory for a colocated server, where the usual one is too much

# What belongs to a number of pipeline stages, and its value for other numbers.
_STAGES: dict[str, int | None] = {
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "virtual_pipeline": 1,
}

# Tried if nothing fits: multiples of the number of nodes, fractions of the response length.
MORE, SHORTER = (2, 4, 8), (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration on its cluster. `words`: the overrides that turn the given configuration into it."""

    words: tuple[str, ...]
    config: Config
    layouts: dict[Role, PlannedLayout]
    split: Split
    memory: Memory
    seconds: dict[MemoryPhase, float]
    moving: float  # those of `seconds` in which models and weights are on their way
    response: float  # seconds of one response of full length

    @property
    def layout(self) -> PlannedLayout:
        """The actor's layout."""
        return self.layouts[Role.actor]

    @property
    def over(self) -> Over | None:
        return self.memory.over()

    @property
    def iteration(self) -> float:
        return iteration(self.config, self.seconds)


def plan_of(config: Config, shape: ModelShape, words: tuple[str, ...] = ()) -> Plan:
    """The plan of a configuration, which has passed `split.problems`."""
    split = split_of(config)
    needed = memory(config, shape)
    seconds, moving = times(config, shape, needed), sum(moving_seconds(config, shape))
    response = response_seconds(config, shape, needed)
    return Plan(words, config, layouts_of(config, split.trainers), split, needed, seconds, moving, response)


def search(config: Config, shape: ModelShape) -> list[Plan]:
    """All layouts that fit, the shortest iteration first."""
    plans = []
    for changes in _changes(config, shape):
        changed, words = _changed(config, changes)
        if laid_out(changed, shape):
            continue
        plans.append(plan_of(changed, shape, words))
    return sorted((plan for plan in plans if plan.over is None), key=lambda plan: (plan.iteration, len(plan.words)))


def best_of_each(plans: list[Plan]) -> list[Plan]:
    """The fastest plan for each tensor x pipeline x data and split of the GPUs, in the order given."""
    seen: dict[tuple[object, ...], Plan] = {}
    for plan in plans:
        layout = plan.layout
        colocated = plan.config.rollout.is_colocated
        seen.setdefault((layout.tensor, layout.pipeline, layout.data, plan.split.serving, colocated), plan)
    return list(seen.values())


def nearest(plans: list[Plan]) -> Plan | None:
    """The plan with the fewest changes; among equals the fastest."""
    return min(plans, key=lambda plan: (len(plan.words), plan.iteration), default=None)


def relief(config: Config, shape: ModelShape) -> Iterator[Plan]:
    """If no layout of the cluster fits: the nearest plan on more nodes, and the nearest one with shorter responses."""
    assert config.cluster is not None
    nodes = [config.cluster.nodes * times for times in MORE]
    lengths = [config.rollout.max_response_tokens // share for share in SHORTER]
    for path, values in (("cluster.nodes", nodes), ("rollout.max_response_tokens", lengths)):
        for value in values:
            changed, words = _changed(config, {path: value})
            if plan := nearest(search(changed, shape)):
                yield replace(plan, words=(*words, *plan.words))
                break


def _changes(config: Config, shape: ModelShape) -> Iterator[dict[str, object]]:
    """Changes to try: new values of fields, by path."""
    for served_by in _engines(config, shape):
        served = _changed(config, served_by)[0]
        for training in _training(served, shape, split_of(served).trainers):
            yield served_by | training


def _training(config: Config, shape: ModelShape, trainers: int) -> Iterator[dict[str, object]]:
    assert config.cluster is not None
    nodes = config.cluster.training_nodes
    inside = trainers // nodes if trainers % nodes == 0 else trainers
    budgets = {config.parallel.micro_batch_tokens, min(config.parallel.micro_batch_tokens, row_tokens(config))}
    kinds = dict.fromkeys([config.parallel.recompute, Recompute.layers])  # in this order, independent of hashes
    colocated = config.rollout.is_colocated  # models take turns there, whatever is set
    turns = [config.parallel.offload] if colocated else list(dict.fromkeys([config.parallel.offload, True]))
    for tensor in (n for n in divisors(shape.heads) if inside % n == 0):
        for pipeline in (n for n in divisors(trainers // tensor) if n <= shape.layers):
            given = pipeline == config.parallel.pipeline
            stages = {
                f"parallel.{name}": getattr(config.parallel, name) if given else other
                for name, other in _STAGES.items()
            }
            # Keep the configuration's own choice where possible: one override less.
            sequence = tensor > 1 and (config.parallel.sequence or tensor != config.parallel.tensor)
            for sequenced in {sequence, tensor > 1}:
                shares = list(_experts(config, shape, tensor, trainers // pipeline))
                for budget, recompute, offload, experts in product(budgets, kinds, turns, shares):
                    yield (
                        stages
                        | experts
                        | {
                            "parallel.tensor": tensor,
                            "parallel.pipeline": pipeline,
                            "parallel.sequence": sequenced,
                            "parallel.micro_batch_tokens": budget,
                            "parallel.recompute": recompute,
                            "parallel.offload": offload,
                        }
                    )


def _experts(config: Config, shape: ModelShape, tensor: int, ranks: int) -> Iterator[dict[str, object]]:
    """How `ranks` of a pipeline stage may share the experts, whole or cut as the dense matrices. The ranks that hold
    all experts are inside a node, unless more are configured. The configured value stays where it says the same."""
    own, cluster = shape.experts, config.cluster
    if own is None:
        yield {}
        return
    assert cluster is not None
    given = config.parallel.expert_tensor
    for cut in {1, tensor}:
        kept = given if cut == (tensor if given is None else given) else cut
        for expert in divisors(own.count):
            if ranks % (expert * cut) == 0 and expert * cut <= max(cluster.gpus_per_node, config.parallel.expert):
                yield {"parallel.expert": expert, "parallel.expert_tensor": kept}


def _engines(config: Config, shape: ModelShape) -> Iterator[dict[str, object]]:
    """The configuration's own engine, the embedded one with fewer rows, servers on some of each node's GPUs, and
    servers on the trainer's."""
    cluster, rollout = config.cluster, config.rollout
    assert cluster is not None
    yield {}
    if rollout.servers.addresses is not None and rollout.is_served:
        return
    if isinstance(rollout.engine, Extension):  # nothing is known of its memory
        return
    if not rollout.is_served:
        rows = least_rows(config)
        while rows < rollout.batch_rows:
            yield {"rollout.batch_rows": rows}
            rows *= 2
    if cluster.rollout_nodes:  # all servers are on those nodes
        return
    if not rollout.is_served and total_parameters(shape) < SERVED:
        return
    kind = rollout.engine if rollout.is_served else SERVERS
    for changes in (*_disaggregated(config, shape), *_colocated(config, shape, kind)):
        yield {"rollout.engine": kind} | changes


def _disaggregated(config: Config, shape: ModelShape) -> Iterator[dict[str, object]]:
    """The last GPUs of each node serve. Servers of a node that shares memory with them are on one node only."""
    cluster = config.cluster
    assert cluster is not None
    node, transport = cluster.gpus_per_node, config.rollout.servers.transport
    for serving in range(1, node):
        world = (node - serving) * cluster.nodes
        for tensor in (n for n in divisors(serving) if shape.heads % n == 0):
            yield _processes(config, world) | {
                "rollout.placement": Placement.disaggregated,
                "rollout.servers.devices": list(range(node - serving, node)),
                "rollout.servers.tensor": tensor,
                "rollout.servers.replicas": serving // tensor,
                "rollout.servers.each_node": _on_each(config),
                "rollout.servers.transport": Transport.group if cluster.nodes > 1 else transport,
            }


def _colocated(config: Config, shape: ModelShape, kind: EngineKind) -> Iterator[dict[str, object]]:
    """All GPUs train and serve by turns, with a smaller share for the servers if the trainer keeps
    FP8 weights there. FP8 servers do not take weights from shared memory."""
    cluster, servers = config.cluster, config.rollout.servers
    assert cluster is not None
    if servers.precision is EnginePrecision.fp8:
        return
    node = cluster.gpus_per_node
    arguments = [servers.arguments]
    if config.run.precision in RECIPES and engine.fraction_of(config) == engine.FRACTION:
        arguments.append([*servers.arguments, f"{engine.FRACTION_OPTIONS[kind]}={LESS}"])
    for tensor, words in product((n for n in divisors(node) if shape.heads % n == 0), arguments):
        yield _processes(config, node * cluster.nodes) | {
            "rollout.placement": Placement.colocated,
            "rollout.servers.devices": None,
            "rollout.servers.tensor": tensor,
            "rollout.servers.replicas": node // tensor,
            "rollout.servers.each_node": _on_each(config),
            "rollout.servers.transport": Transport.shared,
            "rollout.servers.arguments": words,
        }


def _on_each(config: Config) -> bool:
    """Of several nodes, each; of a single node it says nothing."""
    assert config.cluster is not None
    return config.cluster.nodes > 1 or config.rollout.servers.each_node


def _processes(config: Config, world: int) -> dict[str, object]:
    return {} if config.parallel.world_size is None else {"parallel.world_size": world}


def _changed(config: Config, changes: dict[str, object]) -> tuple[Config, tuple[str, ...]]:
    """A copy with these values, and the overrides for those that differ from the configuration.

    Only the groups that change are copied: a search makes hundreds of configurations, and none of them is modified.
    """
    changed, words = copy(config), []
    moves = changes.get("rollout.placement", config.rollout.placement) is not config.rollout.placement
    copied: dict[tuple[str, ...], Any] = {(): changed}
    for path, value in changes.items():
        *groups, name = path.split(".")
        node = changed
        for depth, group in enumerate(groups, start=1):
            key = tuple(groups[:depth])
            if key not in copied:
                copied[key] = copy(getattr(node, group))
                setattr(node, group, copied[key])
            node = copied[key]
        if getattr(node, name) != value:
            setattr(node, name, value)
            words.append(_word(path, value))
        elif moves and path in _FOLLOWING:
            words.append(_word(path, value))
    return changed, tuple(words)


def _word(path: str, value: object) -> str:
    """An override that can be pasted into a shell: lists are quoted."""
    if isinstance(value, list):
        entries = (f'"{entry}"' if isinstance(entry, str) else show(entry) for entry in value)
        return f"'{path}=[{','.join(entries)}]'"
    return f"{path}={show(value)}"
