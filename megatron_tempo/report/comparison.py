"""Several runs on one page: their scores, curves, phases and memory side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_tempo.config.tree import leaves
from megatron_tempo.errors import InputError
from megatron_tempo.observability.console import readable
from megatron_tempo.observability.progress import clock
from megatron_tempo.observability.records import Record, write_whole
from megatron_tempo.report import overlays
from megatron_tempo.report.html import WARNED, Sample, picture, samples, scale, template, value_range_of
from megatron_tempo.report.overlays import Labelled, labelled
from megatron_tempo.report.summary import Run, memory_peaks, printable, score

_OWN = ("run.dir",)  # fields in which every run differs


@dataclass(frozen=True, slots=True)
class Cell:
    """A score; `small`: the score of the run's first evaluation; `best`: the highest of its row."""

    text: str
    small: str
    best: bool


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Writes a page about these runs to `out` and replaces an earlier one.

    Raises InputError for a folder that is given twice, that is missing, or whose files are broken.
    """
    if twice := [folder for i, folder in enumerate(folders) if folder.resolve() in [f.resolve() for f in folders[:i]]]:
        raise InputError(f"{twice[0]} is given twice: give each folder once")
    runs = labelled(list(zip(names(folders), [Run.read(folder) for folder in folders], strict=True)))
    sets = list(dict.fromkeys(name for one in runs for name in one.run.sets()))
    bars = overlays.phases(runs)
    page = template("comparison.html").render(
        title=f"{len(runs)} TEMPO runs",
        runs=[_about(one, folder, out) for one, folder in zip(runs, folders, strict=True)],
        labels=[printable(one.label) for one in runs],
        score_rows=[row for name in sets for row in _score_rows(runs, name)],
        scores=[picture(figure, title) for name in sets for title, figure in overlays.scores(runs, name)],
        calibration=[picture(figure, title) for title, figure in overlays.calibration(runs)],
        training=[picture(figure, title) for title, figure in overlays.training(runs)],
        phases=picture(bars, "Seconds per iteration by phase") if bars is not None else None,
        phase_rows=_rows([overlays.phase_means(one.run) for one in runs]),
        memory_rows=_rows([memory_peaks(one.run.metrics) for one in runs]),
        differences=_differences(runs),
        alerts=[printable(f"{one.label}: {alert.message()}") for one in runs for alert in one.run.alerts()],
        warnings=[printable(f"{one.label}: {w['text']}") for one in runs for w in one.run.warnings[-WARNED:]],
        samples=[(printable(one.label), chosen, value_range_of(one.run)) for one in runs if (chosen := _last(one.run))],
        scale=scale(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(out, page)


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
        "colour": one.colour,
        "dashes": one.dashes,
        "model": Path(str(run.config["model"]["path"])).name if run.config else "",
        "stages": " · ".join(stage.label for stage in run.stages()),
        "iterations": str(done) if done == planned else f"{done} of {planned}",
        "time": clock(seconds),
    }


def _score_rows(runs: Sequence[Labelled], name: str) -> list[tuple[str, str, list[Cell]]]:
    """Set, kind of score, and one cell per run with its last evaluation."""
    of_run = [[record for record in one.run.evaluations if record["set"] == name] for one in runs]
    k = next(records[0]["avg_k"] for records in of_run if records)
    rows = [(name, f"avg@{k}", [_cell(records, k, None) for records in of_run])]
    passes = dict.fromkeys(k for records in of_run for record in records for k in record["pass"])
    rows += [(name, f"pass@{k}", [_cell(records, None, k) for records in of_run]) for k in passes]
    return [(printable(set_name), kind, _with_best(cells)) for set_name, kind, cells in rows]


def _cell(records: Sequence[Record], avg_k: int | None, k: str | None) -> tuple[float | None, str, str]:
    """The last score, as a number and as text, and the first one as text, which names k if it is not `avg_k`."""

    def of(record: Record) -> tuple[float | None, float | None]:
        if k is None:
            return record["avg"], record["avg_se"]
        return record["pass"].get(k), record["pass_se"].get(k)

    if not records or of(records[-1])[0] is None:
        return None, "-", ""
    first, last = records[0], records[-1]
    other = "" if avg_k is None or last["avg_k"] == avg_k else f"avg@{last['avg_k']}, "
    was = f"step {last['step']}" + ("" if first is last else f", from {score(of(first)[0], None)}")
    return of(last)[0], score(*of(last)), f"{other}{was}"


def _with_best(cells: Sequence[tuple[float | None, str, str]]) -> list[Cell]:
    highest = max((value for value, _, _ in cells if value is not None), default=None)
    return [Cell(text, small, best=value is not None and value == highest) for value, text, small in cells]


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
