"""Plain data to the typed tree and back; what cannot be read is told, all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_tempo.config import Config, load, save
from megatron_tempo.config.choices import Device, RouterReplay
from megatron_tempo.config.earlier import RENAMED
from megatron_tempo.config.method_settings import PpoSettings
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import to_plain
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.config.tree import field_paths, read, walk
from megatron_tempo.errors import InputError
from tests.unit.config_files import configure


def changed() -> Config:
    return configure(
        [
            "run.dir=somewhere",
            "run.device=cuda",
            "data.labelled.path=a.jsonl",
            "data.labelled.limit=3",
            "stage1.actor.optimizer.lr=2",
            "stage2.method=ppo",
            "stage1.actor.dual_clip=3.5",
            "evaluation.pass_k=[1,4]",
            "evaluation.sets.b={path: b.parquet, verifier: countdown}",
        ]
    )


def test_round_trip(tmp_path: Path) -> None:
    config = changed()
    save(config, tmp_path / "config.json")
    again = load(tmp_path / "config.json")
    assert again == config
    assert again.run.device is Device.cuda
    assert type(again.stage1.actor.optimizer.lr) is float
    assert again.evaluation.sets["b"].path == "b.parquet"


def test_save_overwrites_nothing(tmp_path: Path) -> None:
    save(Config(), tmp_path / "config.json")
    with pytest.raises(FileExistsError):
        save(Config(), tmp_path / "config.json")


def test_absent_fields_keep_the_defaults_of_their_place() -> None:
    config, problems = read({"stage1": {"iterations": 3}})
    assert problems == []
    assert config.stage1 == StageConfig(PpoSettings(), iterations=3)
    assert config.stage2.unlabelled_prompts == Config().stage2.unlabelled_prompts


def test_load_names_what_it_does_not_know(tmp_path: Path) -> None:
    plain = to_plain(Config())
    plain["stage2"]["method"] = "alchemy"
    plain["run"]["sed"] = 3
    file = tmp_path / "config.json"
    file.write_text(json.dumps(plain))
    with pytest.raises(InputError) as caught:
        load(file)
    assert str(caught.value) == (
        f"{file} was written by another version of the program, or changed by hand: this one does not know run.sed=3, "
        "stage2.method=alchemy; use the version that wrote it"
    )
    file.write_text(json.dumps(plain)[:-9])
    with pytest.raises(InputError, match=r"config\.json .*write it again, or bring back a whole copy"):
        load(file)


# plain data, field, a part of what is wrong, a part of the fix
UNREADABLE = [
    ({"typo": 1}, "typo", "no such field", "one of run, model"),
    ({"parallel": {"tensr": 2}}, "parallel.tensr", "no such field", "parallel.tensor?"),
    ({"paralel": {"tensor": 2}}, "paralel.tensor", "no such field", "parallel.tensor?"),
    ({"stage2": {"lr": 2}}, "stage2.lr", "no such field", "did you mean stage2.actor.optimizer.lr"),
    ({"data": {"labelled": {"verifer": 1}}}, "data.labelled.verifer", "no such field", "data.labelled.verifier or"),
    ({"evaluation": {"sets": {"a": {"pth": 1}}}}, "evaluation.sets.a.pth", "no such field", "evaluation.sets.a.path?"),
    ({"data": {"unlabelled": {"answer": 1}}}, "data.unlabelled.answer", "no such field", "answer_field?"),
    ({"run": 3}, "run", "group of fields", "run.dir"),
    ({"data": {"labelled": "a.jsonl"}}, "data.labelled", "group of fields", "data.labelled.path"),
    ({"evaluation": {"sets": "a.jsonl"}}, "evaluation.sets", "named entries", "evaluation.sets.NAME"),
    ({"evaluation": {"pass_k": 8}}, "evaluation.pass_k", "list", "evaluation.pass_k=[8]"),
    ({"evaluation": {"pass_k": ["x"]}}, "evaluation.pass_k[0]", "whole number", "for example"),
    ({"run": {"device": "gpu"}}, "run.device", "auto, cpu, cuda", "cpu"),
    ({"stage2": {"baseline": "papr"}}, "stage2.baseline", "before_token, paper, reference", "did you mean paper?"),
    ({"stage2": {"method": None}}, "stage2.method", "one of ppo, tempo", "tempo"),
    ({"parallel": {"tensor": "two"}}, "parallel.tensor", "whole number", "parallel.tensor=8"),
    ({"parallel": {"tensor": 2.0}}, "parallel.tensor", "whole number", "parallel.tensor=8"),
    ({"parallel": {"tensor": True}}, "parallel.tensor", "whole number", "parallel.tensor=8"),
    ({"rollout": {"temperature": "hot"}}, "rollout.temperature", "a number", "rollout.temperature=0.1"),
    ({"rollout": {"dump": "yes"}}, "rollout.dump", "true or false", "rollout.dump=true"),
    ({"run": {"dir": 7}}, "run.dir", "text", "'run.dir=\"7\"'"),
    ({"run": {"dir": None}}, "run.dir", "text", "run.dir=NAME"),
    ({"stage1": {"iterations": "???"}}, "stage1.iterations", "has no value", "stage1.iterations=VALUE"),
]


@pytest.mark.parametrize(("plain", "field", "wrong", "fix"), UNREADABLE, ids=[row[1] for row in UNREADABLE])
def test_unreadable(plain: dict, field: str, wrong: str, fix: str) -> None:
    config, problems = read(plain)
    (problem,) = problems
    assert problem.field == field
    assert wrong in problem.wrong
    assert fix in problem.fix
    # what cannot be read stays as it was; an entry of an optional or named group comes in without the bad field
    assert config.run == Config().run
    assert config.stage2 == Config().stage2


def test_all_unreadable_fields_are_told_at_once() -> None:
    _, problems = read({"typo": 1, "run": {"sed": 1, "seed": "x"}, "stage1": {"actor": {"optimizer": {"lr": []}}}})
    assert [problem.field for problem in problems] == ["typo", "run.sed", "run.seed", "stage1.actor.optimizer.lr"]


def test_every_leaf_has_a_path() -> None:
    known = set(field_paths())
    for path, node in walk(changed()):
        for name in node.__dataclass_fields__:
            if isinstance(node, StageConfig) and name == "settings":
                continue  # its fields stand among those of the stage, which is their path here
            leaf = re.sub(r"sets\.\w+", "sets.NAME", f"{path}.{name}")
            assert leaf in known or any(other.startswith(f"{leaf.lstrip('.')}.") for other in known)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_field_is_refused_with_its_new_name(old: str, new: str) -> None:
    group, _, name = old.partition(".")
    _, (problem,) = read({group: {name: 2}})
    assert str(problem) == f"{old}=2: is now {new}; fix: {new}=2"
    assert new in field_paths()
    assert old not in field_paths()


@pytest.mark.parametrize(
    ("cap", "fix"),
    [
        (1.5, "stage2.actor.correction.level=token and stage2.actor.correction.high=1.5"),
        (None, "stage2.actor.correction.level=null"),
    ],
)
def test_the_importance_cap_is_refused_with_the_correction_that_replaces_it(cap: float | None, fix: str) -> None:
    _, (problem,) = read({"stage2": {"actor": {"importance_cap": cap}}})
    assert problem == Problem("stage2.actor.importance_cap", cap, "is now stage2.actor.correction", fix)


@pytest.mark.parametrize(
    ("text", "wanted"), [("on", RouterReplay.on), ("off", RouterReplay.off), ("'off'", RouterReplay.off)]
)
def test_on_and_off_without_quotes_are_choices(text: str, wanted: RouterReplay) -> None:
    """YAML reads them as booleans."""
    config, problems = read(yaml.safe_load(f"model: {{router_replay: {text}}}"))
    assert (config.model.router_replay, problems) == (wanted, [])


def test_a_boolean_is_no_other_choice() -> None:
    assert [problem.field for problem in read({"run": {"device": True}})[1]] == ["run.device"]
