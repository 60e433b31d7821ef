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
from study import ARMS, BASELINES, BOTH_STAGES, EVERY, FACTORIAL, FEW, ROOT, TEST_SEEDS, Arm, folder, is_done

from megatron_tempo.files import replace_file
from megatron_tempo.observability.records import read, read_evaluations, read_metrics
from megatron_tempo.report.collapse import collapse_words
from megatron_tempo.report.plots import STYLE

DOCUMENT = ROOT / "docs" / "study.md"
CURVES = ROOT / "docs" / "study.jsonl"
SETS = ("unlabelled", "heldout", "labelled")
CELLS = [(name, score) for name in SETS for score in ("avg@16", "pass@16")]
WITHIN = "auroc_within_questions"
VOTES = {"reward_accuracy": "reward accuracy", "label_accuracy": "label accuracy"}  # fields of a record's votes
LAST = 10  # iterations at the end of a run, for the share of truncated responses
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#24292f")

# Lines of docs/study.jsonl, by arm and seed: arm, seed, seconds, the share of truncated training responses in the last
# iterations, and for each set the iterations and their scores.
Runs = dict[tuple[str, int], dict[str, Any]]


def saved_runs() -> Runs:
    return {(line["arm"], line["seed"]): line for line in read(CURVES)}


def finished_runs() -> Runs:
    """The finished runs on this machine."""
    done = [(arm.name, seed) for arm in EVERY for seed in arm.seeds if is_done(folder(arm.name, seed))]
    return {(arm, seed): _line(arm, seed) for arm, seed in done}


def save_runs(runs: Runs) -> None:
    order = [(arm.name, seed) for arm in EVERY for seed in _seeds(runs, arm)]
    replace_file(CURVES, "".join(json.dumps(runs[run]) + "\n" for run in order), fsync=False)


def _seeds(runs: Runs, arm: Arm) -> list[int]:
    return [seed for seed in arm.seeds if (arm.name, seed) in runs]


def _line(arm: str, seed: int) -> dict[str, Any]:
    run = folder(arm, seed)
    curves: dict[str, dict[str, list[float | None]]] = {}  # None: AUROC if all responses are wrong
    records = [record for record in read_evaluations(run) if record["stage"] == "stage2"]
    for record in sorted(records, key=lambda record: record["iteration"]):
        scores = {"avg@16": record["avg"]} | {f"pass@{k}": value for k, value in record["pass"].items() if k != "1"}
        last = (record["calibration"] or {}).get("last", {})
        scores |= {name: last[name] for name in ("auroc", WITHIN, "ece") if name in last}
        vote = record.get("vote") or {}
        scores |= {name: vote[field] for field, name in VOTES.items() if field in vote}
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
    """The curve of an arm's score on the set `name`, of the runs that recorded it. None if there is none."""
    seeds = [seed for seed in _seeds(runs, arm) if score in runs[arm.name, seed]["sets"][name]]
    curves = [runs[arm.name, seed]["sets"][name] for seed in seeds]
    if not curves:
        return None
    return Curve(seeds, np.array(curves[0]["iterations"]), np.array([one[score] for one in curves], dtype=float))


