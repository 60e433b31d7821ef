"""The text that `megatron-tempo plan` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_tempo.config.choices import RouterReplay
from megatron_tempo.config.extensions import Extension, short_name
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.schema import Config
from megatron_tempo.config.summary import layout_words as config_words
from megatron_tempo.plan import placements
from megatron_tempo.plan.layout import machine_of
from megatron_tempo.plan.memory import GB, Part, host_bytes, places_of, routed_bytes, saved_bytes
from megatron_tempo.plan.parameters import Role, active_parameters, resident, total_parameters
from megatron_tempo.plan.placements import seconds_text
from megatron_tempo.plan.search import MORE, SHORTER, Plan, best_of_each, nearest, relief
from megatron_tempo.plan.split import takes_turns

ROWS = 12  # of the table of layouts
GAIN, GAIN_SHARE = 1.0, 0.01  # a layout is proposed if it saves these seconds, and this share, of an iteration


def report(config: Config, shape: ModelShape, own: Plan, plans: list[Plan]) -> str:
    """The configuration's own plan, and the layouts that fit."""
    parts = [
        "\n".join(_head(config, shape, own)),
        "\n".join(_memory(own)),
        "\n".join(_models(shape, own)),
        "\n".join(_times(own)),
        "\n".join(_verdict(shape, own, plans)),
        "\n".join(_layouts(own, plans)),
        "\n".join(placements.compared(own, plans)),
    ]
    return "\n\n".join(part for part in parts if part)


def _head(config: Config, shape: ModelShape, own: Plan) -> Iterator[str]:
    cluster, split = config.cluster, own.split
    assert cluster is not None
    active = f" ({active_parameters(shape) / GB:.2f} of them active for a token)" if shape.experts is not None else ""
    yield (
        f"{total_parameters(shape) / GB:.2f} billion parameters{active}, {shape.layers} layers, on {cluster.gpus} x "
        f"{cluster.gpu or 'GPU'} of {cluster.memory_gb:g} GB, of which {cluster.reserve_gb:g} GB are reserved"
    )
    engine = config.rollout.engine.name
    if not config.rollout.is_served:
        engine += " in the trainer's processes"
        if isinstance(config.rollout.engine, Extension):
            engine += " (its memory and times are those of the embedded engine)"
    elif not split.servers:
        engine += " servers outside this cluster"
    else:
        where = f"disaggregated on {split.serving} GPUs"
        if config.rollout.is_colocated:
            where = "colocated on the trainer's GPUs, by turns"
        elif split.shared:
            where = "on GPUs that the trainer uses too, and both keep their memory"
        servers = "1 server" if split.servers == 1 else f"{split.servers} servers"
        engine += f", {servers} with tensor {config.rollout.servers.tensor}, {where}"
    yield f"trainer: {split.trainers} GPUs, {layout_words(own)}; engine: {engine}"


def layout_words(plan: Plan) -> str:
    """The layouts, in the words of `check`."""
    own = {Role.actor: plan.config.parallel, Role.critic: plan.config.parallel.of_critic()}
    actor, critic = (config_words(own[role], plan.layouts[role].data) for role in Role)
    turns = ", one model at a time" if takes_turns(plan.config) else ""
    return actor + (f"; critic {critic}" if critic != actor else "") + turns


def _memory(own: Plan) -> list[str]:
    parts = [part for part in Part if any(part in of for of in own.memory.phases.values())]
    rows = [["GB per GPU", *(part.value for part in parts), "total", "free"]]
    for phase, of in own.memory.phases.items():
        total = own.memory.total(phase)
        cells = [f"{of[part] / GB:.1f}" if part in of else "" for part in parts]
        rows.append([phase.value, *cells, f"{total / GB:.1f}", f"{(own.memory.limit - total) / GB:.1f}"])
    lines = aligned(rows)
    if own.config.rollout.is_colocated:
        lines.append(placements.ORDER)
    if own.memory.room:
        lines.append(f"{own.memory.room:.0f} rows of full length fit in each server or process at a time")
    return lines


def _models(shape: ModelShape, own: Plan) -> list[str]:
    """Bytes of each model on the first and the last pipeline stage, and on the one with most layers."""
    machine = machine_of(own.config)
    rows = [["GB resident", "weights", "gradients", "optimizer"]]
    for role in Role:
        last, counts = own.layouts[role].pipeline - 1, own.layouts[role].pipeline_layers.counts(shape.layers)
        for stage in sorted({0, last, counts.index(max(counts))}):
            held = resident(shape, own.layouts[role], machine, role, stage)
            name = role.value + (f", stage {stage + 1} of {last + 1}" if last else "")
            rows.append([name, *(f"{size / GB:.1f}" for size in (held.weights, held.gradients, held.optimizer))])
    return [*aligned(rows), *_host(shape, own)]


