"""What a run writes: files that survive kills, full disks and NaN; a log without control characters."""

import json
import logging
import math
import os
import pty
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import megatron_tempo.observability.metrics as metrics_module
from megatron_tempo.config.method_settings import PpoSettings
from megatron_tempo.config.schema import Config, MetricsConfig
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.progress import Forecast, clock
from megatron_tempo.observability.records import (
    append,
    drop,
    read,
    read_evaluations,
    read_metrics,
    read_samples,
    read_warnings,
)

STAGES = {"stage1": StageConfig(PpoSettings(), iterations=2), "stage2": StageConfig(iterations=3)}


def step_record(step: int, **numbers: Any) -> dict[str, Any]:
    stage = "stage1" if step <= 2 else "stage2"
    iteration = step if step <= 2 else step - 2
    return {"stage": stage, "method": STAGES[stage].method.name, "iteration": iteration, "step": step} | numbers


def evaluation_record(step: int, point: str = "before", avg: float | None = 0.25) -> dict[str, Any]:
    return {
        "stage": "stage1",
        "iteration": step,
        "step": step,
        "point": point,
        "set": "unlabelled",
        "avg": avg,
        "avg_se": 0.02,
        "avg_k": 16,
        "pass": {"8": 0.5},
        "pass_se": {"8": None},
        "questions": 128,
        "response_length": 15.0,
        "truncated": 0.0,
        "calibration": None,
    }


def metrics(run_dir: Path, **config: Any) -> Metrics:
    return Metrics(run_dir, MetricsConfig(**config), is_writer=True)


def test_a_step_is_a_line_in_the_file_and_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with metrics(tmp_path) as m:
        m.plan(STAGES, evaluations=1)
        m.step(step_record(1) | {"reward/labelled": 0.125, "actor/grad_norm": np.float32(0.5), "critic/loss": 0.2})
        m.step(step_record(2) | {"reward/labelled": -0.25, "actor/grad_norm": 12.3, "critic/loss": 0.1})
        m.evaluation(evaluation_record(2, "between"))
    first, second = read_metrics(tmp_path)
    assert first["reward/labelled"] == 0.125
    assert first["actor/grad_norm"] == 0.5
    assert first["time"] == pytest.approx(time.time(), abs=60)
    assert second["step"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["stage1", "ppo", "1/2", "reward", "0.125"]
    assert "actor grad    0.5  critic" in lines[0]
    assert "nan" not in lines[0]
    assert "entropy" not in lines[0]
    assert lines[0].index("critic") == lines[1].index("critic")  # aligned
    assert " ".join(lines[2].split()) == (
        "evaluation between unlabelled avg@16 0.250 ± 0.020 pass@8 0.500 128 questions"
    )


def test_a_log_file_gets_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics(tmp_path, progress=True) as m:
        m.plan(STAGES, evaluations=1)
        with m.phase("generate"):
            m.step(step_record(1))
        logging.getLogger("megatron_tempo.any").info("saved\x1b[31m")
    out = capsys.readouterr().out
    assert out.endswith("saved\u241b[31m\n")
    assert all(c.isprintable() or c == "\n" for c in out)


def test_a_terminal_gets_a_bar_that_says_what_it_is_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with metrics(tmp_path) as m:
            m.plan(STAGES, evaluations=1)
            m.step(step_record(1))
            with m.phase("generate"):
                shown, deadline = "", time.monotonic() + 120
                while "generate" not in shown:  # the bar is drawn every quarter of a second
                    assert time.monotonic() < deadline, shown
                    terminal.flush()
                    shown += os.read(leader, 100_000).decode()
        terminal.flush()
        shown += os.read(leader, 100_000).decode()
    assert "stage 1/2 PPO, iteration 2/2, generate" in shown
    assert "about 0:00 left" in shown


def test_phases_are_seconds_of_the_next_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    with metrics(tmp_path) as m:
        with m.phase("generate"):
            now += 2
        now += 1
        with m.phase("generate"), m.phase("sync"):
            now += 3
        m.step(step_record(1))
        with m.phase("evaluate"):
            now += 4
            m.evaluation(evaluation_record(1))
            now += 5
        m.step(step_record(2))
    first, second = (
        {k: v for k, v in line.items() if "time/" in k or k == "seconds"} for line in read_metrics(tmp_path)
    )
    (evaluation,) = read_evaluations(tmp_path)
    assert first == {"seconds": 6, "time/generate": 5, "time/generate/sync": 3}
    assert (evaluation["seconds"], evaluation["time/evaluate"]) == (4, 4)  # split where the record was written
    assert second == {"seconds": 5, "time/evaluate": 5}


def test_a_phase_that_raises_is_closed(tmp_path: Path) -> None:
    with metrics(tmp_path) as m:
        with pytest.raises(RuntimeError), m.phase("generate"):
            raise RuntimeError
        with m.phase("score"):
            pass
        m.step(step_record(1))
    (line,) = read_metrics(tmp_path)
    assert {"time/generate", "time/score"} <= line.keys()


def test_nan_is_null_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with metrics(tmp_path) as m, caplog.at_level(logging.WARNING):
        m.step(step_record(1) | {"actor/loss": math.nan, "critic/loss": np.float32(np.inf), "actor/entropy": 0.5})
        m.evaluation(evaluation_record(1, avg=math.nan))
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["actor/loss"], line["critic/loss"], line["actor/entropy"]) == (None, None, 0.5)
    assert read_evaluations(tmp_path)[0]["avg"] is None
    assert "step 1: NaN or infinity, written as null: actor/loss, critic/loss" in caplog.text


