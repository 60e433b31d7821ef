"""Rollout engines and prompt templates named as `import:package.module:name`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.config.extensions import ENGINE_METHODS, Extension, ExtensionError
from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.config.rules import Purpose
from megatron_tempo.config.schema import DatasetConfig, RolloutConfig
from megatron_tempo.config.tree import read
from megatron_tempo.data.dataset import load_unlabelled
from megatron_tempo.data.rows import DataError
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.plan.split import problems as plan_problems
from megatron_tempo.rollout.engine import Engine, EngineSetup, Request, Sampling
from megatron_tempo.rollout.imported import ImportedEngine
from megatron_tempo.types import TokenCount
from tests.support.completions import completion, plain
from tests.support.ranks import run_ranks
from tests.unit.config_files import CORRECTED, configure, good_overrides, write_all
from tests.unit.extension_modules import assert_refused, problems, write

ENGINE = """
from megatron_tempo.types import Completion, EngineHealth, TokenCount
import array, numpy, torch

class Fixed:
    def __init__(self, setup):
        self.setup = setup
    def start(self, requests, sampling):
        for number, request in enumerate(requests):
            yield number, [self.answer(request) for _ in range(request.samples)]
    def answer(self, request):
        return Completion((5, 6), (-0.5, 1e-6), "stop", ((0, 2),))
    def load_weights(self, weights, version):
        pass
    def differences(self, weights):
        return [("a", 0.5)]
    def health(self):
        return [EngineHealth("fixed", "serving")]
    def close(self):
        pass
