"""Completions into batches, verdicts, and the record that a run is replayed from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_tempo.errors import EngineError
from megatron_tempo.rewards.responses import View
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout import dump
from megatron_tempo.rollout.batches import Asked, ask, batch_of, collect, summed_counts
from megatron_tempo.rollout.engine import EngineWork, Request, Sampling
from megatron_tempo.rollout.verification import responses_of
from megatron_tempo.types import (
    Batch,
    Completion,
    EngineHealth,
    LabelledPrompt,
    TokenCount,
    UnlabelledPrompt,
    Weights,
    seed_of,
)
from tests.support.completions import completion, plains
from tests.support.ranks import run_ranks
from tests.support.tiny import WORDS, ragged_batch, write_model

ANSWER = "sentinel-answer"
LABELLED = [LabelledPrompt(f"l:{i}", f"{i} {i + 1}", (i, i + 1), ANSWER, "math") for i in range(3)]
UNLABELLED = [UnlabelledPrompt(f"u:{i}", f"{i}", (40 + i,)) for i in range(2)]
SAMPLING = Sampling(1.0, 9)


class CountingEngine:
    """Answers each request by numbers that tell its seed, its prompt and the sample; the last request first."""

    counted, replicas, work = TokenCount(), 1, EngineWork()

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for i in reversed(range(dist.get_rank(), len(requests), dist.get_world_size())):
            yield i, self.answer(requests[i], sampling)

    def answer(self, request: Request, sampling: Sampling) -> list[Completion]:
        return [self.sampled(request, sampling, sample) for sample in range(request.samples)]

    @staticmethod
    def sampled(request: Request, sampling: Sampling, sample: int) -> Completion:
        end = (WORDS.index("$"),) * (sample % 2)
        tokens = (request.seed % 50, *request.token_ids, sample, *end)[: sampling.max_tokens]
        return completion(
            tokens,
            [-0.1 * (t + 1) for t in range(len(tokens))],
            "stop" if end else "length",
            ((3, len(tokens)),) if sample else ((2, 1), (3, len(tokens) - 1)),
        )

    def load_weights(self, weights: Weights, version: int) -> None:
        raise NotImplementedError

    def differences(self, weights: Weights) -> list[tuple[str, float]]:
        raise NotImplementedError

    def health(self) -> list[EngineHealth]:
        raise NotImplementedError

    def close(self) -> None: ...


class EchoVerifiers(Verifiers):
    """Right is a response whose decoded text ends in an even number. Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Item] = []
        self.classed: list[tuple[str, str, tuple[str, ...]]] = []

    def score(self, items: Sequence[Item]) -> list[float]:
        self.asked += items
        return [float(int(item.response.split()[-1]) % 2 == 0) for item in items]

    def classes(self, verifier: str, prompt: str, responses: Sequence[str]) -> list[int | None]:
        self.classed.append((verifier, prompt, tuple(responses)))
        return [None, 0, 0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    folder = write_model(tmp_path_factory.mktemp("model"), tied=True, layers=1)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def single() -> Any:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Over the ranks


def over_ranks(folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    engine, verifiers = CountingEngine(), EchoVerifiers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = ask(engine, [*LABELLED, *UNLABELLED], 3, SAMPLING, 5, "stage1", 0)
    completions, verdicts, unread = collect(asked, verifiers, tokenizer)
    assert verifiers.classed == []
    asked = ask(engine, [*LABELLED, *UNLABELLED], 3, SAMPLING, 5, "stage1", 0)
    with_classes = collect(asked, verifiers, tokenizer, "math")
    verifiers.asked = verifiers.asked[: len(verifiers.asked) // 2]
    none = collect(ask(engine, [], 3, SAMPLING), verifiers, tokenizer)
    dist.destroy_process_group()
    return {"completions": plains(completions), "verdicts": verdicts, "asked": verifiers.asked, "none": none,
            "unread": unread, "classes": with_classes.classes, "classed": verifiers.classed,
            "same": plains(with_classes.completions) == plains(completions) and with_classes.verdicts == verdicts,
            }  # fmt: skip


@pytest.mark.long
def test_any_number_of_ranks_collects_the_same(tmp_path: Path) -> None:
    """Two ranks share five prompts; each rank gets everything, in the prompts' order."""
    folder = write_model(tmp_path / "model", tied=True, layers=1)
    ranks = run_ranks(over_ranks, 2, tmp_path / "ranks", folder)
    wanted = [
        CountingEngine().answer(Request(tokens, 3, seed_of(5, "stage1", 0, i)), SAMPLING)
        for i, tokens in enumerate([(0, 1), (1, 2), (2, 3), (40,), (41,)])
    ]
    for rank in ranks:
        assert rank["completions"] == plains(wanted)
        assert rank["verdicts"] == [[1.0, 0.0, 1.0]] * 3 + [[]] * 2
        assert rank["none"] == ([], [], [])
        assert rank["unread"] == [[]] * 5
        assert rank["classes"] == [[]] * 3 + [[None, 0, 0]] * 2
        assert rank["same"]
    # Each unlabelled prompt's responses are classed once, together, by what is said alone.
    classed = sorted(one for rank in ranks for one in rank["classed"])
    assert [(verifier, prompt, len(texts)) for verifier, prompt, texts in classed] == [
        ("math", "0", 3),
        ("math", "1", 3),
    ]
    assert all(ANSWER not in text for one in classed for text in one[2])
    # No response is verified twice, and each with its own prompt's text and answer.
    asked = [item for rank in ranks for item in rank["asked"]]
    assert sorted(item.prompt for item in asked) == ["0 1"] * 3 + ["1 2"] * 3 + ["2 3"] * 3
    for item in asked:
        assert item.response.split()[1:-1] == item.prompt.split()
        assert (item.answer, item.verifier) == (ANSWER, "math")


class Keeping(EchoVerifiers):
    """Every response is right."""

    def score(self, items: Sequence[Item]) -> list[float]:
        self.asked += items
        return [1.0 for _ in items]


@pytest.mark.parametrize(
    ("verifier", "reason", "seen"),
    [
        ("math", "stop", "4 7"),
        ("math", "length", "4 7 $"),
        ("choice", "stop", "4 7"),
        ("countdown", "stop", "4 7 $"),
    ],
)
def test_a_verifier_sees_no_end_token_but_where_it_is_part_of_the_answer(
    single: None, tokenizer: transformers.PreTrainedTokenizerBase, verifier: str, reason: str, seen: str
) -> None:
    """The end token goes by its place: no list of end tokens has the quickstart's `$`."""
    verifiers = Keeping()
    answer = completion((4, 7, WORDS.index("$")), (-0.1, -0.2, -0.3), reason)
    prompt = dataclasses.replace(LABELLED[0], verifier=verifier)
    asked = Asked([prompt], iter([(0, [answer])]))
    completions, verdicts, classes = collect(asked, verifiers, tokenizer)
    assert (plains(completions), verdicts, classes) == (plains([[answer]]), [[1.0]], [[]])
    assert [item.response for item in verifiers.asked] == [seen]


def test_a_thought_that_the_prompt_began_is_a_thought_of_the_response() -> None:
    class Letters:
        """A tokenizer of which each token is a letter."""

        @staticmethod
        def decode(tokens: Sequence[int]) -> str:
            return "".join(map(chr, tokens))

    prompt = UnlabelledPrompt("a", "How many?", tuple(map(ord, "How many?<bot><think>\n")))
    answer = completion(list(map(ord, "4?</think>5$")), (), "stop", ())
    for view, text in ((View.answer, "<think>4?</think>5"), (View.response, "4?</think>5"),
                       (View.everything, "4?</think>5$")):  # fmt: skip
        assert [*responses_of(prompt, [answer], "math").texts(Letters(), view)] == [text]
    plain = dataclasses.replace(prompt, token_ids=tuple(map(ord, "How many?")))
    assert [*responses_of(plain, [answer], "math").texts(Letters(), View.answer)] == ["4?</think>5"]


def test_counts_are_summed_over_what_each_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [{"math/timeouts": 2, "math/failures": 0}, {}, {"math/timeouts": 1, "math/failures": 4}]

    def gather(into: list[Any], mine: dict[str, int]) -> None:
        into[:] = [mine, *shares[1:]]

    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    verifiers = Keeping()
    verifiers.take_counts = lambda: shares[0]  # type: ignore[method-assign]
    assert summed_counts(verifiers) == {"math/timeouts": 3, "math/failures": 4}


class FailingVerifiers(EchoVerifiers):
    """As a judge that went down for one rank."""

    threads = 3

    def score(self, items: Sequence[Item]) -> list[float]:
        if dist.get_rank() == 1:
            raise EngineError("the judge gave no answer")
        return [1.0 for _ in items]


def without_answers(asked: Asked) -> Asked:
    """On the second rank, as of an engine whose logits are not finite there."""

    def fail() -> Iterator[tuple[int, list[Completion]]]:
        raise EngineError("the engine's logits are not finite")
        yield

    return Asked(asked.prompts, fail()) if dist.get_rank() == 1 else asked


@pytest.mark.long
def with_a_failure(folder: Path, failing: str) -> tuple[str, list[int]]:
    dist.init_process_group("gloo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = ask(CountingEngine(), LABELLED, 3, SAMPLING)
    try:
        if failing == "engine":
            collect(without_answers(asked), EchoVerifiers(), tokenizer)
        else:
            collect(asked, FailingVerifiers(), tokenizer)
        message = "nothing"
    except EngineError as error:
        message = str(error)
    together = [0, 0]
    dist.all_gather_object(together, dist.get_rank())  # what a checkpoint does next
    dist.destroy_process_group()
    return message, together


@pytest.mark.parametrize(
    ("failing", "words"),
    [("verifier", "the judge gave no answer"), ("engine", "the engine's logits are not finite")],
)
def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path, failing: str, words: str) -> None:
    folder = write_model(tmp_path / "model", tied=True, layers=1)
    ranks = run_ranks(with_a_failure, 2, tmp_path / "ranks", folder, failing)
    assert ranks == [(words, [0, 1])] * 2


# Batches


def test_a_batch_by_hand() -> None:
    """The example of `Batch`: prompts (5, 6) and (7,), responses (1, 2, 3) and (4,)."""
    prompts = [LabelledPrompt("a", "", (5, 6), "1", "math"), LabelledPrompt("b", "", (7,), "1", "math")]
    completions = [
        [completion((1, 2, 3), (-0.1, -0.2, -0.3), "stop", ((40, 2), (41, 1)))],
        [completion((4,), (-0.4,), "length", ((41, 1),))],
    ]
    batch = batch_of(prompts, completions, [[1.0], [0.0]])
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in fields.items()}
    assert plain == {
        "prompt_ids": ("a", "b"), "group": [0, 1], "prompt_tokens": [5, 6, 7], "prompt_lengths": [2, 1],
        "response_tokens": [1, 2, 3, 4], "response_lengths": [3, 1],
        "engine_logprobs": pytest.approx([-0.1, -0.2, -0.3, -0.4]), "stopped": [True, False],
        "versions": [40, 40, 41, 41], "correct": [1.0, 0.0], "answer_class": None,
    }  # fmt: skip
    assert {name: value.dtype for name, value in fields.items() if isinstance(value, Tensor)} == {
        "group": torch.int64, "prompt_tokens": torch.int64, "prompt_lengths": torch.int64,
        "response_tokens": torch.int64, "response_lengths": torch.int64, "engine_logprobs": torch.float32,
        "stopped": torch.bool, "versions": torch.int32, "correct": torch.float32,
    }  # fmt: skip
    assert [row.tolist() for row in batch.rows()] == [[5, 6, 1, 2, 3], [7, 4]]
    assert batch_of(prompts, completions, None).correct is None
    classes = batch_of(prompts, completions, None, [[None], [3]]).answer_class
    assert classes is not None
    assert classes.dtype == torch.int64
    assert classes.tolist() == [-1, 3]


def test_samples_of_a_prompt_are_a_group_also_where_a_prompt_comes_twice() -> None:
    answer = completion((1,), (-0.1,))
    batch = batch_of([UNLABELLED[0], UNLABELLED[1], UNLABELLED[0]], [[answer] * 2] * 3, None)
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.prompt_ids == ("u:0", "u:0", "u:1", "u:1", "u:0", "u:0")


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    logprobs = batch.engine_logprobs.split(batch.response_lengths.tolist())
    versions = batch.versions.split(batch.response_lengths.tolist())
    return [
        (batch.prompt_ids[i], prompt.tolist(), response.tolist(), logprobs[i].tolist(), bool(batch.stopped[i]),
         versions[i].tolist(),
         None if batch.correct is None else float(batch.correct[i]),
         None if batch.answer_class is None else int(batch.answer_class[i]))
        for i, (prompt, response) in enumerate(zip(batch.prompts(), batch.responses(), strict=True))
    ]  # fmt: skip


def test_selected_and_joined_rows_are_the_rows() -> None:
    batch = dataclasses.replace(ragged_batch(8), answer_class=torch.tensor([0, 1, 0, -1, 0, 0, 2, 1]))
    batch.stopped[3] = False
    order = [6, 0, 3, 3]
    assert rows_of(batch.select(torch.tensor(order))) == [rows_of(batch)[i] for i in order]
    assert batch.select(torch.tensor(order)).group.tolist() == [3, 0, 1, 1]
    empty = batch.select(torch.zeros(0, dtype=torch.int64))
    assert len(empty) == 0
    assert rows_of(empty) == []

    other = ragged_batch(4, seed=9)
    joined = Batch.join(batch, other)
    assert rows_of(joined) == [(*row[:-2], None, None) for row in rows_of(batch) + rows_of(other)]
    assert joined.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert rows_of(Batch.join(empty, other)) == [(*row[:-2], None, None) for row in rows_of(other)]


def test_padding_is_measured_from_an_earlier_count() -> None:
    count, other = TokenCount(), TokenCount(7, 2)
    earlier = TokenCount.total([count, other])
    count.add(10, 3)
    count.add(5, 0)
    assert count == TokenCount(15, 3)
    assert earlier == TokenCount(7, 2)
    assert TokenCount.total([count, other]) == TokenCount(22, 5)
    assert TokenCount.total([count, other]).padding_since(earlier) == 3 / 15
    assert count.padding_since(count) == 0.0


# The record


@pytest.fixture
def rollouts() -> tuple[Batch, Batch]:
    engine = CountingEngine()

    def completions(prompts: Sequence[LabelledPrompt | UnlabelledPrompt]) -> list[list[Completion]]:
        return [engine.answer(Request(prompt.token_ids, 2, i), SAMPLING) for i, prompt in enumerate(prompts)]

    labelled = batch_of(LABELLED, completions(LABELLED), [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    labelled.engine_logprobs.copy_(torch.rand(len(labelled.engine_logprobs)).log())  # numbers of no short decimal form
    return labelled, batch_of(UNLABELLED, completions(UNLABELLED), None)


@pytest.fixture
def path(rollouts: tuple[Batch, Batch], tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    path_of_dump = dump.path_of(tmp_path / "rollouts", "stage2", 12)
    dump.write(path_of_dump, *rollouts, tokenizer)
    return path_of_dump


def assert_equal(batch: Batch | None, wanted: Batch) -> None:
    assert batch is not None
    for field in dataclasses.fields(wanted):
        mine, theirs = getattr(batch, field.name), getattr(wanted, field.name)
        if isinstance(theirs, Tensor):
            assert mine.dtype == theirs.dtype, field.name
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


def test_what_is_written_is_read_bit_by_bit(rollouts: tuple[Batch, Batch], path: Path) -> None:
    assert path.name == "stage2-000012.jsonl"
    labelled, unlabelled = dump.read(path, LABELLED, UNLABELLED, 2)
    assert_equal(labelled, rollouts[0])
    assert_equal(unlabelled, rollouts[1])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_may_be_absent(
    rollouts: tuple[Batch, Batch], tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path, which: int
) -> None:
    path = tmp_path / "x.jsonl"
    dump.write(path, rollouts[0] if which == 0 else None, rollouts[1] if which == 1 else None, tokenizer)
    batches = dump.read(path, LABELLED if which == 0 else [], UNLABELLED if which == 1 else [], 2)
    assert_equal(batches[which], rollouts[which])
    assert batches[1 - which] is None


def test_a_record_shows_text_and_no_answers(path: Path) -> None:
    text = path.read_text()
    assert ANSWER not in text
    first = json.loads(text.splitlines()[0])
    assert first.keys() == {
        "prompt_id", "prompt_tokens", "response", "response_tokens", "logprobs", "versions", "stopped", "correct"
    }  # fmt: skip
    assert first["response"].split() == [WORDS[token] for token in first["response_tokens"]]
    assert [json.loads(line)["correct"] for line in text.splitlines()] == [1, 0, 0, 0, 1, 1, None, None, None, None]


def change(path: Path, number: int, edit: Callable[[dict[str, Any]], object]) -> None:
    lines = path.read_text().splitlines()
    line = json.loads(lines[number - 1])
    edit(line)
    lines[number - 1] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")


def test_another_number_of_responses_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage2-000012\.jsonl has 10 responses, this run needs 15"):
        dump.read(path, LABELLED, UNLABELLED, 3)
    with pytest.raises(ValueError, match=r"has 10 responses, this run needs 8"):
        dump.read(path, LABELLED, UNLABELLED[:1], 2)


def test_other_prompts_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage2-000012\.jsonl, line 1 answers 'l:0', this run asks 'l:1'"):
        dump.read(path, LABELLED[1:] + LABELLED[:1], UNLABELLED, 2)
    with pytest.raises(ValueError, match=r"line 7 answers 'u:0', this run asks 'u:1'"):
        dump.read(path, LABELLED, UNLABELLED[::-1], 2)


def test_a_record_that_is_not_there_is_named(path: Path) -> None:
    other = dump.path_of(path.parent, "stage2", 13)
    with pytest.raises(ValueError, match=r"rollout\.replay: .*stage2-000013\.jsonl is not there"):
        dump.read(other, LABELLED, UNLABELLED, 2)


def test_a_line_that_is_cut_short_is_named(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[:-40])
    with pytest.raises(ValueError, match=r"stage2-000012\.jsonl, line 10"):
        dump.read(path, LABELLED, UNLABELLED, 2)


@pytest.mark.parametrize(
    "edit",
    [
        lambda line: line.pop("logprobs"),
        lambda line: line["logprobs"].pop(),
        lambda line: line.update(response_tokens=[]),
        lambda line: line.update(correct=None),  # of a labelled prompt
    ],
    ids=["no-logprobs", "one-logprob-less", "no-tokens", "no-verdict"],
)
def test_a_line_that_holds_no_response_is_named(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    change(path, 4, edit)
    with pytest.raises(ValueError, match=r"stage2-000012\.jsonl, line 4"):
        dump.read(path, LABELLED, UNLABELLED, 2)


def test_a_verdict_on_an_unlabelled_prompt_is_not_read(path: Path) -> None:
    change(path, 8, lambda line: line.update(correct=1.0))
    _, unlabelled = dump.read(path, LABELLED, UNLABELLED, 2)
    assert unlabelled is not None
    assert unlabelled.correct is None


@pytest.fixture
def classed(
    rollouts: tuple[Batch, Batch], tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path
) -> tuple[Path, Batch]:
    """A record with the classes of the unlabelled prompts' answers."""
    unlabelled = dataclasses.replace(rollouts[1], answer_class=torch.tensor([0, -1, 0, 1]))
    path = tmp_path / "classed.jsonl"
    dump.write(path, rollouts[0], unlabelled, tokenizer)
    return path, unlabelled


def test_classes_are_written_and_read(classed: tuple[Path, Batch], rollouts: tuple[Batch, Batch]) -> None:
    path, wanted = classed
    labelled, unlabelled = dump.read(path, LABELLED, UNLABELLED, 2, classes=True)
    assert_equal(labelled, rollouts[0])
    assert_equal(unlabelled, wanted)
    _, unasked = dump.read(path, LABELLED, UNLABELLED, 2)
    assert_equal(unasked, rollouts[1])


@pytest.mark.parametrize("value", [None, -2, "0", True])
def test_a_record_without_classes_is_refused_where_they_are_needed(classed: tuple[Path, Batch], value: object) -> None:
    change(classed[0], 9, lambda line: line.update(answer_class=value))
    with pytest.raises(ValueError, match=rf"classed\.jsonl, line 9 has the answer_class {value!r}"):
        dump.read(classed[0], LABELLED, UNLABELLED, 2, classes=True)