def test_rewind_drops_what_a_killed_run_wrote_later(tmp_path: Path) -> None:
    sample = {"point": "during", "stage": "stage2", "set": "s", "prompt": "", "tokens": [], "values": [0.5]}
    sample |= {"correct": 1, "answer": "2"}
    with metrics(tmp_path) as m:
        for step in (1, 2, 3, 4):
            m.step(step_record(step))
            m.evaluation(evaluation_record(step, "during"))
            m.samples([sample | {"step": step}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "stage": "sta')  # killed here
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    with metrics(tmp_path) as m:
        m.rewind(2)
        m.step(step_record(3, again=True))
    assert [(line["step"], line.get("again")) for line in read_metrics(tmp_path)] == [(1, None), (2, None), (3, True)]
    assert [line["step"] for line in read_evaluations(tmp_path)] == [1, 2]
    assert [line["step"] for line in read_samples(tmp_path)] == [1, 2]
    files = ["evaluations.jsonl", "heartbeat.json", "metrics.jsonl", "samples.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_what_is_evaluated_again_replaces_the_first(tmp_path: Path) -> None:
    sample = {"point": "before", "stage": "stage1", "step": 0, "set": "s", "prompt": "", "tokens": ["a"]}
    sample |= {"correct": 1, "answer": "2"}
    with metrics(tmp_path) as m:
        for avg in (0.1, 0.2):
            m.evaluation(evaluation_record(0, "before", avg))
            m.evaluation(evaluation_record(0, "between", avg))
            m.samples([sample | {"values": [avg, avg]}] * 2)
    assert [(line["point"], line["avg"]) for line in read_evaluations(tmp_path)] == [("before", 0.2), ("between", 0.2)]
    assert [line["values"] for line in read_samples(tmp_path)] == [[0.2, 0.2]] * 2


def test_a_full_disk_is_an_error_with_the_path(tmp_path: Path) -> None:
    with metrics(tmp_path) as m:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
            m.step(step_record(1))


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))  # the first bytes are written
    try:
        with pytest.raises(OSError, match=r"cannot write a record: File too large: '.*metrics\.jsonl'"):
            append(path, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_can_be_done_without_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {
        "point": "before",
        "step": 0,
        "set": "s",
        "prompt": "",
        "tokens": ["a"],
        "values": None,
        "correct": 0,
        "answer": "2",
    }
    with metrics(tmp_path) as m:
        (tmp_path / "samples.jsonl").symlink_to("/dev/full")
        for _ in range(2):
            with m.spare("samples.jsonl"):
                append(tmp_path / "samples.jsonl", {})
        (tmp_path / "samples.jsonl").unlink()
        m.samples([sample])  # there is room again
    (line,) = read_warnings(tmp_path)
    assert line["text"] == (
        "samples.jsonl cannot be written (cannot write a record: No space left on device): the run continues without it"
    )
    assert capsys.readouterr().out.count("samples.jsonl cannot be written") == 1
    assert len(read_samples(tmp_path)) == 1


def test_a_log_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with metrics(tmp_path) as m:
            m.step(step_record(1))
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "warnings.jsonl"
    path.write_text('{"time": 1.0, "text": "a"}\n{"text": \n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"warnings\.jsonl:2: not a JSON record"):
        read(path)


def test_drop_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "starts.jsonl"
    for step in (1, 2):
        append(path, {"step": step})

    def fail(descriptor: int) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk gone"):
        drop(path, lambda record: record["step"] == 1)
    assert [record["step"] for record in read(path)] == [1, 2]
    drop(path, lambda record: record["step"] == 2)  # the end is cut off in place
    assert [record["step"] for record in read(path)] == [1]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path / "run", MetricsConfig(tensorboard=True), is_writer=False) as m:
        m.plan(STAGES, evaluations=1)
        m.rewind(0)
        with m.phase("generate"):
            m.step(step_record(1))
        m.evaluation(evaluation_record(1))
        m.samples([{}])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_numbers_and_forgets_rewound_ones(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    with metrics(tmp_path, tensorboard=True) as m:
        for step in (1, 2, 3):
            m.step(step_record(step) | {"actor/loss": step / 4})
        m.rewind(2)
        m.step(step_record(3) | {"actor/loss": 9.0})
        m.evaluation(evaluation_record(3))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("actor/loss")] == [(1, 0.25), (2, 0.5), (3, 9.0)]
    assert [(e.step, e.value) for e in events.Scalars("unlabelled/pass@8")] == [(3, 0.5)]


class _Error(Exception):
    pass


def fake_wandb(logged: list[Any], fail_at: int) -> Any:
    """Stands in for the wandb package: a run whose connection is lost at a step."""

    def log(numbers: dict[str, float], step: int) -> None:
        if step == fail_at:
            raise _Error("connection lost")
        logged.append((step, numbers["actor/loss"]))

    run = SimpleNamespace(log=log, finish=lambda: logged.append("finished"))

    def init(**settings: Any) -> Any:
        logged.append(settings["id"])
        return run

    return SimpleNamespace(errors=SimpleNamespace(Error=_Error), init=init)


def test_a_lost_wandb_connection_is_warned_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(logged, fail_at=2))
    with metrics(tmp_path, wandb_project="tempo") as m:
        for step in (1, 2, 3):
            m.step(step_record(step) | {"actor/loss": 0.5})
    assert logged[1:] == [(1, 0.5)]
    assert capsys.readouterr().out.count("Weights & Biases failed (connection lost)") == 1
    assert [line["text"][:42] for line in read_warnings(tmp_path)] == ["Weights & Biases failed (connection lost);"]
    assert len(read_metrics(tmp_path)) == 3
    with metrics(tmp_path, wandb_project="tempo"):
        pass
    assert logged[2] == logged[0]  # the same W&B run is gone on with
    assert logged[3] == "finished"


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"metrics\.wandb_project=p requires .*pip install wandb,"):
        metrics(tmp_path, wandb_project="p")


