"""Commands behind `| head`, on a stream of ASCII, without a stream; --version, help, presets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import megatron_tempo
from megatron_tempo import cli
from megatron_tempo.commands.presets import description, listing, natural
from megatron_tempo.config.compose import GROUPS, REPOSITORY
from megatron_tempo.observability import terminal

ROOT = Path(__file__).resolve().parents[2]
PLAN = ["plan", "experiment=qwen3_8b_aime", "cluster=h100x16"]


def program(*words: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "megatron_tempo", *words], os.environ | {"PYTHONPATH": str(ROOT)} | environment


@pytest.mark.parametrize("words", [PLAN, ["presets"], ["--help"], ["submit", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(words: list[str]) -> None:
    command, environment = program(*words)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode in (0, terminal.GONE)


def test_a_broken_pipe_of_another_kind_is_an_error() -> None:
    with pytest.raises(BrokenPipeError), terminal.standard_streams():
        raise BrokenPipeError


@pytest.mark.parametrize("words", [["presets"], ["presets", "model"]])
def test_output_onto_a_full_disk_is_a_line(words: list[str]) -> None:
    command = [sys.executable, "-u", "-m", "megatron_tempo", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def test_warnings_of_torch_about_checkpoints_are_hidden() -> None:
    code = (
        "import warnings; from megatron_tempo import cli; cli._quiet()\n"
        "for name in ('megatron_compat.cpu_backend', 'device', 'gpt'):\n"
        "    module = f'megatron_tempo.models.{name}'\n"
        "    warnings.warn_explicit('use DTensor', FutureWarning, 'a.py', 1, module=module)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_a_closed_stream_is_no_error() -> None:
    command, environment = program("presets", "cluster")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:surrogateescape"])
def test_a_stream_without_the_characters(encoding: str) -> None:
    code = (
        "from megatron_tempo.observability.terminal import standard_streams\n"
        "with standard_streams(): print('0.5 \u00b1 0.1 \u2192 \u6570 \U0001f600')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.decode("latin-1") in ("0.5 +- 0.1 -> ? ?\n", "0.5 ± 0.1 -> ? ?\n")
    assert done.stderr == b""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"megatron-tempo {megatron_tempo.__version__} in ")
    assert f"megatron-core {metadata.version('megatron-core')}, torch " in out


COMMANDS = [
    "train",
    "check",
    "plan",
    "eval",
    "submit",
    "serve",
    "status",
    "report",
    "compare",
    "presets",
    "convert",
    "prepare",
]


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        cli.main([*words, "--help"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def test_each_help_is_short_and_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    texts = {name: helped(capsys, name) for name in COMMANDS}
    for name, text in texts.items():
        assert len(text.splitlines()) <= 36, name
        assert text.startswith(f"usage: megatron-tempo {name} ")
        # Examples of a command are of this command.
        _, _, examples = text.partition("examples:\n")
        assert all(f" {name} " in f"{line} " for line in examples.splitlines() if line.strip()), text
    assert "data=FILE" in texts["eval"]
    assert [name for name, text in texts.items() if "data=FILE" in text] == ["eval"]
    assert [name for name, text in texts.items() if "run.seed=1" in text] == COMMANDS[:6]
    summary = helped(capsys)
    assert all(f"\n    {name} " in summary for name in COMMANDS)


def test_every_preset_has_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line for line in lines if line.startswith("  ")}
    for path in (REPOSITORY / "configs").glob("*/*.yaml"):
        words = shown[path.stem].split(maxsplit=1)[1]
        assert 10 < len(description(path.read_text())) <= 100, path
        assert words
    assert [line.split("=")[0] for line in lines if line and not line.startswith(" ")] == sorted(
        GROUPS, key=["experiment", "model", "data", "benchmark", "engine", "algorithm", "cluster"].index
    )
    assert [line.split()[0] for line in listing("cluster", None).splitlines()[1:]] == sorted(
        (path.stem for path in (REPOSITORY / "configs/cluster").glob("*.yaml")), key=natural
    )


@pytest.mark.parametrize("columns", [1, 10, 24, 40, 79])
def test_presets_in_a_narrow_terminal_are_words(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = sorted(listing(None, None).split())
    longest = max(map(len, words))
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = listing(None, None)
    assert sorted(narrow.split()) == words, "no word is cut"
    assert max(map(len, narrow.splitlines())) <= max(columns, longest + 4)


def test_presets_of_ones_own_are_listed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\n# My run of v1.5 on 8 GPUs. More.\nrun: {}\n")
    (tmp_path / "experiment/bare.yaml").write_text("run: {}\n")
    lines = [" ".join(line.split()) for line in listing("experiment", str(tmp_path)).splitlines()]
    assert "mine My run of v1.5 on 8 GPUs" in lines
    assert "bare" in lines
    assert any(line.startswith("qwen3_8b_aime ") for line in lines)


@pytest.mark.parametrize("words", [["clustr"], ["--config-dir", "nowhere"]])
def test_presets_refuse_what_is_not_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presets", *words]) == 2
    assert words[-1] in capsys.readouterr().err
