"""Reads a run from its folder and summarizes its outcome in sentences and as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tempo.config.extensions import short_name
from megatron_tempo.errors import InputError
from megatron_tempo.errors import printable as printable
from megatron_tempo.files import read_json
from megatron_tempo.observability.alerts import Alert, alerts
from megatron_tempo.observability.heartbeat import read_heartbeat
from megatron_tempo.observability.records import (
    EVALUATIONS,
    METRICS,
    Record,
    read_evaluations,
    read_metrics,
    read_samples,
    read_starts,
    read_warnings,
)
from megatron_tempo.report.collapse import collapse_sentence, reward_accuracies
from megatron_tempo.report.verdict import same_questions, verdict

# Points at which no stage has run: of a training run, and of the eval command, which has no stages.
UNTRAINED = {"before": "before training", "alone": "as given"}


@dataclass(frozen=True, slots=True)
class Stage:
    """The steps first..last of a stage that have run."""

    name: str
    label: str  # Stage 2 · TEMPO
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Milestone:
    """The evaluation before training or after a stage."""

    label: str  # before training, after stage 1, ...
    stage: str  # the stage that has ended; empty before training
    step: int
    scores: dict[str, Record]  # by set: its line of evaluations.jsonl


@dataclass(frozen=True, slots=True)
class Finding:
    scores: str
    verdict: tuple[str, ...] = ()  # sentences: what the last stage changed, and the whole run


@dataclass(frozen=True, slots=True)
class Run:
    name: str
    config: Record  # the configuration as dicts; empty if config.json is missing
    metrics: list[Record]
    evaluations: list[Record]
    samples: list[Record]
    warnings: list[Record]
    starts: list[Record]

    @classmethod
    def read(cls, run_dir: Path) -> Run:
        """Raises InputError if the folder is missing or not that of a run, or if a file in it is broken."""
        check_is_run(run_dir)
        return cls(
            name=run_dir.resolve().name,
            config=_config(run_dir / "config.json"),
            metrics=read_metrics(run_dir),
            evaluations=sorted(read_evaluations(run_dir), key=lambda record: record["step"]),
            samples=read_samples(run_dir),
            warnings=read_warnings(run_dir),
            starts=read_starts(run_dir),
        )

    def alerts(self) -> list[Alert]:
        return alerts(self.metrics, self.evaluations)

    def sets(self) -> list[str]:
        """The evaluated sets, in the order of their first evaluation."""
        return list(dict.fromkeys(record["set"] for record in self.evaluations))

    def stages(self) -> list[Stage]:
        spans: dict[str, list[Record]] = {}
        for record in self.metrics:
            spans.setdefault(record["stage"], []).append(record)
        return [
            Stage(
                name,
                f"{_words(name).capitalize()} · {short_name(records[0].get('method', '?')).upper()}",
                min(record["step"] for record in records),
                max(record["step"] for record in records),
            )
            for name, records in spans.items()
        ]

    def milestones(self) -> list[Milestone]:
        """In the order of the run. A stage without iterations adds no milestone: it has the previous stage's step."""
        milestones: dict[int, Milestone] = {}
        for record in self.evaluations:
            if record["point"] == "during":
                continue
            stage = record.get("stage", "")
            label = UNTRAINED.get(record["point"], f"after {_words(stage)}")
            new = Milestone(label, "" if record["point"] in UNTRAINED else stage, record["step"], {})
            milestones.setdefault(record["step"], new).scores.setdefault(record["set"], record)
        labels = [milestone.label for milestone in milestones.values()]
        return [  # a stage that was made longer after its end has ended more than once
            replace(one, label=f"{one.label} (step {one.step})") if labels.count(one.label) > 1 else one
            for one in milestones.values()
        ]

    def iterations(self) -> tuple[int, int]:
        """Iterations done and planned, over all stages."""
        done = max((record["step"] for record in self.metrics), default=0)
        planned = sum(self.config.get(stage, {}).get("iterations", 0) for stage in ("stage1", "stage2"))
        return done, max(done, planned)


