"""`megatron-tempo submit`: what it refuses, the script that it writes, the snapshot, what it says to sbatch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.config import Config, ConfigErrors, load
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.compose import REPOSITORY
from megatron_tempo.config.schema import to_plain
from megatron_tempo.errors import InputError, hidden
from megatron_tempo.submit import snapshot
from megatron_tempo.submit.job import Job, Kind
from megatron_tempo.submit.script import BEGIN, END, render
from tests.unit.config_files import good_overrides, write_all

LAUNCH = REPOSITORY / "launch"


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    write_all(tmp_path)
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 64, "head_dim": 8}))  # as `plan` wants it
    return [*good_overrides(tmp_path), "cluster=h100x16", "rollout.servers.python=sh"]


def block(script: str) -> str:
    return script.split(BEGIN, 1)[1].split("\n", 1)[1].split(f"\n{END}", 1)[0]


def values(script: str) -> dict[str, list[str]]:
    """The variables of a script's block as bash reads them; a list for arrays and single values alike."""
    names = re.findall(r"^([A-Z_]+)=", block(script), re.MULTILINE)
    show = "; ".join(f"printf '%s\\0' {name} \"${{{name}[@]}}\"; printf '\\1\\0'" for name in names)
    done = subprocess.run(["bash", "-c", f"{block(script)}\n{show}"], capture_output=True, text=True, check=True)
    parts = [part.split("\0") for part in done.stdout.split("\1\0") if part]
    return {name: values_of[:-1] for name, *values_of in parts}


def options(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", block(script), re.MULTILINE)


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["submit", "--dry-run", *words]) == 0
    out = capsys.readouterr().out
    return out[out.index("#!/usr/bin/env bash") :]


def test_a_dry_run_prints_plan_and_script_and_writes_nothing(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", "--dry-run", *good]) == 0
    out = capsys.readouterr().out
    assert "on 16 x H100 of 80 GB" in out
    assert re.search(r"^(fits|does not fit): ", out, re.MULTILINE)
    script = out[out.index("#!/usr/bin/env bash") :]
    assigned = values(script)
    assert assigned["JOB"] == [f"{tmp_path}/run/jobs/0001"]
    assert assigned["CONFIG"] == [f"{tmp_path}/run/jobs/0001/config.json"]
    assert (assigned["TRAIN_NODES"], assigned["PROCESSES"], assigned["ROLLOUT_NODES"]) == (["2"], ["8"], ["0"])
    assert assigned["PYTHON"] == [sys.executable]
    assert {"--nodes=2", "--ntasks-per-node=8", "--gres=gpu:8", "--signal=B:USR1@600", "--requeue"} <= set(
        options(script)
    )
    assert not any("None" in option for option in options(script))
    assert not (tmp_path / "run").exists()


def test_without_facts_there_is_no_plan(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "--dry-run", *good, "cluster.memory_gb=0"]) == 0
    assert capsys.readouterr().out.startswith("no plan: cluster.memory_gb=0.0: must be above 0")


