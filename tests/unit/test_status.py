"""`megatron-tempo status`: what it says of runs in every state, made by hand from the files that a run writes."""

from __future__ import annotations

import json
import logging
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_tempo import cli
from megatron_tempo.config.method_settings import PpoSettings
from megatron_tempo.config.schema import Config, MetricsConfig, ServersConfig, to_plain
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.observability import heartbeat
from megatron_tempo.observability.heartbeat import Heartbeat, read_heartbeat
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.records import append
from megatron_tempo.report.status import status
from megatron_tempo.rollout.engine import EngineWork
from megatron_tempo.rollout.fleet import Fleet
from megatron_tempo.rollout.server_adapter import ServerAdapter
from megatron_tempo.runtime.folder_lock import Holder
from megatron_tempo.types import EngineHealth
from tests.support.file_size import file_size_limit

NOW = 1_764_000_000.0
ENGINE = {"name": "vllm server 1", "state": "serving", "requests": 12, "restarts": 1, "address": "http://n2:30001"}


def write_run(folder: Path, done: int = 30, **beat: Any) -> Path:
    """A run of 40 iterations of PPO and 60 of TEMPO after `done` of them, and its last heartbeat, 5 s old."""
    folder.mkdir()
    config = Config(stage1=StageConfig(PpoSettings(), iterations=40), stage2=StageConfig(iterations=60))
    config.model.path = "models/Qwen3-8B"
    config.evaluation.every = 0
    (folder / "config.json").write_text(json.dumps(to_plain(config)))
    for step in range(1, done + 1):
        stage, iteration = ("stage1", step) if step <= 40 else ("stage2", step - 40)
        numbers = {"tokens_per_second": 2000.0, "truncated": 0.0, "memory_gb/actor": 50.0 + step, "time/generate": 60.0}
        record = {"time": NOW, "stage": stage, "method": "ppo", "iteration": iteration, "step": step, "seconds": 100.0}
        append(folder / "metrics.jsonl", record | numbers)
    record = {
        "time": NOW - 4,
        "host": "node7",
        "pid": 42,
        "started": NOW - 3700,
        "phase": "generate",
        "since": NOW - 30,
        "ended": None,
        "engines": [ENGINE],
    }
    (folder / "heartbeat.json").write_text(json.dumps(record | beat))
    return folder


def rows(folder: Path, now: float | None = NOW) -> dict[str, str]:
    """What stands behind each label; `now`: none is the clock's."""
    by_label, label = {}, ""
    for line in status(folder, now).text.splitlines():
        label = line[:12].strip() or label
        by_label[label] = f"{by_label.get(label, '')} {line[12:]}".strip()
    return by_label


