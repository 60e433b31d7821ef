"""A wheel in a clean environment runs every command from another folder, and none prints a warning of a library's."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

import megatron_tempo
from tests.support.wheel import Installed

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    *("stage1.iterations=1", "stage1.critic.warmup_iterations=0", "stage2.iterations=1"),
    *("stage2.critic.warmup_iterations=0", "evaluation.every=0", "evaluation.samples=4", "evaluation.pass_k=[2]"),
    *("evaluation.sets.unlabelled.limit=32", "evaluation.sets.heldout.limit=32"),
]
LENGTHS = ["rollout.max_prompt_tokens=40", "rollout.max_response_tokens=24", "evaluation.samples=2"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed.make(tmp_path_factory.mktemp("wheel"))


def output(installed: Installed, *words: str, code: int = 0, **variables: str) -> str:
    """What a command prints. Its stderr must be empty: no warning of torch, Megatron-Core or transformers."""
    done = installed.run(*words, **variables)
    assert (done.returncode, done.stderr) == (code, ""), f"{words}: {done.stdout[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_from_another_folder(installed: Installed) -> None:
    run = installed.work / "runs/quickstart"
    out = output(installed, "--version")
    assert out.startswith(f"megatron-tempo {megatron_tempo.__version__} in {installed.environment}")
    assert "\n  quickstart " in output(installed, "presets")
    assert output(installed, "check", "experiment=quickstart").startswith("ok\n")
    assert "fits: " in output(installed, "plan", "experiment=qwen3_8b_aime", "cluster=h100x16")
    # On an encoding without "±", which the tables have.
    out = output(installed, "train", "experiment=quickstart", *SHORT, PYTHONIOENCODING="ascii", COLUMNS="80")
    assert "after stage 2" in out
    assert "+-" in out
    steps = [line for line in out.splitlines() if line.startswith(("stage1 ", "stage2 ", "evaluation  "))]
    assert len(steps) == 8
    assert max(map(len, steps)) <= 80
    assert (run / "report.html").stat().st_size > 0
    assert "finished" in output(installed, "status", "runs/quickstart")
    assert output(installed, "report", "runs/quickstart") == "runs/quickstart/report.html\n"
    _converted(installed)
    _evaluated(installed)
    _served(installed)


def _converted(installed: Installed) -> None:
    checkpoint = "runs/quickstart/checkpoints/step_00000002"
    output(installed, "convert", "megatron-to-hf", checkpoint, "back")
    output(installed, "convert", "hf-to-megatron", "back", "megatron")
    assert (installed.work / "megatron/metadata.json").exists()


def _evaluated(installed: Installed) -> None:
    rows = [{"q": f"{a}+{a}", "a": 2 * a} for a in range(1, 9)]
    (installed.work / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ["--prompt-field", "q", "--answer-field", "a", "--verifier", "math"]
    assert "8 questions kept" in output(installed, "prepare", "custom", "mine.jsonl", "--out", "set.jsonl", *fields)
    heldout = next(installed.environment.rglob("examples/quickstart/heldout.jsonl"))
    words = ["evaluation.sets.heldout.verifier=countdown", "evaluation.sets.heldout.chat_template=false"]
    words += ["evaluation.sets.heldout.limit=32", *LENGTHS]
    output(installed, "eval", "model=back", f"data={heldout}", "evaluation.pass_k=[2]", "run.dir=one", *words)
    shutil.copytree(installed.work / "one", installed.work / "two")
    assert "heldout" in output(installed, "compare", "one", "two")


def _served(installed: Installed) -> None:
    """The only output is the error of the engine that does not start."""
    (installed.work / "servers").mkdir()
    (installed.work / "servers/key").write_text("secret")
    words = ["experiment=quickstart", "engine=vllm", "rollout.servers.python=/bin/false", "rollout.servers.tensor=1"]
    words += ["rollout.servers.devices=null", "rollout.servers.each_node=false", "rollout.placement=disaggregated"]
    done = installed.run("serve", *words, "--folder", "servers")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: vLLM ended with exit code 1\n")
    assert "arning" not in done.stderr


@pytest.mark.slow
def test_a_job_is_submitted_with_the_code_of_the_wheel(installed: Installed) -> None:
    """The snapshot of an installed program has what that of a checkout has."""
    site = installed.work / "presets/cluster"
    site.mkdir(parents=True)
    (site / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - example_site\n")
    sbatch = installed.environment / "bin/sbatch"
    sbatch.write_text("#!/bin/sh\necho 1\n")
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}:/usr/bin:/bin"
    words = ["cluster=mine", "run.dir=job", "--config-dir", "presets", "--job", "convert"]
    output(installed, "submit", *words, "--", "megatron-to-hf", "A", "B", PATH=path)
    code = installed.work / "job/jobs/0001/code"
    for name in ("megatron_tempo/cli.py", "configs/config.yaml", "launch/common.sh", "launch/convert.sbatch"):
        assert (code / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (code / "megatron_tempo/shipped").exists()


@pytest.mark.slow
def test_the_wheel_has_what_the_package_reads_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert all(name.startswith("megatron_tempo/") for name in names)
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_tempo").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    shipped = {
        f"megatron_tempo/shipped/{path.relative_to(ROOT).as_posix()}"
        for folder in ("configs", "launch", "examples/quickstart")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert names == package | shipped
