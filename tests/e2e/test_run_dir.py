"""A run's folder belongs to one configuration and to one process: what is refused, and that nothing is then changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tempo.checkpoint.convert import to_hugging_face
from megatron_tempo.checkpoint.manifest import MANIFEST
from megatron_tempo.config import resume
from megatron_tempo.config.method_settings import Method
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import load, save
from megatron_tempo.errors import InputError
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.report.status import status
from megatron_tempo.runtime.folder_lock import LOCK, FolderLock
from megatron_tempo.training.jobs import evaluate, train
from tests.support.fork_server import FORK_SERVER
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations."""
    out = tmp_path_factory.mktemp("run_dir")
    config = config_of(write_project(out / "project"), out / "run")
    config.stage1.iterations = 1
    run_ranks(train, 1, out / "ranks", config)
    return out / "run"


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def another_method(config: Config) -> None:
    config.stage2.method = Method.ttrl


def another_temperature(config: Config) -> None:
    config.rollout.temperature = 1.0


def other_questions(config: Config) -> None:
    assert config.data.labelled is not None
    path = Path(config.run.dir).with_name("other.jsonl")
    rows = Path(config.data.labelled.path).read_text().splitlines()
    path.write_text("\n".join(reversed(rows)) + "\n")
    config.data.labelled.path = str(path)


def no_questions(config: Config) -> None:
    assert config.data.labelled is not None
    config.data.labelled.path = str(Path(config.run.dir).with_name("none.jsonl"))


def shorter(config: Config) -> None:
    config.stage2.iterations = 0


# What is given otherwise, and what is then said.
OTHERWISE: dict[str, tuple[Callable[[Config], None], str]] = {
    "method": (another_method, "stage2.method: 'tempo' -> 'ttrl'"),
    "temperature": (another_temperature, "rollout.temperature: 1.3 -> 1.0"),
    "questions": (other_questions, "the labelled prompts are not those of the checkpoint"),
    "file": (no_questions, "none.jsonl"),
    "length": (shorter, "stage2.iterations=0"),
}


def refusals(config: Config, *names: str) -> list[str]:
    """Why each of these starts is refused."""
    output = []
    for change, _ in (OTHERWISE[name] for name in names):
        other = load(Path(config.run.dir) / "config.json")
        change(other)
        with pytest.raises((InputError, FileNotFoundError)) as raised:
            train(other)
        output.append(str(raised.value))
    return output


def test_a_finished_run_stays_what_it_is(run: Path, tmp_path: Path) -> None:
    before, config = snapshot(run), load(run / "config.json")
    (output,) = run_ranks(refusals, 1, tmp_path / "alone", config, *OTHERWISE)
    for (_, wrong), why in zip(OTHERWISE.values(), output, strict=True):
        assert wrong in why
    both = run_ranks(refusals, 2, tmp_path / "ranks", config, "questions")
    assert both == [output[2:3]] * 2
    assert snapshot(run) == before
    assert status(run).well
    assert "finished at" in status(run).text
    assert not (run / LOCK).exists()


def refused(config: Config, job: Callable[[Config], None]) -> str:
    with pytest.raises(InputError) as raised:
        job(config)
    return str(raised.value)


@pytest.mark.parametrize("job", [train, evaluate])
def test_a_folder_in_use_is_refused_on_all_ranks(run: Path, tmp_path: Path, job: Callable[[Config], None]) -> None:
    config = load(run / "config.json")
    config.run.dir = str(run if job is train else tmp_path / "eval")
    with FolderLock(Path(config.run.dir) / LOCK, "the run", "train", "", beat=1000.0):
        before = snapshot(Path(config.run.dir))
        output = run_ranks(refused, 2, tmp_path / "ranks", config, job)
        assert snapshot(Path(config.run.dir)) == before
    assert output[0] == output[1]
    assert output[0].startswith(f"run.dir={config.run.dir} is in use by process {os.getpid()} on ")


def test_a_refused_evaluation_leaves_nothing(run: Path, tmp_path: Path) -> None:
    config = load(run / "config.json")
    config.run.dir, path = str(tmp_path / "new/eval"), tmp_path / "questions.jsonl"
    path.write_text("no JSON\n")
    config.evaluation.sets["unlabelled"].path = str(path)
    (output,) = run_ranks(refused, 1, tmp_path / "ranks", config, evaluate)
    assert str(path) in output
    assert not (tmp_path / "new").exists()


def test_an_export_says_where_it_is_from(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints/step_00000002"
    expected = {
        "run": str(run),
        "step": 2,
        "config_sha256": resume.fingerprint(load(run / "config.json")),
        "checkpoint": "step_00000002",
        "checkpoint_sha256": hashlib.sha256((step / MANIFEST).read_bytes()).hexdigest(),
    }
    for model in ("actor", "critic"):
        assert json.loads((run / f"hf_step_00000002/{model}/tempo_origin.json").read_text()) == expected
    to_hugging_face(step, tmp_path / "converted", "actor", None, None, 1 << 30)
    assert json.loads((tmp_path / "converted/tempo_origin.json").read_text()) == expected


def test_an_export_of_another_run_is_not_taken_for_this_ones(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again)
    config = load(run / "config.json")
    config.run.dir = str(again)
    config.checkpoint.keep = 5  # on the list of what may change
    exported = again / "hf_step_00000002"
    origin = json.loads((exported / "actor/tempo_origin.json").read_text())
    (exported / "actor/tempo_origin.json").write_text(json.dumps(origin | {"checkpoint_sha256": "another"}))
    critic = snapshot(exported / "critic")
    run_ranks(train, 1, tmp_path / "ranks", config)
    assert snapshot(exported / "critic") == critic, "it fits, and stays"
    assert json.loads((exported / "actor/tempo_origin.json").read_text()) == origin | {"run": str(again)}
    assert json.loads((exported / "actor.other-1/tempo_origin.json").read_text())["checkpoint_sha256"] == "another"
    weights = "model-00001.safetensors"
    assert (exported / "actor" / weights).read_bytes() == (run / "hf_step_00000002/actor" / weights).read_bytes()
    output = (tmp_path / "ranks/rank0.log").read_text()
    assert f"{exported}/actor does not come from this run's step 2: renamed to actor.other-1" in output


COMMAND = """
import sys
from megatron_tempo import cli

if __name__ == "__main__":
    sys.exit(cli.main(["train", "--config", sys.argv[1]]))
"""


def test_ctrl_c_saves_and_says_a_line(run: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(COMMAND)
    config = config_of(run.parent / "project", out)
    config.stage2.iterations, config.checkpoint.every = 200, 0
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    save(config, tmp_path / "config.json")
    process = FORK_SERVER.script(script, tmp_path / "config.json", environment={}, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 75
    done = len(read_metrics(out))
    output = (tmp_path / "log").read_text()
    assert "Traceback" not in output
    where = out / f"checkpoints/step_{done:08d}"
    assert output.splitlines()[-1] == (
        f"stopped after {done} iterations, as requested by INT; rerun the same command to resume from {where}"
    )
    assert where.is_dir()
    assert not (out / LOCK).exists()
