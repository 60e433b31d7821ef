"""Several runs on one page: their scores, curves, phases and memory side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_tempo.config.tree import leaves
from megatron_tempo.errors import InputError
from megatron_tempo.files import replace_file
from megatron_tempo.observability.console import readable
from megatron_tempo.observability.progress import clock
from megatron_tempo.observability.records import Record
from megatron_tempo.report import charts
from megatron_tempo.report.charts import Chart, Labelled, labelled
from megatron_tempo.report.collapse import collapse_words, reward_accuracies
from megatron_tempo.report.html import WARNED, Sample, made_with, samples, scale, template, value_range_of
from megatron_tempo.report.summary import Run, memory_peaks, phase_totals, printable, score
from megatron_tempo.report.verdict import compared

_OWN = ("run.dir",)  # fields in which every run differs


# Settings of an evaluation that change its scores, whatever the model.
_MEASURED = (
    *("evaluation.temperature", "evaluation.top_p", "evaluation.top_k", "evaluation.min_p", "evaluation.stop"),
    *("rollout.stop", "evaluation.max_response_tokens", "rollout.max_response_tokens"),
)
# Those that records of earlier versions do not have, with the values that they had.
_MEASURED_AT_FIRST: Record = {
    "evaluation.top_p": 1.0,
    "evaluation.top_k": None,
    "evaluation.min_p": 0.0,
    "evaluation.stop": None,
    "rollout.stop": [],
}
_OF_SET = ("verifier", "verifier_field", "prompt_field", "chat_template", "system", "suffix")


@dataclass(frozen=True, slots=True)
class Cell:
    """A score; `small`: the score of the run's first evaluation; `best`: a test supports that it is the highest."""

    text: str
    small: str
    best: bool


@dataclass(frozen=True, slots=True)
class ScoreRow:
    set: str
    kind: str
    cells: list[Cell]


