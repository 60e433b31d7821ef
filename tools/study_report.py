"""Tables and pictures of the study (tools/study.py), from the records of its runs, into docs/study.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from study import ARMS, OUT, ROOT, SEEDS, Arm, folder, is_done

from megatron_tempo.records import read_evaluations
from megatron_tempo.report.plots import STYLE

DOCUMENT = ROOT / "docs" / "study.md"
BEGIN, END = "<!-- made by tools/study.py: {} -->\n", "<!-- end -->\n"
SETS = ("unlabelled", "heldout", "labelled")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#24292f")
Score = Callable[[dict[str, Any]], float | None]


def avg(record: dict[str, Any]) -> float | None:
    return record["avg"]


def pass_at(k: int) -> Score:
    return lambda record: record["pass"][str(k)]


def auroc(record: dict[str, Any]) -> float | None:
    return (record["calibration"] or {}).get("last", {}).get("auroc")


def ece(record: dict[str, Any]) -> float | None:
    return (record["calibration"] or {}).get("last", {}).get("ece")


@dataclass(frozen=True, slots=True)
class Curve:
    """A score of an arm on a set: iterations [p], and for each of s seeds [s, p]."""

    seeds: list[int]
    iterations: np.ndarray
    scores: np.ndarray

    @property
    def first(self) -> np.ndarray:
        return self.scores[:, 0]

    @property
    def last(self) -> np.ndarray:
        return self.scores[:, -1]


def curve(arm: Arm, name: str, score: Score) -> Curve | None:
    """None where no seed's run is done, or the arm has no such score."""
    seeds = [seed for seed in SEEDS if is_done(folder(arm.name, seed))]
    found = []
    for seed in seeds:
        records = [one for one in read_evaluations(folder(arm.name, seed)) if one["set"] == name]
        found.append({one["iteration"]: score(one) for one in records})
    if not found or any(value is None for value in found[0].values()):
        return None
    iterations = sorted(found[0])
    return Curve(seeds, np.array(iterations), np.array([[one[i] for i in iterations] for one in found], dtype=float))


def interval(values: np.ndarray) -> float:
    """Half of the 95% interval of the mean over seeds, by Student's t; NaN for a single seed."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")


def told(values: np.ndarray, sign: str = "") -> str:
    half = interval(values)
    mean = f"{values.mean():{sign}.3f}".replace("0.", ".", 1)
    return mean if np.isnan(half) else f"{mean} ± {half:.3f}".replace(" 0.", " .")


def done(group: str) -> list[Arm]:
    return [arm for arm in ARMS if arm.group == group and any(is_done(folder(arm.name, seed)) for seed in SEEDS)]


def table(arms: list[Arm]) -> Iterator[str]:
    """The ends of the arms: means over seeds with intervals, and what lies between an arm and TEMPO."""
    heads = [f"{name}, {score}" for name in SETS for score in ("avg@16", "pass@16")]
    yield f"| stage 2 | seeds | {' | '.join(heads)} | less TEMPO: unlabelled | held-out |\n"
    yield f"|{' --- |' * (len(heads) + 4)}\n"
    tempo = next(arm for arm in ARMS if arm.name == "tempo")
    start = [curve(tempo, name, score) for name in SETS for score in (avg, pass_at(16))]
    if start[0] is not None:
        cells = [told(one.first) for one in start if one is not None]
        yield f"| none: the end of stage 1 | {len(start[0].seeds)} | {' | '.join(cells)} | | |\n"
    for arm in arms:
        ends = [curve(arm, name, score) for name in SETS for score in (avg, pass_at(16))]
        cells = [told(one.last) if one is not None else "" for one in ends]
        apart = [_apart(arm, tempo, name) for name in SETS[:2]]
        seeds = len(ends[0].seeds) if ends[0] is not None else 0
        yield f"| {arm.what} | {seeds} | {' | '.join(cells)} | {' | '.join(apart)} |\n"


def _apart(arm: Arm, tempo: Arm, name: str) -> str:
    """The mean over seeds of the difference, seed by seed: they share their stage 1 and their questions' order."""
    one, other = curve(arm, name, avg), curve(tempo, name, avg)
    if arm is tempo or one is None or other is None:
        return ""
    shared = [seed for seed in one.seeds if seed in other.seeds]
    ends = [curve.last[[curve.seeds.index(seed) for seed in shared]] for curve in (one, other)]
    return told(ends[0] - ends[1], "+") if shared else ""


