"""Output of a run: the console, JSONL files, and TensorBoard and Weights & Biases if configured."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from megatron_tempo.config.schema import MetricsConfig
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.errors import InputError
from megatron_tempo.observability.alerts import Watch
from megatron_tempo.observability.console import evaluation_line, is_number, step_line
from megatron_tempo.observability.heartbeat import DONE, Heartbeat
from megatron_tempo.observability.idle import PhaseSpan, Span, idle_share
from megatron_tempo.observability.logs import ALERT, PACKAGE
from megatron_tempo.observability.progress import Forecast, ProgressBar
from megatron_tempo.observability.records import (
    EVALUATIONS,
    METRICS,
    SAMPLES,
    WARNINGS,
    Record,
    append,
    drop,
    extend,
    finite,
    read_evaluations,
    read_metrics,
)
from megatron_tempo.observability.terminal import IN_A_FILE, width
from megatron_tempo.observability.trackers import tensorboard_writer, wandb_run
from megatron_tempo.types import EngineHealth

log = logging.getLogger(__name__)
_UNRECORDED = {"is_recorded": False}  # for a warning that the records themselves show


class Metrics:
    """Collects what rank 0 measures. On the other ranks (`is_writer` false) every call does nothing.

        with Metrics(run_dir, config.metrics, is_writer=rank == 0) as metrics:
            metrics.plan(config.stages(), evaluations=6, step=resumed_step)
            with metrics.phase("generate"):
                ...
            metrics.step({"stage": "stage1", "method": "ppo", "iteration": 1, "step": 1, "actor/loss": 0.2})

    Until `begin`, it writes nothing: a rejected start leaves the folder unchanged. The warnings that the package logs
    while it is open are records too, which status and report show.

    Raises ValueError if a configured tracker is not installed, and OSError that names the file if metrics.jsonl or
    evaluations.jsonl cannot be written. If another file cannot be written, it warns once per file and continues. If a
    tracker fails later, it warns once and stops using the tracker.
    """

    def __init__(self, run_dir: Path, config: MetricsConfig, is_writer: bool, *, begun: bool = True) -> None:
        """`begun`: whether to write at once. Otherwise call `begin` later."""
        self._dir = run_dir
        self._config = config
        self._is_writer = is_writer
        self._open: list[tuple[str, float]] = []  # phases that are running, outermost first, and their starts
        self._phases: list[PhaseSpan] = []  # those that ended since the last record
        self._engine_work: Callable[[float], Iterable[Span]] = lambda since: ()
        self._mark = time.monotonic()  # time of the last record
        self._purge_step: int | None = None
        self._forecast: Forecast | None = None
        self._bar: ProgressBar | None = None
        self._console: Console | None = None
        self._heartbeat: Heartbeat | None = None
        self._watch = Watch()
        self._printed: set[str] = set()  # names of alerts
        self._unwritten: set[str] = set()  # what has been reported as not writable
        self._resumed: int | None = None  # no evaluation after this step is written yet
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._begun = False
        self._early: list[Record] = []  # warnings before `begin`
        self._warnings = _WarningsHandler(self._record_warning)
        if is_writer:
            logging.getLogger(PACKAGE).addHandler(self._warnings)
            if sys.stdout.isatty():
                self._console = Console(markup=False, highlight=False, soft_wrap=True)
        if begun:
            self.begin()

    def begin(self) -> None:
        """Open the run's files, and begin the heartbeats."""
        if not self._is_writer:
            return
        self._begun = True
        self._dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVALUATIONS):
            drop(self._dir / name, lambda record: False)
        for name in (SAMPLES, WARNINGS):
            with self.spare(name):
                drop(self._dir / name, lambda record: False)
        with self.spare(WARNINGS):
            extend(self._dir / WARNINGS, self._early)
        self._heartbeat = Heartbeat(self._dir)
        self._open_tensorboard()
        if self._config.wandb_project is not None:
            self._wandb = wandb_run(self._dir, self._config.wandb_project)

    def plan(self, stages: Mapping[str, StageConfig], evaluations: int, step: int = 0) -> None:
        """Set what remains, for the time left, and start the progress bar. `stages`: all stages. `evaluations`:
        records still to be written. `step`: completed iterations of a resumed run."""
        if not self._is_writer:
            return
        self._watch, self._resumed = Watch(), step
        for line in read_metrics(self._dir):
            self._watch.metrics(line)
        for line in read_evaluations(self._dir):
            self._watch.evaluation(line)
        self._printed = {alert.name for alert in self._watch.alerts()}  # before the run was resumed
        self._forecast = Forecast(stages, evaluations, step)
        self._mark = time.monotonic()
        if self._console is not None and self._config.progress:
            self._bar = ProgressBar(self._forecast, self._console)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase: `time/<name>` seconds of the next record; a phase inside another is `time/<outer>/<name>`.

        Wall time: queued GPU work counts in the phase that waits for it. A phase that is open when a record is written
        is split between that record and the next.
        """
        if not self._is_writer:
            yield
            return
        path = f"{self._open[-1][0]}/{name}" if self._open else name
        self._open.append((path, time.monotonic()))
        self._show()
        try:
            yield
        finally:
            path, since = self._open.pop()
            self._phases.append((path, since, time.monotonic()))
            self._show()

    def step(self, record: Mapping[str, Any]) -> None:
        """Writes the record of an iteration: stage, method, iteration, step and numbers by name (see records.py)."""
        if not self._is_writer:
            return
        line = self._complete(record, with_idle=True)
        if self._forecast is not None:
            self._forecast.step(line["stage"], line["iteration"], line["seconds"])
        append(self._dir / METRICS, line)
        self._watch.metrics(line)
        log.info("%s", step_line(line, *self._ahead(line), width(IN_A_FILE)))
        self._alert()
        self._track({name: value for name, value in line.items() if is_number(value) and name != "time"}, line["step"])
        self._show()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes the scores of one set at one point. Replaces those of the same set, step and point, if any."""
        if not self._is_writer:
            return
        line = self._complete(record)
        if self._forecast is not None:
            self._forecast.evaluation(line["seconds"])
        self._replace(EVALUATIONS, [line])
        self._watch.evaluation(line)
        log.info("%s", evaluation_line(line, width(IN_A_FILE)))
        self._alert()
        scores = {f"avg@{line['avg_k']}": line["avg"]} | {f"pass@{k}": value for k, value in line["pass"].items()}
        if line.get("calibration"):
            scores |= line["calibration"]["last"]
        self._track({f"{line['set']}/{name}": v for name, v in scores.items() if is_number(v)}, line["step"])
        self._show()

    def samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes responses for the report. Replaces those of the same set, step and point, if any."""
        if not self._is_writer:
            return
        lines = [finite(dict(record))[0] for record in records]
        for line in lines:
            assert line["values"] is None or len(line["values"]) == len(line["tokens"]) + 1
        with self.spare(SAMPLES):
            self._replace(SAMPLES, lines)

    def rewind(self, step: int) -> None:
        """Deletes the records after `step`: a killed run may have written some, and is resumed from `step`."""
        if not self._is_writer:
            return
        for name in (METRICS, EVALUATIONS):
            drop(self._dir / name, lambda record: record["step"] > step)
        with self.spare(SAMPLES):
            drop(self._dir / SAMPLES, lambda record: record["step"] > step)
        if self._tensorboard is not None:
            self._close_tensorboard()
            self._open_tensorboard(purge_step=step + 1)

    def watch(
        self,
        engines: Callable[[], list[EngineHealth]],
        work: Callable[[float], Iterable[Span]] = lambda since: (),
    ) -> None:
        """Include these engines in the heartbeat, and their work in `idle_share`.

        `engines` is called from any thread. `work(since)`: (begin, end) of the requests that ended after `since`.
        """
        self._engine_work = work
        if self._heartbeat is not None:
            self._heartbeat.watch(engines)

    @contextmanager
    def spare(self, what: str) -> Iterator[None]:
        """For output that the run can do without: warn of a file that cannot be written or read, and continue.

        Warns once for each `what`.
        """
        try:
            yield
        except (OSError, InputError) as error:
            if what not in self._unwritten:
                self._unwritten.add(what)
                reason = getattr(error, "strerror", None) or error
                log.warning("%s cannot be written (%s): the run continues without it", what, reason)

    def close(self, ended: str = DONE) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._close_tensorboard()
        if self._wandb is not None:
            self._wandb.finish()
        if self._heartbeat is not None:
            self._heartbeat.end(ended)
        logging.getLogger(PACKAGE).removeHandler(self._warnings)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.close("Ctrl-C")
            return
        self.close(DONE if error is None else f"{type(error).__name__}: {error}")

    def _replace(self, name: str, lines: list[Record]) -> None:
        """Adds lines and removes those of the same set, step and point. After the step that the run was resumed from
        there are none to remove, and the growing file is not read."""
        keys = {(line["set"], line["step"], line["point"]) for line in lines}
        if self._resumed is None or any(line["step"] <= self._resumed for line in lines):
            drop(self._dir / name, lambda old: (old["set"], old["step"], old["point"]) in keys)
        extend(self._dir / name, lines)

    def _alert(self) -> None:
        """Print the alerts that have fired for the first time."""
        for alert in self._watch.alerts():
            if alert.name not in self._printed:
                self._printed.add(alert.name)
                log.log(ALERT, "%s", alert.line())

    def _complete(self, record: Mapping[str, Any], *, with_idle: bool = False) -> Record:
        """The record with its time, the seconds since the last record, and the phases. NaN and infinity become None.

        `with_idle`: with the share of those seconds in which neither a model nor the engine worked.
        """
        now = time.monotonic()
        self._phases += [(path, since, now) for path, since in self._open]
        self._open = [(path, now) for path, _ in self._open]
        seconds = dict.fromkeys(sorted(path for path, _, _ in self._phases), 0.0)
        for path, begin, end in self._phases:
            seconds[path] += end - begin
        times: dict[str, float] = {f"time/{path}": round(spent, 4) for path, spent in seconds.items()}
        if with_idle:
            window = (self._mark, now)
            times["idle_share"] = round(idle_share(window, self._phases, self._engine_work(self._mark)), 4)
        line, bad = finite({"time": round(time.time(), 3), **record, "seconds": round(now - self._mark, 4), **times})
        if bad:
            step, names = line.get("step"), ", ".join(bad)
            log.warning("step %s: NaN or infinity, written as null: %s", step, names, extra=_UNRECORDED)
        self._phases.clear()
        self._mark = now
        return line

    def _ahead(self, line: Record) -> tuple[int | None, float | None]:
        """The iterations of the line's stage, and the seconds to the end of the run; None, None without a plan."""
        if self._forecast is None:
            return None, None
        return self._forecast.stages[line["stage"]].iterations, self._forecast.left()

    def _record_warning(self, text: str) -> None:
        record = {"time": round(time.time(), 3), "text": text}
        if not self._begun:
            self._early.append(record)
            return
        with self.spare(WARNINGS):
            append(self._dir / WARNINGS, record)

    def _show(self) -> None:
        doing = self._open[-1][0] if self._open else ""
        if self._heartbeat is not None:
            self._heartbeat.phase(doing)
        if self._bar is not None:
            self._bar.update(doing)

    def _track(self, numbers: Mapping[str, float], step: int) -> None:
        if self._tensorboard is not None:
            with self._tensorboard_or_none():
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step)

    def _open_tensorboard(self, purge_step: int | None = None) -> None:
        if self._config.tensorboard:
            with self._tensorboard_or_none():
                self._tensorboard = tensorboard_writer(self._dir, purge_step)

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            with self._tensorboard_or_none():
                self._tensorboard.close()

    @contextmanager
    def _tensorboard_or_none(self) -> Iterator[None]:
        """Stop using TensorBoard if the code inside raises OSError."""
        try:
            yield
        except OSError as error:
            log.warning("TensorBoard failed (%s); training continues without it; %s has all metrics", error, METRICS)
            self._tensorboard = None


class _WarningsHandler(logging.Handler):
    """Gives the text of each warning and error to `write`. Alerts are left out: they follow from the records."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno != ALERT and getattr(record, "is_recorded", True):
            self._write(record.getMessage())
