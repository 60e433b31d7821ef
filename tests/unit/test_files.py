"""Files that are read back: what is no file, cut short or of another form is refused with the file's name."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo import cli
from megatron_tempo.checkpoint import manifest
from megatron_tempo.checkpoint.resumable_folder import ResumableFolder
from megatron_tempo.config import resume
from megatron_tempo.config.schema import Config
from megatron_tempo.config.trained_with import read_trained_with
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json, read_text, why_unreadable
from megatron_tempo.observability.heartbeat import read_heartbeat
from megatron_tempo.observability.records import read
from megatron_tempo.report.html import write_report
from megatron_tempo.report.status import status
from megatron_tempo.rewards.verdicts import VerdictCache
from tests.unit.config_files import good_overrides, write_all


def no_files(folder: Path) -> dict[str, Path]:
    """Paths in a file's place, by what they are."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("none")
    named = {name: folder / name for name in ("none", "folder", "pipe", "loop", "dangling")}
    return named | {"device": Path("/dev/zero"), "long": folder / ("x" * 300), "null": folder / "a\0b"}


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    messages = {
        "none": "does not exist",
        "folder": "is a folder, not a file",
        "pipe": "is a named pipe, not a file",
        "loop": "cannot be read: Too many levels of symbolic links",
        "dangling": "is a link to a file that does not exist",
        "device": "is a device, not a file",
        "long": "cannot be read: File name too long",
        "null": "is no name of a file",
    }
    for name, path in no_files(tmp_path).items():
        assert str(why_unreadable(path)).startswith(messages[name]), name
        with pytest.raises(InputError, match=messages[name]):
            read_json(path, dict)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends too early, at line 1, column 1"),
        (b'{"a": 1', "ends too early"),
        (b'{"a" 1}', "is not JSON"),
        (b"3", "holds a JSON number, not an object"),
        (b"null", "holds a JSON null, not an object"),
        (b"[]", "holds a JSON array, not an object"),
        (b"\xff{}", "byte 1 is no UTF-8"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", r"is not JSON that can be read \(a whole number has more than 4300 digits\)"),
    ],
)
def test_json_of_another_form_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}.* {words}|{path}: {words}"):
        read_json(path, dict)


def test_another_users_file(tmp_path: Path) -> None:
    """As a user that may not read it: root, who may run the tests, can read all."""
    path = tmp_path / "a.json"
    path.write_text("{}")
    path.chmod(0)
    code = (
        "import os; from pathlib import Path; from megatron_tempo.files import why_unreadable\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "print(why_unreadable(Path('a.json')))"  # of this folder, which the other user could not enter
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "cannot be read: Permission denied\n", done.stderr


STEP: dict[str, Any] = {"stage": "stage1", "step": 1, "method": "ppo", "iteration": 1, "time": 1.0, "seconds": 1.0}
SCORED: dict[str, Any] = {"set": "a", "step": 1, "point": "during", "time": 1.0, "seconds": 1.0, "avg_k": 2} | {
    "avg": 0.5,
    "avg_se": None,
    "pass": {"2": 0.5},
    "pass_se": {"2": None},
}
SAMPLE: dict[str, Any] = {"set": "a", "step": 1, "point": "during", "prompt": "p", "correct": 1, "answer": "2"} | {
    "tokens": ["a", "b"],
    "values": [0.1, 0.2, 0.3],
}
CALIBRATION: dict[str, Any] = {"auroc": 0.5, "brier": 0.1, "ece": 0.1, "bins": []}
NO_NUMBER = "the record's {} is no number that a run has"
NUMBERS = ("step", "iteration", "time", "seconds", "actor/loss")


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in record.items() if other != name}


