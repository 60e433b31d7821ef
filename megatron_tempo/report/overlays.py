"""The figures of a comparison: one curve per run, in the run's colour and dashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from megatron_tempo.observability.records import Record
from megatron_tempo.report.plots import CURVES, NARROW, SCIENTIFIC, WIDE, draw_smoothed, floats, panel
from megatron_tempo.report.summary import Run, phase_totals, printable

# Okabe and Ito's colours, without those too light for lines on white; then the same again, dashed and dotted.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#24292f")
_DASHES = (("-", ""), ("--", "6 3"), (":", "1.5 2.5"))  # of matplotlib, and of SVG for the legend
_CALIBRATION = (("auroc", "Critic AUROC", "1 is best"), ("ece", "Calibration error", "ECE, 0 is best"))


@dataclass(frozen=True, slots=True)
class Labelled:
    """A run with a unique name and its line style."""

    label: str
    run: Run
    colour: str
    line: str
    dashes: str


def labelled(runs: Sequence[tuple[str, Run]]) -> list[Labelled]:
    styles = [(colour, *dashes) for dashes in _DASHES for colour in _COLOURS]
    return [Labelled(name, run, *styles[i % len(styles)]) for i, (name, run) in enumerate(runs)]


def scores(runs: Sequence[Labelled], name: str) -> Iterator[tuple[str, Figure]]:
    """avg@k of a set over the iterations, and pass@k for the largest k that all runs with the set have."""
    of_run = [[record for record in one.run.evaluations if record["set"] == name] for one in runs]
    known = [records for records in of_run if records]
    averages = sorted({record["avg_k"] for records in known for record in records})
    shared = set.intersection(*({k for record in records for k in record["pass"]} for records in known))
    k = max(shared, key=int, default=None)
    readings: list[tuple[str, Callable[[Record], float | None]]] = [
        (f"avg@{'/'.join(map(str, averages))}", lambda record: record["avg"])
    ]
    if k is not None:
        readings.append((f"pass@{k}", lambda record: record["pass"].get(k)))
    for kind, read in readings:
        title = f"{printable(name)}: {kind}"
        with panel(WIDE) as (figure, axes):
            for one in runs:
                _draw_evaluations(axes, one, name, read)
            _finish(axes, title, "score (fraction right)")
            axes.set_ylim(bottom=0.0)
        yield title, figure


def calibration(runs: Sequence[Labelled]) -> Iterator[tuple[str, Figure]]:
    """AUROC and calibration error of the value after the last token, over the iterations."""
    for score, title, unit in (
        ("auroc", "Critic AUROC", "1 is best"),
        ("ece", "Calibration error", "ECE, 0 is best"),
    ):

        def read(record: Record, score: str = score) -> float | None:
            value: float | None = record["calibration"]["last"][score] if record.get("calibration") else None
            return value

        names = {r["set"] for one in runs for r in one.run.evaluations if r.get("calibration")}
        if not names:
            continue
        with panel(WIDE) as (figure, axes):
            for one in runs:
                for name in sorted(names):
                    _draw_evaluations(axes, one, name, read)
            _finish(axes, title, unit)
        yield title, figure


def training(runs: Sequence[Labelled]) -> Iterator[tuple[str, Figure]]:
    """Each training curve for which a run has numbers."""
    for group, unit, curves, logarithmic in CURVES:
        for name, label in curves:
            having = [one for one in runs if any(record.get(name) is not None for record in one.run.metrics)]
            if not having:
                continue
            title = group if len(curves) == 1 else f"{group}: {label}"
            with panel(NARROW) as (figure, axes):
                for one in having:
                    records = [record for record in one.run.metrics if record.get(name) is not None]
                    numbers = floats([record[name] for record in records])
                    draw_smoothed(axes, [r["step"] for r in records], numbers, one.colour, one.label, one.line)
                if logarithmic:
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                elif unit.startswith("tokens"):
                    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
                else:
                    axes.ticklabel_format(axis="y", scilimits=SCIENTIFIC)
                _finish(axes, title, unit)
            yield title, figure


def phases(runs: Sequence[Labelled]) -> Figure | None:
    """Seconds per iteration by phase, without evaluations: one bar per run."""
    means = [phase_means(one.run) for one in runs]
    names = sorted({name for mean in means for name in mean}, key=lambda name: -max(m.get(name, 0.0) for m in means))
    if not names:
        return None
    lines = (len(names) + 2) // 3  # of the legend
    bars, below = 0.34 * len(runs), 0.55 + 0.2 * lines  # inches
    height = bars + below + 0.1
    with panel((WIDE[0], height)) as (figure, axes):
        axes.set_position((0.3, below / height, 0.66, bars / height))
        ends = np.zeros(len(runs))
        places = np.arange(len(runs))[::-1]
        for i, name in enumerate(names):
            widths = np.array([mean.get(name, 0.0) for mean in means])
            colour = _COLOURS[i % len(_COLOURS)]
            axes.barh(places, widths, left=ends, height=0.62, color=colour, alpha=0.85, label=name)
            ends += widths
        axes.set_yticks(places, [_short(one.label) for one in runs])
        axes.set_ylim(-0.5, len(runs) - 0.5)
        axes.set_xlabel("seconds per iteration")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="lower center", ncols=3, fontsize=8)
    return figure


def phase_means(run: Run) -> dict[str, float]:
    """Mean seconds per iteration of each outermost phase."""
    return {name: total / len(run.metrics) for name, total in phase_totals(run.metrics).items() if run.metrics}


def _draw_evaluations(axes: Axes, one: Labelled, name: str, read: Callable[[Record], float | None]) -> None:
    # Two evaluations at the same step (between stages) are one point.
    records = {record["step"]: record for record in one.run.evaluations if record["set"] == name}
    points = [(step, value) for step, record in records.items() if (value := read(record)) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=one.colour, linestyle=one.line, marker="o", markersize=3, label=one.label)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, ylabel=unit, xlabel="iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlim(left=0)


def _short(label: str) -> str:
    text = printable(label)
    return text if len(text) <= 16 else f"{text[:7]}…{text[-8:]}"
