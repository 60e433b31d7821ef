"""Console lines: as wide as the terminal at most, the important numbers first, no name twice."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from megatron_tempo.config.method_settings import PpoSettings
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.observability.console import COLUMNS, evaluation_line, readable, step_line
from megatron_tempo.observability.progress import BAR, Forecast, ProgressBar
from megatron_tempo.observability.terminal import wrapped

STEP: dict[str, Any] = {
    "stage": "stage2",
    "method": "tempo",
    "iteration": 7,
    "reward/labelled": 0.5,
    "reward/unlabelled_value": 0.25,
    "reward/unlabelled": 0.125,
    "actor/entropy": 1.25,
    "actor/clip_fraction": 0.0,
    "actor/grad_norm": 12345.6,
    "critic/loss": 0.2,
    "critic/grad_norm": 0.25,
    "tokens_per_second": 15729.4,
    "seconds": 123.45,
}
EVALUATION: dict[str, Any] = {
    "point": "between",
    "set": "olymmath_hard",
    "avg": 0.25,
    "avg_se": 0.02,
    "avg_k": 16,
    "pass": {"1": 0.25, "8": 0.5},
    "pass_se": {"1": 0.02, "8": None},
    "questions": 128,
    "calibration": {"last": {"auroc": 0.75, "ece": 0.125}},
}


@pytest.mark.parametrize("width", [60, 80, 100, 132, 200])
def test_a_step_fits_the_terminal(width: int) -> None:
    line = step_line(STEP, 100, 4000.0, width)
    assert len(line) <= width
    assert line.startswith("stage2 tempo   7/100  reward  0.500  ")
    assert ("value 0.250" in line) == (width >= 80)
    assert line.endswith("1:06:40 left")
    assert ("entropy 1.250" in line) == (width >= 80)
    if width >= 200:
        assert line == (
            "stage2 tempo   7/100  reward  0.500  value 0.250  agreement 0.125  entropy 1.250  clip 0.000  "
            "actor grad 12,346  critic loss 0.200  critic grad   0.25  15,729 tok/s  123.5 s  1:06:40 left"
        )


def test_columns_of_a_narrow_terminal_do_not_change_with_the_numbers() -> None:
    lines = [
        step_line(STEP | {"reward/labelled": r, "seconds": s}, 100, 9.0, 80) for r, s in ((-0.5, 1.0), (0.5, 99.0))
    ]
    names = [re.sub(r"[\d.:,-]+", "0", " ".join(line.split())) for line in lines]
    assert names[0] == names[1]


def test_each_column_has_a_name_of_its_own() -> None:
    names = Counter(form.partition("{")[0] or form.partition("}")[2] for _, form, _ in COLUMNS)
    assert max(names.values()) == 1
    assert len({rank for rank, _, _ in COLUMNS}) == len(COLUMNS)


def test_a_step_without_a_plan_or_numbers() -> None:
    assert step_line({"stage": "stage1", "method": "ppo", "iteration": 3}, None, None, 80) == "stage1 ppo   3"
    assert step_line(STEP | {"reward/labelled": None}, 100, None, 80).endswith("? left")


@pytest.mark.parametrize("width", [60, 80, 132])
def test_an_evaluation_fits_the_terminal(width: int) -> None:
    line = evaluation_line(EVALUATION, width)
    assert len(line) <= width
    assert line.startswith("evaluation  between olymmath_hard  avg@16 0.250 ± 0.020")
    assert ("ECE 0.125" in line) == (width >= 132)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (1751.6, "1,752"),
        (2500.0, "2,500"),
        (1234567.0, "1,234,567"),
        (999.6, "1,000"),
        (36.0, "36"),
        (0.0123456, "0.0123"),
        (1.58e-7, "1.58e-07"),
        (0, "0"),
        (-1751.6, "-1,752"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_readable(number: float, shown: str) -> None:
    assert readable(number) == shown


def test_a_message_is_broken_between_words_and_a_path_never() -> None:
    path = "/a" * 60
    text = wrapped(f"the checkpoint is in {path}\nshort", 40)
    assert text.split("\n") == ["the checkpoint is in", f"  {path}", "short"]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_bar_fits_the_terminal(columns: int, encoding: str) -> None:
    """Drawn once on a terminal of this many columns: one line, with a bar of a length that shows progress."""
    import io

    from rich.console import Console

    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=out, width=columns, force_terminal=True, legacy_windows=False, color_system=None)
    stages = {"stage1": StageConfig(PpoSettings(), iterations=100), "stage2": StageConfig(iterations=100)}
    bar = ProgressBar(Forecast(stages, 3), console)
    bar.update("generate")
    (line,) = [
        "".join(segment.text for segment in row)
        for row in console.render_lines(bar._progress.get_renderable(), pad=False)
    ]
    bar.close()
    assert len(line) <= columns
    assert "left" in line
    if columns >= 60:
        assert "stage 1/2 PPO" in line
        assert "1/100" in line
        assert "generate" in line
        assert len(re.findall("[━╸╺-]", line)) >= BAR[0]
    line.encode(encoding)
