"""The answers of the unlabelled set do not reach a training step, and these tests would see it if they did.

One test looks at everything that training steps are given, for an answer planted in the unlabelled file. The other
changes all answers in that file: the evaluation's scores follow, the trained weights stay the same bit by bit.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.method_settings import NEEDS, Method, Prompts
from megatron_tempo.config.schedule import remaining
from megatron_tempo.config.schema import Config, DatasetConfig
from megatron_tempo.data import sets
from megatron_tempo.data.copies import QuestionSet
from megatron_tempo.data.dataset import load_unlabelled
from megatron_tempo.models.trained import Model, TrainedModel
from megatron_tempo.observability.records import read_evaluations, read_metrics
from megatron_tempo.rollout.batches import Collected
from megatron_tempo.training.context import open_context
from megatron_tempo.training.jobs import train
from megatron_tempo.training.trainer import Trainer
from megatron_tempo.types import Batch, UnlabelledPrompt
from tests.support.matrix import matrix
from tests.support.project import config_of, write_project
from tests.support.tiny import WORDS

SENTINEL = "49 48 49 48 49"  # in the words of the quickstart's tokenizer, whose first fifty tokens are 0..49
SENTINEL_TOKENS = (49, 48, 49, 48, 49)

Loader = Callable[..., list[UnlabelledPrompt]]


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def project_with(folder: Path, answer: Callable[[str], str]) -> Path:
    """The small project; the answers in its unlabelled file are `answer(prompt)`."""
    folder.mkdir()
    write_project(folder)
    path = folder / "unlabelled.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"answer": answer(row["prompt"])}) + "\n" for row in rows))
    return folder


UNLABELLED = [method for method, needs in NEEDS.items() if needs.actor is Prompts.unlabelled]


def config_for(project: Path, out: Path, method: Method = Method.tempo) -> Config:
    """One iteration, with evaluations of the unlabelled file before and after that do read its answers."""
    config = config_of(project, out)
    config.stage2.method = method
    if method is not Method.tempo:
        config.stage2.labelled_prompts = 0
        assert config.data.unlabelled is not None
        config.data.unlabelled = replace(config.data.unlabelled, verifier=Verifier.countdown)
    config.rollout.dump = True
    by_answer = replace(config.evaluation.sets["unlabelled"], verifier=Verifier.math)
    config.evaluation.sets = {"unlabelled": by_answer}
    config.evaluation.samples = 4
    return config


def target(prompt: str) -> str:
    """The number that a question wants reached: `2 4 5 6 > 13 :` wants 13."""
    return prompt.split()[-2]


def leaking(field: str) -> Loader:
    """A loader that lets the answers through in a prompt's id or tokens."""

    def load(config: Any, tokenizer: Any, length: int) -> list[UnlabelledPrompt]:
        prompts = load_unlabelled(config, tokenizer, length)
        rows = [json.loads(line) for line in Path(config.path).read_text().splitlines()]
        if field == "id":
            return [replace(p, id=f"{p.id} {row['answer']}") for p, row in zip(prompts, rows, strict=True)]
        words = [[WORDS.index(word) for word in row["answer"].split()] for row in rows]
        return [replace(p, token_ids=(*p.token_ids, *tail)) for p, tail in zip(prompts, words, strict=True)]

    return load


# By construction


def test_an_unlabelled_prompt_has_no_field_for_an_answer() -> None:
    assert [field.name for field in dataclasses.fields(UnlabelledPrompt)] == ["id", "text", "token_ids"]
    assert not hasattr(UnlabelledPrompt("a", "", ()), "__dict__"), "nor can one be added"


# What training steps are given


def reachable(*roots: object) -> Iterator[object]:
    """Every object that the roots refer to, over any number of steps; of functions, what they have closed over.

    Networks, classes and modules are not entered: everything in a process can be reached through them.
    """
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | torch.nn.Module | Model):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, FunctionType):
            stack += [cell.cell_contents for cell in item.__closure__ or ()]
        elif not isinstance(item, MethodType | Tensor | np.ndarray):
            stack += gc.get_referents(item)


def holds_sentinel(item: object) -> bool:
    if isinstance(item, str):
        return SENTINEL in item
    if isinstance(item, Tensor | np.ndarray):
        item = item.tolist() if item.ndim == 1 else []
    if isinstance(item, Sequence) and not isinstance(item, bytes):
        size = len(SENTINEL_TOKENS)
        return any(tuple(item[i : i + size]) == SENTINEL_TOKENS for i in range(len(item) - size + 1))
    return False


def traces(*roots: object) -> list[object]:
    return [item for item in reachable(*roots) if holds_sentinel(item)]


@pytest.fixture(scope="module")
def sentinel_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project_with(tmp_path_factory.mktemp("sentinel") / "project", lambda _: SENTINEL)