def critics(arms: list[Arm]) -> Iterator[str]:
    yield "| stage 2 | AUROC, end of stage 1 | least | end | ECE, end of stage 1 | most | end |\n"
    yield "| --- | --- | --- | --- | --- | --- | --- |\n"
    for arm in arms:
        right, honest = curve(arm, "heldout", auroc), curve(arm, "heldout", ece)
        if right is None or honest is None:
            continue
        cells = [told(x) for x in (right.first, right.scores.min(1), right.last)]
        cells += [told(x) for x in (honest.first, honest.scores.max(1), honest.last)]
        yield f"| {arm.what} | {' | '.join(cells)} |\n"


def draw(path: Path, arms: list[Arm], panels: list[tuple[str, str, Score]]) -> None:
    """A panel for each (title, set, score): means over seeds, and the span from the least to the greatest."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for axes, (title, name, score) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for number, arm in enumerate(arms):
                one = curve(arm, name, score)
                if one is None:
                    continue
                colour, line = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
                axes.plot(one.iterations, one.scores.mean(0), line, color=colour, label=arm.name)
                axes.fill_between(one.iterations, one.scores.min(0), one.scores.max(0), color=colour, alpha=0.12, lw=0)
            axes.set(title=title, xlabel="iteration of stage 2")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)))
        figure.savefig(path, dpi=130)


def times() -> str:
    """Wall times of the runs that are done, of one core each: with what else the machine did, and pauses."""
    found = sorted(int((run / "done").read_text()) for run in OUT.glob("seed*/*") if is_done(run))
    return f"{len(found)} runs done; a run took {found[0]} to {found[-1]} s, {np.median(found):.0f} in the middle.\n"


@dataclass(frozen=True, slots=True)
class Picture:
    """Beside docs/study.md: its name, what it shows, in which part of the page, of which arms and scores."""

    name: str
    words: str
    part: str
    arms: list[Arm]
    panels: list[tuple[str, str, Score]]


def pictures(groups: dict[str, list[Arm]]) -> list[Picture]:
    """Those of arms that are done."""
    tempo = [arm for arm in groups["methods"] if arm.name == "tempo"]
    avgs: list[tuple[str, str, Score]] = [(f"avg@16, {name}", name, avg) for name in SETS[:2]]
    passes: list[tuple[str, str, Score]] = [(f"pass@16, {name}", name, pass_at(16)) for name in SETS[:2]]
    labelled: tuple[str, str, Score] = ("avg@16, labelled", "labelled", avg)
    honest: list[tuple[str, str, Score]] = [
        ("AUROC, held-out", "heldout", auroc), ("calibration error, held-out", "heldout", ece)
    ]  # fmt: skip
    found = [
        Picture("study-avg.png", "avg@16 over the iterations", "methods", groups["methods"], avgs),
        Picture("study-pass.png", "pass@16 over the iterations", "methods", groups["methods"], passes),
        Picture("study-critic.png", "AUROC and calibration error", "critic", groups["methods"], honest),
    ]
    for group in ("choices", "labels", "transfer"):
        if groups[group]:
            panels = [*avgs, labelled] if group == "transfer" else avgs
            arms = [*tempo, *groups[group]]
            found.append(Picture(f"study-{group}.png", "avg@16 over the iterations", group, arms, panels))
    return [picture for picture in found if picture.arms]


def write() -> None:
    """Replace the made parts of docs/study.md, and the pictures beside it. What has not been run is told of."""
    groups = {group: done(group) for group in dict.fromkeys(arm.group for arm in ARMS)}
    missing = "Not run yet.\n"
    parts = {group: "".join(table(arms)) if arms else missing for group, arms in groups.items()}
    parts |= {"critic": "".join(critics([arm for arms in groups.values() for arm in arms])), "times": times()}
    for one in pictures(groups):
        draw(DOCUMENT.with_name(one.name), one.arms, one.panels)
        parts[one.part] += f"\n![{one.words}]({one.name})\n"
    text = DOCUMENT.read_text()
    for name, made in parts.items():
        before, _, rest = text.partition(BEGIN.format(name))
        _, _, after = rest.partition(END)
        text = f"{before}{BEGIN.format(name)}\n{made}\n{END}{after}"
    DOCUMENT.write_text(text)
    (DOCUMENT.with_name("study.json")).write_text(json.dumps(_ends(), indent=1) + "\n")


def _ends() -> dict[str, Any]:
    """The last scores of every run, for who wants to reckon with them."""
    ends: dict[str, Any] = {}
    for arm in ARMS:
        for seed in SEEDS:
            if is_done(folder(arm.name, seed)):
                last = {one["set"]: one for one in read_evaluations(folder(arm.name, seed)) if one["point"] == "after"}
                found = {name: {"avg@16": one["avg"], "pass": one["pass"]} for name, one in sorted(last.items())}
                ends.setdefault(arm.name, {})[f"seed {seed}"] = found
    return ends
