"""The report's figures. The colours are those of Okabe and Ito, which colour-blind readers can distinguish."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from megatron_tempo.observability.records import Record
from megatron_tempo.report.summary import Milestone, Run, Stage, printable

BLUE, ORANGE, GREEN, INK, MUTED = "#0072B2", "#D55E00", "#009E73", "#24292f", "#6b7280"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7")
SHADES = ("#eef1f4", "#dfeaf4")  # of the stages, in turn
WIDE, NARROW = (4.3, 3.0), (3.6, 2.7)  # inches: one of two and of three columns; the full width of a phone
SCIENTIFIC = (-3, 5)  # powers of ten beyond which tick labels would not fit next to the axis label
POINTS = 800  # longer curves are thinned out to about this number of points

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

# Training curves: title, unit, curves (name in metrics.jsonl, label), logarithmic.
CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...], bool], ...] = (
    (
        "Reward",
        "mean over responses",
        (
            ("reward/labelled", "labelled, verified"),
            ("reward/unlabelled_value", "unlabelled, critic's value"),
            ("reward/unlabelled", "unlabelled, agreement"),
        ),
        False,
    ),
    ("Entropy", "nats per token", (("actor/entropy", "actor"),), False),
    ("Clipping", "fraction of tokens clipped", (("actor/clip_fraction", "actor"),), False),
    (
        "Policy ratio",
        "ratio to the old policy",
        (("actor/ratio_max", "largest"), ("actor/ratio_min", "smallest")),
        False,
    ),
    ("KL to the old policy", "nats per token", (("actor/approx_kl", "actor"),), False),
    ("Gradient norm", "2-norm before clipping", (("actor/grad_norm", "actor"), ("critic/grad_norm", "critic")), True),
    ("Critic loss", "mean squared error", (("critic/loss", "critic"),), False),
    ("Response length", "tokens", (("response_length/mean", "mean"),), False),
    ("Truncated responses", "fraction of responses", (("truncated", "truncated"),), False),
    ("Throughput", "tokens per second", (("tokens_per_second", "tokens"),), False),
)


def score_panel(run: Run, name: str) -> Figure:
    """avg@k and pass@k of one set over the iterations."""
    with panel(WIDE) as (figure, axes):
        _draw_scores(axes, run, name)
    return figure


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


def reliability(milestone: Milestone, record: Record) -> Figure:
    """Fraction of correct responses over the mean value of each bin, for the value after the last token."""
    rows = record["calibration"]["last"]["bins"]
    with panel(WIDE) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1, label="perfectly calibrated")
        counts = np.array([row["count"] for row in rows])
        x, y = [row["mean_value"] for row in rows], [row["fraction_right"] for row in rows]
        axes.plot(x, y, color=BLUE, linewidth=1)
        axes.scatter(x, y, s=20 + 180 * counts / counts.max(), color=BLUE, alpha=0.75, linewidths=0, label="critic")
        axes.set(
            title=milestone.label.capitalize(),
            xlabel="value after the last token (mean of a bin)",
            ylabel="fraction right",
            xlim=(-0.04, 1.04),
            ylim=(-0.04, 1.04),
        )
        legend = axes.legend(loc="upper left")
        legend.legend_handles[1].set_sizes([40])  # type: ignore[union-attr]
    return figure


def by_prefix(milestones: Sequence[tuple[Milestone, Record]], score: str, title: str, label: str) -> Figure:
    """One of auroc, brier, ece over the fraction of the response that the critic has read."""
    with panel(NARROW) as (figure, axes):
        for colour, (milestone, record) in zip(COLOURS, milestones, strict=False):
            prefixes = {float(fraction): scores for fraction, scores in record["calibration"]["by_prefix"].items()}
            fractions = sorted(prefixes)
            values = floats(prefixes[fraction][score] for fraction in fractions)
            axes.plot([100 * f for f in fractions], values, color=colour, marker="o", label=milestone.label)
        axes.set(title=title, xlabel="read of the response (% of its tokens)", ylabel=label)
        if score == "auroc":
            axes.axhline(0.5, color=MUTED, linestyle="--", linewidth=1, label="chance")
            axes.set_ylim(0.0, 1.02)
        else:
            axes.set_ylim(0.0, 1.5 * axes.get_ylim()[1])  # room for the legend
        axes.legend(loc="lower right" if score == "auroc" else "upper right")
    return figure


def training_panels(run: Run) -> Iterator[tuple[str, Figure]]:
    """Title and figure of each group of training curves for which the run has numbers."""
    for title, unit, curves, logarithmic in CURVES:
        drawn = [(name, label) for name, label in curves if any(record.get(name) is not None for record in run.metrics)]
        if not drawn:
            continue
        with panel(NARROW) as (figure, axes):
            for colour, (name, label) in zip(COLOURS, drawn, strict=False):
                records = [record for record in run.metrics if name in record]
                draw_smoothed(axes, [r["step"] for r in records], floats(r[name] for r in records), colour, label)
            axes.set(title=title, ylabel=unit)
            if logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_locator(NullLocator())
            elif unit.startswith("tokens"):
                axes.yaxis.set_major_formatter(EngFormatter(sep=""))  # 16k
            else:
                axes.ticklabel_format(axis="y", scilimits=SCIENTIFIC)
            _draw_stages(axes, run.stages())
            if len(curves) > 1:
                axes.legend(loc="best")
        yield title, figure


def svg(figure: Figure) -> str:
    """The figure as SVG text. The reader's sans-serif font is used for labels."""
    with matplotlib.rc_context(STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    # The layout is made with DejaVu Sans, which is wider than its replacements, so no labels overlap.
    return buffer.getvalue().replace("'DejaVu Sans'", "system-ui, 'Segoe UI', Roboto, Helvetica, Arial")


@contextmanager
def panel(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        # With fixed margins the panels of a page are aligned, and drawing takes half the time of a computed layout.
        # The left margin is the same in inches for all panels: tick labels are as wide in a narrow one.
        left = 0.75 / size[0]
        yield figure, figure.subplots(gridspec_kw={"left": left, "right": 0.965, "bottom": 0.16, "top": 0.85})


def _draw_scores(axes: Axes, run: Run, name: str) -> None:
    # Two evaluations at the same step (between stages) are one point.
    records = list({record["step"]: record for record in run.evaluations if record["set"] == name}.values())
    steps = [record["step"] for record in records]
    curves = [(f"avg@{records[0]['avg_k']}", floats(r["avg"] for r in records), floats(r["avg_se"] for r in records))]
    for k in dict.fromkeys(k for record in records for k in record["pass"]):
        values, errors = (floats(r[field].get(k) for r in records) for field in ("pass", "pass_se"))
        curves.append((f"pass@{k}", values, errors))
    for i, (label, values, errors) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(steps, values, color=colour, marker="o", markersize=3.5, label=label)
        axes.fill_between(steps, values - errors, values + errors, color=colour, alpha=0.18, linewidth=0)
    highest = np.nanmax(np.concatenate([np.nan_to_num(values) for _, values, _ in curves]))
    axes.set(title=printable(name), ylabel="score (fraction right)", ylim=(0.0, min(max(1.25 * highest, 0.1), 1.05)))
    _draw_stages(axes, run.stages())
    axes.legend(loc="upper left", ncols=len(curves))


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


def draw_smoothed(axes: Axes, steps: list[int], values: np.ndarray, colour: str, label: str, line: str = "-") -> None:
    """Draw the numbers, faint, and their running mean over a twentieth of the run. Short runs are not smoothed."""
    window = len(values) // 20
    every = max(len(values) // POINTS, 1)
    if window < 2:
        marker = "o" if len(values) < 5 else None
        axes.plot(steps, values, color=colour, label=label, linestyle=line, marker=marker)
        return
    known = ~np.isnan(values)
    weights = np.ones(window)
    sums = np.convolve(np.where(known, values, 0.0), weights, mode="same")
    counts = np.convolve(known.astype(float), weights, mode="same")
    smooth = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    axes.plot(steps[::every], values[::every], color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps[::every], smooth[::every], color=colour, label=label, linestyle=line)


def floats(values: Iterator[float | None] | Sequence[float | None]) -> np.ndarray:
    """As an array, with NaN (a gap in a curve) for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)
