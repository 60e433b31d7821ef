"""User code named as `import:package.module:name`: what is loaded, and what is reported before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tempo.config.extensions import Extension, ExtensionError, load
from megatron_tempo.config.method_settings import Method, Needs, Prompts
from megatron_tempo.config.rules import Purpose
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.stages import StageConfig, load_method, settings_of
from megatron_tempo.config.tree import differences, read, save
from megatron_tempo.config.tree import load as load_config
from megatron_tempo.data.rows import read_rows
from megatron_tempo.errors import InputError
from megatron_tempo.methods import METHODS, iterate_of
from megatron_tempo.methods.learner import Rollouts
from megatron_tempo.plan.split import problems as plan_problems
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers
from tests.unit.config_files import configure, good_overrides, write_all
from tests.unit.extension_modules import assert_refused, problems, write

LABELLED, UNLABELLED, HELDOUT = "data.labelled", "data.unlabelled", "evaluation.sets.heldout"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_all(folder)
    return folder


def named(attribute: str) -> Extension:
    return Extension.parse(f"import:mine:{attribute}")


# Names

MALFORMED = [
    "import:",
    "import:mine",
    "import:mine:",
    "import::x",
    "import:my-module:x",
    "import:mine.x",
    "import:a:b:c",
]


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("field", ["data.labelled.verifier", "stage1.method"])
def test_a_malformed_name_is_a_problem_of_its_field(field: str, name: str) -> None:
    group, key = field.rsplit(".", 1)
    plain: dict[str, Any] = {key: name}
    for part in reversed(group.split(".")):
        plain = {part: plain}
    _, (problem,) = read(plain)
    assert (problem.field, problem.value) == (field, name)
    assert "does not have the form import:package.module:name" in problem.wrong
    assert problem.fix == f"{field}=import:my_package.my_module:name"


def test_a_name_is_kept_as_it_is_in_config_json(tmp_path: Path) -> None:
    """Also where the module cannot be imported: records can be read on another machine."""
    config, unread = read({"stage1": {"method": "import:nowhere.at_all:method"}})
    assert unread == []
    assert isinstance(config.stage1.method, Extension)
    save(config, tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["stage1"]["method"] == "import:nowhere.at_all:method"
    assert type(to_plain(config)["stage1"]["method"]) is str
    again = load_config(tmp_path / "config.json")
    assert again == config
    again.stage1.method = Method.ppo
    assert differences(config, again) == [
        "stage1.method: 'import:nowhere.at_all:method' -> 'ppo'",
        "stage1.baseline: None -> 'before_token'",
        "stage1.gae_lambda: None -> 1.0",
        "stage1.pass_at_k: None -> 1",
    ]


def test_a_built_in_name_is_read_as_before() -> None:
    config, unread = read({"stage1": {"method": "grpo"}})
    assert unread == []
    assert config.stage1.method is Method.grpo
    _, (problem,) = read({"stage1": {"method": "nowhere:x"}})
    assert problem.wrong == f"must be one of {', '.join(Method.__members__)}"


# Imports

BROKEN = {
    "the module": ("", "import:nowhere:x", "there is no module nowhere", "PYTHONPATH"),
    "the package": ("", "import:nowhere.inside:x", "there is no module nowhere", "holds nowhere on PYTHONPATH"),
    "the attribute": ("verifier = 1", "import:mine:verifer", "has no verifer", "one of verifier"),
    "syntax": ("x = 1\ndef (", "import:mine:x", "SyntaxError: invalid syntax", "correct the module"),
    "an import in it": ("\nimport nowhere_either", "import:mine:x", "No module named 'nowhere_either'", "correct"),
    "an error in it": ("x = 1\n\nx / 0\n", "import:mine:x", "ZeroDivisionError: division by zero", "correct"),
}
LINES = {"syntax": 2, "an import in it": 2, "an error in it": 3}


@pytest.mark.parametrize("case", list(BROKEN))
def test_an_import_that_fails_is_a_problem_with_the_modules_own_error(files: Path, modules: Path, case: str) -> None:
    text, name, wrong, fix = BROKEN[case]
    write(modules, text)
    for field in (f"{LABELLED}.verifier", "stage1.method"):
        (problem,) = problems(files, f"{field}={name}")
        assert (problem.field, problem.value) == (field, name)
        assert wrong in problem.wrong
        assert fix in problem.fix
        if case in LINES:
            assert f"({modules}/mine.py:{LINES[case]})" in problem.wrong


def test_all_problems_are_in_one_report(files: Path, modules: Path) -> None:
    write(modules, "def verifier(prompt): ...\nmethod = 3")
    report = problems(
        files,
        *(f"{LABELLED}.verifier=import:mine:verifier", "stage1.method=import:mine:method"),
        *(f"{HELDOUT}.verifier=import:nowhere:verifier", "stage2.actor.mini_batch_prompts=7", "run.seed=-1"),
    )
    assert [problem.field for problem in report] == [
        "run.seed", f"{LABELLED}.verifier", "stage1.method", "stage2.actor.mini_batch_prompts", f"{HELDOUT}.verifier"
    ]  # fmt: skip


def test_only_what_a_job_uses_is_loaded(files: Path, modules: Path) -> None:
    """An eval ignores the stages and their data; a stage without iterations is not used."""
    changes = [f"{LABELLED}.verifier=import:nowhere:x", "stage1.method=import:nowhere:x"]
    assert [problem.field for problem in problems(files, *changes)] == [f"{LABELLED}.verifier", "stage1.method"]
    assert problems(files, *changes, purpose=Purpose.eval) == []
    assert problems(files, "stage1.iterations=0", "stage1.method=import:nowhere:x") == []


# Verifiers

VERIFIERS = {
    "not callable": ("x = 3", "x is 3 (int), which cannot be called", "define a function, or an object with x(prompt"),
    "too few parameters": ("def x(prompt, response): ...", "x(prompt, response) cannot be called as", "def x(prompt, "),
    "too many": ("def x(a, b, c, d): ...", "missing a required argument: 'd'", "def x(prompt, response, answer)"),
    "by keyword only": ("def x(*, prompt, response, answer): ...", "too many positional", "def x("),
    "a class": ("class x:\n def score(self, a, b, c): ...", "x is a class", "x = x()"),
    "its score": ("class X:\n def score(self): ...\nx = X()", "score() cannot be called as score(prompt", "def score("),
    "its check": (
        "class X:\n def score(self, a, b, c): ...\n def check(self): ...\nx = X()",
        "check() cannot be called as check(prompt, answer)",
        "def check(",
    ),
    "its answer_of": (
        "class X:\n answer_of = 3\n def score(self, a, b, c): ...\nx = X()",
        "answer_of is 3 (int), which cannot be called",
        "define a method answer_of(prompt, response)",
    ),
    "its graded": ("def x(a, b, c): ...\nx.graded = 'yes'", "its attribute graded is 'yes'", "True or False"),
}


@pytest.mark.parametrize("case", list(VERIFIERS))
def test_a_verifier_of_another_form_is_a_problem(files: Path, modules: Path, case: str) -> None:
    text, wrong, fix = VERIFIERS[case]
    write(modules, text)
    for group in (LABELLED, HELDOUT):
        (problem,) = problems(files, f"{group}.verifier=import:mine:x")
        assert (problem.field, problem.value) == (f"{group}.verifier", "import:mine:x")
        assert wrong in problem.wrong
        assert fix in problem.fix


GOOD = """
def exact(prompt, response, answer):
    return response == answer

