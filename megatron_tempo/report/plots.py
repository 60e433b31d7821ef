"""Pictures of scores as files. The colours are those of Okabe and Ito, which colour-blind readers can distinguish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_tempo.report.summary import Run, Stage, printable

BLUE, ORANGE, GREEN, INK, MUTED = "#0072B2", "#D55E00", "#009E73", "#24292f", "#6b7280"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7")
SHADES = ("#eef1f4", "#dfeaf4")  # of the stages, in turn

STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#c9ced6",
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_tempo",
}


def plot_curves(run_dir: Path, path: Path) -> None:
    """Writes the scores of each set over the iterations, side by side. The path's suffix sets the format (PNG, ...)."""
    run = Run.read(run_dir)
    sets = run.sets()
    if not sets:
        raise ValueError(f"{run_dir} has no evaluations to plot: give a run that has evaluated a set")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0 * len(sets), 3.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for axes, name in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
            _draw_scores(axes, run, name)
        figure.savefig(path, dpi=160)


def _draw_scores(axes: Axes, run: Run, name: str) -> None:
    # Two evaluations at the same step (between stages) are one point.
    records = list({record["step"]: record for record in run.evaluations if record["set"] == name}.values())
    steps = [record["step"] for record in records]
    curves = [(f"avg@{records[0]['avg_k']}", _floats(r["avg"] for r in records), _floats(r["avg_se"] for r in records))]
    for k in dict.fromkeys(k for record in records for k in record["pass"]):
        values, errors = (_floats(r[field].get(k) for r in records) for field in ("pass", "pass_se"))
        curves.append((f"pass@{k}", values, errors))
    for i, (label, values, errors) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(steps, values, color=colour, marker="o", markersize=3.5, label=label)
        axes.fill_between(steps, values - errors, values + errors, color=colour, alpha=0.18, linewidth=0)
    highest = np.nanmax(np.concatenate([np.nan_to_num(values) for _, values, _ in curves]))
    axes.set(title=printable(name), ylabel="score (fraction right)", ylim=(0.0, min(max(1.25 * highest, 0.1), 1.05)))
    _draw_stages(axes, run.stages())
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(curves))  # below the axes: not over the data


def _draw_stages(axes: Axes, stages: Sequence[Stage]) -> None:
    """Shades and labels the stages; the x axis counts iterations over the run."""
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_title(axes.get_title("left"), pad=18)
    if not stages:
        return
    total = stages[-1].last
    for i, stage in enumerate(stages):
        axes.axvspan(stage.first - 1, stage.last, color=SHADES[i % 2], zorder=0, linewidth=0)
        wide = (stage.last - stage.first + 1) / total > 0.3
        axes.annotate(
            stage.label if wide else stage.label.split(" · ")[-1],
            xy=((stage.first - 1 + stage.last) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=MUTED,
        )
    axes.set_xlim(0, max(total, 1))


def _floats(values: Iterator[float | None] | Sequence[float | None]) -> np.ndarray:
    """As an array, with NaN (a gap in a curve) for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)
