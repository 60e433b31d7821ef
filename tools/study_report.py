"""Writes the tables and pictures of the study (tools/study.py) into docs/study.md, from the records of its runs.

The runs' curves are saved in docs/study.jsonl, one line per run. So the page can be generated again, and the study
continued on another machine, without the runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from factorial import FACTORS, effects
from made_parts import replaced
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from study import ARMS, BASELINES, COUNTDOWN, FACTORIAL, ROOT, SEEDS, Arm, folder, is_done

from megatron_tempo.files import replace_file
from megatron_tempo.observability.records import read, read_evaluations, read_metrics
from megatron_tempo.report.collapse import collapse_words
from megatron_tempo.report.plots import STYLE

DOCUMENT = ROOT / "docs" / "study.md"
CURVES = ROOT / "docs" / "study.jsonl"
SETS = ("unlabelled", "heldout", "labelled")
LAST = 10  # iterations at the end of a run, for the share of truncated responses
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#24292f")

# Lines of docs/study.jsonl, by arm and seed: arm, seed, seconds, the share of truncated training responses in the last
# iterations, and for each set the iterations and their scores.
Runs = dict[tuple[str, int], dict[str, Any]]


def saved_runs() -> Runs:
    return {(line["arm"], line["seed"]): line for line in read(CURVES)}


def finished_runs() -> Runs:
    """The finished runs on this machine."""
    arms = (*ARMS, *FACTORIAL)
    seeds = [(arm.name, seed) for arm in arms for seed in SEEDS if is_done(folder(arm.name, seed))]
    return {(arm, seed): _line(arm, seed) for arm, seed in seeds}


def save_runs(runs: Runs) -> None:
    arms = (*ARMS, *FACTORIAL)
    order = [(arm.name, seed) for arm in arms for seed in SEEDS if (arm.name, seed) in runs]
    replace_file(CURVES, "".join(json.dumps(runs[run]) + "\n" for run in order), fsync=False)


def _line(arm: str, seed: int) -> dict[str, Any]:
    run = folder(arm, seed)
    curves: dict[str, dict[str, list[float | None]]] = {}  # None: AUROC if all responses are wrong
    for record in sorted(read_evaluations(run), key=lambda record: record["iteration"]):
        scores = {"avg@16": record["avg"]} | {f"pass@{k}": value for k, value in record["pass"].items() if k != "1"}
        last = (record["calibration"] or {}).get("last", {})
        scores |= {name: last[name] for name in ("auroc", "ece") if name in last}
        scores |= {"reward accuracy": record["vote"]["reward_accuracy"]} if record.get("vote") else {}
        curve = curves.setdefault(record["set"], {"iterations": []})
        curve["iterations"].append(record["iteration"])
        for name, value in scores.items():
            curve.setdefault(name, []).append(None if value is None else round(value, 6))
    shares = [record["truncated"] for record in read_metrics(run)][-LAST:]
    found = {"truncated": round(float(np.mean(shares)), 6)} if shares else {}
    return {"arm": arm, "seed": seed, "seconds": int((run / "done").read_text()), **found, "sets": curves}


@dataclass(frozen=True, slots=True)
class Curve:
    """A score of an arm on a set, for s seeds and p iterations: `iterations` [p], `scores` [s, p]."""

    seeds: list[int]
    iterations: np.ndarray
    scores: np.ndarray

    @property
    def first(self) -> np.ndarray:
        return self.scores[:, 0]

    @property
    def last(self) -> np.ndarray:
        return self.scores[:, -1]


def curve(runs: Runs, arm: Arm, name: str, score: str) -> Curve | None:
    """The curve of an arm's score on the set `name`. None if the arm has no run, or no such score."""
    seeds = [seed for seed in SEEDS if (arm.name, seed) in runs]
    curves = [runs[arm.name, seed]["sets"][name] for seed in seeds]
    if not curves or score not in curves[0]:
        return None
    return Curve(seeds, np.array(curves[0]["iterations"]), np.array([one[score] for one in curves], dtype=float))