def test_an_alert_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with metrics(tmp_path) as m:
        m.plan(STAGES, evaluations=1)
        for step in (1, 2, 3):
            m.step(step_record(step) | {"actor/skipped": 1.0})
    with metrics(tmp_path) as m:  # gone on with
        m.rewind(2)
        m.plan(STAGES, evaluations=1, step=2)
        m.step(step_record(3) | {"actor/skipped": 1.0, "seconds": 1.0})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alert: ")]
    assert [line.partition(";")[0] for line in lines] == [
        "alert: steps are skipped, step 1: 1 of the actor's steps were not finite"
    ]


def test_time_left_by_hand() -> None:
    forecast = Forecast(STAGES, evaluations=3)
    forecast.evaluation(10.0)
    assert forecast.left() is None
    assert forecast.where() == "stage 1/2 PPO, iteration 1/2"
    forecast.step("stage1", 1, 2.0)
    assert forecast.left() == pytest.approx(2 * 10.0 + 1 * 2.0 + 3 * 2.0)
    forecast.step("stage1", 2, 4.0)
    assert forecast.where() == "stage 2/2 TEMPO, iteration 1/3"
    forecast.step("stage2", 1, 7.0)
    assert forecast.left() == pytest.approx(2 * 10.0 + 2 * 7.0)
    forecast.step("stage2", 3, 7.0)
    forecast.evaluation(10.0)
    forecast.evaluation(10.0)
    assert forecast.left() == 0.0
    assert forecast.where() == "training done"


def test_a_resumed_run_has_less_left() -> None:
    forecast = Forecast(Config(stage2=StageConfig(iterations=4)).stages(), evaluations=0, step=3)
    assert forecast.where() == "stage 1/1 TEMPO, iteration 4/4"  # the empty stage is passed over
    resumed = Forecast(STAGES, evaluations=0, step=4)
    assert resumed.where() == "stage 2/2 TEMPO, iteration 3/3"


@pytest.mark.parametrize(("seconds", "shown"), [(None, "?"), (-1, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_clock(seconds: float | None, shown: str) -> None:
    assert clock(seconds) == shown