def default(prompt, response, answer, strict=True):
    return 1

class Length:
    graded = True
    def score(self, prompt, response, answer):
        return len(response) / 10
    def check(self, prompt, answer):
        if not answer.isdigit():
            raise ValueError(f"the answer {answer!r} is not a number")
    def answer_of(self, prompt, response):
        return response.strip() or None

length = Length()

def text(prompt, response, answer):
    return "right"

def half(prompt, response, answer):
    return 0.5

def outside(prompt, response, answer):
    return 1.5
outside.graded = True

def nan(prompt, response, answer):
    return float("nan")
nan.graded = True

def failing(prompt, response, answer):
    return {}[response]

class Lists:
    def score(self, prompt, response, answer):
        return 1
    def answer_of(self, prompt, response):
        return [response]

lists = Lists()
"""


def scored(attribute: str, *responses: str) -> list[float]:
    with Verifiers(imported=[named(attribute)]) as verifiers:
        return verifiers.score([Item(named(attribute), "2+2", response, "4") for response in responses])


def test_a_verifier_scores(modules: Path) -> None:
    write(modules, GOOD)
    assert scored("exact", "4", "5") == [1.0, 0.0]
    assert scored("default", "5") == [1.0]
    assert scored("length", "12345", "") == [0.5, 0.0]
    with Verifiers(imported=[named("length")]) as verifiers:
        assert verifiers.classes(named("length"), "2+2", ["4", "5", "", " 4"]) == [0, 1, None, 0]
        with pytest.raises(ValueError, match="the answer 'four' is not a number"):
            verifiers.score([Item(named("length"), "2+2", "4", "four")])
        with pytest.raises(InputError, match="verifier 'import:mine:exact' is unknown"):
            verifiers.score([Item(named("exact"), "2+2", "4", "4")])


RETURNED = {
    "text": "import:mine:text returned 'right' (str); fix: return 0 or 1",
    "half": "import:mine:half returned 0.5 (float); fix: return 0 or 1 (a number between them requires the attribute",
    "outside": "import:mine:outside returned 1.5 (float); fix: return a number from 0 to 1",
    "nan": "import:mine:nan returned nan (float); fix: return a number from 0 to 1",
    "failing": "import:mine:failing raised KeyError: '4' ({folder}/mine.py:35); fix: correct it",
}


@pytest.mark.parametrize("attribute", list(RETURNED))
def test_what_a_verifier_returns_is_checked(modules: Path, attribute: str) -> None:
    write(modules, GOOD)
    with pytest.raises(InputError) as caught:
        scored(attribute, "4")
    assert str(caught.value).startswith(RETURNED[attribute].format(folder=modules))


def test_what_answer_of_returns_is_checked(modules: Path) -> None:
    write(modules, GOOD)
    with Verifiers(imported=[named("lists")]) as verifiers, pytest.raises(InputError, match="return a hashable value"):
        verifiers.classes(named("lists"), "2+2", ["4"])


def test_where_a_graded_verifier_is_a_problem(files: Path, modules: Path) -> None:
    write(modules, GOOD + METHOD.replace("graded=True", "graded=False"))
    (problem,) = problems(files, f"{HELDOUT}.verifier=import:mine:length")
    assert "requires verdicts of 0 and 1" in problem.wrong
    assert problems(files, f"{LABELLED}.verifier=import:mine:length") == []  # PPO and TEMPO take them
    (problem,) = problems(files, f"{LABELLED}.verifier=import:mine:length", "stage1.method=import:mine:method")
    assert problem.field == f"{LABELLED}.verifier"
    assert "stage1.method=import:mine:method requires verdicts of 0 and 1" in problem.wrong
    assert problems(files, f"{LABELLED}.verifier=import:mine:exact", "stage1.method=import:mine:method") == []


def test_a_method_that_compares_answers_asks_for_answer_of(files: Path, modules: Path) -> None:
    write(modules, GOOD)
    ttrl = ["stage2.method=ttrl", "stage2.labelled_prompts=0"]
    (problem,) = problems(files, *ttrl, f"{UNLABELLED}.verifier=import:mine:exact")
    assert problem.field == f"{UNLABELLED}.verifier"
    assert "has no method answer_of" in problem.wrong
    assert problems(files, *ttrl, f"{UNLABELLED}.verifier=import:mine:length") == []


def test_votes_in_evaluations_ask_for_answer_of(files: Path, modules: Path) -> None:
    write(modules, GOOD)
    given = [f"{HELDOUT}.verifier=import:mine:exact"]
    assert problems(files, *given) == []
    (problem,) = problems(files, *given, "evaluation.votes=true")
    assert problem.field == f"{HELDOUT}.verifier"
    assert "has no method answer_of" in problem.wrong


# Methods

METHOD = """
from megatron_tempo.config.method_settings import Needs, Prompts
class M:
    needs = Needs(actor=Prompts.labelled, critic=None, graded=True)
    returned = {"reward": 1}
    def iterate(self, learner, rollouts, stage, iteration):
        return self.returned
