"""Plots the memory of a plan by phase, stacked by part, next to the GPU's memory."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_tempo.plan.memory import GB, Part
from megatron_tempo.plan.search import Plan
from megatron_tempo.plan.table import layout_words
from megatron_tempo.report.plots import BLUE, GREEN, INK, ORANGE, STYLE

_COLOURS = {
    Part.weights: BLUE,
    Part.fp8: "#3f8fc4",
    Part.gradients: "#56B4E9",
    Part.optimizer: "#9ecae1",
    Part.reference: "#004c73",
    Part.engine: GREEN,
    Part.cache: "#7fd1b9",
    Part.asleep: "#cdeee2",
    Part.batch: "#999999",
    Part.activations: ORANGE,
    Part.head: "#E69F00",
    Part.buffers: "#CC79A7",
}


def draw(plan: Plan, path: Path) -> None:
    """Writes the plot. The path's suffix sets the format."""
    cluster = plan.config.cluster
    assert cluster is not None
    phases = list(plan.memory.phases)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 0.95 * len(phases), 4.2), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        below = [0.0] * len(phases)
        for part in Part:
            sizes = [plan.memory.phases[phase].get(part, 0.0) / GB for phase in phases]
            if any(sizes):
                axes.bar(range(len(phases)), sizes, 0.7, below, color=_COLOURS[part], label=part.value)
                below = [low + size for low, size in zip(below, sizes, strict=True)]
        limits = ((cluster.memory_gb, "GPU memory", "-"), (plan.memory.limit / GB, "GPU memory minus reserve", "--"))
        for height, label, style in limits:
            axes.axhline(height, color=INK, linewidth=1, linestyle=style, label=label)
        # A cache that is far too large would hide the rest.
        axes.set_ylim(0, min(max(*below, cluster.memory_gb) * 1.05, 2.5 * cluster.memory_gb))
        axes.set_xticks(range(len(phases)), [phase.value for phase in phases])
        axes.grid(visible=False, axis="x")
        axes.set(title=layout_words(plan), ylabel="peak GB per GPU")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        figure.savefig(path, dpi=160)
