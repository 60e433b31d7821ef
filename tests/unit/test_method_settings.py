"""The settings of a stage that belong to its method, of built-in methods and of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.config import check, resume
from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel
from megatron_tempo.config.method_settings import (
    SETTINGS,
    Baseline,
    EmpoSettings,
    GrpoSettings,
    Method,
    MethodSettings,
    PpoSettings,
    TempoSettings,
    TtrlSettings,
    ValueTiming,
)
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.stages import ExtensionSettings, StageConfig
from megatron_tempo.config.tree import differences, field_paths, load, read, save
from megatron_tempo.errors import InputError
from tests.unit.config_files import configure, good_overrides, write_all

FIELDS = {
    Method.ppo: {"baseline", "gae_lambda", "pass_at_k"},
    Method.tempo: {
        *("baseline", "gae_lambda", "pass_at_k", "value_timing", "estep_every", "estep_when_ece_above"),
        *("pessimism", "actor_on_labelled"),
    },
    Method.ttrl: {"group_std", "vote_responses"},
    Method.ttrl_guard: {
        *("group_std", "vote_responses", "flip_window", "flip_threshold", "agreement_threshold", "flip_penalty"),
        *("confident_penalty", "least_weight", "minority_weight", "minority_share", "calm_visits", "risk_threshold"),
        *("skip_probability", "skipped_share"),
    },
    Method.scrl: {
        *("group_std", "vote_responses", "positive_share", "positive_margin", "negative_share", "entropy_penalty"),
    },
    Method.empo: {"group_std", "entropy_low", "entropy_high"},
    Method.grpo: {"group_std"},
    Method.intuitor: {"group_std"},
    Method.entropy_min: set(),
}
VALUES = {
    "baseline": "paper",
    "gae_lambda": 0.9,
    "pass_at_k": 4,
    "value_timing": "before_estep",
    "estep_every": 3,
    "estep_when_ece_above": 0.05,
    "pessimism": 1.5,
    "actor_on_labelled": True,
    "group_std": False,
    "vote_responses": 16,
    "flip_window": 4,
    "flip_threshold": 0.5,
    "agreement_threshold": 0.7,
    "flip_penalty": 0.4,
    "confident_penalty": 0.2,
    "least_weight": 0.2,
    "minority_weight": 0.2,
    "minority_share": 0.125,
    "calm_visits": 2,
    "risk_threshold": 0.7,
    "skip_probability": 0.5,
    "skipped_share": 0.5,
    "positive_share": 0.5,
    "positive_margin": 0.25,
    "negative_share": 0.2,
    "entropy_penalty": 0.05,
    "entropy_low": 0.5,
    "entropy_high": 1.5,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_all(folder)
    return folder


def test_every_method_has_its_settings() -> None:
    assert {method: set(kind.__dataclass_fields__) for method, kind in SETTINGS.items()} == FIELDS
    assert set().union(*FIELDS.values()) == set(VALUES)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("name", list(VALUES))
def test_a_setting_is_of_its_methods_alone(method: Method, name: str) -> None:
    config, problems = read({"stage1": {"method": method.name, name: VALUES[name]}})
    assert config.stage1.method is method
    if name in FIELDS[method]:
        assert problems == []
        assert to_plain(config.stage1)[name] == VALUES[name]
        assert to_plain(config.stage1.settings)[name] == VALUES[name]
    else:
        (problem,) = problems
        assert (problem.field, problem.value) == (f"stage1.{name}", VALUES[name])
        assert problem.wrong == f"method {method.name} does not use it"
        users = " or ".join(user.name for user in Method if name in FIELDS[user])
        assert problem.fix == f"remove it (~stage1.{name} where a preset gives it), or stage1.method={users}"
        assert config.stage1.settings == SETTINGS[method]()
    with pytest.raises(AttributeError):
        setattr(StageConfig(), name, VALUES[name])


def test_a_default_of_another_method_cannot_be_given_either() -> None:
    _, problems = read({"stage1": {"estep_every": 1}, "stage2": {"method": "grpo", "estep_every": 1}})
    assert [problem.field for problem in problems] == ["stage1.estep_every", "stage2.estep_every"]


def test_all_problems_of_a_stage_at_once() -> None:
    stage = {"method": "ttrl", "vote_responses": "x", "baseline": 3, "iteratons": 3, "group_sd": True, "iterations": []}
    _, problems = read({"stage2": stage})
    fixes = {problem.field: problem.fix for problem in problems}
    assert set(fixes) == {f"stage2.{name}" for name in stage if name != "method"}
    assert fixes["stage2.iteratons"] == "did you mean stage2.iterations?"
    assert fixes["stage2.group_sd"] == "did you mean stage2.group_std?"


def test_under_an_unknown_method_its_settings_are_not_problems_too() -> None:
    _, (problem,) = read({"stage2": {"method": "grpoo", "estep_every": 3}})
    assert (problem.field, problem.fix) == ("stage2.method", "did you mean grpo?")
    _, (_, problem) = read({"stage2": {"method": "grpoo", "estep_evry": 3}})
    assert problem.fix == "did you mean stage2.estep_every?"


def test_the_trainers_questions_have_an_answer_for_every_method() -> None:
    assert [StageConfig(kind()).samples for kind in SETTINGS.values()] == [8] * len(Method)
    assert StageConfig(TtrlSettings(vote_responses=32)).samples == 32
    assert [kind().baseline for kind in SETTINGS.values()] == [Baseline.before_token] * len(Method)
    assert PpoSettings(Baseline.paper).baseline is Baseline.paper
    assert not StageConfig(TempoSettings(estep_every=0)).trains_critic
    assert [StageConfig(TempoSettings(estep_every=3)).critic_learns(i) for i in range(4)] == [True, False, False, True]
    with pytest.raises(AssertionError, match="the settings of grpo are GrpoSettings"):
        StageConfig(GrpoSettings()).settings_as(EmpoSettings)


def test_another_method_has_its_own_defaults() -> None:
    stage = StageConfig(TempoSettings(estep_every=3), iterations=5)
    stage.method = Method.grpo
    assert stage == StageConfig(GrpoSettings(), iterations=5)


def test_the_paths_of_all_fields() -> None:
    paths = list(field_paths())
    assert {f"stage2.{name}" for name in ("method", *VALUES)} <= set(paths)
    assert not any("settings" in path for path in paths)
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("method", list(Method))
def test_config_json_has_the_settings_among_the_fields_of_a_stage(method: Method, tmp_path: Path) -> None:
    given = {name: VALUES[name] for name in FIELDS[method]}
    config, problems = read({"stage1": {"method": method.name, **given}})
    assert problems == []
    save(config, tmp_path / "config.json")
    plain = json.loads((tmp_path / "config.json").read_text())["stage1"]
    assert {name: plain[name] for name in ("method", *given)} == {"method": method.name, **given}
    assert not set(VALUES) & set(plain) - FIELDS[method]
    assert load(tmp_path / "config.json") == config
    assert differences(load(tmp_path / "config.json"), config) == []


def test_a_config_json_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has the settings of all methods in each stage."""
    config = Config(stage2=StageConfig(TempoSettings(estep_every=3)))
    plain = to_plain(config)
    every = {name: value for kind in SETTINGS.values() for name, value in to_plain(kind()).items()}
    for stage in ("stage1", "stage2"):
        plain[stage] = every | plain[stage]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert load(tmp_path / "config.json") == config
    plain["stage1"]["vote_responses"] = 8
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(InputError, match=r"this one does not know stage1\.vote_responses=8"):
        load(tmp_path / "config.json")