RECORDS: list[tuple[str, Any, str]] = [
    ("evaluations.jsonl", {k: v for k, v in SCORED.items() if k != "pass_se"}, "the record has no pass_se"),
    ("evaluations.jsonl", SCORED | {"pass": {"8": "x"}}, "the record's pass.8 is a JSON string"),
    ("evaluations.jsonl", SCORED | {"calibration": {"last": 3, "by_prefix": {}}}, "the record's calibration.last is a"),
    ("evaluations.jsonl", SCORED | {"calibration": {"last": {}}}, "the record's calibration has no by_prefix"),
    (
        "evaluations.jsonl",
        SCORED | {"calibration": {"last": CALIBRATION | {"auroc_within_questions": "0.5"}, "by_prefix": {}}},
        "the record's calibration.last.auroc_within_questions is a JSON string",
    ),
    ("evaluations.jsonl", SCORED | {"avg": 10**309}, "the record's avg is no number that a run has"),
    ("evaluations.jsonl", SCORED | {"right": [1, "2"]}, "the record's right[1] is a JSON string"),
    (
        "evaluations.jsonl",
        SCORED | {"right": [1, 2], "questions": 3},
        "the record's right has 2 numbers, and there are 3",
    ),
    ("samples.jsonl", SAMPLE | {"tokens": ["a"]}, "the record has 3 values of 1 tokens, not one more"),
    ("starts.jsonl", {"command": ["megatron-tempo"]}, "the record's command is a JSON array"),
    ("warnings.jsonl", {"text": "a"}, "the record has no time"),
    ("metrics.jsonl", 3, "a JSON number, not a record"),
    ("metrics.jsonl", [], "a JSON array, not a record"),
    ("metrics.jsonl", {"stage": "stage1"}, "the record has no step"),
    *(("metrics.jsonl", without(STEP, name), f"the record has no {name}") for name in STEP),
    *(("evaluations.jsonl", without(SCORED, name), f"the record has no {name}") for name in SCORED),
    *(
        ("metrics.jsonl", STEP | {name: 10**400}, f"the record's {name} is no number that a run has")
        for name in NUMBERS
    ),
    *(
        ("metrics.jsonl", STEP | {name: math.nan}, f"the record's {name} is no number that a run has")
        for name in NUMBERS[2:]
    ),
    ("evaluations.jsonl", SCORED | {"pass": {"8": math.inf}}, "the record's pass.8 is no number that a run has"),
    ("starts.jsonl", {"command": 5}, "the record's command is a JSON number"),
    ("starts.jsonl", {"versions": []}, "the record's versions is a JSON array"),
    ("starts.jsonl", {"gpus": 1}, "the record's gpus is a JSON number"),
    ("metrics.jsonl", STEP | {"stage": 1, "step": 1}, "the record's stage is a JSON number, which it cannot be"),
    ("metrics.jsonl", STEP | {"stage": "stage1", "step": "1"}, "the record's step is a JSON string"),
    (
        "metrics.jsonl",
        STEP | {"stage": "stage1", "step": 1, "actor/loss": "x"},
        "the record's actor/loss is a JSON string",
    ),
    ("metrics.jsonl", STEP | {"stage": "stage1", "step": 1, "time": []}, "the record's time is a JSON array"),
    ("evaluations.jsonl", {"set": "a", "step": 1}, "the record has no point"),
    ("evaluations.jsonl", SCORED | {"pass": 3}, "the record's pass is a JSON number"),
    ("samples.jsonl", {"set": "a", "step": 1, "point": "x", "prompt": "p", "tokens": "t"}, "the record's tokens is"),
    ("responses.jsonl", {"set": "a", "id": "b", "question": "c", "correct": "d"}, "the record's correct is a JSON str"),
    ("warnings.jsonl", {"time": 1}, "the record has no text"),
    ("seen.jsonl", {"step": 1, "labels": "x", "question": "q"}, "the record's labels is a JSON string"),
]


@pytest.mark.parametrize(("name", "record", "words"), RECORDS)
def test_records_of_another_form_are_named(tmp_path: Path, name: str, record: Any, words: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(InputError) as caught:
        read(path)
    assert f"{path}:1: {words}" in str(caught.value)


CONFIGS = ["3", "[]", "{", "", '{"stage1": 3}', '{"stage1": {"iterations": "x"}}', '{"stage2": {"critic": []}}']


@pytest.mark.parametrize("text", CONFIGS)
def test_a_run_with_a_config_of_another_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "stage1", "step": 1, "method": "ppo"}\n')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "warnings.jsonl"]
)
def test_a_pipe_in_the_place_of_a_runs_file(
    tmp_path: Path, name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in ("config.json", "metrics.jsonl"):
        (tmp_path / other).write_text("{}" if other == "config.json" else "")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    output = cli.main([command, str(tmp_path)]), capsys.readouterr().err
    if command == "report" or name != "samples.jsonl":  # which status does not read
        assert output == (2, f"error: {tmp_path / name} is a named pipe, not a file\n")


@pytest.mark.parametrize("text", ["3", "{", "{}", '{"phase": 3}', '{"phase": "", "time": "x"}'])
def test_a_heartbeat_of_another_form_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "heartbeat.json").write_text(text)
    (tmp_path / "config.json").write_text("{}")
    assert read_heartbeat(tmp_path) is None
    assert "there is no heartbeat.json" in status(tmp_path).text


