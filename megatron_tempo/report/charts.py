"""The charts of the reports, as data: chart.js draws them with uPlot in the reader's browser.

uPlot 1.6.32 (MIT licence; `uplot/` has the files of its npm package, unchanged) is 50 kB and is written into the page,
so the page is one file that works offline. plotly.js, the other candidate, would make every report 4.5 MB larger.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tempo.observability.records import Record
from megatron_tempo.report.summary import Milestone, Run, Stage, printable

COLOURS = 7  # of the palette in head.html: --c0 .. --c6
DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 3))  # of runs, once all colours are used
POINTS = 800  # longer curves are thinned out to about this number of points
ITERATION = "iteration"

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
    ("Flip rate", "share of the questions seen before", (("vote/flip_rate", "majority's answer"),), False),
    ("Self-certainty", "nats per token", (("reward/self_certainty", "unlabelled"),), False),
    ("Entropy", "nats per token", (("actor/entropy", "actor"),), False),
    ("Clipping", "fraction of tokens clipped", (("actor/clip_fraction", "actor"),), False),
    (
        "Policy ratio",
        "ratio to the old policy",
        (("actor/ratio_max", "largest"), ("actor/ratio_min", "smallest")),
        False,
    ),
    ("KL to the old policy", "nats per token", (("actor/approx_kl", "actor"),), False),
    ("KL of the engine to the old policy", "nats per token, k3", (("engine/kl_k3", "engine"),), False),
    (
        "Off-policy correction",
        "share",
        (
            ("correction/ess", "effective sample size"),
            ("correction/tokens_out_of_bounds", "tokens out of bounds"),
            ("correction/responses_out_of_bounds", "responses out of bounds"),
        ),
        False,
    ),
    ("Gradient norm", "2-norm before clipping", (("actor/grad_norm", "actor"), ("critic/grad_norm", "critic")), True),
    ("Critic loss", "mean squared error", (("critic/loss", "critic"),), False),
    ("Response length", "tokens", (("response_length/mean", "mean"),), False),
    ("Truncated responses", "fraction of responses", (("truncated", "truncated"),), False),
    ("Throughput", "tokens per second", (("tokens_per_second", "tokens"),), False),
    ("Idle", "share of time without work of a model or the engine", (("idle_share", "idle"),), False),
)


@dataclass(frozen=True, slots=True)
class Line:
    """A curve. Numbers that are None are gaps. `colour` is a place in the palette."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int
    dash: tuple[int, ...] = ()
    dots: bool = False
    faint: Sequence[float | None] | None = None  # what `y` is the running mean of
    reach: Sequence[float | None] | None = None  # half the width of a band around `y`
    counts: Sequence[int] | None = None  # responses behind each point: the sizes of dots
    guide: bool = False  # no measurement: thin and grey


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture. `stages`: shaded spans of x, with labels. `y_range`: None to fit the numbers."""

    title: str
    unit: str
    lines: Sequence[Line]
    x_label: str = ITERATION
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    stages: Sequence[Stage] = ()
    logarithmic: bool = False

    @property
    def json(self) -> str:
        """What chart.js reads."""
        return json.dumps(
            {
                "title": self.title,
                "unit": self.unit,
                "x": self.x_label,
                "xRange": self.x_range,
                "yRange": self.y_range,
                "log": self.logarithmic,
                "stages": [[stage.first - 1, stage.last, stage.label] for stage in self.stages],
                "lines": [_line(line, self.logarithmic) for line in self.lines],
            },
            separators=(",", ":"),
        )


def _line(line: Line, logarithmic: bool) -> Record:
    y = _numbers(line.y, logarithmic)
    described: Record = {"label": line.label, "colour": line.colour % COLOURS, "x": _numbers(line.x), "y": y}
    described |= {name: True for name in ("dots", "guide") if getattr(line, name)}
    if line.dash:
        described["dash"] = line.dash
    if line.faint is not None:
        described["faint"] = _numbers(line.faint, logarithmic)
    if line.reach is not None:
        ends = [[None if v is None or r is None else v + sign * r for v, r in zip(line.y, line.reach, strict=True)]
                for sign in (-1, 1)]  # fmt: skip
        described["low"], described["high"] = (_numbers(end, logarithmic) for end in ends)
    if line.counts is not None:
        described["counts"] = list(line.counts)
    return described


def _numbers(values: Iterable[float | None], positive: bool = False) -> list[float | None]:
    """The values to six digits. None, NaN and, if `positive`, values that are not positive become gaps."""
    plain = (None if v is None or not np.isfinite(v) or (positive and v <= 0) else float(v) for v in values)
    return [None if v is None else float(f"{v:.6g}") for v in plain]


# One run


def score_chart(run: Run, name: str) -> Chart:
    """avg@k and pass@k of one set over the iterations, with one standard error on either side."""
    records = list({record["step"]: record for record in run.evaluations if record["set"] == name}.values())
    steps = [record["step"] for record in records]
    errors = [record["avg_se"] for record in records]
    lines = [Line(f"avg@{records[0]['avg_k']}", steps, [r["avg"] for r in records], 0, dots=True, reach=errors)]
    for i, k in enumerate(dict.fromkeys(k for record in records for k in record["pass"]), start=1):
        values, errors = ([r[field].get(k) for r in records] for field in ("pass", "pass_se"))
        lines.append(Line(f"pass@{k}", steps, values, i, dots=True, reach=errors))
    return Chart(
        printable(name),
        "score (fraction right)",
        lines,
        x_range=_x_range(run),
        y_range=_from_zero(lines),
        stages=run.stages(),
    )


def reliability(milestone: Milestone, record: Record) -> Chart:
    """Fraction of correct responses over the mean value of each bin, for the value after the last token."""
    rows = record["calibration"]["last"]["bins"]
    values, fractions = [row["mean_value"] for row in rows], [row["fraction_right"] for row in rows]
    lines = [
        Line("critic", values, fractions, 0, dots=True, counts=[row["count"] for row in rows]),
        Line("perfectly calibrated", [0.0, 1.0], [0.0, 1.0], 6, dash=(4, 4), guide=True),
    ]
    return Chart(
        f"Reliability {milestone.label}",
        "fraction right",
        lines,
        "value after the last token (mean of a bin)",
        (-0.04, 1.04),
        (-0.04, 1.04),
    )


def by_prefix(milestones: Sequence[tuple[Milestone, Record]], score: str, title: str, label: str) -> Chart | None:
    """A number of `evaluation.calibration` over the fraction of the response that the critic has read.

    None if no record has it.
    """
    lines = []
    for i, (milestone, record) in enumerate(milestones):
        prefixes = {float(fraction): scores for fraction, scores in record["calibration"]["by_prefix"].items()}
        fractions = sorted(prefixes)
        values = [prefixes[fraction].get(score) for fraction in fractions]
        if any(value is not None for value in values):
            lines.append(Line(milestone.label, [100 * f for f in fractions], values, i, dots=True))
    return Chart(title, label, lines, "read of the response (% of its tokens)", (-2.0, 102.0)) if lines else None


def training_charts(run: Run) -> Iterator[Chart]:
    """Each group of training curves for which the run has numbers."""
    for title, unit, curves, logarithmic in CURVES:
        drawn = [(name, label) for name, label in curves if any(record.get(name) is not None for record in run.metrics)]
        if drawn:
            lines = [_smoothed(run.metrics, name, label, i) for i, (name, label) in enumerate(drawn)]
            yield Chart(title, unit, lines, x_range=_x_range(run), stages=run.stages(), logarithmic=logarithmic)


def memory_chart(run: Run) -> Chart | None:
    """Peak memory of each phase over the iterations. Phases with the same numbers share a curve."""
    phases = dict.fromkeys(name for record in run.metrics for name in record if name.startswith("memory_gb/"))
    by_numbers: dict[tuple[float | None, ...], list[str]] = {}
    every = -(-len(run.metrics) // POINTS) or 1
    parts = [run.metrics[start : start + every] for start in range(0, len(run.metrics), every)]
    for phase in phases:
        # Of a long run, the highest of every few iterations: no peak is left out.
        peaks = ([v for record in part if (v := record.get(phase)) is not None] for part in parts)
        numbers = tuple(_numbers(max(part, default=None) for part in peaks))
        known = next((n for n in by_numbers if _alike(n, numbers)), numbers)
        by_numbers.setdefault(known, []).append(phase.removeprefix("memory_gb/"))
    steps = [part[-1]["step"] for part in parts]
    lines = [
        Line(", ".join(names), steps, numbers, i, dots=len(steps) < 5)
        for i, (numbers, names) in enumerate(by_numbers.items())
    ]
    if not lines:
        return None
    title = "Peak memory of each phase"
    return Chart(title, "GB", lines, x_range=_x_range(run), y_range=_from_zero(lines, top=None), stages=run.stages())


def _alike(first: Sequence[float | None], second: Sequence[float | None]) -> bool:
    """Whether two curves would overlap: within 1% where both have a number, with the same gaps."""
    pairs = list(zip(first, second, strict=True))
    gaps = all((a is None) == (b is None) for a, b in pairs)
    return gaps and all(a is None or b is None or abs(a - b) <= 0.01 * max(a, b) for a, b in pairs)


def _x_range(run: Run) -> tuple[float, float]:
    last = max((record["step"] for record in run.metrics + run.evaluations), default=1)
    return (0.0, float(max(last, 1)))


def _from_zero(lines: Sequence[Line], top: float | None = 1.05) -> tuple[float, float]:
    highest = max((v + (r or 0.0) for line in lines for v, r in _with_reach(line) if v is not None), default=0.0)
    return (0.0, max(1.1 * highest, 0.1) if top is None else min(max(1.1 * highest, 0.1), top))


def _with_reach(line: Line) -> Iterator[tuple[float | None, float | None]]:
    return zip(line.y, line.reach or [None] * len(line.y), strict=True)


def _smoothed(metrics: Sequence[Record], name: str, label: str, colour: int, dash: tuple[int, ...] = ()) -> Line:
    """A running mean over a twentieth of the run, with the numbers themselves, faint. Short runs are not smoothed."""
    records = [record for record in metrics if name in record]
    steps = [record["step"] for record in records]
    values = np.array([np.nan if r[name] is None else r[name] for r in records], dtype=float)
    window, every = len(values) // 20, max(len(values) // POINTS, 1)
    if window < 2:
        return Line(label, steps, values.tolist(), colour, dash, dots=len(values) < 5)
    known, weights = ~np.isnan(values), np.ones(window)
    sums = np.convolve(np.where(known, values, 0.0), weights, mode="same")
    counts = np.convolve(known.astype(float), weights, mode="same")
    smooth = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return Line(label, steps[::every], smooth[::every].tolist(), colour, dash, faint=values[::every].tolist())


# Several runs


@dataclass(frozen=True, slots=True)
class Labelled:
    """A run with a unique name and its line style."""

    label: str
    run: Run
    colour: int
    dash: tuple[int, ...]


def labelled(runs: Sequence[tuple[str, Run]]) -> list[Labelled]:
    return [Labelled(name, run, i % COLOURS, DASHES[i // COLOURS % len(DASHES)]) for i, (name, run) in enumerate(runs)]


def score_charts(runs: Sequence[Labelled], name: str, title: str) -> Iterator[Chart]:
    """avg@k of a set over the iterations, and pass@k for the largest k that all these runs have."""
    of_run = [[record for record in one.run.evaluations if record["set"] == name] for one in runs]
    known = [records for records in of_run if records]
    averages = sorted({record["avg_k"] for records in known for record in records})
    shared = set.intersection(*({k for record in records for k in record["pass"]} for records in known))
    kinds: list[tuple[str, str | None]] = [(f"avg@{'/'.join(map(str, averages))}", None)]
    if shared:
        best = max(shared, key=int)
        kinds.append((f"pass@{best}", best))
    for kind, k in kinds:
        lines = []
        for one, records in zip(runs, of_run, strict=True):
            # Two evaluations at the same step (between stages) are one point.
            by_step = {r["step"]: r["avg"] if k is None else r["pass"].get(k) for r in records}
            if by_step:
                lines.append(_of_run(one, by_step))
        yield Chart(f"{title}: {kind}", "score (fraction right)", lines, y_range=_from_zero(lines))


def calibration_charts(runs: Sequence[Labelled]) -> Iterator[Chart]:
    """AUROCs and calibration error of the value after the last token, over the iterations."""
    for score, title, unit in (
        ("auroc", "Critic AUROC", "1 is best"),
        ("auroc_within_questions", "Critic AUROC within questions", "1 is best"),
        ("ece", "Calibration error", "ECE, 0 is best"),
    ):
        lines = []
        for one in runs:
            calibrated = [r for r in one.run.evaluations if r.get("calibration")]
            for name in dict.fromkeys(record["set"] for record in calibrated):
                numbers = {r["step"]: r["calibration"]["last"].get(score) for r in calibrated if r["set"] == name}
                if any(number is not None for number in numbers.values()):
                    lines.append(_of_run(one, numbers))
        if lines:
            yield Chart(title, unit, lines)


def training_overlays(runs: Sequence[Labelled]) -> Iterator[Chart]:
    """Each training curve for which a run has numbers."""
    for group, unit, curves, logarithmic in CURVES:
        for name, label in curves:
            having = [one for one in runs if any(record.get(name) is not None for record in one.run.metrics)]
            if having:
                lines = [_smoothed(o.run.metrics, name, printable(o.label), o.colour, o.dash) for o in having]
                title = group if len(curves) == 1 else f"{group}: {label}"
                yield Chart(title, unit, lines, logarithmic=logarithmic)


def _of_run(one: Labelled, by_step: dict[int, float | None]) -> Line:
    return Line(printable(one.label), list(by_step), list(by_step.values()), one.colour, one.dash, dots=True)