"""
NAME = "import:mine:Fixed"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_all(folder)
    return folder


# Engines: before one is made


def test_the_methods_that_are_checked_are_those_of_the_protocol() -> None:
    own = {name: kind for name, kind in vars(Engine).items() if inspect.isfunction(kind) and not name.startswith("_")}
    del own["sleep"]  # of servers: an engine in the trainer's processes keeps its memory
    assert {name: tuple(inspect.signature(kind).parameters)[1:] for name, kind in own.items()} == ENGINE_METHODS


def test_what_is_served() -> None:
    assert [kind.name for kind in EngineKind if not kind.is_served] == ["embedded"]
    assert [RolloutConfig(engine=kind).is_served for kind in EngineKind] == [kind.is_served for kind in EngineKind]
    assert not RolloutConfig(engine=Extension.parse(NAME)).is_served


FORMS = {
    "an instance": (ENGINE + "Fixed = Fixed(None)", "which is no class", "name a class: class Fixed"),
    "a function": ("def Fixed(setup): ...", "Fixed is <function", "name a class"),
    "no start": (ENGINE.replace("start", "begin"), "has no method start", "define start(requests, sampling)"),
    "no close": (ENGINE.replace("def close", "def shut"), "has no method close", "define close()"),
    "its load_weights": (
        ENGINE.replace("weights, version", "weights"),
        "Fixed.load_weights(self, weights) cannot be called as Fixed.load_weights(self, weights, version)",
        "def load_weights(self, weights, version)",
    ),
    "its constructor": (
        ENGINE.replace("self, setup", "self, setup, device"),
        "Fixed(setup, device) cannot be called as Fixed(setup): missing a required argument: 'device'",
        "def __init__(self, setup)",
    ),
    "its background": (ENGINE + "Fixed.background = 1", "background is 1 (int)", "background = True or False"),
    "its sampling": (
        ENGINE + "Fixed.sampling = ('top_p', 'beams')",
        "sampling is ('top_p', 'beams') (tuple)",
        'sampling = ("greedy", "top_p", "top_k", "min_p", "stop", "seed"), or some of these',
    ),
    "an error in it": ("import nowhere", "No module named 'nowhere'", "correct the module"),
}


@pytest.mark.parametrize("case", list(FORMS))
def test_an_engine_of_another_form_is_a_problem(files: Path, modules: Path, case: str) -> None:
    text, wrong, fix = FORMS[case]
    write(modules, text)
    for purpose in (Purpose.train, Purpose.eval):
        (problem,) = problems(files, f"rollout.engine={NAME}", purpose=purpose)
        assert (problem.field, problem.value) == ("rollout.engine", NAME)
        assert wrong in problem.wrong
        assert fix in problem.fix
    planned = configure([*good_overrides(files), f"rollout.engine={NAME}"])
    assert problem.wrong in [other.wrong for other in plan_problems(planned)]


def test_an_engine_of_the_right_form_passes(files: Path, modules: Path) -> None:
    write(modules, ENGINE)
    assert problems(files, f"rollout.engine={NAME}") == []
    assert problems(files, "rollout.engine=import:generate_engine:GenerateEngine") == []


def test_a_name_that_is_no_engine_names_the_built_in_ones() -> None:
    _, (problem,) = read({"rollout": {"engine": "vlm"}})
    assert "must be one of embedded, sglang, vllm" in problem.wrong
    assert problem.fix == "did you mean vllm?"
    _, (problem,) = read({"rollout": {"engine": "import:mine"}})
    assert "does not have the form import:package.module:name" in problem.wrong


def test_only_an_engine_that_works_in_the_background_may_be_stale(files: Path, modules: Path) -> None:
    write(modules, ENGINE + "Fixed.background = True")
    assert problems(files, f"rollout.engine={NAME}", "rollout.max_staleness=1", *CORRECTED) == []
    given = [f"rollout.engine={NAME}", "rollout.max_staleness=1", *CORRECTED]
    (problem,) = problems(files, *given, "rollout.partial_rollouts=true")
    assert problem.field == "rollout.partial_rollouts"
    # One that cannot be loaded is one problem, not two.
    (problem,) = problems(files, "rollout.engine=import:nowhere:x", "rollout.max_staleness=1", *CORRECTED)
    assert problem.field == "rollout.engine"


KEPT = {  # setting -> what it takes to be kept
    "rollout.top_p=0.9": "top_p",
    "rollout.top_k=20": "top_k",
    "rollout.min_p=0.1": "min_p",
    "rollout.stop=[x]": "stop",
    "rollout.seed=3": "seed",
    "evaluation.stop=[x]": "stop",
    "evaluation.top_k=3": "top_k",
    "evaluation.temperature=0 evaluation.samples=1 evaluation.pass_k=[1]": "greedy",
}


@pytest.mark.parametrize("setting", list(KEPT))
def test_an_engine_gets_no_setting_that_it_does_not_keep(files: Path, modules: Path, setting: str) -> None:
    words, name = setting.split(), KEPT[setting]
    write(modules, ENGINE)
    found = problems(files, f"rollout.engine={NAME}", *words)
    assert found[0].field == words[0].partition("=")[0]
    assert f'"{name}" among its class\'s attribute sampling' in found[0].fix
    fields = {"rollout.stop", "evaluation.stop"} if setting.startswith("rollout.stop") else {found[0].field}
    assert {problem.field for problem in found} == fields


@pytest.mark.parametrize("setting", list(KEPT))
def test_an_engine_gets_the_settings_that_it_keeps(files: Path, modules: Path, setting: str) -> None:
    write(modules, ENGINE + f"Fixed.sampling = ['{KEPT[setting]}']")
    assert problems(files, f"rollout.engine={NAME}", *setting.split()) == []


def test_an_engine_that_does_not_say_so_is_not_stale(files: Path, modules: Path) -> None:
    write(modules, ENGINE)
    (problem,) = problems(files, f"rollout.engine={NAME}", "rollout.max_staleness=1", *CORRECTED)
    assert problem.field == "rollout.max_staleness"
    assert "background = True" in problem.fix


def test_serve_starts_servers_only(files: Path, modules: Path) -> None:
    write(modules, ENGINE)
    for engine in ("embedded", NAME):
        (problem,) = problems(files, f"rollout.engine={engine}", purpose=Purpose.serve)
        assert (problem.field, problem.value) == ("rollout.engine", engine)
        assert "has no servers" in problem.wrong


# Engines: what they return


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def setup_of(folder: Path) -> EngineSetup:
    return EngineSetup(
        folder, torch.device("cpu"), torch.float32, folder / "engine", RolloutConfig(), logging.getLogger()
    )


def engine_of(folder: Path, routing: RoutingFormat | None = None) -> ImportedEngine:
    engine = ImportedEngine(Extension.parse(NAME), setup_of(folder), 9, routing)
    engine.load_weights(None, 0)  # type: ignore[arg-type]
    return engine


ANSWER = 'Completion((5, 6), (-0.5, 1e-6), "stop", ((0, 2),))'
REQUESTS = [Request((1, 2), samples=2, seed=0), Request((3,), samples=1, seed=1)]
SAMPLING = Sampling(temperature=1.0, max_tokens=2)


def test_an_engine_answers(modules: Path, group: None) -> None:
    write(modules, ENGINE)
    engine = engine_of(modules)
    answers = dict(engine.start(REQUESTS, SAMPLING))
    expected = plain(completion((5, 6), (-0.5, 0.0)))  # 1e-6 is rounding
    assert {i: [plain(one) for one in row] for i, row in answers.items()} == {0: [expected] * 2, 1: [expected]}
    assert (engine.counted, engine.replicas) == (TokenCount(6, 0), 1)
    assert engine.differences(None) == [("a", 0.5)]  # type: ignore[arg-type]
    assert [state.name for state in engine.health()] == ["fixed"]


GIVEN = {
    "lists": "Completion([5, 6], [-0.5, 0], 'stop', [[0, 2]])",
    "a range": "Completion(range(5, 7), (-0.5, 0), 'stop', ((0, 1), (0, 1)))",
    "numpy": "Completion(numpy.array([5, 6], 'u2'), numpy.array([-0.5, 0]), 'stop', ((0, numpy.int64(2)),))",
    "numbers of numpy": "Completion(list(numpy.array([5, 6])), list(numpy.float32([-0.5, 0])), 'stop', ((0, 2),))",
    "tensors": "Completion(torch.tensor([5, 6]), torch.tensor([-0.5, 0]).bfloat16(), 'stop', ((0, 2),))",
    "a tensor with a gradient": "Completion((5, 6), torch.tensor([-0.5, 0], requires_grad=True), 'stop', ((0, 2),))",
    "an array of Python": "Completion(array.array('i', [5, 6]), array.array('f', [-0.5, 0]), 'stop', ((0, 2),))",
}


@pytest.mark.parametrize("case", list(GIVEN))
def test_an_engine_may_answer_in_any_numbers(modules: Path, group: None, case: str) -> None:
    write(modules, ENGINE.replace(ANSWER, GIVEN[case]))
    (answer,) = dict(engine_of(modules).start(REQUESTS, SAMPLING))[1]
    assert plain(answer)[:3] == ((5, 6), (-0.5, 0.0), "stop")


ROUTING = RoutingFormat(layers=1, per_token=2, experts=4)
EXPERTS = {
    "numpy": "numpy.array([[[0, 3]], [[1, 2]]])",
    "a tensor": "torch.tensor([[[0, 3]], [[1, 2]]], dtype=torch.uint8)",
}
NO_EXPERTS = {
    "none": ("None", "returned no experts: model.router_replay uses those that its routers chose; fix: experts=... in"),
    "no array": ("[[[0, 3]]]", "experts is [[[0, 3]]] (list), not an array of integers"),
    "no layers": ("numpy.array([[0, 3]])", "not an array of integers [tokens, layers, k]"),
    "other layers": (
        "numpy.array([[[0, 3], [1, 2]]])",
        "experts are torch.uint8 [1, 2, 2], not torch.uint8 [tokens",
    ),
    "no expert": ("numpy.array([[[0, 4]]])", "an expert that is none of 4"),
    "too large": ("numpy.array([[[0, 300]]])", "experts has numbers that uint8 does not hold"),
    "too many": ("numpy.array([[[0, 3]]] * 4)", "experts of 4 tokens, but the last one of a response has passed no"),
}


def with_experts(text: str) -> str:
    return ENGINE.replace(ANSWER, f'Completion((5, 6), (-0.5, 0.0), "stop", ((0, 2),), {text})')


@pytest.mark.parametrize("case", list(EXPERTS))
def test_an_engine_returns_the_experts_of_its_routers(modules: Path, group: None, case: str) -> None:
    write(modules, with_experts(EXPERTS[case]))
    engine = engine_of(modules, ROUTING)
    (answer,) = dict(engine.start(REQUESTS, replace(SAMPLING, with_experts=True)))[1]
    assert answer.experts is not None
    assert (answer.experts.dtype, answer.experts.tolist()) == (torch.uint8, [[[0, 3]], [[1, 2]]])
    (plain_answer,) = dict(engine.start(REQUESTS, SAMPLING))[1]
    assert plain_answer.experts is None


@pytest.mark.parametrize("case", list(NO_EXPERTS))
def test_experts_that_no_router_chooses_name_the_engine(modules: Path, group: None, case: str) -> None:
    text, words = NO_EXPERTS[case]
    write(modules, with_experts(text))
    with pytest.raises(EngineError) as caught:
        list(engine_of(modules, ROUTING).start(REQUESTS, replace(SAMPLING, with_experts=True)))
    assert words in str(caught.value)


def test_what_an_engine_keeps_is_not_changed(modules: Path, group: None) -> None:
    text = ENGINE.replace("self.setup = setup", "self.kept = torch.tensor([-0.5, 1e-6])")
    write(modules, text.replace("(-0.5, 1e-6)", "self.kept"))
    engine = engine_of(modules)
    (answer,) = dict(engine.start(REQUESTS, SAMPLING))[1]
    assert answer.logprobs.tolist() == [-0.5, 0.0]
    assert engine._engine.kept[1] > 0


def test_an_engine_may_count_for_itself(modules: Path, group: None) -> None:
    text = ENGINE.replace("self.setup = setup", "self.counted, self.replicas = TokenCount(100, 3), 2")
    write(modules, text)
    engine = engine_of(modules)
    list(engine.start(REQUESTS, SAMPLING))
    assert (engine.counted, engine.replicas) == (TokenCount(100, 3), 2)


MADE = {
    "1 / 0": "import:mine:Fixed raised ZeroDivisionError: division by zero ({folder}/mine.py:7); fix: correct it",
    "self.counted = 3": "import:mine:Fixed: counted is 3 (int); fix: self.counted = TokenCount()",
    "self.replicas = 0": "import:mine:Fixed: replicas is 0 (int); fix: self.replicas = 1 or more",
}


@pytest.mark.parametrize("text", list(MADE))
def test_an_engine_that_cannot_be_made_is_named(modules: Path, text: str) -> None:
    write(modules, ENGINE.replace("self.setup = setup", text))
    with pytest.raises(InputError) as caught:
        engine_of(modules)
    assert str(caught.value).startswith(MADE[text].format(folder=modules))


YIELD = "yield number, [self.answer(request) for _ in range(request.samples)]"
ANSWERED = {
    "no iterator": (ENGINE.replace("for number, request", "return 3\n        for number, request").replace(
        YIELD, "pass"), "returned 3 (int); fix: return an iterator of (number of the request, completions)"),
    "no pairs": (ENGINE.replace(YIELD, "yield number"), "returned 0 (int); fix: return (number of the request from 0"),
    "another number": (ENGINE.replace(YIELD, "yield 7, []"), "returned (7, []) (tuple)"),
    "too few": (ENGINE.replace("range(request.samples)", "range(1)"), "fix: return 2 of megatron_tempo.types.Compl"),
    "no completion": (ENGINE.replace(ANSWER, '"text"'), "returned ['text', 'text'] (list); fix: return 2 of"),
    "twice": (ENGINE.replace(YIELD, f"{YIELD}; {YIELD}"), "answered request 0 2 times over all ranks; fix: answer"),
    "one left out": (ENGINE.replace("enumerate(requests)", "enumerate(requests[:1])"), "answered request 1 0 times"),
    "an error": (ENGINE.replace(YIELD, "1 / 0"), "raised ZeroDivisionError: division by zero ({folder}/mine.py:10)"),
    "an error of its start": (ENGINE.replace("for number, request in enumerate(requests)", "for number in 3")
        .replace(YIELD, "yield"), "raised TypeError: 'int' object is not iterable ({folder}/mine.py:9)"),
    "a long one": (ENGINE.replace(ANSWER, 'Completion((5,) * 3, (-0.5,) * 3, "stop", ((0, 3),))'), "3 tokens of at m"),
    "no log-probability": (ENGINE.replace("1e-6", "float('nan')"), "a log-probability that is none"),
    "a positive one": (ENGINE.replace("1e-6", "0.5"), "a log-probability that is none"),
    "a foreign token": (ENGINE.replace("(5, 6)", "(5, 9)"), "a token out of the vocabulary"),
    "another end": (ENGINE.replace('"stop"', '"eos"'), "ended by eos"),
    "newer weights": (ENGINE.replace("((0, 2),)", "((1, 2),)"), "weights of version [(1, 2)], not 0 to 0"),
    "no numbers": (ENGINE.replace("(5, 6)", "None"), "makes no sense: token_ids is None, not a sequence"),
    "half a token": (ENGINE.replace("(5, 6)", "(5, 6.0)"), "makes no sense: token_ids has 6.0 (float)"),
    "a token as a word": (ENGINE.replace("(5, 6)", '"56"'), "makes no sense: token_ids has '5' (str)"),
    "a token beyond 64 bits": (ENGINE.replace("(5, 6)", "(5, 2**70)"), "token_ids has numbers that are too large"),
    "a token beyond 32 bits": (ENGINE.replace("(5, 6)", "(5, 2**32 + 6)"), "a token out of the vocabulary"),
    "a grid of tokens": (ENGINE.replace("(5, 6)", "torch.tensor([[5, 6]])"), "token_ids is an array int64 [1, 2]"),
    "tokens as floats": (ENGINE.replace("(5, 6)", "torch.tensor([5.0, 6.0])"), "token_ids is an array float32 [2]"),
    "no logprobs": (ENGINE.replace("(-0.5, 1e-6)", "[None, None]"), "makes no sense: logprobs has None"),
    "an infinite one": (ENGINE.replace("1e-6", "-1e300"), "a log-probability that is none"),
    "one less": (ENGINE.replace("(-0.5, 1e-6)", "torch.zeros(1)"), "1 log-probabilities of 2 tokens"),
    "no versions": (ENGINE.replace("((0, 2),)", "0"), "makes no sense: versions is 0 (int), not (version, number"),
    "a version of minus tokens": (ENGINE.replace("((0, 2),)", "((0, 3), (0, -1))"), "a negative number of tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ANSWERED))
def test_what_an_engine_answers_is_checked(modules: Path, group: None, case: str) -> None:
    text, wrong = ANSWERED[case]
    assert text != ENGINE
    write(modules, text)
    with pytest.raises(EngineError) as caught:
        list(engine_of(modules).start(REQUESTS, SAMPLING))
    assert str(caught.value).startswith("import:mine:Fixed ")
    assert wrong.format(folder=modules) in str(caught.value)


def test_what_an_engine_tells_is_checked(modules: Path) -> None:
    write(modules, ENGINE.replace('[("a", 0.5)]', '["a"]').replace('[EngineHealth("fixed", "serving")]', '"well"'))
    engine = engine_of(modules)
    with pytest.raises(ExtensionError, match=r"returned 'a' \(str\); fix: return a list of \(name of a tensor"):
        engine.differences(None)  # type: ignore[arg-type]
    with pytest.raises(ExtensionError, match=r"returned 'well' \(str\); fix: return a list of megatron_tempo.types"):
        engine.health()


def failing_on_one(folder: str) -> str:
    import sys

    sys.path.insert(0, folder)
    dist.init_process_group("gloo")
    try:
        list(engine_of(Path(folder)).start(REQUESTS, SAMPLING))
    except EngineError as error:
        return str(error)
    return "no error"


def test_an_engine_that_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    only_first = "import torch.distributed as dist; [0][dist.get_rank()]"
    write(tmp_path, ENGINE.replace(YIELD, f"{only_first}; {YIELD}"))
    first, second = run_ranks(failing_on_one, 2, tmp_path / "ranks", str(tmp_path))
    assert first == second
    assert first.startswith("import:mine:Fixed raised IndexError: list index out of range")


# Prompt templates

TEMPLATES = {
    "not callable": ("x = 3", "x is 3 (int), which cannot be called", "define a function x(messages, tokenizer)"),
    "too few parameters": ("def x(messages): ...", "cannot be called as", "def x(messages, tokenizer)"),
    "a class": ("class x: ...", "x is a class", "x = x()"),
}


@pytest.mark.parametrize("case", list(TEMPLATES))
def test_a_template_of_another_form_is_a_problem(files: Path, modules: Path, case: str) -> None:
    assert_refused(files, modules, TEMPLATES[case], "chat_template")


def test_chat_template_is_read_as_before() -> None:
    _, (problem,) = read({"data": {"labelled": {"chat_template": "yes"}}})
    assert problem.wrong == "must be true or false"
    _, (problem,) = read({"data": {"labelled": {"chat_template": "import:x"}}})
    assert "does not have the form" in problem.wrong


WORDS = {word: i for i, word in enumerate(["<unk>", "a", "b", "c", "|"])}


def prompts(folder: Path, name: str, lines: Sequence[str], **changes: object) -> list[str]:
    """The texts of a file's prompts by a template. The tokenizer has none of its own."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(WORDS, unk_token="<unk>")))
    path = folder / "questions.jsonl"
    path.write_text("".join(f'{{"prompt": {line}}}\n' for line in lines))
    config = DatasetConfig(path=str(path), chat_template=Extension.parse(name), **changes)  # type: ignore[arg-type]
    return [prompt.text for prompt in load_unlabelled(config, tokenizer, 999)]