method = M()
"""
METHODS_OF = {
    "no needs": (METHOD.replace("needs =", "nothing ="), "its attribute needs is None", "needs = Needs(actor="),
    "other needs": (
        METHOD.replace("needs = Needs", "needs = dict"),
        "its attribute needs is {'actor'",
        "needs = Needs(",
    ),
    "needs of text": (METHOD.replace("Prompts.labelled", "'labelled'"), "actor='labelled'", "a member of Prompts"),
    "no iterate": (METHOD.replace("iterate", "step"), "has no method iterate", "define iterate(learner, rollouts"),
    "its iterate": (METHOD.replace(", iteration", ""), "iterate(learner, rollouts, stage) cannot", "def iterate("),
    "a class": (METHOD.replace("M()", "M"), "M is a class", "name an instance"),
    "a function": ("def method(learner, rollouts, stage, iteration): ...", "has no method iterate", "define iterate("),
}


@pytest.mark.parametrize("case", list(METHODS_OF))
def test_a_method_of_another_form_is_a_problem(files: Path, modules: Path, case: str) -> None:
    text, wrong, fix = METHODS_OF[case]
    write(modules, text)
    (problem,) = problems(files, "stage1.method=import:mine:method")
    assert (problem.field, problem.value) == ("stage1.method", "import:mine:method")
    assert wrong in problem.wrong
    assert fix in problem.fix
    config = configure([*good_overrides(files), "stage1.method=import:mine:method"])
    assert problem.wrong in [other.wrong for other in plan_problems(config)]


def test_what_a_method_needs_decides_as_for_the_built_in_ones(files: Path, modules: Path) -> None:
    write(modules, METHOD)
    assert load_method(named("method")).needs == Needs(Prompts.labelled, None)
    config = Config(stage1=StageConfig(settings_of(named("method")), iterations=1), stage2=StageConfig())
    assert not config.has_critic
    assert config.stage1.prompts() == {Prompts.labelled}
    (problem,) = problems(files, "stage1.method=import:mine:method", "data.labelled=null", "stage2.iterations=0")
    assert problem.field == "data.labelled"
    (problem,) = problems(files, "stage2.method=import:mine:method")
    assert problem.field == "stage2.unlabelled_prompts"
    assert "method import:mine:method uses no unlabelled prompts" in problem.wrong


RESULTS = {
    "None": "import:mine:method returned None; fix: return a dict of metrics: {name: number}",
    "3": "import:mine:method returned 3 (int)",
    "{'loss': 'low'}": "import:mine:method returned {'loss': 'low'} (dict)",
    "{1: 2.0}": "import:mine:method returned {1: 2.0} (dict)",
    "{'loss': __import__('torch').ones(1)}": "import:mine:method returned {'loss': tensor([1.])} (dict)",
}


@pytest.mark.parametrize("returned", list(RESULTS))
def test_what_a_method_returns_is_checked(modules: Path, returned: str) -> None:
    write(modules, METHOD.replace('{"reward": 1}', returned))
    with pytest.raises(ExtensionError) as caught:
        iterate_of(named("method"))(None, Rollouts(None, None), StageConfig(), 0)  # type: ignore[arg-type]
    assert str(caught.value).startswith(RESULTS[returned])


def test_the_metrics_of_a_method_are_returned(modules: Path) -> None:
    write(modules, METHOD)
    assert iterate_of(named("method"))(None, Rollouts(None, None), StageConfig(), 0) == {"reward": 1}  # type: ignore[arg-type]
    assert iterate_of(Method.ppo) is METHODS[Method.ppo]


# Readers

READERS_OF = {
    "not callable": ("x = 3", "x is 3 (int), which cannot be called", "define a function x(path)"),
    "too many parameters": ("def x(path, names): ...", "missing a required argument: 'names'", "def x(path)"),
    "a class": ("class x: ...", "x is a class", "x = x()"),
}


@pytest.mark.parametrize("case", list(READERS_OF))
def test_a_reader_of_another_form_is_a_problem(files: Path, modules: Path, case: str) -> None:
    assert_refused(files, modules, READERS_OF[case], "reader")


def test_a_reader_is_named_as_an_import() -> None:
    _, (problem,) = read({"data": {"labelled": {"reader": "csv"}}})
    assert problem.field == "data.labelled.reader"
    assert "does not have the form import:package.module:name" in problem.wrong


READ = {
    "None": "import:mine:x returned None; fix: return the rows: an iterable of dicts",
    "'text'": "import:mine:x returned 'text' (str); fix: return the rows: an iterable of dicts",
    "[{'prompt': 'a'}, 3]": "import:mine:x returned 3 (int); fix: return a dict as row 1",
    "open(path / 'nowhere')": "import:mine:x raised FileNotFoundError: ",
}


@pytest.mark.parametrize("returned", list(READ))
def test_what_a_reader_returns_is_checked(modules: Path, returned: str) -> None:
    write(modules, f"def x(path): return {returned}")
    with pytest.raises(InputError) as caught:
        list(read_rows(modules, ["prompt"], named("x")))
    assert str(caught.value).startswith(READ[returned])


def test_a_reader_gives_rows_with_the_fields_asked_for(files: Path, modules: Path) -> None:
    write(modules, "def x(path): return [{'prompt': str(path), 'answer': 1}, {'question': 'b'}]")
    first, second = read_rows(Path("table:1"), ["prompt"], named("x"))
    assert (first.number, first.fields, first.problem) == (0, {"prompt": "table:1"}, None)
    assert (second.place, second.fields) == ("row 1", {})
    assert second.problem is not None
    assert "field 'prompt' is missing" in second.problem
    # What the path means is the reader's affair.
    assert problems(files, "data.labelled.path=table:1", "data.labelled.reader=import:mine:x") == []


# The examples

RIGHT = "5 * 1 = 5 + 3 = 8 * 3 = 24 y $"


def test_the_example_verifier_by_hand(modules: Path) -> None:
    name = Extension.parse("import:countdown_verifier:verifier")
    prompt = "5 1 3 3 > 24 :"
    responses = [RIGHT, RIGHT.replace("24 y", "25 y"), "5 * 1 = 5 + 3 = 8 + 3 = 11 n $", "24", ""]
    with Verifiers(imported=[name]) as verifiers:
        scores = verifiers.score([Item(name, prompt, response, "*+*") for response in responses])
        assert scores == pytest.approx([1.0, 0.0, 1 / 14, 0.0, 0.0])
        assert verifiers.classes(name, prompt, responses) == [0, None, 1, None, None]
        with pytest.raises(ValueError, match="is not a question such as"):
            verifiers.score([Item(name, "5 1", "", "*")])


def test_the_example_reader_by_hand(modules: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.csv").write_text('prompt,answer\n"1, 2",3\n4,5\n')
    rows = read_rows(tmp_path / "questions.csv", ["prompt", "answer"], Extension.parse("import:csv_reader:read"))
    assert [row.fields for row in rows] == [{"prompt": "1, 2", "answer": "3"}, {"prompt": "4", "answer": "5"}]


def test_the_example_method_by_hand(modules: Path) -> None:
    leave_one_out = load(Extension.parse("import:leave_one_out:leave_one_out"))
    rewards, group = torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.tensor([0, 0, 0, 1])
    assert leave_one_out(rewards, group).tolist() == [0.75, -0.75, 0.0, 0.0]
