"""The commands: dispatch, messages, exit status, and that a check needs no torch."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.cli import build
from megatron_tempo.config import Config
from megatron_tempo.config.benchmarks import BENCHMARKS
from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.compose import EVAL_DIR
from megatron_tempo.config.rules import Purpose
from megatron_tempo.config.schema import DatasetConfig
from megatron_tempo.config.trained_with import ENTRY, trained_with
from megatron_tempo.errors import InputError, Stopped
from tests.unit.config_files import good_overrides, write_all, write_rows


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    write_all(tmp_path)
    return good_overrides(tmp_path)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config]]:
    """Stands for megatron_tempo.training.jobs, whose calls it records."""
    calls: list[tuple[str, Config]] = []
    module = types.ModuleType("megatron_tempo.training.jobs")
    module.train = lambda config: calls.append(("train", config))  # type: ignore[attr-defined]
    module.evaluate = lambda config: calls.append(("evaluate", config))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_tempo.training.jobs", module)
    return calls


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines of the report on a configuration that must be refused."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return [line.strip() for line in captured.err.splitlines()]


def test_check_says_ok_and_what_it_is(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *good, "parallel.tensor=2", "parallel.world_size=8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok\n")
    assert "tensor 2 x pipeline 1 x data 4" in out
    assert "tempo, 1 iterations of 256 labelled + 256 unlabelled prompts x 8 responses" in out
    assert f"{512 * 8 * (2048 + 16384):,} tokens" in out
    assert "avg@16, pass@8 on heldout" in out


# overrides, and for each the line that it gets
TYPOS = {
    "parallel.tensr=2": "parallel.tensr=2: there is no such field; fix: did you mean parallel.tensor?",
    "+parallel.tensr=2": "parallel.tensr=2: there is no such field; fix: did you mean parallel.tensor?",
    "++parallel.tensr=2": "parallel.tensr=2: there is no such field; fix: did you mean parallel.tensor?",
    "+typo=1": "typo=1: there is no such field; fix: one of run, model, parallel, data, rollout, rewards, "
    "stage1, stage2, "
    "evaluation, checkpoint, metrics, profile, cluster",
    "stage1.actor.lr=1": "stage1.actor.lr=1: there is no such field; fix: did you mean "
    "stage1.actor.optimizer.lr or stage1.critic.optimizer.lr or stage2.actor.optimizer.lr?",
    "run.device=gpu": "run.device=gpu: must be one of auto, cpu, cuda; fix: did you mean cpu?",
    "parallel.tensor=two": "parallel.tensor=two: must be a whole number; fix: for example parallel.tensor=8",
    "rollout.dump=1": "rollout.dump=1: must be true or false; fix: for example rollout.dump=true",
    "stage1=ppo": "stage1=ppo: is a group of fields, not a value; fix: set its fields, such as stage1.method",
    "algorithm=refrence": "algorithm=refrence: there is no preset of this name in configs/algorithm; "
    "fix: did you mean reference?",
    "experiment=x": "experiment=x: there is no preset of this name in configs/experiment; "
    "fix: one of logic_dates, olmo3_7b_aime, quickstart, qwen3_14b_aime, qwen3_30b_a3b_aime, qwen3_8b_aime, "
    "qwen3_8b_day, qwen3_8b_general, smollm2_arithmetic",
    "expriment=quickstart": "expriment=quickstart: there is no such group of presets; fix: experiment=quickstart",
    "model=qwen": "model=qwen: there is no preset of this name in configs/model; fix: did you mean qwen3_8b or "
    "qwen3_14b?",
    "data=[a,b]": "data=[a,b]: is a list, not one name; fix: data=a",
    "model=[a,b]": "model=[a,b]: is a list, not one name; fix: model=a",
    "algorithm={a: b}": "algorithm={a: b}: is a mapping, not one name; fix: algorithm=a",
    "model=a,b": "model=a,b: sweeps over several values are not supported; fix: model=one of a,b",
    "run.dir=[a,b]": "run.dir=[a, b]: must be text; fix: give one: run.dir=a",
    "model.path=[a,b]": "model.path=[a, b]: must be text; fix: give one: model.path=a",
    "evaluation.sets.heldout.path=[a,b]": "evaluation.sets.heldout.path=[a, b]: must be text; fix: give one: "
    "evaluation.sets.heldout.path=a",
    "data=a.jsonl": "data=a.jsonl: is only for eval; fix: data.labelled.path=a.jsonl or data.unlabelled.path=a.jsonl",
    "run.seed=1,2": "run.seed=1,2: sweeps over several values are not supported; fix: give one value, a list "
    "as run.seed=[1,2], or text with a comma in quotes: 'run.seed=\"1,2\"'",
    "run.seed": "run.seed=: cannot be read; fix: write KEY=VALUE; quote a value with special characters: "
    "'KEY=\"VALUE\"'",
    "hydra.verbose=true": "hydra.verbose=true: Hydra's own settings are not used; fix: for your own presets "
    "use --config-dir",
    "~run.sed": "~run.sed=: Could not delete from config. 'run.sed' does not exist.; fix: correct it, or the file that "
    "it names",
    "evaluation.pass_k.x=3": "evaluation.pass_k.x=3: invalid literal for int() with base 10: 'x'; fix: correct it, "
    "or the file that it names",
    "run.dir={x: 3}": "run.dir={x: 3}: must be text; fix: for example run.dir=NAME",
    "run.dir=${run.folder}": "run.dir=${run.folder}: Interpolation key 'run.folder' not found; full_key: run.dir; "
    "object_type=dict; fix: correct it, or the file that it names",
}


@pytest.mark.parametrize("override", TYPOS)
def test_a_typo_gets_one_line(override: str, good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys, "check", *good, override) == ["1 problem in the configuration:", TYPOS[override]]


def test_typos_and_broken_rules_come_in_one_report(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bad = ["+typo=1", "run.device=gpu", "~run.sed", "parallel.tensor=3", "stage1.actor.optimizer.lr=-1"]
    lines = report(capsys, "check", *good, *bad)
    assert lines[0] == "5 problems in the configuration:"
    fields = ["~run.sed", "run.device", "typo", "parallel.tensor", "stage1.actor.optimizer.lr"]
    assert [line.partition("=")[0] for line in lines[1:]] == fields


def test_an_unreadable_value_is_told_once(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys, "check", *good, "run.dir=7")
    assert lines[1:] == [
        "run.dir=7: must be text; fix: quote it: 'run.dir=\"7\"' "
        "(without quotes YAML reads 010, 1e3 or 12:00 as a number)"
    ]


def test_presets_of_ones_own(good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "presets" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nrun: {seed: 5, sed: 6}\nrolout: {dump: true}\n")
    (folder / "broken.yaml").write_text("# @package _global_\nrun: {seed: 5\n")
    arguments = ["check", "--config-dir", str(folder.parent), *good]
    short = [*good, "stage1.critic.warmup_iterations=0", "stage2.critic.warmup_iterations=0"]
    assert cli.main([*arguments, "experiment=quickstart", "model.path=" + str(tmp_path / "model"), *short]) == 0
    capsys.readouterr()
    lines = report(capsys, *arguments, "experiment=mine")
    assert lines[1] == "run.sed=6: there is no such field; fix: did you mean run.seed?"
    assert lines[2] == "rolout.dump=true: there is no such field; fix: did you mean rollout.dump?"
    (line,) = report(capsys, *arguments, "experiment=broken")[1:]
    assert line.startswith("experiment=broken: ")
    assert "broken.yaml" in line
    (folder / "elsewhere.yaml").write_text("# @package _lobal_\nrun: {seed: 5}\n")
    (folder / "bare.yaml").write_text("# My run.\n# @package _global_\nrun: {seed: 5}\n")  # Hydra reads no header here
    for name, package in [("elsewhere", "_lobal_"), ("bare", "experiment")]:
        (line,) = report(capsys, *arguments, f"experiment={name}")[1:]
        assert f"{name}.yaml puts its fields into {package}, which is no section of a configuration; fix: begin" in line
    assert report(capsys, "check", "--config-dir", "nowhere")[1].startswith("--config-dir=nowhere: does not exist")


def test_train_checks_then_trains(
    good: list[str], called: list[tuple[str, Config]], capsys: pytest.CaptureFixture[str]
) -> None:
    report(capsys, "train", *good, "parallel.tensor=3")
    assert called == []
    assert cli.main(["train", *good, "run.seed=7"]) == 0
    ((name, config),) = called
    assert (name, config.run.seed) == ("train", 7)


def launch(monkeypatch: pytest.MonkeyPatch, rank: str, local_rank: str, world: str = "6") -> None:
    """Stands for torchrun."""
    rendezvous = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, **rendezvous}.items():
        monkeypatch.setenv(name, value)


def test_one_process_a_node_reports(
    good: list[str],
    called: list[tuple[str, Config]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reported(rank: str, local_rank: str) -> list[str]:
        launch(monkeypatch, rank, local_rank)
        return report(capsys, "train", *good, "parallel.tensor=4")

    waited: list[float] = []
    monkeypatch.setattr("megatron_tempo.cli.time.sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    first = reported("0", "0")
    assert first[0] == "1 problem in the configuration:"
    assert first[1].startswith("parallel.world_size=6: is not a multiple of")
    assert reported("3", "0") == ["node7: " + first[0], first[1]]
    assert waited == []
    assert reported("5", "2") == []
    assert waited == [cli.REPORT_SECONDS], "torchrun would end the rank that reports"
    assert called == []


def test_an_error_of_the_job_names_its_node(
    good: list[str],
    called: list[tuple[str, Config]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: Config) -> None:
        raise InputError("no such row")

    monkeypatch.setattr(sys.modules["megatron_tempo.training.jobs"], "train", fail)
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    assert report(capsys, "train", *good) == ["error: no such row"]
    launch(monkeypatch, "3", "0", "4")
    assert report(capsys, "train", *good) == ["node7: error: no such row"]


def test_a_run_that_was_told_to_stop_has_a_status_of_its_own(
    good: list[str],
    called: list[tuple[str, Config]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(config: Config) -> None:
        raise Stopped("stopped after 3 iterations")

    monkeypatch.setattr(sys.modules["megatron_tempo.training.jobs"], "train", stop)
    assert cli.main(["train", *good]) == cli.STOPPED == 75
    assert capsys.readouterr().out == "stopped after 3 iterations\n"
    launch(monkeypatch, "1", "1", "2")
    assert cli.main(["train", *good]) == 75
    assert capsys.readouterr().out == ""


def test_eval_takes_a_folder_and_files(good: list[str], tmp_path: Path, called: list[tuple[str, Config]]) -> None:
    files = [tmp_path / "labelled.jsonl", tmp_path / "my.held-out.jsonl"]
    write_rows(files[1])
    change = "evaluation.sets.labelled.verifier=countdown"
    data = [f"data={file}" for file in files]
    assert cli.main(["eval", change, f"model={tmp_path / 'model'}", *data, "evaluation.samples=32"]) == 0
    ((name, config),) = called
    assert (name, config.model.path, config.evaluation.samples) == ("evaluate", str(tmp_path / "model"), 32)
    sets = config.evaluation.sets
    assert {key: (s.path, s.prompt_field, s.answer_field) for key, s in sets.items()} == {
        "labelled": (str(files[0]), "prompt", "answer"),
        "my_held_out": (str(files[1]), "prompt", "answer"),
    }
    assert [s.verifier.name for s in sets.values() if s.verifier] == ["countdown", "math"]
    assert re.fullmatch(EVAL_DIR + r"/\d{8}-\d{6}-\d+", config.run.dir)


ROW = '{"prompt": "1 + 1", "answer": "2", "gold": "2", "kind": "math", "id": "a"}\n'


def test_files_of_equal_names_are_sets_of_their_own(
    good: list[str], tmp_path: Path, called: list[tuple[str, Config]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("gsm8k/test.jsonl", "math/test.jsonl", "x/math/test.jsonl", "a-b.jsonl", "a_b.jsonl", "24game.jsonl")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(ROW)
    model = f"model={tmp_path / 'model'}"
    assert cli.main(["eval", model, *(f"data={tmp_path / name}" for name in names)]) == 0
    sets = called[0][1].evaluation.sets
    assert sorted(s.path for s in sets.values()) == sorted(str(tmp_path / name) for name in names)
    by_path = {str(Path(s.path).relative_to(tmp_path)): name for name, s in sets.items()}
    assert by_path["gsm8k/test.jsonl"] == "gsm8k_test"
    assert by_path["24game.jsonl"] == "set_24game"
    assert (by_path["a-b.jsonl"], by_path["a_b.jsonl"]) == ("a_b", "a_b_2")
    assert all(s.verifier is not None and s.verifier.name == "math" for s in sets.values())
    # the names are told, and an override takes them
    change = "evaluation.sets.gsm8k_test.verifier=choice"
    two = [f"data={tmp_path / name}" for name in names[:2]]
    assert cli.main(["eval", model, change, *two]) == 0
    verifiers = {name: s.verifier.name for name, s in called[1][1].evaluation.sets.items() if s.verifier}
    assert verifiers == {"gsm8k_test": "choice", "math_test": "math"}
    (line,) = report(capsys, "eval", model, two[0], two[0])[1:]
    assert line == f"{two[0]}: is given twice; fix: give each file once"
    (tmp_path / "other").mkdir()
    for folder in (".", "other"):
        (tmp_path / folder / "math500.jsonl").write_text(ROW)
    twice = [f"data={tmp_path}/math500.jsonl", f"data={tmp_path}/other/math500.jsonl"]
    assert any(
        "is the benchmark math500, as" in line for line in report(capsys, "eval", model, *twice, "benchmark=math500")
    )


def test_a_list_of_files_is_a_set_for_each(
    good: list[str], tmp_path: Path, called: list[tuple[str, Config]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a.jsonl", "b c, d.jsonl", "数学.jsonl")
    for name in names:
        (tmp_path / name).write_text(ROW)
    model = f"model={tmp_path / 'model'}"
    listed = ",".join(f"'{tmp_path / name}'" for name in names)
    assert cli.main(["eval", model, f"data=[{listed}]", "evaluation.sets.a.verifier=choice"]) == 0
    sets = called[0][1].evaluation.sets
    assert {s.path for s in sets.values()} == {str(tmp_path / name) for name in names}
    assert sets["a"].verifier is not None
    assert sets["a"].verifier.name == "choice"
    first = tmp_path / "a.jsonl"
    assert cli.main(["eval", model, f"data=[{first}]"]) == 0
    # one that is not there, a file twice, and what is no list of files
    assert any("data=b: names neither" in line for line in report(capsys, "eval", model, f"data=[{first},b]"))
    assert any("is given twice" in line for line in report(capsys, "eval", model, f"data=[{first},{first}]"))
    for word, fix in {
        "data=[]": "is a list, not one name or path; fix: data=NAME",
        "data=[[a.jsonl]]": "is a list, not one name or path; fix: data=NAME",
        f"data={{x: {first}}}": f"is a mapping, not a file; fix: evaluation.sets.x.path={first}",
        f"data={first},b.jsonl": f"sweeps over several values are not supported; fix: data=[{first},b.jsonl]",
    }.items():
        assert f"{word}: {fix}" in report(capsys, "eval", model, word)
    # a file whose name has a comma, and words without a key
    odd = first.with_name("h,1.jsonl")
    odd.write_bytes(first.read_bytes())
    fix = f"sweeps over several values are not supported; fix: 'data=\"{odd}\"'"
    assert f"data={odd}: {fix}" in report(capsys, "eval", model, f"data={odd}")
    for word, fix in {str(first): f"data={first}", str(odd.parent): f"model={odd.parent}"}.items():
        assert f"{word}=: cannot be read; fix: {fix}" in report(capsys, "eval", word)
    assert "quickstart=: cannot be read; fix: experiment=quickstart" in report(capsys, "check", "quickstart")
    for word in (5000 * "x", "data=" + 5000 * "x" + ",y", "~a." + 300 * "[", "a\0b"):
        assert any("fix: " in line for line in report(capsys, "eval", word))


@pytest.mark.parametrize("command", ["train", "eval"])
def test_every_row_is_checked_before_the_slow_imports(
    command: str, good: list[str], tmp_path: Path, called: list[tuple[str, Config]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ROW] * 3 + ['{"prompt": "1 + 1", "answer": true, "id": "b"}\n', "[]\n"]
    for name in ("labelled", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    words = good if command == "train" else [f"model={tmp_path / 'model'}", f"data={tmp_path / 'heldout.jsonl'}"]
    before = set(tmp_path.iterdir())
    lines = report(capsys, command, *words)
    assert called == []
    assert "heldout.jsonl:4: field 'answer' is True (bool); an answer is text or a number" in lines
    assert "heldout.jsonl:5: a JSON array, not an object; write one {...} a line" in lines
    assert any(line.startswith("labelled.jsonl:4:") for line in lines) == (command == "train")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("what", ["nothing", "a model", "a broken heartbeat", "no records"])
@pytest.mark.parametrize("words", [["status"], ["report"], ["report", "TMP/run", "--out", "TMP/page.html"]])
def test_a_folder_of_no_run_is_refused_and_nothing_written(
    what: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    contents = {
        "a model": ("config.json", '{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}'),
        "a broken heartbeat": ("heartbeat.json", "{}"),
        "no records": ("metrics.jsonl", ""),
    }
    if what in contents:
        (folder / contents[what][0]).write_text(contents[what][1])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    given = [word.replace("TMP", str(tmp_path)) for word in words]
    assert report(capsys, *given[:1], str(folder), *given[1:])[0].startswith(
        f"error: {folder} is not the folder of a run"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_eval_offers_what_an_export_was_trained_with(
    good: list[str], tmp_path: Path, called: list[tuple[str, Config]]
) -> None:
    model, data = tmp_path / "model", f"data={tmp_path / 'labelled.jsonl'}"
    for name in ("labelled", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(ROW)
    run = Config()
    run.data.labelled = DatasetConfig(path="train.jsonl", answer_field="gold", verifier=Verifier.countdown)
    run.data.labelled.chat_template, run.data.labelled.suffix = False, " ="
    run.rollout.max_response_tokens, run.rollout.max_prompt_tokens = 48, 32
    own = DatasetConfig(path=str(tmp_path / "heldout.jsonl"), answer_field="gold", verifier=Verifier.choice)
    run.evaluation.sets["mine"] = own
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(shape | {ENTRY: trained_with(run)}))
    base = ["eval", f"model={model}"]
    assert cli.main([*base, data]) == 0
    config = called[-1][1]
    offered = config.evaluation.sets["labelled"]
    assert (offered.verifier, offered.chat_template, offered.suffix) == (Verifier.countdown, False, " =")
    assert offered.answer_field == "answer", "the columns of another file are not those of the training set"
    assert (config.rollout.max_response_tokens, config.rollout.max_prompt_tokens) == (48, 32)
    # the run's own set has its own settings, columns included
    assert cli.main([*base, f"data={tmp_path / 'heldout.jsonl'}"]) == 0
    known = called[-1][1].evaluation.sets["heldout"]
    assert (known.verifier, known.answer_field, known.chat_template) == (Verifier.choice, "gold", True)
    # what the command line says goes before
    changes = ["evaluation.sets.labelled.verifier=math", "rollout.max_response_tokens=16384"]
    assert cli.main([*base, data, *changes]) == 0
    config = called[-1][1]
    assert config.evaluation.sets["labelled"].verifier is Verifier.math
    assert config.evaluation.sets["labelled"].suffix == " ="
    assert (config.rollout.max_response_tokens, config.rollout.max_prompt_tokens) == (16384, 32)
    column = ["evaluation.sets.labelled.verifier_field=kind"]
    assert cli.main([*base, data, *column]) == 0
    assert called[-1][1].evaluation.sets["labelled"].verifier is None
    # neither is a benchmark's form replaced
    (tmp_path / "math500.jsonl").write_text(ROW)
    assert cli.main([*base, f"data={tmp_path / 'math500.jsonl'}", "benchmark=math500"]) == 0
    assert called[-1][1].evaluation.sets["math500"].suffix == BENCHMARKS["math500"].suffix


@pytest.mark.parametrize("entry", [3, [], {"asked": 3, "sets": [1], "max_response_tokens": "x"}, {"sets": {"a": 1}}])
def test_an_entry_of_another_shape_is_left_alone(
    good: list[str], tmp_path: Path, called: list[tuple[str, Config]], entry: object
) -> None:
    model = tmp_path / "model"
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(shape | {ENTRY: entry}))
    assert cli.main(["eval", f"model={model}", f"data={tmp_path / 'labelled.jsonl'}"]) == 0
    assert called[0][1].evaluation.sets["labelled"].verifier is Verifier.math


def test_eval_on_benchmarks(good: list[str], tmp_path: Path, called: list[tuple[str, Config]]) -> None:
    """A file with a benchmark's name is the benchmark's where that is chosen; others are as without it."""
    for name in ("math500", "bbh", "gpqa_diamond"):
        row = {"id": "1", "prompt": "P", "answer": "A", "verifier": "math"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    data = [f"data={tmp_path}/{name}.jsonl" for name in ("math500", "bbh", "gpqa_diamond")]
    assert cli.main(["eval", *data, "benchmark=[bbh, math500]", f"model={tmp_path / 'model'}"]) == 0
    assert cli.main(["eval", *data[:1], "benchmark=math500", f"model={tmp_path / 'model'}"]) == 0
    sets = called[0][1].evaluation.sets
    assert sets["math500"] == called[1][1].evaluation.sets["math500"]
    asked = {name: (s.path, s.verifier and s.verifier.name, s.verifier_field, s.suffix) for name, s in sets.items()}
    suffixes = {name: BENCHMARKS[name].suffix for name in ("math500", "bbh")}
    assert asked == {
        "math500": (f"{tmp_path}/math500.jsonl", "math", None, suffixes["math500"]),
        "bbh": (f"{tmp_path}/bbh.jsonl", None, "verifier", suffixes["bbh"]),
        "gpqa_diamond": (f"{tmp_path}/gpqa_diamond.jsonl", "math", None, ""),
    }
    assert "\\boxed{}" in suffixes["math500"]


def test_eval_on_no_such_benchmark(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = report(capsys, "eval", *good, "benchmark=[math500,bbq]")[1:]
    assert line == "benchmark=[math500,bbq]: there is no benchmark bbq; fix: did you mean bbh?"
    (line,) = report(capsys, "eval", *good, "benchmark=dapo_math_17k")[1:]  # to train on, not to measure by
    assert line.startswith("benchmark=dapo_math_17k: there is no preset of this name")
    (line,) = report(capsys, "check", *good, "benchmark=math500")[1:]
    assert line.startswith("evaluation.sets.math500.path=???: has no value; fix: give evaluation.sets.math500.path=")


def test_eval_writes_into_no_other_run(
    good: list[str], called: list[tuple[str, Config]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([time.struct_time((2026, 1, 2, 3, 4, second, 4, 2, 0)) for second in range(5, 8)])
    strftime = time.strftime
    monkeypatch.setattr(time, "strftime", lambda text: strftime(text, next(times)))
    model, data = f"model={tmp_path / 'model'}", f"data={tmp_path / 'heldout.jsonl'}"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nrun: {dir: runs/mine}\n")
    arguments = ["eval", "--config-dir", str(tmp_path), "experiment=mine", model, data]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "run.dir=elsewhere"]) == 0
    fresh = [f"runs/eval/20260102-03040{second}-{os.getpid()}" for second in (5, 6)]
    assert [config.run.dir for _, config in called] == [*fresh, "elsewhere"]


def test_eval_reports_all_that_is_wrong_at_once(
    good: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without torch: a name that is no model, a file that is none, a column that is not there, a folder in use."""
    used = tmp_path / "used"
    used.mkdir()
    (used / "config.json").write_text("{}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n" + json.dumps({"question": "1+1", "answers": "2"}) + "\n")
    words = ["model=nomodel", "data=table.csv", "data=absent.jsonl", f"data={rows}", f"run.dir={used}"]
    lines = report(capsys, "eval", *words, "evaluation.samples=0", "evaluation.pass_k=[]")
    assert [line.partition("=")[0] for line in lines[1:]] == [
        *("data", "model", "run.dir", "evaluation.samples", "evaluation.sets.absent.path"),
        *("evaluation.sets.rows.prompt_field", "evaluation.sets.rows.answer_field"),
    ]
    assert "must end in .jsonl or .parquet; fix: convert it: megatron-tempo prepare custom FILE" in lines[1]
    assert "fix: an existing folder" in lines[2]
    assert "belongs to another job: it has config.json; fix: give a folder of its own" in lines[3]
    assert lines[-1].endswith("fix: did you mean answers?")