def test_the_importance_cap_of_an_earlier_version_is_a_correction_of_tokens(tmp_path: Path) -> None:
    """In the recorded configuration of a run, from which it resumes, and in a file for `--config`."""
    config = Config()
    config.stage1.actor.correction = CorrectionConfig(CorrectionLevel.token, high=1.5)
    plain = to_plain(config)
    for stage, cap in (("stage1", 1.5), ("stage2", None)):
        del plain[stage]["actor"]["correction"]
        plain[stage]["actor"]["importance_cap"] = cap
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert load(path) == config
    config.run.dir = str(tmp_path)
    assert resume.problem(config) is None
    config.stage1.actor.correction.high = 2.0
    problem = resume.problem(config)
    assert problem is not None
    assert "stage1.actor.correction.high: 1.5 -> 2.0" in problem.wrong
    assert composed(whole=path)[0].stage1.actor.correction.high == 1.5


def composed(*words: str, whole: Path | None = None) -> tuple[Config, list[Problem]]:
    plain, problems = cli.compose_tree(words, cli.Purpose.train, None, None if whole is None else str(whole))
    assert problems == []
    return read(plain)


def test_an_override_of_the_method_leaves_no_settings_of_the_default_one(tmp_path: Path) -> None:
    config, problems = composed("stage2.method=empo", "stage2.entropy_low=0.1", "stage1.method=grpo")
    assert problems == []
    assert (config.stage1.settings, config.stage2.settings) == (GrpoSettings(), EmpoSettings(entropy_low=0.1))
    save(config, tmp_path / "config.json")
    changed, problems = composed("stage1.method=tempo", "stage1.estep_every=2", whole=tmp_path / "config.json")
    assert problems == []
    assert changed.stage1.settings == TempoSettings(estep_every=2)
    assert changed.stage2 == config.stage2


