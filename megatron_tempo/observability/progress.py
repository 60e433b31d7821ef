"""Progress of a job: an estimate of the time left, and a bar on a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from megatron_tempo.config.extensions import short_name
from megatron_tempo.config.stages import StageConfig

RECENT = 20  # iterations whose mean time predicts the remaining ones


class Forecast:
    """Estimates the seconds left: the remaining iterations and evaluations, each at the recent pace of its kind."""

    def __init__(self, stages: Mapping[str, StageConfig], evaluations: int, step: int = 0) -> None:
        """`stages`: of the whole run. `evaluations`: the remaining ones. `step`: completed iterations."""
        self.stages = {name: stage for name, stage in stages.items() if stage.iterations}
        self._done = dict.fromkeys(self.stages, 0)
        for name, stage in self.stages.items():
            self._done[name] = min(step, stage.iterations)
            step -= self._done[name]
        self._evaluations = evaluations
        self._paces: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in self.stages}
        self._evaluation_pace: deque[float] = deque(maxlen=RECENT)

    def step(self, stage: str, iteration: int, seconds: float) -> None:
        self._done[stage] = iteration
        self._paces[stage].append(seconds)

    def evaluation(self, seconds: float) -> None:
        self._evaluations = max(self._evaluations - 1, 0)
        self._evaluation_pace.append(seconds)

    def left(self) -> float | None:
        """Seconds; None before the first iteration. A stage that has not begun is assumed to take as long per iteration
        as the others."""
        measured = [seconds for pace in self._paces.values() for seconds in pace]
        total = self._evaluations * _mean(self._evaluation_pace or [0.0])
        for name, stage in self.stages.items():
            iterations = stage.iterations - self._done[name]
            if iterations and not measured:
                return None
            if iterations:
                total += iterations * _mean(self._paces[name] or measured)
        return total

    def where(self, *, short: bool = False) -> str:
        """The current iteration: 'stage 1/2 PPO, iteration 12/100', or 'stage 1/2 PPO 12/100'."""
        for number, (name, stage) in enumerate(self.stages.items(), start=1):
            if self._done[name] < stage.iterations:
                iteration = f"{' ' if short else ', iteration '}{self._done[name] + 1}/{stage.iterations}"
                return f"stage {number}/{len(self.stages)} {short_name(stage.method.name).upper()}{iteration}"
        return "training done"


SHORT = 100  # columns below which the bar's line uses short words and omits the time elapsed
BAR = (8, 24)  # minimum and maximum columns of the bar itself


class ProgressBar:
    """One line at the foot of a terminal: the current iteration, the phase, time elapsed and time left.

    In a narrow terminal the words are shortened, and cut if they must be, so that the bar keeps a length that shows
    progress.
    """

    def __init__(self, forecast: Forecast, console: Console) -> None:
        self._forecast = forecast
        self._started = time.monotonic()
        self._short = console.width < SHORT
        self._left = _Left("" if self._short else "about ")
        self._bar = BarColumn(bar_width=BAR[1])
        elapsed = [] if self._short else [TimeElapsedColumn()]
        self._progress = Progress(
            SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            self._bar,
            *elapsed,
            self._left,
            console=console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self.update("")
        self._progress.start()

    def update(self, activity: str) -> None:
        """`activity`: the current phase; empty between phases."""
        left = self._forecast.left()
        elapsed = time.monotonic() - self._started
        self._left.set(left)
        words = ", ".join(filter(None, (self._forecast.where(short=self._short), activity)))
        # Spinner, time left ("100:00:00 left") and elapsed, and a blank between columns.
        room = self._progress.console.width - 2 - 15 - (0 if self._short else 16)
        words = words[: max(room - BAR[0] - 1, 0)]
        self._bar.bar_width = min(max(room - len(words) - 1, BAR[0]), BAR[1])
        self._progress.update(
            self._task,
            description=words,
            total=None if left is None else elapsed + left,
            completed=elapsed,
        )

    def close(self) -> None:
        self._progress.stop()


class _Left(ProgressColumn):
    """Time left. It counts down between two estimates."""

    def __init__(self, about: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._about = about
        self._end: float | None = None

    def set(self, left: float | None) -> None:
        self._end = None if left is None else time.monotonic() + left

    def render(self, task: Task) -> Text:
        return Text(f"{self._about}{clock(None if self._end is None else self._end - time.monotonic())} left")


def clock(seconds: float | None) -> str:
    """12:03 or 3:04:05; '?' for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _mean(values: deque[float] | list[float]) -> float:
    return sum(values) / len(values)