@pytest.mark.parametrize("row", ["", "[1]", "{", "\x00", "[" * 100_000, '"' + "a" * 10_000])
def test_a_first_row_that_cannot_be_read_is_left_to_the_loader(good: list[str], tmp_path: Path, row: str) -> None:
    (tmp_path / "odd.jsonl").write_text(row)
    build([f"model={tmp_path / 'model'}", f"data={tmp_path / 'odd.jsonl'}"], purpose=Purpose.eval)


def test_eval_without_anything(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys, "eval")
    assert [line.partition("=")[0] for line in lines[1:]] == ["model.path", "evaluation.sets"]


@pytest.mark.parametrize("arguments", [[], ["tain"], ["check", "--verbose"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_check_loads_no_torch_and_takes_a_moment(good: list[str]) -> None:
    code = (
        "import sys; from megatron_tempo.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'megatron.core', 'transformers', 'numpy'} & set(sys.modules);"
        "print(sorted(heavy)); sys.exit(status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, "check", *good], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith("ok\n")
    assert done.stdout.endswith("[]\n")
    # Processor time: what other work on the machine adds to the wall time is not what is measured.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 8


def test_check_as_a_program(good: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_tempo", "check", *good, "parallel.tensor=3", "+typo=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split("=")[0].strip() for line in done.stderr.splitlines()[1:]] == ["typo", "parallel.tensor"]


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build", interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli.main(["check"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "again: at once"
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


INTERRUPTED = """
import os, signal, sys
from megatron_tempo import __main__

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "megatron_tempo.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
__main__.main()
"""


def test_ctrl_c_during_the_imports_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_file_that_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/data/l.jsonl")

    monkeypatch.setattr(cli, "build", unreadable)
    assert cli.main(["check"]) == 2
    assert capsys.readouterr().err == "error: /data/l.jsonl: Permission denied\n"