def test_what_a_site_says_comes_into_the_script(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    site = {
        "partition": "gpu",
        "account": "'my account'",
        "time_limit": "'1-00:00:00'",
        "grace_seconds": "900",
        "gres": "gpu:h100",
        "cpus_per_task": "12",
        "options": "['--qos=high']",
        "modules": "[cuda/12.8,gcc]",
        "environment": "{NCCL_IB_HCA: mlx5, NOTE: 'a \"b\" $c'}",
        "interface": "ib0",
        "container": "'docker://image:1'",
        "mounts": "[/data:/data:ro]",
    }
    script = dry(capsys, *good, *(f"cluster.slurm.{name}={value}" for name, value in site.items()))
    assert options(script)[3:12] == [
        "--cpus-per-task=12",
        "--gres=gpu:h100:8",
        "--partition=gpu",
        '"--account=my account"',
        "--time=1-00:00:00",
        "--signal=B:USR1@900",
        f"--output={values(script)['JOB'][0]}/%j.out",
        "--open-mode=append",
        "--requeue",
    ]
    assert options(script)[-1] == "--qos=high"
    assigned = values(script)
    assert assigned["MODULES"] == ["cuda/12.8", "gcc"]
    assert assigned["ENVIRONMENT"] == ["NCCL_IB_HCA=mlx5", 'NOTE=a "b" $c']
    assert (assigned["INTERFACE"], assigned["CONTAINER"]) == (["ib0"], ["docker://image:1"])
    assert assigned["PYTHON"] == ["python3"]
    run = assigned["RUN"][0]
    assert assigned["MOUNTS"] == [f"{run}:{run}", f"{Path.cwd()}:{Path.cwd()}", "/data:/data:ro"]
    assert (assigned["GRES"], assigned["CPUS"], assigned["GRACE"]) == (["gpu:h100:8"], ["96"], ["900"])


SERVED = ["rollout.engine=vllm", "rollout.servers.host=hostname", "rollout.servers.tensor=2"]


def test_servers_take_gpus_of_each_node_or_nodes_of_their_own(
    good: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    beside = ["rollout.servers.devices=[4,5,6,7]", "rollout.servers.replicas=2", "rollout.servers.each_node=true"]
    assigned = values(dry(capsys, *good, *SERVED, *beside))
    assert [assigned[name] for name in ("TRAIN_NODES", "PROCESSES", "ROLLOUT_NODES", "SERVERS")] == [
        ["2"],
        ["4"],
        ["0"],
        ["0"],
    ]
    away = [
        "cluster.nodes=6",
        "cluster.rollout_nodes=2",
        "rollout.servers.replicas=4",
        "rollout.servers.start_seconds=90",
    ]
    script = dry(capsys, *good, *SERVED, *away)
    assigned = values(script)
    assert [assigned[name] for name in ("TRAIN_NODES", "PROCESSES", "ROLLOUT_NODES", "SERVERS")] == [
        ["4"],
        ["8"],
        ["2"],
        ["4"],
    ]
    assert assigned["START_SECONDS"] == ["90"]
    assert "--nodes=6" in options(script)


def test_the_other_jobs(good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = dry(capsys, "--job", "eval", "cluster=h100x8", f"model={tmp_path}/model", f"data={tmp_path}/heldout.jsonl")
    assert re.search(r"/runs/eval/\d{8}-\d{6}-\d+$", values(script)["RUN"][0])
    assert "--no-requeue" in options(script)
    assert not any("signal" in option for option in options(script))
    words = ["hf-to-megatron", "A B", "OUT", "--model", "critic"]
    script = dry(capsys, "--job", "convert", "cluster=example_site", "--", *words)
    assert values(script)["COMMAND"] == words
    # By the name of the program in tools/.
    older = dry(capsys, "--job", "convert", "cluster=example_site", "--", "convert_hf_to_megatron", *words[1:])
    assert values(older)["COMMAND"] == words
    assert options(script)[1:4] == ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=12"]
    assert not any("gres" in option for option in options(script))


@pytest.mark.parametrize("kind", Kind)
def test_a_script_by_hand_has_what_submit_writes(kind: Kind, tmp_path: Path) -> None:
    config = Config(cluster=ClusterConfig())
    config.run.dir = str(tmp_path)
    template = (LAUNCH / f"{kind.name}.sbatch").read_text()
    script = render(Job(kind, config, ()), LAUNCH, tmp_path / "job", tmp_path)
    assert set(values(template)) == set(values(script))
    assert {option.partition("=")[0] for option in options(template)} == {o.partition("=")[0] for o in options(script)}
    assert script.split(f"\n{END}", 1)[1] == template.split(f"\n{END}", 1)[1]


REFUSED = {
    "~cluster": "cluster=null: nothing says where to submit to",
    "cluster.slurm.time_limit=12h": "cluster.slurm.time_limit=12h: is no time that sbatch reads",
    "cluster.slurm.time_limit=720": "must be text; fix: quote it: 'cluster.slurm.time_limit=\"0:12:00\"' if you wrote",
    "cluster.slurm.time_limit=43200": "'cluster.slurm.time_limit=\"12:00:00\"' if you wrote 12:00:00 (YAML reads that",
    "cluster.slurm.options=['-']": "cluster.slurm.options=-: is no option of sbatch",
    "run.dir=/tmp/a:b": "run.dir=/tmp/a:b: /tmp/a:b has a : in its name",
    "run.dir='/tmp/a,b' cluster.slurm.container=i": "run.dir=/tmp/a,b: /tmp/a,b has a : or , in its name",
    "cluster.rollout_nodes=1 ROLLOUT rollout.servers.host=localhost": "localhost: is reached from one machine alone",
    "cluster.slurm.grace_seconds=0": "cluster.slurm.grace_seconds=0: must be 1 or more",
    "cluster.slurm.options=['qos=high']": "cluster.slurm.options=qos=high: is no option of sbatch",
    "cluster.slurm.environment={A-B: c}": "cluster.slurm.environment=A-B: is no name of a variable",
    "cluster.slurm.mounts=[/a:/b]": "cluster.slurm.mounts=[/a:/b]: are of a container, and there is none",
    "cluster.slurm.container=i cluster.slurm.mounts=[a]": "cluster.slurm.mounts=a: is no mount",
    "cluster.slurm.partion=gpu": "cluster.slurm.partion=gpu: there is no such field; fix: did you mean",
    "cluster.rollout_nodes=1": "cluster.rollout_nodes=1: the engine embedded generates in the trainer's processes",
    "cluster.rollout_nodes=2 ROLLOUT": "cluster.rollout_nodes=2: leaves none of cluster.nodes=2 to train on",
    "cluster.rollout_nodes=1 rollout.engine=vllm": "rollout.servers.host=127.0.0.1: is reached from one machine alone",
    "cluster.rollout_nodes=1 ROLLOUT rollout.servers.replicas=5": "(replicas x tensor) GPUs are more than a node's 8",
    "cluster.rollout_nodes=1 ROLLOUT rollout.servers.each_node=true": "the trainer's nodes start none",
    "cluster.rollout_nodes=1 ROLLOUT rollout.servers.transport=shared": "the servers are on others",
    "parallel.world_size=15": "parallel.world_size=15: 15 processes cannot be shared evenly by 2 nodes",
    "parallel.world_size=24": "parallel.world_size=24: is 12 processes a node, and a node has 8 GPUs",
    # Rules of every run, on as many processes as the job will have.
    "cluster.nodes=3": "stage1.actor.mini_batch_prompts=64: its 512 responses cannot be shared evenly by 24",
    "rollout.engine=vllm rollout.servers.python=none": "rollout.servers.python=none: is no program that can be run",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words: str, good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = words.replace("ROLLOUT", " ".join(SERVED)).replace("{A-B: c}", "{A-B:c}").split()
    base = [word for word in good if words != "~cluster" or not word.startswith("cluster=")]
    assert cli.main(["submit", *base, *(given if words != "~cluster" else [])]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert REFUSED[words] in captured.err


def test_a_container_has_an_engine_that_this_machine_lacks(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rollout.engine=vllm", "rollout.servers.python=/opt/vllm/bin/python", "cluster.slurm.container=image"]
    words += ["rollout.servers.host=hostname", "rollout.servers.tensor=4"]
    assert values(dry(capsys, *good, *words))["CONTAINER"] == ["image"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "--chain", "0"],
        ["submit", "--job", "eval", "--chain", "2"],
        ["submit", "--job", "convert", "cluster=h100x8"],
        ["submit", "--job", "convert", "cluster=h100x8", "--", "rm", "-r"],
        ["train", "experiment=quickstart", "--", "more"],
        ["serve", "experiment=quickstart"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


HOSTILE = "a 'b' \"c\" \\d $(touch gone) `touch gone` #e %j ;&|<>"


def test_whatever_a_field_holds_is_one_word(good: list[str], tmp_path: Path) -> None:
    config = cli.build(good)
    assert config.cluster is not None
    slurm = config.cluster.slurm
    slurm.partition = slurm.account = slurm.interface = slurm.container = slurm.python = HOSTILE
    slurm.modules, slurm.environment, slurm.options = [HOSTILE], {"NOTE": HOSTILE}, [f"--comment={HOSTILE}"]
    config.run.dir = str(tmp_path / HOSTILE)
    script = render(Job(Kind.train, config, ()), LAUNCH, tmp_path / HOSTILE, tmp_path / HOSTILE)
    assigned = values(script)
    assert [assigned[name] for name in ("INTERFACE", "MODULES", "CONTAINER", "PYTHON")] == [[HOSTILE]] * 4
    assert assigned["ENVIRONMENT"] == [f"NOTE={HOSTILE}"]
    assert assigned["RUN"] == assigned["JOB"] == assigned["WORK"] == [str(tmp_path / HOSTILE)]
    parsed = [as_sbatch_reads(line) for line in options(script)]
    assert {f"--partition={HOSTILE}", f"--account={HOSTILE}", f"--comment={HOSTILE}"} <= set(parsed)
    assert f"--output={tmp_path}/{HOSTILE.replace('%', '%%')}/%j.out" in parsed
    assert f"--job-name=tempo-train-{HOSTILE}" in parsed
    assert not list(tmp_path.glob("**/gone"))


def as_sbatch_reads(line: str) -> str:
    """The one argument of a line of options, by the rules of sbatch's own parser (src/sbatch/opt.c)."""
    argument, quote, is_escaped = "", "", False
    for position, character in enumerate(line):
        if is_escaped:
            argument, is_escaped = argument + character, False
        elif character == "\\":
            is_escaped = True
        elif quote and character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote = character
        elif not quote and (character.isspace() or character == "#"):
            assert not line[position:].strip(), f"a second word: {line[position:]}"
        else:
            argument += character
    assert not quote
    return argument


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x00", "\u009b", "\u202e", "\t"])
def test_no_field_begins_a_line(good: list[str], tmp_path: Path, character: str) -> None:
    """A newline would make a command of what follows; the others deceive who reads the script."""
    plain = to_plain(cli.build(good))
    for field in ("partition", "account", "interface", "container", "python", "gres", "time_limit"):
        plain["cluster"]["slurm"][field] = f"x{character}touch gone"
    plain["cluster"]["slurm"]["options"] = [f"--qos=x{character}touch gone"]
    plain["cluster"]["slurm"]["modules"] = [f"x{character}touch gone"]
    plain["cluster"]["slurm"]["environment"] = {"NAME": f"x{character}touch gone"}
    plain["run"]["dir"] = f"{tmp_path}/x{character}touch gone"
    (tmp_path / "whole.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigErrors) as caught:
        cli.build([], whole=str(tmp_path / "whole.json"), submitted=Kind.train)
    assert {problem.wrong.partition("=")[0] for problem in caught.value.problems} == {
        "run.dir",
        *(f"cluster.slurm.{name}" for name in ("partition", "account", "interface", "container", "python", "gres")),
        *(f"cluster.slurm.{name}" for name in ("time_limit", "options[0]", "modules[0]", "environment.NAME")),
    }
    assert hidden(str(caught.value)) is None
    config = cli.build(good)
    with pytest.raises(InputError, match="has an invisible character in its name"):
        render(Job(Kind.train, config, ()), LAUNCH, tmp_path, tmp_path / f"x{character}touch gone")


class Queue:
    """Stands for SLURM: programs that note how they are called. `refuse`: the number of the sbatch call that fails."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        count = f"$(wc -l <{folder}/calls)"
        refuse = f"[ {count} = $(cat {folder}/refuse) ] && echo 'no such partition' >&2 && exit 1"
        self._program("sbatch", f"{refuse}; echo $((100 + {count}))")
        self._program("squeue", f"cat {folder}/active")
        self._program("scancel", "")
        for name, text in {"calls": "", "refuse": "0", "active": ""}.items():
            (folder / name).write_text(text)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def _program(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.folder}/calls\n{body}\n')
        path.chmod(0o755)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(tmp_path / "bin", monkeypatch)


def test_a_chain_is_submitted_with_its_snapshot(
    good: list[str], queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", *good, "--chain", "3"]) == 0
    job = tmp_path / "run/jobs/0001"
    script = job / "train.sbatch"
    assert queue.calls() == [
        f"sbatch --parsable {script} 2",
        f"sbatch --parsable --dependency=afterany:101 {script} 1",
        f"sbatch --parsable --dependency=afterany:102 {script} 0",
    ]
    assert f"submitted job 101 -> 102 -> 103 from {job}" in capsys.readouterr().out
    assert load(job / "config.json").run.dir == f"{tmp_path}/run"
    assert values(script.read_text())["CODE"] == [f"{job}/code"]
    for name in ("megatron_tempo/cli.py", "configs/config.yaml", "launch/common.sh"):
        assert (job / "code" / name).read_bytes() == (REPOSITORY / name).read_bytes()
    # Before any of them has ended nothing else may write there.
    (queue.folder / "active").write_text("7\n102\n103\n")
    assert cli.main(["submit", *good]) == 2
    assert "job 102, 103 of this run waits or runs" in capsys.readouterr().err
    assert [path.name for path in snapshot.jobs(tmp_path / "run")] == ["0001"]


def test_the_next_submission_says_what_is_otherwise(
    good: list[str], queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", *good]) == 0
    assert "differences from" not in capsys.readouterr().out
    (tmp_path / "run/jobs/0001/code/megatron_tempo/training/trainer.py").write_text("")
    assert cli.main(["submit", *good, "run.seed=7"]) == 0
    out = capsys.readouterr().out
    assert "differences from" in out
    assert "run.seed: 0 -> 7" in out
    assert "code: megatron_tempo/training/trainer.py" in out
    assert json.loads((tmp_path / "run/jobs/0001/config.json").read_text())["run"]["seed"] == 0
    assert json.loads((tmp_path / "run/jobs/0002/config.json").read_text())["run"]["seed"] == 7


def test_from_inside_an_allocation_none_of_it_goes_along(
    good: list[str], queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_it = ["SLURM_MEM_PER_CPU", "SLURM_NTASKS", "SRUN_CPUS_PER_TASK", "RANK", "CUDA_VISIBLE_DEVICES", "PMIX_RANK"]
    for name in [*of_it, "SLURM_CONF", "SBATCH_ACCOUNT", "WANDB_API_KEY"]:
        monkeypatch.setenv(name, "1")
    queue._program("sbatch", f"env >{queue.folder}/environment; echo 101")

    def variables() -> set[str]:
        assert cli.main(["submit", *good]) == 0
        return {line.partition("=")[0] for line in (queue.folder / "environment").read_text().splitlines()}

    monkeypatch.delenv("RANK")
    assert {"SLURM_MEM_PER_CPU", "CUDA_VISIBLE_DEVICES"} <= variables(), "a user's own, where there is no allocation"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    inside = variables()
    assert not inside & {*of_it, "SLURM_JOB_ID"}
    assert {"SLURM_CONF", "SBATCH_ACCOUNT", "WANDB_API_KEY", "PATH"} <= inside


@pytest.mark.parametrize("refused", [1, 2])
def test_what_sbatch_refuses_leaves_nothing(
    good: list[str], queue: Queue, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: int
) -> None:
    (queue.folder / "refuse").write_text(str(refused))
    assert cli.main(["submit", *good, "--chain", "2"]) == 2
    assert "error: sbatch failed: no such partition" in capsys.readouterr().err
    assert list((tmp_path / "run/jobs").iterdir()) == []
    assert queue.calls()[refused:] == (["scancel 101"] if refused == 2 else [])


def test_without_slurm_it_says_so(
    good: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert cli.main(["submit", *good]) == 2
    assert "error: sbatch is not installed on this machine" in capsys.readouterr().err


def test_a_whole_configuration_and_changes_to_it(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cli.build([*good, "run.seed=5", "stage1.iterations=3"])
    file = tmp_path / "whole.json"
    file.write_text(json.dumps(json.loads(json.dumps(to_plain(config))) | {"typo": 1}))
    assert cli.main(["check", "--config", str(file)]) == 2
    assert f"--config={file}: typo=1 in it: there is no such field" in capsys.readouterr().err
    assert cli.main(["check", "--config", str(file), "run.sed=2"]) == 2
    assert "  run.sed=2: there is no such field; fix: did you mean run.seed?" in capsys.readouterr().err
    file.write_text(json.dumps(to_plain(config))[:-20])
    assert cli.main(["check", "--config", str(file)]) == 2
    assert f"--config={file}: ends too early" in capsys.readouterr().err
    file.write_text(json.dumps(to_plain(config)))
    assert cli.build([], whole=str(file)) == config
    changed = cli.build(["run.seed=6", "algorithm=reference", "cluster=h200x8"], whole=str(file))
    assert (changed.run.seed, changed.stage1.iterations) == (6, 3)
    assert changed.stage2.method_settings.actor_on_labelled
    assert changed.cluster is not None
    assert (changed.cluster.gpu, changed.cluster.memory_gb) == ("H200", 141)
    assert cli.main(["check", "--config", "nowhere.json"]) == 2
    assert "--config=nowhere.json: does not exist" in capsys.readouterr().err