JOINED = "def x(messages, tokenizer): return '|'.join(m['role'][0] + m['content'] for m in messages)"


def test_a_template_writes_the_prompt(modules: Path) -> None:
    write(modules, JOINED)
    lines = ['"a"', '[{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}, {"role": "user",'
             ' "content": "a"}]']  # fmt: skip
    assert prompts(modules, "import:mine:x", lines) == ["ua", "ub|ac|ua"]
    assert prompts(modules, "import:mine:x", lines[:1], system="c", suffix=" b") == ["sc|ua b"]


RENDERED = {
    "return 3": "import:mine:x returned 3 (int); fix: return the text that the model reads (str)",
    "1 / 0": "import:mine:x raised ZeroDivisionError: division by zero ({folder}/mine.py:1)",
}


@pytest.mark.parametrize("text", list(RENDERED))
def test_what_a_template_returns_is_checked(modules: Path, text: str) -> None:
    write(modules, f"def x(messages, tokenizer): {text}")
    with pytest.raises(ExtensionError) as caught:
        prompts(modules, "import:mine:x", ['"a"'])
    assert str(caught.value).startswith(RENDERED[text].format(folder=modules))


def test_a_templates_value_error_rejects_the_row(modules: Path) -> None:
    write(modules, "def x(messages, tokenizer): raise ValueError('too vague')")
    with pytest.raises(DataError, match=r"questions.jsonl:1: import:mine:x rejects the messages: too vague"):
        prompts(modules, "import:mine:x", ['"a"'])


def test_the_example_template_by_hand(modules: Path) -> None:
    name = "import:zero_template:template"
    (text,) = prompts(modules, name, ['"What is 2 + 2?"'])
    assert text.startswith("A conversation between User and Assistant.")
    assert text.endswith("the answer.\nUser: What is 2 + 2?\nAssistant: <think>")
    (text,) = prompts(modules, name, ['"What is 2 + 2?"'], system="Be brief.")
    assert text == "Be brief.\nUser: What is 2 + 2?\nAssistant: <think>"
    late = '[{"role": "user", "content": "b"}, {"role": "system", "content": "c"}, {"role": "user", "content": "a"}]'
    with pytest.raises(DataError, match="a system message must come first"):
        prompts(modules, name, [late])