def _host(shape: ModelShape, own: Plan) -> Iterator[str]:
    """The host memory of offloaded models, and of each process's share of a checkpoint."""
    cluster, config = own.config.cluster, own.config
    assert cluster is not None
    places, count = places_of(config, own.split.trainers), -(-own.split.trainers // cluster.nodes)
    if takes_turns(config):
        most = max(host_bytes(config, shape, place) for place in places)
        yield f"page-locked host memory per node: {count} processes x {most / GB:.1f} = {count * most / GB:.0f} GB"
    if shape.experts is not None and config.model.router_replay is not RouterReplay.off:
        yield f"host memory for the experts of an iteration's tokens: up to {routed_bytes(config, shape) / GB:.0f} GB"
    most = max(saved_bytes(config, shape, place) for place in places)
    yield f"host memory per node for checkpoints: {count} processes x {most / GB:.1f} = {count * most / GB:.0f} GB"


def _times(own: Plan) -> list[str]:
    cluster = own.config.cluster
    assert cluster is not None
    rows = [["seconds", *(phase.value for phase in own.seconds), "iteration"]]
    rows.append(["at full length", *map(seconds_text, own.seconds.values()), seconds_text(own.iteration)])
    return [
        *aligned(rows),
        f"assumed: {cluster.compute_share:.0%} of {cluster.bf16_tflops:g} TFLOP/s, {cluster.memory_share:.0%} of "
        f"{cluster.memory_tbs:g} TB/s, {cluster.link_share:.0%} of {cluster.nvlink_gbs:g} and {cluster.network_gbs:g} "
        f"GB/s; not measured",
    ]


def _verdict(shape: ModelShape, own: Plan, plans: list[Plan]) -> Iterator[str]:
    if own.over is None:
        yield f"fits: {own.memory.largest.value} needs most, {own.memory.total(own.memory.largest) / GB:.1f} GB"
        return
    yield f"does not fit: {own.over}"
    change = nearest(plans)
    if change is not None:
        yield f"smallest change that fits: {' '.join(change.words)}"
        return
    yield "no layout on these GPUs fits"
    others = list(relief(own.config, shape))
    yield from (f"change that fits: {' '.join(other.words)}" for other in others)
    if not others:
        yield f"not even with {MORE[-1]} times as many nodes, or with 1/{SHORTER[-1]} of the response length"


def _layouts(own: Plan, plans: list[Plan]) -> list[str]:
    shown = best_of_each(plans)
    experts = ["expert x tensor"] if any(plan.layout.expert > 1 for plan in (own, *plans)) else []
    rows = [
        ["", "tensor", "pipeline", "data", *experts, "trainer GPUs", "engine", "peak GB", "in phase", "rows", "seconds"]
    ]
    mine = own if own.over is None else None
    listed = shown[:ROWS]
    if mine is not None:
        listed = [mine if not plan.words else plan for plan in listed]
        if mine not in listed:
            listed.append(mine)
    else:
        listed = [*listed, own]
    for plan in listed:
        cells, layout = layout_row(plan), plan.layout
        shares = [f"{layout.expert} x {layout.expert_cut}"] if experts else []
        rows.append(["*" if plan is own else "", *cells[:3], *shares, *cells[3:]])
    lines = ["layouts that fit, fastest first (* the given one)" if own.over is None else
             "layouts that fit, fastest first; the last row (*) is the given one, which does not fit"]  # fmt: skip
    return [*lines, *aligned(rows), *_pasted(mine, shown[:1])]


def layout_row(plan: Plan) -> list[str]:
    """Cells of the table of layouts."""
    servers, split, layout = plan.config.rollout.servers, plan.split, plan.layout
    engine = f"{split.serving} GPUs, tensor {servers.tensor}"
    if not plan.config.rollout.is_served:
        engine = short_name(plan.config.rollout.engine.name)
    elif split.shared:
        how = "colocated" if plan.config.rollout.is_colocated else "shared"
        engine = f"{how}, tensor {servers.tensor}"
    elif not split.servers:
        engine = "elsewhere"
    largest = plan.memory.largest
    return [
        *map(str, (layout.tensor, layout.pipeline, layout.data, split.trainers)),
        engine,
        f"{plan.memory.total(largest) / GB:.1f}",
        largest.value,
        f"{plan.memory.room:.0f}",
        seconds_text(plan.iteration),
    ]


def _pasted(mine: Plan | None, best: Sequence[Plan]) -> Iterator[str]:
    """The fastest plan as overrides, unless the given one, `mine`, is as fast by what an estimate can tell."""
    for plan in best:
        if plan.words and (mine is None or mine.iteration - plan.iteration >= max(GAIN, GAIN_SHARE * mine.iteration)):
            yield f"fastest: {' '.join(plan.words)}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text: the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