def test_a_run_under_way(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step, avg in ((0, 0.25), (20, 0.5)):
        scores = {"avg": avg, "avg_se": 0.02, "avg_k": 16, "pass": {"8": 0.7}, "pass_se": {"8": None}}
        place = {"set": "aime", "step": step, "point": "during", "time": NOW, "seconds": 7.0, "calibration": None}
        append(run / "evaluations.jsonl", place | scores)
    shown = rows(run)
    assert status(run, NOW).well
    assert shown["run"] == f"{run}, Qwen3-8B"
    assert shown["state"] == "running on node7, process 42, for 1:01:40"
    assert shown["step"] == "30 of 100, 30%; stage 1/2 PPO, iteration 31/40"
    assert shown["doing"] == "generate for 0:30, usually 1:00"
    assert shown["rate"] == "36 iterations/hour, 100 s each, 2,000 tokens/s"
    assert shown["left"] == "about 1:56:40"  # 70 iterations of 100 s
    assert shown["evaluation"] == ("aime at step 20: avg@16 0.500 ± 0.020, pass@8 0.700; avg@16 was 0.250 at step 0")
    assert shown["memory"] == "peak of a process, GB: actor 80"
    assert shown["engines"] == "vllm server 1: serving, 12 running requests, 1 restarts, http://n2:30001"
    assert shown["alerts"] == "none"


def test_alerts_and_the_last_warnings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step in range(31, 37):
        last = {"time": NOW, "stage": "stage1", "method": "ppo", "iteration": step, "step": step, "seconds": 100.0}
        append(run / "metrics.jsonl", last | {"truncated": 0.5, "critic/skipped": float(step == 33)})
    for number in range(7):
        append(run / "warnings.jsonl", {"time": NOW, "text": f"vllm server {number} did not answer\x1b[31m"})
    shown = rows(run)
    assert "steps are skipped, step 33 (over): 1 of the critic's steps were not finite" in shown["alerts"]
    assert "truncated responses rise, steps 32 to 36: 50% of the responses are truncated, was 0%" in shown["alerts"]
    assert shown["warnings"].startswith("last 5 of 7")
    assert "server 6" in shown["warnings"]
    assert "server 1 " not in shown["warnings"]
    assert "\x1b" not in shown["warnings"]


STATES: dict[str, tuple[int, dict[str, Any], str, bool]] = {
    "silent": (30, {"time": NOW - 600}, "looks dead: no heartbeat since", False),
    "silent for a moment": (30, {"time": NOW - 100}, "running on node7", True),
    "failed": (30, {"ended": "NotFiniteError: the loss"}, "stopped at", False),
    "its clock was set back": (30, {"time": NOW + 18_000}, "unknown: its last heartbeat is 5:00:00 ahead", False),
    "done": (100, {"ended": "done"}, "finished at", True),
    "stopped early": (30, {"ended": "done"}, "after 30 of 100 iterations", True),
}


@pytest.mark.parametrize("state", STATES)
def test_states(tmp_path: Path, state: str) -> None:
    done, beat, words, well = STATES[state]
    run = write_run(tmp_path / "run", done, **beat)
    assert words in rows(run)["state"]
    assert status(run, NOW).well is well
    if "ended" in beat and not well:
        assert rows(run)["state"].endswith(", on node7, process 42: NotFiniteError: the loss")
    if words.startswith("looks dead"):
        assert "10:00 ago; its last phase was generate, on node7, process 42" in rows(run)["state"]
    assert ("left" in rows(run)) is ("running" in words)  # nothing is promised for a run that is not there
    assert ("engines" in rows(run)) is ("running" in words)


def test_a_path_stays_whole(tmp_path: Path) -> None:
    path = "/runs/of-a-long-name/" + "-".join(["part"] * 30) + "/checkpoints/step_00000010"
    run = write_run(tmp_path / "run", ended=f"rank 1 has died; rerun the same command to resume from {path}")
    assert path in status(run, NOW).text


def test_a_phase_that_hangs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", since=NOW - 3600)
    assert rows(run)["doing"] == "generate for 1:00:00, usually 1:00; 60 times as long as usual, so it may hang"


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert cli.main(["status", str(tmp_path)]) == 2
    assert f"{tmp_path}/config.json ends too early, at line 1, column 2" in capsys.readouterr().err


def test_a_run_whose_files_are_half_there(tmp_path: Path) -> None:
    """As in the first seconds of a run, and of one by another version."""
    run = write_run(tmp_path / "run", 0)
    assert rows(run)["step"] == "0 of 100, 0%; stage 1/2 PPO, iteration 1/40"
    assert rows(run)["left"] == "about ?"
    (run / "config.json").write_text('{"stage1": {"iterations": 3, "gone": 1}, "model": {"path": "m"}}')
    assert rows(run)["step"].startswith("0 of 3")
    (run / "config.json").unlink()
    assert "running" in rows(run)["state"]


def test_the_heartbeat_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    with Metrics(tmp_path, MetricsConfig(), is_writer=True) as metrics:
        metrics.watch(lambda: [EngineHealth("vllm server 0", "serving", requests=3)])
        with metrics.phase("generate"), metrics.phase("sync"):
            first = read_heartbeat(tmp_path)
            assert first is not None
            assert first["phase"] == "generate/sync"
            deadline = time.monotonic() + 120
            while (later := read_heartbeat(tmp_path)) is None or later["time"] == first["time"]:
                assert time.monotonic() < deadline, "a phase that lasts gives no sign of life"
                time.sleep(0.02)
            assert later["since"] == pytest.approx(first["since"], abs=0.1)
            assert later["engines"][0] == {
                "name": "vllm server 0", "state": "serving", "requests": 3, "restarts": 0, "address": ""
            }  # fmt: skip
        assert read_heartbeat(tmp_path)["phase"] == ""  # type: ignore[index]
        logging.getLogger("megatron_tempo.rollout.fleet").warning("vllm server %d did not answer", 0)
    assert read_heartbeat(tmp_path)["ended"] == "done"  # type: ignore[index]
    assert "vllm server 0 did not answer" in status(tmp_path).text


@pytest.mark.parametrize("jump", [-18_000.0, 100_000.0])
def test_a_clock_that_is_set_is_right_at_the_next_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    real = time.time
    with Metrics(tmp_path, MetricsConfig(), is_writer=True) as metrics, metrics.phase("generate"):
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        record = {"time": 1.0, "step": 1, "stage": "stage1", "method": "ppo", "iteration": 1, "seconds": 1.0}
        append(tmp_path / "metrics.jsonl", record | {"time/generate": 1.0})
        before = rows(tmp_path, None)["state"]
        assert before.startswith("looks dead" if jump > 0 else "unknown: its last heartbeat is 5:00:00 ahead")
        with metrics.phase("sync"):
            shown = rows(tmp_path, None)
            assert re.fullmatch(r"running on .*, for 0:0\d", shown["state"])
            assert re.fullmatch(r"generate/sync for 0:0\d", shown["doing"])


def test_an_error_is_the_last_sign(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Metrics(tmp_path, MetricsConfig(), is_writer=True):
        raise RuntimeError("no vllm server is left")
    heartbeat_read = read_heartbeat(tmp_path)
    assert heartbeat_read is not None
    assert heartbeat_read["ended"] == "RuntimeError: no vllm server is left"
    assert heartbeat_read["time"] == pytest.approx(time.time(), abs=30)


def test_a_full_disk_is_warned_of_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file_size_limit(0):
        beat = Heartbeat(tmp_path)
        beat.phase("generate")
        beat.end("done")
    assert list(tmp_path.iterdir()) == []
    assert caplog.text.count("heartbeat.json cannot be written") == 1


def test_as_a_program_without_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 100, ended="done")
    code = (
        "import sys; from megatron_tempo.cli import main; status = main(sys.argv[1:]);"
        "print(sorted({'torch', 'megatron.core', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)));"
        "sys.exit(status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, "status", str(run)], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: what other work on the machine adds to the wall time is not what is measured.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert done.stdout.endswith("[]\n")
    assert "finished at" in done.stdout


class OneComes:
    """Starts server 0 alone."""

    async def start(self, index: int) -> str:
        if index:
            raise EngineError("does not come up")
        return "http://node:30000"


def test_the_health_of_servers() -> None:
    named = cast(ServerAdapter, SimpleNamespace(name="vllm", answer_format="vllm", routing=None))
    fleet = Fleet(named, ServersConfig(), OneComes(), 2, "key", [0], 10, EngineWork())
    try:
        assert fleet.health() == [EngineHealth(f"vllm server {i}", "starting") for i in (0, 1)]
        with pytest.raises(InputError, match="does not come up"):
            fleet.open()
        assert fleet.health()[0] == EngineHealth("vllm server 0", "empty", address="http://node:30000")
    finally:
        fleet.close()


def test_a_start_that_has_sent_no_heartbeat_yet(tmp_path: Path) -> None:
    now, here = time.time(), Holder.here("train")
    run = write_run(tmp_path / "run", time=now - 9000, ended="Stopped: as requested by TERM")
    assert rows(run, now)["state"].startswith("stopped at ")
    (run / "lock.json").write_text(json.dumps(asdict(replace(here, since=now - 90))))
    report = status(run, now)
    assert report.well
    assert rows(run, now)["state"] == f"starting on {here.host}, process {here.pid}, for 1:30"
    assert "doing" not in rows(run, now)
    assert rows(run, now + 1000)["state"].startswith("stopped at "), "a lock that is not renewed says nothing"
    (run / "heartbeat.json").unlink()
    assert rows(run, now)["state"].startswith("starting on ")
    Heartbeat(run).end("done")
    assert rows(run, now)["state"].startswith("finished at ")
    for wrong in ("", "[]", "{}", '{"host": 1, "pid": null, "since": 3}'):
        (run / "lock.json").write_text(wrong)
        assert rows(run, now)["state"].startswith("finished at ")


def test_ctrl_c_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Metrics(tmp_path, MetricsConfig(), is_writer=True):
        raise KeyboardInterrupt
    assert rows(tmp_path, None)["state"].endswith(": Ctrl-C")