@pytest.mark.parametrize("text", ["3", "[]", "{", '{"a": 3}', "[" * 100_000])
def test_a_manifest_of_another_form_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / manifest.MANIFEST).write_text(text)
    assert manifest.MANIFEST in str(manifest.read(tmp_path))


def test_a_conversion_whose_notes_are_of_another_form(tmp_path: Path) -> None:
    work = ResumableFolder(tmp_path / "out", {"a": 1})
    work.begin(10)
    (work.whole / "x").write_text("x")
    work.mark("x")
    assert work.note("x") == {"bytes": 1}
    (tmp_path / "out.partial/done/x").write_text("[]")
    assert work.note("x") is None, "the file is written again"
    (tmp_path / "out.partial/inputs.json").write_text("[]")
    with pytest.raises(InputError, match=r"out\.partial was not written by this program"):
        ResumableFolder(tmp_path / "out", {"a": 1})


def test_verdicts_that_cannot_be_read_are_asked_for_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.jsonl").write_text('3\n[]\n{"key": "00", "right": true}\n')
    assert VerdictCache(tmp_path).get("00") is True
    assert "a.jsonl is a folder, not a file" in caplog.text


WORDS: dict[str, Callable[[Path], list[str]]] = {
    "check": lambda path: ["check", f"--config={path}"],
    "plan": lambda path: ["plan", f"model.path={path.parent}"],
}


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "3", "{"])
def test_commands_name_a_config_that_is_none(
    tmp_path: Path, command: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text(kind)
    assert cli.main(WORDS[command](path)) == 2
    output = capsys.readouterr().err
    assert "config.json" in output
    assert "Traceback" not in output


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"k\xe9y")
    with pytest.raises(InputError, match="byte 2 is no UTF-8"):
        read_text(tmp_path / "key")


def test_presets_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither waits for a pipe nor shows a traceback, as Hydra would."""
    (tmp_path / "cluster").mkdir()
    mine = tmp_path / "cluster" / "mine.yaml"
    mine.write_bytes("cluster: {}".encode("utf-16"))
    commands = (["presets"], ["plan", "experiment=qwen3_8b_aime", "cluster=mine"])
    for command in commands:
        assert cli.main([*command, "--config-dir", str(tmp_path)]) == 2
        assert f"{mine}: byte 1 is no UTF-8" in capsys.readouterr().err
    mine.unlink()
    os.mkfifo(mine)
    for command in commands:
        assert cli.main([*command, "--config-dir", str(tmp_path)]) == 2
        assert f"{mine} is a named pipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "checkpoints/step_00000001/run.json"])
def test_a_pipe_or_deep_json_as_a_runs_configuration(tmp_path: Path, name: str) -> None:
    config = Config()
    config.run.dir = str(tmp_path)
    path = tmp_path / name
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    os.mkfifo(path)
    assert f"{path} is a named pipe" in str(resume.problem(config))
    path.unlink()
    path.write_text("[" * 100_000)
    assert f"{path} is cut short or not JSON" in str(resume.problem(config))


def test_a_pipe_as_a_models_config_or_as_a_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert read_trained_with(tmp_path) == {}
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "lock.json")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    assert "step" in status(tmp_path).text


def test_a_presets_description_is_safe_to_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("# Ours\x9b2J\ufeff.\ncluster: {}\n", encoding="utf-8")
    assert cli.main(["presets", "--config-dir", str(tmp_path)]) == 0
    assert "Ours<U+009B>2J<U+FEFF>" in capsys.readouterr().out


def test_a_link_of_too_long_a_name_in_a_models_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path)
    for name in ("tokenizer.json", "config.json", "tokenizer_config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        content = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        path.symlink_to("x" * 300)
        assert cli.main(["check", *good_overrides(tmp_path)]) == 2
        assert f"{name} cannot be read: File name too long" in capsys.readouterr().err
        path.unlink()
        if content is not None:
            path.write_bytes(content)