def test_a_setting_of_a_preset_is_removed_as_the_fix_says() -> None:
    config, problems = composed("algorithm=reference", "stage2.method=ppo")
    assert [problem.field for problem in problems] == ["stage2.value_timing", "stage2.actor_on_labelled"]
    removed = ("~stage2.value_timing", "~stage2.actor_on_labelled")
    config, problems = composed("algorithm=reference", "stage2.method=ppo", *removed)
    assert problems == []
    assert config.stage2.settings == PpoSettings(Baseline.reference)
    config, problems = composed("algorithm=reference")
    assert problems == []
    assert config.stage2.settings == TempoSettings(
        baseline=Baseline.reference, value_timing=ValueTiming.before_estep, actor_on_labelled=True
    )


# A method of the user's own

METHOD = """
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar
from megatron_tempo.config.method_settings import Baseline, MethodSettings, Needs, Prompts
class Kind(Enum):
    hard = "hard"
    soft = "soft"
@dataclass(slots=True)
class Own(MethodSettings):
    note: ClassVar[Path] = Path("no setting")
    kind: Kind = Kind.hard
    weight: float | None = None
    sizes: list[int] = field(default_factory=list)
    estep_every: int = 2
    def __post_init__(self):
        if self.weight == 3:
            raise ValueError("weight=3 is unlucky")
class M:
    needs = Needs(actor=Prompts.unlabelled, critic=Prompts.labelled)
    settings = Own
    def iterate(self, learner, rollouts, stage, iteration):
        return {"weight": stage.settings_as(Own).weight}
method = M()
"""
NAME = "import:mine:method"


def write(folder: Path, text: str) -> None:
    (folder / "mine.py").write_text(text)


def problems_of(files: Path, *changes: str) -> list[Problem]:
    words = [*good_overrides(files), f"stage2.method={NAME}", *changes]
    return check(configure(words), world_size=None)


def test_a_users_method_has_settings_of_its_own(files: Path, modules: Path) -> None:
    write(modules, METHOD)
    given = {"kind": "soft", "weight": 2, "sizes": [1, 2]}
    config, problems = read({"stage2": {"method": NAME, **given, "iterations": 4}})
    assert problems == []
    assert config.stage2.iterations == 4
    assert isinstance(config.stage2.settings, ExtensionSettings)
    assert to_plain(config.stage2)["sizes"] == [1, 2]
    own = config.stage2.method_settings
    assert (own.kind.name, own.weight, own.sizes) == ("soft", 2.0, [1, 2])  # type: ignore[attr-defined]
    assert [config.stage2.critic_learns(i) for i in range(3)] == [True, False, True], "its own estep_every"
    assert config.stage2.samples == 8
    assert problems_of(files, "stage2.kind=soft", "stage2.weight=2") == []