_MOST = 1 << 53  # iterations, which no run reaches


def check_is_run(run_dir: Path) -> None:
    """Raises InputError if the folder is not that of a run or an evaluation, such as a folder of a model."""
    if not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a folder: give the run.dir of a run")
    if read_heartbeat(run_dir) is not None or any(_has_content(run_dir / name) for name in (METRICS, EVALUATIONS)):
        return
    config = run_dir / "config.json"
    if not config.exists():
        raise InputError(
            f"{run_dir} is not the folder of a run: no config.json, no heartbeat.json; give the run.dir of a run"
        )
    keys = read_json(config, dict).keys()
    if keys and not _OF_A_RUN & keys:
        raise InputError(f"{run_dir} is not the folder of a run: its config.json is none's; give the run.dir of a run")


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


_OF_A_RUN = {"run", "rollout", "stage1"}  # keys of a run's config.json


def _config(path: Path) -> Record:
    """The configuration of a run as written; empty if there is none."""
    if not path.exists():
        return {}
    config = read_json(path, dict)
    for group, field in (("model", "path"), ("run", "seed")):
        if config and (not isinstance(config.get(group), dict) or field not in config[group]):
            raise InputError(f"{path} has no {group}.{field}; bring back the file that the run wrote")
    for name in ("stage1", "stage2"):
        stage = config.get(name, {})
        if not isinstance(stage, dict) or not isinstance(stage.get("critic", {}), dict):
            raise InputError(f"{path}: {name} is not a group of fields; bring back the file that the run wrote")
        if not isinstance(stage.get("critic", {}).get("targets", ""), str):
            raise InputError(f"{path}: {name}.critic.targets is not a name; bring back the file that the run wrote")
        if type(stage.get("iterations", 0)) is not int or abs(stage.get("iterations", 0)) > _MOST:
            raise InputError(f"{path}: {name}.iterations is not a whole number; bring back the file that the run wrote")
    return config


def outcome(run: Run) -> list[Finding]:
    """What was measured, in sentences: first the progress of an unfinished run, then one finding per set.

    A set's verdict is paired over its questions, and covers every pass@k: training may raise avg@k and lower pass@k.
    """
    findings = []
    done, planned = run.iterations()
    if done < planned:
        findings.append(Finding(f"This run is not finished: {done} of {planned} iterations are done."))
    milestones = run.milestones()
    if not milestones:
        findings.append(Finding("Nothing has been evaluated yet."))
    for name in run.sets():
        reached = [(m, m.scores[name]) for m in milestones if name in m.scores and m.scores[name]["avg"] is not None]
        if not reached:
            continue
        record = reached[0][1]
        texts = [f"{score(r['avg'], r['avg_se'])} {m.label}" for m, r in reached]
        listed = " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
        findings.append(
            Finding(
                f"{name} ({record['questions']} questions): avg@{record['avg_k']} was {listed}.",
                _verdict(reached),
            )
        )
        if accuracies := reward_accuracies([record for record in run.evaluations if record["set"] == name]):
            findings.append(Finding(collapse_sentence(name, accuracies)))
        last = reached[-1][1]
        if "seen" in last:  # not in the records of earlier versions
            findings.append(Finding(f"{name}: {seen_words(last['seen'], last['questions'])}."))
    return findings


def summary_table(run_dir: Path) -> str:
    """Plain text: scores of each set before, between and after the stages, with standard errors, and the outcome."""
    run = Run.read(run_dir)
    table = plain_table(*score_rows(run))
    findings = [line for finding in outcome(run) for line in (finding.scores, *(f"  {v}" for v in finding.verdict))]
    return printable("\n".join([*table, *findings]))