def traces_of_an_iteration(
    project: Path, out: Path, monkeypatch: pytest.MonkeyPatch, method: Method = Method.tempo
) -> dict[str, int]:
    """Traces of the sentinel in the unlabelled stream, in the rollouts, and in all that training steps are given.

    Verdicts on unlabelled rows, which follow from an answer, are traces too.
    """
    counts = {"stream": 0, "rollouts": 0, "steps": 0, "evaluation": 0}
    seen: list[int] = []
    step, rollouts = TrainedModel.step, Trainer.rollouts

    def verdicts(batch: Batch) -> int:
        return batch.correct is not None and any(name.startswith("unlabelled:") for name in batch.prompt_ids)

    def watched_step(self: TrainedModel, *args: Any) -> Any:
        counts["steps"] += len(traces(*args)) + verdicts(args[0])
        seen.append(len(list(reachable(*args))))
        return step(self, *args)

    def watched_rollouts(self: Trainer, *args: Any) -> Any:
        answer = rollouts(self, *args)
        assert (answer.labelled is not None) == (method is Method.tempo)
        assert answer.unlabelled is not None
        assert all(name.startswith("unlabelled:") for name in answer.unlabelled.prompt_ids)
        counts["rollouts"] += len(traces(answer)) + verdicts(answer.unlabelled)
        return answer

    monkeypatch.setattr(TrainedModel, "step", watched_step)
    monkeypatch.setattr(Trainer, "rollouts", watched_rollouts)
    config = config_for(project, out, method)
    with open_context(config) as context, Trainer.open(context) as run:
        run.sync_engine()
        counts["stream"] = len(traces(run.requests.unlabelled))
        counts["evaluation"] = len(traces(run.evaluator.sets))
        for stage_name, stage, iteration in remaining(config, 0):
            run.iterate(stage_name, stage, iteration)
    assert len(seen) == (4 if method is Method.tempo else 2), "two steps of the critic, if any, and two of the actor"
    assert min(seen) > 20, "the search comes through to what the steps are given"
    return counts


@pytest.mark.parametrize("method", UNLABELLED)
def test_no_training_step_is_given_an_answer_of_the_unlabelled_set(
    sentinel_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    counts = traces_of_an_iteration(sentinel_project, tmp_path, monkeypatch, method)
    assert counts.pop("evaluation") > 0, "the search finds the answers where they may be"
    assert counts == {"stream": 0, "rollouts": 0, "steps": 0}


@pytest.mark.parametrize("field", ["id", "tokens"])
def test_an_answer_that_leaks_is_found(
    sentinel_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setattr(sets, "load_unlabelled", leaking(field))
    read = QuestionSet.read  # by the ids that the planted loader gives, too

    def planted(name: str, dataset: DatasetConfig) -> QuestionSet:
        whole = read(name, dataset)
        names = {known + end: known for known in whole.keys for end in ("", f" {SENTINEL}")}
        keys, texts = ({new: of[known] for new, known in names.items()} for of in (whole.keys, whole.texts))
        return QuestionSet(name, keys, texts)

    monkeypatch.setattr(QuestionSet, "read", planted)
    counts = traces_of_an_iteration(sentinel_project, tmp_path, monkeypatch)
    assert all(count > 0 for count in counts.values()), counts


def test_a_verdict_that_leaks_is_found(sentinel_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Collected.take

    def judging(self: Collected, first: int, last: int, **given: Any) -> Collected:
        return take(self, first, last, **{**given, "verdicts": True})

    monkeypatch.setattr(Collected, "take", judging)
    counts = traces_of_an_iteration(sentinel_project, tmp_path, monkeypatch)
    assert counts["rollouts"] > 0
    assert counts["steps"] > 0


# What training makes


@dataclasses.dataclass(frozen=True)
class Outcome:
    weights: dict[str, Tensor]
    metrics: dict[str, float]  # of the iteration
    rollouts: str
    scores: list[float]


def outcome(project: Path, out: Path, method: Method) -> Outcome:
    train(config_for(project, out, method))
    weights = {
        f"{model}/{name}": tensor
        for model in ("actor", "critic")[: 2 if method is Method.tempo else 1]
        for name, tensor in load_file(out / f"hf_step_00000001/{model}/model-00001.safetensors").items()
    }
    (line,) = read_metrics(out)
    metrics = {name: line[name] for name in line if name.startswith(("actor/", "critic/", "reward/", "advantage/"))}
    (dump,) = (out / "rollouts").iterdir()
    return Outcome(weights, metrics, dump.read_text(), [line["avg"] for line in read_evaluations(out)])


def both(tmp_path: Path, method: Method = Method.tempo) -> tuple[Outcome, Outcome]:
    """The same run on the same questions: with their right answers in the unlabelled file, and with a wrong one."""
    right = outcome(project_with(tmp_path / "right", target), tmp_path / "right-run", method)
    wrong = outcome(project_with(tmp_path / "wrong", lambda _: "48"), tmp_path / "wrong-run", method)
    return right, wrong


def unequal(right: Outcome, wrong: Outcome) -> list[str]:
    assert right.weights.keys() == wrong.weights.keys()
    return [name for name in right.weights if not torch.equal(right.weights[name], wrong.weights[name])]


@pytest.mark.long
@pytest.mark.parametrize("method", matrix(UNLABELLED, [Method.tempo, Method.ttrl_guard]))
def test_answers_of_the_unlabelled_set_change_scores_and_no_weight(tmp_path: Path, method: Method) -> None:
    right, wrong = both(tmp_path, method)
    assert unequal(right, wrong) == []
    assert right.metrics == wrong.metrics
    assert right.metrics["actor/grad_norm"] > 0
    assert (right.metrics.get("critic/grad_norm", 0.0) > 0) == (method is Method.tempo)
    assert right.rollouts == wrong.rollouts
    # The evaluation does read the answers, before and after.
    assert len(right.scores) == len(wrong.scores) == 2
    assert all(good > bad for good, bad in zip(right.scores, wrong.scores, strict=True))


@pytest.mark.long
def test_a_leak_changes_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "load_unlabelled", leaking("tokens"))
    right, wrong = both(tmp_path)
    assert any(name.startswith("actor/") for name in unequal(right, wrong))