def interval(values: np.ndarray) -> float:
    """Half the width of the 95% interval of the mean over seeds, by Student's t. NaN for a single seed."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")


def formatted(values: np.ndarray, sign: str = "") -> str:
    """The mean over seeds with its interval. With two seeds it says nothing: the lower and the higher score."""
    half = interval(values)
    mean = number(values.mean(), sign)
    if len(values) == 2:
        return f"{mean} ({number(values.min(), sign)} to {number(values.max(), sign)})"
    return mean if np.isnan(half) else f"{mean} ± {number(half)}"


def number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def baseline(group: str) -> Arm:
    """The arm that those of a group are compared with."""
    return next(arm for arm in EVERY if arm.name == BASELINES.get(group, "tempo"))


def mixed(runs: Runs) -> list[str]:
    """Runs whose first scores are not those of TEMPO's run of their part and seed: they do not share a stage 1.

    As if part of the runs had been made on another machine. Runs of both stages have a stage 1 of their own.
    """
    found = []
    for arm in (arm for arm in EVERY if not set(BOTH_STAGES) <= set(arm.words)):
        tempo = baseline(arm.group).name
        for seed in (seed for seed in _seeds(runs, arm) if (tempo, seed) in runs):
            one, other = (runs[name, seed]["sets"][SETS[0]]["avg@16"][0] for name in (arm.name, tempo))
            if one != other:
                found.append(f"{arm.name}, seed {seed}, starts at {number(one)}, and {tempo} at {number(other)}")
    return found


def table(runs: Runs, arms: list[Arm], group: str = "methods") -> Iterator[str]:
    """The final scores of the arms: means over seeds with intervals, and each arm's difference to TEMPO.

    If they were recorded: the share of truncated responses in the last iterations, and the model collapse step of each
    seed on the unlabelled set. Earlier runs recorded neither.
    """
    heads = [f"{name}, {score}" for name, score in CELLS]
    tempo, shares = baseline(group), {arm.name: _truncated(runs, arm) for arm in arms}
    shown = any(len(one) for one in shares.values())
    voted = any(curve(runs, arm, SETS[0], "reward accuracy") is not None for arm in arms)
    last = (" | truncated" if shown else "") + (" | model collapse step" if voted else "")
    extra = shown + voted
    yield f"| stage 2 | seeds | {' | '.join(heads)} | minus TEMPO: unlabelled | held-out{last} |\n"
    yield f"|{' --- |' * (len(heads) + 4 + extra)}\n"
    start = [curve(runs, tempo, *cell) for cell in CELLS]
    if start[0] is not None:
        words = [formatted(one.first) for one in start if one is not None]
        yield f"| no stage 2 (end of stage 1) | {len(start[0].seeds)} | {' | '.join(words)} | | |{' |' * extra}\n"
    for arm in arms:
        ends = [curve(runs, arm, *cell) for cell in CELLS]
        words = [formatted(one.last) if one is not None else "" for one in ends]
        differences = [_difference(runs, arm, tempo, name) for name in SETS[:2]]
        seeds = len(ends[0].seeds) if ends[0] is not None else 0
        share = shares[arm.name]
        more = f" {formatted(share) if len(share) else ''} |" if shown else ""
        more += f" {collapses(runs, arm)} |" if voted else ""
        yield f"| {arm.what} | {seeds} | {' | '.join(words)} | {' | '.join(differences)} |{more}\n"


def _truncated(runs: Runs, arm: Arm) -> np.ndarray:
    return np.array([one["truncated"] for seed in _seeds(runs, arm) if "truncated" in (one := runs[arm.name, seed])])


def collapses(runs: Runs, arm: Arm) -> str:
    """The model collapse step of each seed (report.collapse), in iterations of stage 2, on the unlabelled set.

    Once, if no seed has one.
    """
    one = curve(runs, arm, SETS[0], "reward accuracy")
    if one is None:
        return ""
    steps = [int(step) for step in one.iterations]
    words = [collapse_words(dict(zip(steps, scores.tolist(), strict=True))) for scores in one.scores]
    return words[0] if len(set(words)) == 1 and words[0].startswith("none") else ", ".join(words)


def _difference(runs: Runs, arm: Arm, tempo: Arm, name: str) -> str:
    found = differences(runs, arm, tempo, (name, "avg@16"))
    return formatted(found, "+") if arm is not tempo and len(found) else ""


def differences(runs: Runs, arm: Arm, other: Arm, cell: tuple[str, str]) -> np.ndarray:
    """The final score of `arm` minus that of `other`, by seed. Runs of a seed share stage 1 and the order of questions.

    Of the seeds that both have.
    """
    pair = [curve(runs, each, *cell) for each in (arm, other)]
    ends = [dict(zip(one.seeds, one.last, strict=True)) if one is not None else {} for one in pair]
    return np.array([ends[0][seed] - ends[1][seed] for seed in ends[0] if seed in ends[1]])


def paired(runs: Runs, arm: Arm, others: list[Arm]) -> Iterator[str]:
    """How the final scores of `arm` differ from those of other arms, seed by seed.

    In each cell: the mean difference with its 95% interval, the number of seeds in which the difference is positive,
    and the p-value of a two-sided paired t-test.
    """
    yield f"| {arm.what} minus | {' | '.join(', '.join(cell) for cell in CELLS)} |\n"
    yield f"|{' --- |' * (len(CELLS) + 1)}\n"
    for other in others:
        words = [_tested(differences(runs, arm, other, cell)) for cell in CELLS]
        yield f"| {other.what} | {' | '.join(words)} |\n"


def _tested(found: np.ndarray) -> str:
    if len(found) < 2:
        return ""
    p = stats.ttest_1samp(found, 0.0).pvalue
    words = "p < .001" if p < 0.001 else f"p = {number(p)}"
    return f"{formatted(found, '+')} ({int((found > 0).sum())} of {len(found)}, {words})"


def critics(runs: Runs, arms: list[Arm]) -> Iterator[str]:
    """AUROC and calibration error of the arms' critics, and the AUROC within questions if it was recorded."""
    shown = {arm.what: [curve(runs, arm, "heldout", name) for name in ("auroc", "ece", WITHIN)] for arm in arms}
    within = any(one[2] is not None for one in shown.values())
    heads = ["AUROC, end of stage 1", "lowest", "end", "ECE, end of stage 1", "highest", "end"]
    heads += ["AUROC within questions, end of stage 1", "lowest", "end"] if within else []
    yield f"| stage 2 | {' | '.join(heads)} |\n"
    yield f"|{' --- |' * (len(heads) + 1)}\n"
    for what, (right, honest, apart) in shown.items():
        if right is None or honest is None:
            continue
        cells = [formatted(x) for x in (right.first, right.scores.min(1), right.last)]
        cells += [formatted(x) for x in (honest.first, honest.scores.max(1), honest.last)]
        if within:
            found = (apart.first, apart.scores.min(1), apart.last) if apart is not None else ()
            cells += [formatted(x) for x in found] or [""] * 3
        yield f"| {what} | {' | '.join(cells)} |\n"