def test_a_method_without_settings_has_none(files: Path, modules: Path) -> None:
    write(modules, METHOD.replace("    settings = Own\n", ""))
    assert problems_of(files) == []
    (problem,) = problems_of(files, "stage2.estep_every=1")
    assert (problem.field, problem.wrong) == ("stage2.estep_every", "there is no such field")


def test_what_is_wrong_with_the_settings_is_in_the_report(files: Path, modules: Path) -> None:
    write(modules, METHOD)
    report = problems_of(
        files, "stage2.kind=softt", "stage2.weight=much", "stage2.wieght=1", "stage2.iteratons=2", "run.seed=-1"
    )
    by_field = {problem.field: (problem.wrong, problem.fix) for problem in report}
    assert by_field["stage2.kind"] == ("must be one of hard, soft", "did you mean soft?")
    assert by_field["stage2.weight"][0] == "must be a number"
    assert by_field["stage2.wieght"] == ("there is no such field", "did you mean stage2.weight?")
    assert by_field["stage2.iteratons"][1] == "did you mean stage2.iterations?"
    assert "run.seed" in by_field
    (problem,) = problems_of(files, "stage2.weight=3")
    assert (problem.field, problem.wrong) == ("stage2.method", "rejects its settings: weight=3 is unlucky")


DECLARED = {
    "no class": (METHOD.replace("settings = Own", "settings = 3"), "its attribute settings is 3 (int)", "a dataclass"),
    "another class": (METHOD.replace("(MethodSettings)", ""), "its attribute settings is <class", "MethodSettings"),
    "no dataclass": (METHOD.replace("@dataclass(slots=True)", ""), "settings Own are no dataclass", "@dataclass"),
    "no default": (METHOD.replace("kind: Kind = Kind.hard", "kind: Kind"), "Own.kind has no default", "default"),
    "no default of a question": (METHOD.replace("estep_every: int = 2", "estep_every: int"), "has no default", "def"),
    "a stage's field": (METHOD.replace("weight:", "iterations:"), "Own.iterations is a field of every stage", "name"),
    "a path": (METHOD.replace("float | None = None", "Path = Path()"), "Own.weight has the type <class", "use bool"),
    "a choice of two": (METHOD.replace("float | None", "float | str"), "Own.weight has the type float | str", "use"),
    "no type": (METHOD.replace("float | None", "None"), "Own.weight has the type <class 'NoneType'>", "use bool"),
    "a list of lists": (METHOD.replace("list[int]", "list[list[int]]"), "has the type list[list[int]]", "use bool"),
    "an error": (METHOD.replace("self.weight == 3", "self.weight > 3"), "raised TypeError: '>' not supported", "corr"),
    "an unknown type": (METHOD.replace("float | None", "'Nothing'"), "name 'Nothing' is not defined", "use bool"),
}


@pytest.mark.parametrize("case", list(DECLARED))
def test_settings_of_another_form_are_a_problem_of_the_method(files: Path, modules: Path, case: str) -> None:
    text, wrong, fix = DECLARED[case]
    assert text != METHOD
    write(modules, text)
    (problem,) = problems_of(files)
    assert (problem.field, problem.value) == ("stage2.method", NAME)
    assert wrong in problem.wrong
    assert fix in problem.fix


def test_settings_that_were_not_checked_end_with_the_same_words(modules: Path) -> None:
    write(modules, METHOD)
    stage = StageConfig(ExtensionSettings(read({"stage2": {"method": NAME}})[0].stage2.method, {"wieght": 1}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wieght=1: there is no such field"):
        stage.method_settings  # noqa: B018
    assert isinstance(StageConfig(GrpoSettings()).method_settings, MethodSettings)


def test_the_example_declares_a_setting(files: Path, modules: Path) -> None:
    method = ["stage2.method=import:leave_one_out:method", "stage2.unlabelled_prompts=0"]
    assert problems_of(files, *method, "stage2.advantage_limit=0.5") == []
    (problem,) = problems_of(files, *method, "stage2.advantage_limit=-1")
    assert problem.wrong == "rejects its settings: advantage_limit is -1.0, and must be above 0"