def plain_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table for a terminal, and an empty line; no lines if there are no rows."""
    if not rows:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    ruled = [header, ["-" * width for width in widths], *rows]
    return [
        *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in ruled),
        "",
    ]


def sampled_words(settings: Mapping[str, Any]) -> str:
    """How responses were sampled, by `temperature` and the other settings that restrict something.

    >>> sampled_words({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "stop": []})
    'temperature 0.6, top_p 0.95, top_k 20'
    """
    temperature = settings.get("temperature")
    words = ["greedy" if temperature == 0 else f"temperature {temperature}"]
    off = {"top_p": 1.0, "top_k": None, "min_p": 0.0}
    named = {name: settings.get(name) for name in off}
    words += [f"{name} {value}" for name, value in named.items() if value not in (None, off[name])]
    stop = settings.get("stop")
    return ", ".join(words + ([f"stop {stop}"] if stop else []))


def seen_words(seen: dict[str, int] | None, questions: int) -> str:
    """How many of a set's questions the model was trained on. `seen`: as from `seen.count`; None if unknown."""
    if seen is None:
        return "it is unknown which questions the model was trained on"
    if not any(seen.values()):
        return f"the model was trained on none of the {questions} questions"
    labelled, unlabelled = seen["with_answers"], seen["without_answers"]
    return f"of the {questions} questions, the model was trained on {labelled} with answers and {unlabelled} without"


def judge_warning(counts: dict[str, int]) -> str | None:
    """A warning about responses for which the judge returned no readable verdict (`Verifiers.take_counts`), or None."""
    missing = counts.get("judge/unreadable", 0)
    if not missing:
        return None
    return f"warning: the judge returned no readable verdict for {missing} responses; they count as wrong"


def score_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """The table's header and rows: one row per set for avg@k and for each pass@k, one column per milestone."""
    milestones = run.milestones()
    rows = []
    for name in run.sets():
        records = [m.scores.get(name) for m in milestones]
        known = [record for record in records if record is not None]
        if not known:
            continue
        rows.append([name, f"avg@{known[0]['avg_k']}", *(score(r["avg"], r["avg_se"]) if r else "" for r in records)])
        for k in dict.fromkeys(k for record in known for k in record["pass"]):
            cells = (score(r["pass"].get(k), r["pass_se"].get(k)) if r else "" for r in records)
            rows.append([name, f"pass@{k}", *cells])
    return ["set", "score", *(m.label for m in milestones)], rows


def memory_peaks(metrics: Sequence[Record]) -> dict[str, float]:
    """The highest peak of each phase in a run, in 10^9 bytes, the largest first."""
    peaks: dict[str, float] = {}
    for record in metrics:
        for name, value in record.items():
            if name.startswith("memory_gb/") and value is not None:
                phase = name.removeprefix("memory_gb/")
                peaks[phase] = max(peaks.get(phase, 0.0), value)
    return dict(sorted(peaks.items(), key=lambda item: -item[1]))


def phase_totals(records: Sequence[Record]) -> dict[str, float]:
    """Seconds of each outermost phase over the records."""
    totals: dict[str, float] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("time/") and name.count("/") == 1 and value is not None:
                totals[name.removeprefix("time/")] = totals.get(name.removeprefix("time/"), 0.0) + value
    return totals


def _verdict(reached: Sequence[tuple[Milestone, Record]]) -> tuple[str, ...]:
    """What the last stage changed and, after several stages, what all of them did. Empty after a single evaluation."""
    if len(reached) < 2:
        return ()
    (first, old), (last, new) = reached[-2:]
    subject, other = _words(last.stage).capitalize(), _words(first.stage) or "the start"
    if first.stage == last.stage:  # it was made longer after its end
        subject, other = f"{subject} at step {last.step}", f"{other} at step {first.step}"
    texts = verdict(subject, other, old, new)
    if len(reached) > 2:
        texts += verdict("The whole run", "the start", reached[0][1], new)
    return (*texts, f"Paired over {new['questions']} questions.") if same_questions(old, new) else tuple(texts)


def score(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _words(stage: str) -> str:
    """The name of a stage in prose: stage 2 for stage2."""
    return re.sub(r"(?<=\D)(?=\d)", " ", stage)
