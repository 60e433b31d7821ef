"""`megatron-tempo status`: what a run is doing, read from its folder. Needs no torch and writes nothing."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_tempo.config import schedule
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import read
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json
from megatron_tempo.observability.alerts import alerts
from megatron_tempo.observability.console import readable
from megatron_tempo.observability.heartbeat import BEAT, DONE, SILENT, read_heartbeat
from megatron_tempo.observability.progress import RECENT, Forecast, clock
from megatron_tempo.observability.records import Record, read_evaluations, read_metrics, read_warnings
from megatron_tempo.observability.terminal import width
from megatron_tempo.report.summary import check_is_run, memory_peaks, printable, score

SHOWN = 5  # warnings, the latest
OVERDUE, OVERDUE_SECONDS = 5.0, 300.0  # a phase is reported if it takes this many times the usual, and this much more
_LABEL = 12
_WIDTH = 118  # at most


@dataclass(frozen=True, slots=True)
class Status:
    text: str
    well: bool  # running, or finished


def status(run_dir: Path, now: float | None = None) -> Status:
    """`now`: unix time; None: the system clock's. Raises InputError if the folder is not that of a run."""
    check_is_run(run_dir)
    config = _config(run_dir / "config.json")
    metrics, evaluations, heartbeat = read_metrics(run_dir), read_evaluations(run_dir), read_heartbeat(run_dir)
    if config is None and heartbeat is None and not metrics and not evaluations:
        raise InputError(
            f"{run_dir} is not the folder of a run: no config.json, no heartbeat.json; give the run.dir of a run"
        )
    now = time.time() if now is None else now
    # The eval command has no iterations.
    trains = config is not None and not any(record["point"] == "alone" for record in evaluations)
    forecast = _forecast(config, metrics, evaluations) if config is not None and trains else None
    step = metrics[-1]["step"] if metrics else 0
    total = schedule.total(config) if config is not None and trains else 0
    starting = _starting(run_dir, heartbeat, now)
    state, well = starting or _state(heartbeat, step, total, now)
    running = well and starting is None and heartbeat is not None and heartbeat["ended"] is None
    rows = [
        ("run", _name(run_dir, config)),
        ("state", state),
        ("step", _step(step, total, forecast)),
        ("doing", _doing(heartbeat, metrics + evaluations, now) if heartbeat is not None and running else ""),
        ("rate", _rate(metrics)),
        ("left", f"about {clock(forecast.left())}" if running and forecast is not None and step < total else ""),
        ("last step", _step_metrics(metrics)),
        *_many("evaluation", _evaluations(evaluations)),
        ("memory", _memory(metrics)),
        *_many("engines", _engines(heartbeat["engines"] if heartbeat is not None else [], running=running)),
        *_many("alerts", [alert.line() for alert in alerts(metrics, evaluations)] or ["none"]),
        *_many("warnings", _warnings(read_warnings(run_dir))),
    ]
    return Status("\n".join(_line(label, text) for label, text in rows if text), well)


def _config(path: Path) -> Config | None:
    """The configuration. If it is from another version, the fields that this version knows."""
    if not path.exists():
        return None
    return read(read_json(path, dict))[0]


