"""What may change when a run goes on in its folder, and what is refused."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.config import resume
from megatron_tempo.config.method_settings import Method
from megatron_tempo.config.schema import Config, DatasetConfig, to_plain
from megatron_tempo.config.tree import field_paths, read, save, without_default_settings
from megatron_tempo.errors import InputError
from tests.unit.config_files import good_overrides, write_all

ROOT = Path(__file__).parents[2]


def changed(**fields: object) -> Config:
    plain = to_plain(config_with_set())
    for path, value in fields.items():
        *groups, name = path.split("__")
        node = plain
        for group in groups:
            node = node[group]
        assert name in node
        node[name] = value
    config, problems = read(without_default_settings(plain))
    assert not problems
    return config


def config_with_set() -> Config:
    config = Config()
    config.evaluation.sets = {"aime": DatasetConfig(path="a.jsonl")}
    config.data.labelled = DatasetConfig(path="l.jsonl")
    return config


REFUSED = {
    "run__seed": 1,
    "run__precision": "bf16",
    "model__path": "elsewhere",
    "model__critic_path": "elsewhere",
    "data__held_out": ["aime"],
    "rollout__temperature": 0.5,
    "rollout__max_staleness": 1,
    "rollout__servers__precision": "fp8",
    "rewards__judge__model": "another",
    "stage1__actor__optimizer__lr": 1.0,
    "stage2__method": "ttrl",
    "stage2__critic__warmup_iterations": 3,
    "evaluation__samples": 3,
    "evaluation__sets__aime__path": "b.jsonl",
    "evaluation__sets__aime__verifier": "countdown",
}
ALLOWED = {
    "run__dir": "moved",
    "run__device": "cpu",
    "run__hang_minutes": None,
    "parallel__tensor": 8,
    "parallel__critic": {"tensor": 2},
    "model__layers": "local",
    "stage1__iterations": 9,
    "data__labelled__path": "moved.jsonl",
    "rollout__engine": "vllm",
    "rollout__servers__start_seconds": 1.0,
    "rewards__judge__url": "http://127.0.0.1:1/v1",
    "evaluation__every": 1,
    "checkpoint__keep": 7,
    "metrics__wandb_project": "mine",
    "profile__steps": [1],
    "cluster": {"gpu": "H100"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_makes_another_experiment_is_refused(field: str) -> None:
    message, *others = resume.refused_changes(config_with_set(), changed(**{field: REFUSED[field]}))
    assert not others or field == "stage2__method"  # whose settings come and go with it
    assert message.startswith(f"{field.replace('__', '.')}: ")
    assert resume.fingerprint(config_with_set()) != resume.fingerprint(changed(**{field: REFUSED[field]}))


@pytest.mark.parametrize("field", ALLOWED)
def test_what_is_on_the_list_may_change(field: str) -> None:
    assert resume.refused_changes(config_with_set(), changed(**{field: ALLOWED[field]})) == []
    assert resume.fingerprint(config_with_set()) == resume.fingerprint(changed(**{field: ALLOWED[field]}))


def test_another_name_of_the_same_place_is_no_change(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    one, other = changed(model__path=str(tmp_path / "model")), changed(model__path=f"{tmp_path}/./link")
    assert resume.refused_changes(one, other) == []


def test_every_pattern_names_a_field_and_the_page_shows_them() -> None:
    fields = [*field_paths(), "cluster", "parallel"]
    for patterns, _ in resume.MAY_CHANGE:
        for pattern in patterns:
            assert any(fnmatchcase(field, pattern) for field in fields), pattern
    assert resume.table() in (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")


def write_run(run: Path, config: Config) -> Path:
    run.mkdir(parents=True)
    save(config, run / "config.json")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def test_a_folder_without_training_is_nobodys(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Config())
    (run / "metrics.jsonl").write_text("")
    assert resume.problem(changed(run__dir=str(run), run__seed=1)) is None
    assert resume.problem(changed(run__dir=str(tmp_path / "none"), run__seed=1)) is None


@pytest.mark.parametrize("trace", ["hf_step_00000001", "checkpoints/step_00000001"])
def test_exports_and_checkpoints_are_training_too(tmp_path: Path, trace: str) -> None:
    run = write_run(tmp_path / "run", config_with_set())
    (run / "metrics.jsonl").unlink()
    (run / trace).mkdir(parents=True)
    with pytest.raises(InputError, match=r"its run has another configuration: run\.seed: 0 -> 1; fix: give another"):
        resume.check_run_folder(changed(run__dir=str(run), run__seed=1))
    assert resume.problem(changed(run__dir=str(run), parallel__tensor=2)) is None


BAD = {
    "cut short": ('{"run": {', "config.json is cut short or not JSON"),
    "not UTF-8": (b"\xff\xfe{}", "config.json is cut short or not JSON"),
    "another shape": ("[]", "config.json is not the configuration of a run"),
    "newer": (
        '{"run": {"colour": 3}}',
        "config.json is of another version of this program, which has other fields: run.colour",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_config_that_cannot_be_compared_is_not_the_users_override(tmp_path: Path, kind: str) -> None:
    content, message = BAD[kind]
    run = write_run(tmp_path / "run", config_with_set())
    (run / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    problem = resume.problem(changed(run__dir=str(run)))
    assert problem is not None
    assert message in problem.wrong
    if kind != "newer":  # what the message offers
        (run / "config.json").rename(run / "config.bad")
        step = run / "checkpoints/step_00000001"
        step.mkdir(parents=True)
        (step / "run.json").write_text(json.dumps({"step": 1, "config": to_plain(config_with_set())}))
        assert resume.problem(changed(run__dir=str(run))) is None
        assert resume.problem(changed(run__dir=str(run), run__seed=1)) is not None


@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
def test_a_link_to_what_is_not_mounted(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    if name != "run":
        write_run(run, Config())
        (run / "metrics.jsonl").unlink()
    (tmp_path / name).symlink_to(tmp_path / "unmounted/disk")
    (tmp_path / "files").mkdir()
    write_all(tmp_path / "files")
    overrides = good_overrides(tmp_path / "files")
    assert cli.main(["check", *overrides, f"run.dir={run}"]) == 2
    output = capsys.readouterr().err
    assert str(tmp_path / name) in output
    assert "mount it" in output


def test_check_refuses_it_before_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path)
    overrides = good_overrides(tmp_path)
    config = cli.build(overrides)
    assert config.stage2.method is Method.tempo
    write_run(Path(config.run.dir), config)
    assert cli.main(["check", *overrides]) == 0
    assert cli.main(["check", *overrides, "stage2.actor.clip_low=0.1"]) == 2
    output = capsys.readouterr().err
    assert "stage2.actor.clip_low: 0.0003 -> 0.1; fix: give another run.dir" in output
    assert cli.main(["check", *overrides, "stage2.actor.clip_low=0.1", f"run.dir={tmp_path}/other"]) == 0