def interval(values: np.ndarray) -> float:
    """Half the width of the 95% interval of the mean over seeds, by Student's t. NaN for a single seed."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")


def formatted(values: np.ndarray, sign: str = "") -> str:
    half = interval(values)
    mean = f"{values.mean():{sign}.3f}".replace("0.", ".", 1)
    return mean if np.isnan(half) else f"{mean} ± {half:.3f}".replace(" 0.", " .")


def baseline(group: str) -> Arm:
    """The arm that those of a group are compared with."""
    return next(arm for arm in ARMS if arm.name == BASELINES.get(group, "tempo"))


def table(runs: Runs, arms: list[Arm], group: str = "methods") -> Iterator[str]:
    """The final scores of the arms: means over seeds with intervals, and each arm's difference to TEMPO.

    Groups with a baseline of their own also have the share of truncated responses. If votes were recorded, there is the
    model collapse step of each seed on the unlabelled set. Earlier runs recorded neither.
    """
    cells = [(name, score) for name in SETS for score in ("avg@16", "pass@16")]
    heads = [f"{name}, {score}" for name, score in cells]
    tempo, shown = baseline(group), group in BASELINES
    voted = any(curve(runs, arm, SETS[0], "reward accuracy") is not None for arm in arms)
    last = (" | truncated" if shown else "") + (" | model collapse step" if voted else "")
    extra = shown + voted
    yield f"| stage 2 | seeds | {' | '.join(heads)} | minus TEMPO: unlabelled | held-out{last} |\n"
    yield f"|{' --- |' * (len(heads) + 4 + extra)}\n"
    start = [curve(runs, tempo, *cell) for cell in cells]
    if start[0] is not None:
        words = [formatted(one.first) for one in start if one is not None]
        yield f"| no stage 2 (end of stage 1) | {len(start[0].seeds)} | {' | '.join(words)} | | |{' |' * extra}\n"
    for arm in arms:
        ends = [curve(runs, arm, *cell) for cell in cells]
        words = [formatted(one.last) if one is not None else "" for one in ends]
        differences = [_difference(runs, arm, tempo, name) for name in SETS[:2]]
        seeds = len(ends[0].seeds) if ends[0] is not None else 0
        shares = [runs[arm.name, seed]["truncated"] for seed in SEEDS if (arm.name, seed) in runs] if shown else []
        more = f" {formatted(np.array(shares)) if shares else ''} |" if shown else ""
        more += f" {collapses(runs, arm)} |" if voted else ""
        yield f"| {arm.what} | {seeds} | {' | '.join(words)} | {' | '.join(differences)} |{more}\n"


def collapses(runs: Runs, arm: Arm) -> str:
    """The model collapse step of each seed (report.collapse), in iterations of stage 2, on the unlabelled set."""
    one = curve(runs, arm, SETS[0], "reward accuracy")
    if one is None:
        return ""
    steps = [int(step) for step in one.iterations]
    return ", ".join(collapse_words(dict(zip(steps, scores.tolist(), strict=True))) for scores in one.scores)


def _difference(runs: Runs, arm: Arm, tempo: Arm, name: str) -> str:
    """The mean over seeds of the paired difference. Runs of a seed share stage 1 and the order of questions."""
    one, other = curve(runs, arm, name, "avg@16"), curve(runs, tempo, name, "avg@16")
    if arm is tempo or one is None or other is None:
        return ""
    shared = [seed for seed in one.seeds if seed in other.seeds]
    ends = [curve.last[[curve.seeds.index(seed) for seed in shared]] for curve in (one, other)]
    return formatted(ends[0] - ends[1], "+") if shared else ""


def critics(runs: Runs, arms: list[Arm]) -> Iterator[str]:
    yield "| stage 2 | AUROC, end of stage 1 | lowest | end | ECE, end of stage 1 | highest | end |\n"
    yield "| --- | --- | --- | --- | --- | --- | --- |\n"
    for arm in arms:
        right, honest = curve(runs, arm, "heldout", "auroc"), curve(runs, arm, "heldout", "ece")
        if right is None or honest is None:
            continue
        cells = [formatted(x) for x in (right.first, right.scores.min(1), right.last)]
        cells += [formatted(x) for x in (honest.first, honest.scores.max(1), honest.last)]
        yield f"| {arm.what} | {' | '.join(cells)} |\n"


def factor_effects() -> str:
    """A table of what each factor changes in the final scores: means over seeds with intervals, on minus off.

    Of the seeds that have all 16 runs.
    """
    runs = saved_runs() | finished_runs()
    seeds = [seed for seed in SEEDS if all((arm.name, seed) in runs for arm in FACTORIAL)]
    if not seeds:
        return "no seed has all runs of the factorial part: python tools/study.py run --only factorial\n"
    cells = [(name, score) for name in SETS for score in ("avg@16", "pass@16")]
    of_cell = {
        cell: effects(
            {arm.name: np.array([runs[arm.name, s]["sets"][cell[0]][cell[1]][-1] for s in seeds]) for arm in FACTORIAL}
        )
        for cell in cells
    }
    what = {factor.letter: f"{factor.letter}: {factor.what}" for factor in FACTORS}
    lines = [f"| {len(seeds)} seeds | {' | '.join(', '.join(cell) for cell in cells)} |"]
    lines.append(f"|{' --- |' * (len(cells) + 1)}")
    for term in of_cell[cells[0]]:
        found = " | ".join(formatted(of_cell[cell][term], "+") for cell in cells)
        lines.append(f"| {what.get(term, term)} | {found} |")
    return "\n".join(lines) + "\n"


# A panel of a picture: title, set, score.
Panel = tuple[str, str, str]


def draw(runs: Runs, path: Path, arms: list[Arm], panels: list[Panel]) -> None:
    """Plot the panels: means over seeds, and the range from the lowest to the highest seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for axes, (title, name, score) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for number, arm in enumerate(arms):
                one = curve(runs, arm, name, score)
                if one is None:
                    continue
                colour, line = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
                axes.plot(one.iterations, one.scores.mean(0), line, color=colour, label=arm.name)
                axes.fill_between(one.iterations, one.scores.min(0), one.scores.max(0), color=colour, alpha=0.12, lw=0)
            axes.set(title=title, xlabel="iteration of stage 2")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(2 * len(panels), len(labels)))
        figure.savefig(path, dpi=130)