def _starting(run_dir: Path, heartbeat: Record | None, now: float) -> tuple[str, bool] | None:
    """The status of a process that holds and renews the folder's lock, and has sent no heartbeat yet."""
    path = run_dir / "lock.json"
    try:
        holder, renewed = read_json(path, dict), path.stat().st_mtime
        host, pid, since = str(holder["host"]), int(holder["pid"]), float(holder["since"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # ValueError: InputError too
        return None
    since = since if math.isfinite(since) else now
    sent = heartbeat is not None and (heartbeat["host"], heartbeat["pid"]) == (host, pid)
    if sent or abs(now - renewed) > SILENT:
        return None
    return f"starting on {host}, process {pid}, for {clock(max(now - since, 0.0))}", True


def _state(heartbeat: Record | None, step: int, total: int, now: float) -> tuple[str, bool]:
    if heartbeat is None and total and step >= total:
        return "all iterations are done; there is no heartbeat.json", True
    if heartbeat is None:
        return "unknown: there is no heartbeat.json; no job has started here, or it is of an older version", False
    where = f"{heartbeat['host']}, process {heartbeat['pid']}"
    ended, age = heartbeat["ended"], now - heartbeat["time"]
    if ended is not None and ended != DONE:
        return f"stopped at {_date(heartbeat['time'])}, on {where}: {ended}", False
    if ended == DONE:
        finished = f"finished at {_date(heartbeat['time'])}"
        return (finished, True) if step >= total else (f"{finished}, after {step} of {total} iterations", True)
    if age < -SILENT:
        ahead = f"its last heartbeat is {clock(-age)} ahead of this clock"
        return f"unknown: {ahead}; one of the clocks was set, so try again in {BEAT:.0f} s", False
    if age > SILENT:
        doing, silent = heartbeat["phase"] or "between phases", f"{_date(heartbeat['time'])}, {clock(age)} ago"
        again = "rerun the same command to resume from the latest checkpoint"
        return f"looks dead: no heartbeat since {silent}; its last phase was {doing}, on {where}; {again}", False
    return f"running on {where}, for {clock(now - heartbeat['started'])}", True


def _forecast(config: Config, metrics: Sequence[Record], evaluations: Sequence[Record]) -> Forecast:
    forecast = Forecast(config.stages(), schedule.evaluations_left(config, 0))
    for record in metrics:
        if record["stage"] in forecast.stages and None not in (record.get("iteration"), record.get("seconds")):
            forecast.step(record["stage"], record["iteration"], record["seconds"])
    for record in evaluations:
        if record.get("seconds") is not None:
            forecast.evaluation(record["seconds"])
    return forecast


def _name(run_dir: Path, config: Config | None) -> str:
    return f"{run_dir}{'' if config is None else f', {Path(config.model.path).name}'}"


def _step(step: int, total: int, forecast: Forecast | None) -> str:
    if forecast is None or not total:
        return str(step) if step else ""
    return f"{step} of {total}, {step / total:.0%}; {forecast.where()}"


def _doing(heartbeat: Record, records: Sequence[Record], now: float) -> str:
    phase, lasts = heartbeat["phase"], now - heartbeat["since"]
    if not phase:
        return f"between phases for {clock(lasts)}"
    known = [record[f"time/{phase}"] for record in records if record.get(f"time/{phase}")][-RECENT:]
    usual = fmean(known) if known else None
    words = f"{phase} for {clock(lasts)}" + (f", usually {clock(usual)}" if usual is not None else "")
    if usual is not None and lasts > OVERDUE * usual and lasts > usual + OVERDUE_SECONDS:
        words += f"; {lasts / max(usual, 1.0):.0f} times as long as usual, so it may hang"
    return words


def _rate(metrics: Sequence[Record]) -> str:
    timed = [record for record in metrics if record.get("seconds") is not None]
    recent = [record for record in timed if record["stage"] == timed[-1]["stage"]][-RECENT:]
    if not recent:
        return ""
    seconds = fmean(record["seconds"] for record in recent)
    tokens = [record["tokens_per_second"] for record in recent if record.get("tokens_per_second")]
    words = f"{readable(3600 / max(seconds, 1e-9))} iterations/hour, {readable(seconds)} s each"
    words += f", {fmean(tokens):,.0f} tokens/s" if tokens else ""
    idle = [record["idle_share"] for record in recent if record.get("idle_share") is not None]
    return words + (f", idle {fmean(idle):.0%}" if idle else "")


# Numbers of the last iteration that are shown if the record has them.
_STEP_METRICS = (
    ("reward, verified", "reward/labelled"),
    ("value", "reward/unlabelled_value"),
    ("agreement", "reward/unlabelled"),
    ("self-certainty", "reward/self_certainty"),
    ("entropy", "actor/entropy"),
    ("clipped", "actor/clip_fraction"),
    ("truncated", "truncated"),
    ("critic loss", "critic/loss"),
    ("engine log-probability gap", "engine/logprob_gap_mean"),
    ("tokens out of the correction's bounds", "correction/tokens_out_of_bounds"),
    ("effective samples", "correction/ess"),
    ("prompts asked", "refill/asked"),
    ("of them dropped", "refill/dropped"),
    ("groups ready ahead", "buffer/ready"),
)


def _step_metrics(metrics: Sequence[Record]) -> str:
    last = metrics[-1] if metrics else {}
    return ", ".join(f"{words} {readable(last[name])}" for words, name in _STEP_METRICS if last.get(name) is not None)


def _evaluations(evaluations: Sequence[Record]) -> Iterator[str]:
    """The last scores of each set, and its first score."""
    first: dict[str, Record] = {}
    last: dict[str, Record] = {}
    for record in sorted(evaluations, key=lambda record: record["step"]):
        first.setdefault(record["set"], record)
        last[record["set"]] = record
    for name, record in last.items():
        words = [f"avg@{record['avg_k']} {score(record['avg'], record['avg_se'])}"]
        words += [f"pass@{k} {score(value, record['pass_se'].get(k))}" for k, value in record["pass"].items()]
        if record.get("calibration"):
            calibration = record["calibration"]["last"]
            words.append(f"critic AUROC {score(calibration['auroc'], None)}, ECE {score(calibration['ece'], None)}")
            if (within := calibration.get("auroc_within_questions")) is not None:
                words.append(f"AUROC within questions {score(within, None)}")
        begun = first[name]
        was = f"; avg@{begun['avg_k']} was {score(begun['avg'], None)} at step {begun['step']}"
        since = "" if begun is record else was
        yield f"{name} at step {record['step']}: {', '.join(words)}{since}"


def _memory(metrics: Sequence[Record]) -> str:
    peaks = memory_peaks(metrics)
    return (
        f"peak of a process, GB: {', '.join(f'{phase} {readable(peak)}' for phase, peak in peaks.items())}"
        if peaks
        else ""
    )


def _engines(engines: Sequence[dict[str, Any]], *, running: bool) -> Iterator[str]:
    if running:
        for engine in engines:
            words = [engine["state"]]
            if engine["address"]:
                words += [
                    f"{engine['requests']} running requests",
                    f"{engine['restarts']} restarts",
                    engine["address"],
                ]
            yield f"{engine['name']}: {', '.join(words)}"


def _warnings(warnings: Sequence[Record]) -> Iterator[str]:
    if len(warnings) > SHOWN:
        yield f"last {SHOWN} of {len(warnings)}"
    yield from (f"{_date(record['time'])}  {record['text']}" for record in warnings[-SHOWN:])


def _many(label: str, lines: Iterator[str] | Sequence[str]) -> list[tuple[str, str]]:
    return [(label if i == 0 else "", line) for i, line in enumerate(lines)]


def _line(label: str, text: str) -> str:
    margin = " " * _LABEL
    text = printable(text.replace("\n", " "))
    # Paths are not broken, so that they can be copied.
    wrapped = textwrap.wrap(
        text, max(min(_WIDTH, width()) - _LABEL, 20), break_long_words=False, break_on_hyphens=False
    )
    return f"{label:<{_LABEL}}{f'{chr(10)}{margin}'.join(wrapped)}".rstrip()


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