def factor_effects(runs: Runs) -> Iterator[str]:
    """A table of what each factor changes in the final scores, on minus off, with 95% intervals (factorial.effects).

    Of the seeds that have all 16 runs. Empty if there is none. An effect whose interval does not contain 0 is bold.
    """
    seeds = [seed for seed in FACTORIAL[0].seeds if all((arm.name, seed) in runs for arm in FACTORIAL)]
    if not seeds:
        return

    def end(arm: Arm, name: str, score: str) -> np.ndarray:
        return np.array([runs[arm.name, seed]["sets"][name][score][-1] for seed in seeds])

    found = [effects({arm.name: end(arm, *cell) for arm in FACTORIAL}) for cell in CELLS]
    what = {factor.letter: f"{factor.letter}: {factor.what}" for factor in FACTORS}
    yield f"| {len(seeds)} seeds | {' | '.join(', '.join(cell) for cell in CELLS)} |\n"
    yield f"|{' --- |' * (len(CELLS) + 1)}\n"
    for term in found[0]:
        words = [number(of_cell[term].mean, "+") for of_cell in found]
        bold = [abs(of_cell[term].mean) > of_cell[term].half for of_cell in found]
        cells = [f"**{word}**" if is_bold else word for word, is_bold in zip(words, bold, strict=True)]
        yield f"| {what.get(term, term)} | {' | '.join(cells)} |\n"
    yield f"| 95% interval, ± | {' | '.join(number(of_cell['A'].half) for of_cell in found)} |\n"


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
    each = f"each {seconds[0]} to {seconds[-1]} s, median {np.median(seconds):.0f} s"
    return f"{len(seconds)} runs of stage 2: {sum(seconds) / 3600:.1f} hours of one core, {each}.\n"


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
    for group in [group for group, arms in groups.items() if group != "methods" and FEW not in arms[0].words]:
        panels = [*avgs, labelled] if group == "transfer" else avgs
        drawn.append(Picture(f"study-{group}.png", "avg@16 over the iterations", group, with_baseline(group), panels))
    return drawn


def write() -> None:
    """Save the curves of this machine's runs, and replace the generated parts of docs/study.md and its pictures.

    A part is not changed if one of its arms has no run. Exits if runs that are compared do not share their stage 1.
    """
    runs = saved_runs() | finished_runs()
    if found := mixed(runs):
        fix = "train all arms of a part, and what its TEMPO is compared with elsewhere, on one machine"
        raise SystemExit("\n".join(["docs/study.md is not changed. Runs of different starts:", *found, f"fix: {fix}"]))
    save_runs(runs)
    groups = {group: [arm for arm in ARMS if arm.group == group] for group in dict.fromkeys(arm.group for arm in ARMS)}
    missing = {arm.group for arm in ARMS if not _seeds(runs, arm)}
    parts = {group: "".join(table(runs, with_baseline(group), group)) for group in groups if group not in missing}
    if "methods" in parts:
        parts["critic"] = "".join(critics(runs, groups["methods"]))
    if "logic_dates" in parts:
        parts["logic_dates"] += "\n" + "".join(critics(runs, groups["logic_dates"]))
    if found := "".join(factor_effects(runs)):
        parts["factorial"] = found
    for test in TEST_SEEDS.keys() & parts.keys():
        tempo, chosen, *rivals = groups[test]
        parts[test] += "\n" + "".join(paired(runs, chosen, [tempo, *rivals]))
    parts["times"] = times(runs)
    for one in pictures(groups):
        if one.part in parts:
            draw(runs, DOCUMENT.with_name(one.name), one.arms, one.panels)
            parts[one.part] += f"\n![{one.words}]({one.name})\n"
    text = replaced(DOCUMENT, {f"tools/study.py: {name}": made for name, made in parts.items()})
    replace_file(DOCUMENT, text, fsync=False)