@dataclass(frozen=True, slots=True)
class Alike:
    """The runs, by index, whose last evaluation of a set has the same questions."""

    set: str
    title: str  # the set's name, and the number of questions if runs have different ones
    members: list[int]


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Writes a page about these runs to `out` and replaces an earlier one.

    Raises InputError for a folder that is given twice, that is missing, or whose files are broken.
    """
    if twice := [folder for i, folder in enumerate(folders) if folder.resolve() in [f.resolve() for f in folders[:i]]]:
        raise InputError(f"{twice[0]} is given twice: give each folder once")
    runs = labelled(list(zip(names(folders), [Run.read(folder) for folder in folders], strict=True)))
    sets = list(dict.fromkeys(name for one in runs for name in one.run.sets()))
    groups = [group for name in sets for group in alike(runs, name)]
    page = template("comparison.html").render(
        title=f"{len(runs)} TEMPO runs",
        runs=[_about(one, folder, out) for one, folder in zip(runs, folders, strict=True)],
        labels=[printable(one.label) for one in runs],
        score_rows=[row for group in groups for row in _score_rows(runs, group)],
        untested=[printable(line) for group in groups if (line := _untested(runs, group))],
        scores=[chart for group in groups for chart in _score_charts(runs, group)],
        calibration=list(charts.calibration_charts(runs)),
        training=list(charts.training_overlays(runs)),
        phase_bars=_phase_bars(runs),
        phase_rows=_rows([phase_means(one.run) for one in runs]),
        memory_rows=_rows([memory_peaks(one.run.metrics) for one in runs]),
        differences=_differences(runs),
        alerts=[printable(f"{one.label}: {alert.message()}") for one in runs for alert in one.run.alerts()],
        warnings=[printable(f"{one.label}: {w['text']}") for one in runs for w in one.run.warnings[-WARNED:]],
        samples=[(printable(one.label), chosen, value_range_of(one.run)) for one in runs if (chosen := _last(one.run))],
        made_with=[(printable(one.label), rows) for one in runs if (rows := made_with(one.run.starts))],
        scale=scale(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page, fsync=True)
    return out


def names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that differ."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _about(one: Labelled, folder: Path, out: Path) -> dict[str, Any]:
    run = one.run
    done, planned = run.iterations()
    seconds = sum(record.get("seconds", 0.0) for record in run.metrics + run.evaluations)
    report = folder / "report.html"
    link = quote(os.path.relpath(report.resolve(), out.resolve().parent)) if report.exists() else ""
    return {
        "label": printable(one.label),
        "link": link,
        "colour": f"var(--c{one.colour})",
        "dashes": " ".join(map(str, one.dash)),
        "model": Path(str(run.config["model"]["path"])).name if run.config else "",
        "stages": " · ".join(stage.label for stage in run.stages()),
        "iterations": str(done) if done == planned else f"{done} of {planned}",
        "time": clock(seconds),
    }


def alike(runs: Sequence[Labelled], name: str) -> list[Alike]:
    """The runs that evaluated a set, grouped by their questions.

    Records of earlier versions do not identify the questions; each number of questions is then a group.
    """
    groups: dict[tuple[str | None, int], list[int]] = {}
    for place, one in enumerate(runs):
        if (last := _last_of(one, name)) is not None:
            groups.setdefault((last.get("questions_hash"), last["questions"]), []).append(place)
    if len(groups) == 1:
        return [Alike(name, printable(name), members) for members in groups.values()]
    used: dict[int, int] = {}
    sets_alike = []
    for (_, questions), members in groups.items():
        used[questions] = used.get(questions, 0) + 1
        other = "" if used[questions] == 1 else f", set {used[questions]}"
        sets_alike.append(Alike(name, printable(f"{name} ({questions} questions{other})"), members))
    return sets_alike


def _last_of(one: Labelled, name: str) -> Record | None:
    records = [record for record in one.run.evaluations if record["set"] == name]
    return records[-1] if records else None


def _score_rows(runs: Sequence[Labelled], group: Alike) -> list[ScoreRow]:
    """One row per kind of score, and one cell per run with its last evaluation."""
    of_run: list[list[Record]] = [
        [record for record in one.run.evaluations if record["set"] == group.set] if place in group.members else []
        for place, one in enumerate(runs)
    ]
    k = of_run[group.members[0]][0]["avg_k"]
    passes = dict.fromkeys(k for records in of_run for record in records for k in record["pass"])
    testable = _untested(runs, group) is None
    rows = []
    for kind, of_kind in ((f"avg@{k}", None), *((f"pass@{k}", k) for k in passes)):
        cells = [_cell(records, k if of_kind is None else None, of_kind) for records in of_run]
        best = _best([records[-1] if records else None for records in of_run], of_kind) if testable else None
        rows.append(ScoreRow(group.title, kind, [Cell(t, s, place == best) for place, (t, s) in enumerate(cells)]))
    votes = [reward_accuracies(records) for records in of_run]
    if any(votes):
        words = [Cell(collapse_words(of) if of else "-", "", best=False) for of in votes]
        rows.append(ScoreRow(group.title, "model collapse step", words))
    return rows


def _best(last: Sequence[Record | None], k: str | None) -> int | None:
    """The index of the run that a paired test finds better than each of the others; None if there is none."""
    values = {
        place: value
        for place, record in enumerate(last)
        if record is not None and (value := record["avg"] if k is None else record["pass"].get(k)) is not None
    }
    if len(values) < 2:
        return None
    highest = max(values, key=values.__getitem__)
    for place in values.keys() - {highest}:
        first, second = last[place], last[highest]
        assert first is not None
        assert second is not None
        comparison = compared(first, second, k)
        if comparison is None or not comparison.is_real or comparison.difference <= 0:
            return None
    return highest


def _untested(runs: Sequence[Labelled], group: Alike) -> str | None:
    """Why the scores of these runs are not tested against each other; None if they are, or if there is only one."""
    members = [runs[place] for place in group.members]
    if len(members) < 2:
        return None
    unknown = [one.label for one in members if (_last_of(one, group.set) or {}).get("right") is None]
    if unknown:
        return f"{group.title}: not tested, as the records of {', '.join(unknown)} have no verdicts by question"
    fields = [*_MEASURED, *(f"evaluation.sets.{group.set}.{name}" for name in _OF_SET)]
    configs = [_MEASURED_AT_FIRST | dict(leaves(one.run.config)) for one in members if one.run.config]
    differing = [field for field in fields if len({_value(config, field) for config in configs}) > 1]
    return f"{group.title}: not tested, as the runs differ in {', '.join(differing)}" if differing else None


def _score_charts(runs: Sequence[Labelled], group: Alike) -> Iterator[Chart]:
    return charts.score_charts([runs[place] for place in group.members], group.set, group.title)


def _cell(records: Sequence[Record], avg_k: int | None, k: str | None) -> tuple[str, str]:
    """The last score and the first one as texts; the second names k if it is not `avg_k`."""

    def of(record: Record) -> tuple[float | None, float | None]:
        if k is None:
            return record["avg"], record["avg_se"]
        return record["pass"].get(k), record["pass_se"].get(k)

    if not records or of(records[-1])[0] is None:
        return "-", ""
    first, last = records[0], records[-1]
    other = "" if avg_k is None or last["avg_k"] == avg_k else f"avg@{last['avg_k']}, "
    was = f"step {last['step']}" + ("" if first is last else f", from {score(of(first)[0], None)}")
    return score(*of(last)), f"{other}{was}"


def phase_means(run: Run) -> dict[str, float]:
    """Mean seconds per iteration of each outermost phase."""
    return {name: total / len(run.metrics) for name, total in phase_totals(run.metrics).items() if run.metrics}


def _phase_bars(runs: Sequence[Labelled]) -> dict[str, Any] | None:
    """Seconds per iteration by phase, without evaluations: a bar per run, as shares of the longest bar in percent."""
    means = [phase_means(one.run) for one in runs]
    names = [name for name, _ in _rows(means)]
    longest = max((sum(mean.values()) for mean in means), default=0.0)
    if not names or not longest:
        return None
    colours = {name: f"var(--c{i % charts.COLOURS})" for i, name in enumerate(names)}
    bars = [
        (
            printable(one.label),
            sum(mean.values()),
            [(name, colours[name], 100 * mean[name] / longest, mean[name]) for name in names if name in mean],
        )
        for one, mean in zip(runs, means, strict=True)
    ]
    return {"key": colours, "bars": bars}


def _rows(numbers: Sequence[dict[str, float]]) -> list[tuple[str, list[str]]]:
    """One row per name, the largest first, with one cell per run."""
    names = {name for of_run in numbers for name in of_run}
    ranked = sorted(names, key=lambda name: -max(of_run.get(name, 0.0) for of_run in numbers))
    return [(name, [readable(of_run[name]) if name in of_run else "-" for of_run in numbers]) for name in ranked]


def _differences(runs: Sequence[Labelled]) -> list[tuple[str, list[str]]]:
    """The configuration fields in which the runs differ, and their values; "-" if a run has none."""
    configs = [dict(leaves(one.run.config)) for one in runs]
    fields = dict.fromkeys(field for config in configs for field in config if field not in _OWN)
    rows = [(field, [_value(config, field) for config in configs]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _value(config: Record, field: str) -> str:
    value = config.get(field, "-")
    plain = {None: "null", True: "true", False: "false"}
    return printable(plain[value] if value is None or isinstance(value, bool) else str(value))


def _last(run: Run) -> list[Sample]:
    """A few responses of the run's last milestone with responses."""
    return next((chosen for m in reversed(run.milestones()) if (chosen := samples(run, m))), [])