def times(runs: Runs) -> str:
    """Wall times of the runs, which use one core each. They include pauses and the effect of other load."""
    seconds = sorted(run["seconds"] for run in runs.values())
    return f"{len(seconds)} runs, each {seconds[0]} to {seconds[-1]} s, median {np.median(seconds):.0f} s.\n"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in docs/: its file name, its description, the part of the page, and the arms and scores it shows."""

    name: str
    words: str
    part: str
    arms: list[Arm]
    panels: list[Panel]


def with_baseline(group: str) -> list[Arm]:
    """The arms of a group, and at first the one that they are compared with."""
    first = baseline(group)
    return [first, *(arm for arm in ARMS if arm.group == group and arm is not first)]


def pictures(groups: dict[str, list[Arm]]) -> list[Picture]:
    avgs: list[Panel] = [(f"avg@16, {name}", name, "avg@16") for name in SETS[:2]]
    passes: list[Panel] = [(f"pass@16, {name}", name, "pass@16") for name in SETS[:2]]
    labelled: Panel = ("avg@16, labelled", "labelled", "avg@16")
    honest: list[Panel] = [("AUROC, held-out", "heldout", "auroc"), ("calibration error, held-out", "heldout", "ece")]
    drawn = [
        Picture("study-avg.png", "avg@16 over the iterations", "methods", groups["methods"], avgs),
        Picture("study-pass.png", "pass@16 over the iterations", "methods", groups["methods"], passes),
        Picture("study-critic.png", "AUROC and calibration error", "critic", groups["methods"], honest),
    ]
    for group in [group for group in groups if group != "methods"]:
        panels = [*avgs, labelled] if group == "transfer" else avgs
        drawn.append(Picture(f"study-{group}.png", "avg@16 over the iterations", group, with_baseline(group), panels))
    return drawn


def write() -> None:
    """Save the curves of this machine's runs, and replace the generated parts of docs/study.md and its pictures.

    A part is not changed if one of its arms has no run.
    """
    runs = saved_runs() | finished_runs()
    save_runs(runs)
    groups = {group: [arm for arm in ARMS if arm.group == group] for group in dict.fromkeys(arm.group for arm in ARMS)}
    missing = {arm.group for arm in ARMS if not any((arm.name, seed) in runs for seed in SEEDS)}
    parts = {group: "".join(table(runs, with_baseline(group), group)) for group in groups if group not in missing}
    judged = [arm for arm in ARMS if arm.start is COUNTDOWN and arm.group != "long"]
    if not missing & {arm.group for arm in judged}:
        parts["critic"] = "".join(critics(runs, judged))
    parts["times"] = times(runs)
    for one in pictures(groups):
        if one.part in parts:
            draw(runs, DOCUMENT.with_name(one.name), one.arms, one.panels)
            parts[one.part] += f"\n![{one.words}]({one.name})\n"
    text = replaced(DOCUMENT, {f"tools/study.py: {name}": made for name, made in parts.items()})
    replace_file(DOCUMENT, text, fsync=False)
