"""Completions into batches, verdicts, and the record that a run is replayed from."""

from __future__ import annotations

import dataclasses
import errno
import json
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_tempo.config.correction import CorrectionLevel
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError
from megatron_tempo.rewards.responses import View
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout import dump
from megatron_tempo.rollout.batches import Asked, Collected, ask, collect, receive, share_columns, summed_counts
from megatron_tempo.rollout.engine import Arrived, Request, Sampling
from megatron_tempo.rollout.group_answers import Asking, Between, StreamedAnswers
from megatron_tempo.rollout.verification import Verification, responses_of
from megatron_tempo.training.rollout_requests import uncorrected
from megatron_tempo.types import (
    Batch,
    Completion,
    LabelledPrompt,
    Owners,
    TokenCount,
    UnlabelledPrompt,
    seed_of,
)
from tests.support import gates
from tests.support.completions import batch_of, completion
from tests.support.engines import AnsweringEngine
from tests.support.ranks import run_ranks
from tests.support.tiny import WORDS, held_by, ragged_batch, write_model

ANSWER = "sentinel-answer"
LABELLED = [LabelledPrompt(f"l:{i}", f"{i} {i + 1}", (i, i + 1), ANSWER, "math") for i in range(3)]
UNLABELLED = [UnlabelledPrompt(f"u:{i}", f"{i}", (40 + i,)) for i in range(2)]
SAMPLING = Sampling(1.0, 9)


class CountingEngine(AnsweringEngine):
    """Answers each request by numbers that tell its seed, its prompt and the sample; the last request first."""

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


# Over the ranks


def batches_of(collected: Collected, labelled: int, held: Callable[[Batch], Tensor], *, classes: bool) -> list[Batch]:
    """The labelled and the unlabelled batch with the rows that `held` chooses, moved in windows of seven tokens."""
    parts = [
        collected.take(0, labelled, verdicts=True),
        collected.take(labelled, len(collected.prompts), classes=classes),
    ]
    assert collected.completions == {}, "they are moved"
    return [receive(part, held(part.columns), window=7) for part in parts]


def held_here(batch: Batch) -> Tensor:
    """Every second row on the second rank, all rows on the first, none on the third."""
    rank = dist.get_rank()
    return torch.arange(len(batch))[rank :: rank + 1] if rank < 2 else torch.zeros(0, dtype=torch.int64)


class OnTheFirst(CountingEngine):
    """As an engine of servers."""

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for i in reversed(range(len(requests) if dist.get_rank() == 0 else 0)):
            yield i, self.answer(requests[i], sampling)


def over_ranks(folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    result: dict[str, Any] = {"batches": {}}
    for engine in (CountingEngine(), OnTheFirst()):
        for by in (None, "math"):
            verifiers = EchoVerifiers()
            asked = ask(engine, [*LABELLED, *UNLABELLED], 3, SAMPLING, 5, "stage1", 0)
            collected = collect(asked, verifiers, tokenizer, by)
            batches = batches_of(collected, len(LABELLED), held_here, classes=by is not None)
            result["batches"][type(engine).__name__, by] = batches
            if by is not None:
                again = ask(engine, [*LABELLED, *UNLABELLED], 3, SAMPLING, 5, "stage1", 0)
                both = collect(again, EchoVerifiers(), tokenizer, by, labelled_too=True)
                taken = both.take(0, len(LABELLED), verdicts=True, classes=True)
                result["labelled_too", type(engine).__name__] = receive(taken, held_here(taken.columns), window=7)
            if isinstance(engine, CountingEngine) and not isinstance(engine, OnTheFirst):
                result[by] = verifiers.asked, verifiers.classed
    none = collect(ask(CountingEngine(), [], 3, SAMPLING), EchoVerifiers(), tokenizer)
    result["none"] = receive(none.take(0, 0), torch.zeros(0, dtype=torch.int64))
    dist.destroy_process_group()
    return result


@pytest.mark.long
def test_any_number_of_ranks_collects_the_same(tmp_path: Path) -> None:
    """Three ranks share five prompts, or the first has them all; each rank gets the rows that it holds."""
    folder = write_model(tmp_path / "model", tied=True, layers=1)
    ranks = run_ranks(over_ranks, 3, tmp_path / "ranks", folder)
    answers = [
        CountingEngine().answer(Request(tokens, 3, seed_of(5, "stage1", 0, i)), SAMPLING)
        for i, tokens in enumerate([(0, 1), (1, 2), (2, 3), (40,), (41,)])
    ]
    labelled = batch_of(LABELLED, answers[:3], [[1.0, 0.0, 1.0]] * 3)
    unlabelled = batch_of(UNLABELLED, answers[3:], None)
    classed_too = batch_of(UNLABELLED, answers[3:], None, [[None, 0, 0]] * 2)
    held = [torch.arange(9), torch.arange(1, 9, 2), torch.zeros(0, dtype=torch.int64)]
    for rank, rows in zip(ranks, held, strict=True):
        assert len(rank["batches"]) == 4
        for (_, by), batches in rank["batches"].items():
            wanted = [labelled, classed_too if by else unlabelled]
            for batch, whole in zip(batches, wanted, strict=True):
                assert_equal(batch, held_by(whole, rows[rows < len(whole)]))
        assert len(rank["none"]) == 0
        for name in ("CountingEngine", "OnTheFirst"):  # with verdicts and classes
            classed = dataclasses.replace(labelled, answer_class=torch.tensor([-1, 0, 0] * 3))
            assert_equal(rank["labelled_too", name], held_by(classed, rows))
    # Without classes none are asked for.
    assert all(rank[None][1] == [] for rank in ranks)
    # Each unlabelled prompt's responses are classed once, together, by what is said alone.
    classed = sorted(one for rank in ranks for one in rank["math"][1])
    assert [(verifier, prompt, len(texts)) for verifier, prompt, texts in classed] == [
        ("math", "0", 3),
        ("math", "1", 3),
    ]
    assert all(ANSWER not in text for one in classed for text in one[2])
    # No response is verified twice, and each with its own prompt's text and answer.
    asked = [item for rank in ranks for item in rank[None][0]]
    assert sorted(item.prompt for item in asked) == ["0 1"] * 3 + ["1 2"] * 3 + ["2 3"] * 3
    for item in asked:
        assert item.response.split()[1:-1] == item.prompt.split()
        assert (item.answer, item.verifier) == (ANSWER, "math")


class Keeping(EchoVerifiers):
    """Every response is right."""

    def score(self, items: Sequence[Item]) -> list[float]:
        self.asked += items
        return [1.0 for _ in items]


class ArrivingEngine(CountingEngine):
    """As an engine of servers, and its stream: answers arrive in a thread while nobody reads them."""

    nodes = None

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[tuple[int, list[Completion]]] = []
        self.cancelled: list[int] = []
        self.interrupted = False

    def start(
        self, requests: Sequence[Request], sampling: Sampling, arrived: Arrived | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        raise AssertionError("it is asked by a stream")

    def stream(self, sampling: Sampling, arrived: Arrived) -> ArrivingEngine:
        self.sampling, self.arrived = sampling, arrived
        return self

    def add(self, requests: Sequence[Request]) -> None:
        first = len(self.answers)
        new = [(first + i, self.answer(request, self.sampling)) for i, request in enumerate(requests)]
        self.answers += new
        self.arrival = threading.Thread(target=lambda: [self.arrived(*answer) for answer in new])
        self.arrival.start()

    def read(self, enough: Callable[[], bool]) -> Iterator[tuple[int, list[Completion]]]:
        self.arrival.join()
        while self.answers and not enough():
            yield self.answers.pop(0)

    def waiting(self) -> list[int]:
        return []

    def interrupt(self) -> None:
        self.interrupted = True

    def cancel(self, numbers: Collection[int]) -> None:
        self.cancelled += numbers


def streamed(
    engine: ArrivingEngine,
    verifiers: Verifiers,
    tokenizer: transformers.PreTrainedTokenizerBase,
    between: Between = Between.runs_on,
) -> tuple[StreamedAnswers, dict[int, tuple[int | None, int]]]:
    """Ask the five prompts. Returns also the dict that gets the finished ones."""
    told: dict[int, tuple[int | None, int]] = {}

    def finished(key: int, oldest: int | None, tokens: int) -> None:
        told[key] = oldest, tokens

    verification = Verification(verifiers, tokenizer, "math")
    answers = StreamedAnswers(engine, SAMPLING, verification, finished, between=between)
    prompts = [*LABELLED, *UNLABELLED]
    answers.ask([Asking(i, prompt, Request(prompt.token_ids, 3, i), 0) for i, prompt in enumerate(prompts)])
    return answers, told


def test_streamed_answers_are_verified_as_they_arrive(
    single: None, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Two groups are collected when three are there; one of the others is not wanted any more."""
    engine, verifiers, prompts = ArrivingEngine(), EchoVerifiers(), [*LABELLED, *UNLABELLED]
    answers, told = streamed(engine, verifiers, tokenizer)
    engine.arrival.join()
    answers._verification.results()  # nothing is read yet
    assert (len(verifiers.asked), len(verifiers.classed)) == (9, 2)
    answers.read(lambda: len(told) == 3)
    assert sorted(told) == [0, 1, 2]
    assert {oldest for oldest, _ in told.values()} == {2}
    collected = answers.collect([2, 0], [prompts[2], prompts[0]])
    assert collected.columns.prompt_ids == (LABELLED[2].id,) * 3 + (LABELLED[0].id,) * 3
    assert collected.columns.correct is not None
    assert collected.columns.correct.tolist() == [1.0, 0.0, 1.0] * 2
    answers.forget([1, 3])
    assert engine.cancelled == [3], "the other one is answered"
    answers.read(lambda: 4 in told)
    assert sorted(told) == [0, 1, 2, 4], "what is not wanted is not told of"
    later = answers.collect([4], [prompts[4]]).columns
    assert later.answer_class is not None
    assert later.answer_class.tolist() == [-1, 0, 0]
    assert answers._completions == {}
    answers.close()


@pytest.mark.parametrize(("between", "read"), [(Between.runs_on, 1), (Between.has_ended, 5), (Between.interrupted, 1)])
def test_servers_that_share_the_trainers_gpus_have_nothing_to_do_while_it_trains(
    single: None, tokenizer: transformers.PreTrainedTokenizerBase, between: Between, read: int
) -> None:
    engine = ArrivingEngine()
    answers, told = streamed(engine, EchoVerifiers(), tokenizer, between)
    answers.read(lambda: len(told) == 1)
    assert (len(told), engine.interrupted) == (read, between is Between.interrupted)
    answers.close()


def test_a_judge_that_fails_early_fails_the_collection(
    single: None, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    verifiers = EchoVerifiers()
    verifiers.score = unanswered  # type: ignore[method-assign]
    answers, told = streamed(ArrivingEngine(), verifiers, tokenizer)
    answers.read(lambda: 0 in told)
    with pytest.raises(EngineError, match="the judge gave no answer"):
        answers.collect([0], [LABELLED[0]])
    answers.close()


def unanswered(_: Sequence[Item]) -> list[float]:
    raise EngineError("the judge gave no answer")


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
    collected = collect(asked, verifiers, tokenizer).take(0, 1, verdicts=True)
    assert_equal(receive(collected, torch.arange(1)), batch_of([prompt], [[answer]], [[1.0]]))
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


def noted(calls: list[tuple[str, int]], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(first: Any, *args: Any, **given: Any) -> Any:
        calls.append((name, first.nbytes if isinstance(first, Tensor) else -1))
        return call(first, *args, **given)

    return counted


def counted_calls(folder: Path) -> tuple[list[tuple[str, int]], int, int]:
    """The collective calls of a collection of which each rank holds a share, with their bytes; bytes and rows held."""
    dist.init_process_group("gloo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list"):
            monkeypatch.setattr(dist, name, noted(calls, name, getattr(dist, name)))
        asked = ask(OnTheFirst(), [*LABELLED, *UNLABELLED], 4, SAMPLING)
        part = collect(asked, Keeping(), tokenizer).take(0, 5)
        held = torch.arange(20)[dist.get_rank() :: dist.get_world_size()]
        batch = receive(part, held, window=40)
    dist.destroy_process_group()
    return calls, batch.response_tokens.nbytes + batch.engine_logprobs.nbytes, len(batch.held)


def test_calls_and_their_bytes_do_not_grow_with_the_ranks(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tied=True, layers=1)
    two, four = (run_ranks(counted_calls, world, tmp_path / str(world), folder) for world in (2, 4))
    lengths = [3 + len(prompt.token_ids) - 1 + sample % 2 for prompt in LABELLED + UNLABELLED for sample in range(4)]
    for ranks in (two, four):
        assert all(calls == two[0][0] for calls, _, _ in ranks)
        # Every token is held once: 8 bytes each.
        assert sum(held for _, held, _ in ranks) == 8 * sum(lengths)
        assert [rows for _, _, rows in ranks] == [20 // len(ranks)] * len(ranks)
    # Whether a rank failed; the answers to each prompt; columns and runs of versions of each row; three windows.
    assert sum(lengths) == 82
    assert [name for name, _ in two[0][0]] == ["all_reduce"] * 4 + ["broadcast"] * 3
    sizes = [size for _, size in two[0][0]]
    assert sizes[:4] == [8, 5 * 3 * 8, 20 * 8 * 8, (20 + 5) * 2 * 8]
    assert max(sizes[4:]) <= 40 * 8
    assert sum(sizes[4:]) == 82 * 8


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
        "versions": [[0, 40, 2], [0, 41, 1], [1, 41, 1]], "correct": [1.0, 0.0], "answer_class": None,
        "held": [0, 1], "owners": None, "experts": None,
    }  # fmt: skip
    assert {name: value.dtype for name, value in fields.items() if isinstance(value, Tensor)} == {
        "group": torch.int64, "prompt_tokens": torch.int32, "prompt_lengths": torch.int64,
        "response_tokens": torch.int32, "response_lengths": torch.int64, "engine_logprobs": torch.float32,
        "stopped": torch.bool, "versions": torch.int64, "correct": torch.float32, "held": torch.int64,
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
    """Each row with all that is known of it; tokens only of the held ones."""
    logprobs = batch.engine_logprobs.split(batch.held_responses.tolist())
    tokens = dict(zip(batch.held.tolist(), zip(batch.prompts(), batch.responses(), logprobs, strict=True), strict=True))
    return [
        (batch.prompt_ids[i], [part.tolist() for part in tokens.get(i, ())], bool(batch.stopped[i]),
         int(batch.prompt_lengths[i]), int(batch.response_lengths[i]),
         batch.versions[batch.versions[:, 0] == i, 1:].tolist(),
         None if batch.owners is None else (int(batch.owners.actor[i]), int(batch.owners.critic[i])),
         None if batch.correct is None else float(batch.correct[i]),
         None if batch.answer_class is None else int(batch.answer_class[i]))
        for i in range(len(batch))
    ]  # fmt: skip


@pytest.mark.parametrize("held", [range(8), [0, 3, 6, 7], []], ids=["all", "some", "none"])
def test_selected_and_joined_rows_are_the_rows(held: Sequence[int]) -> None:
    batch = dataclasses.replace(ragged_batch(8), answer_class=torch.tensor([0, 1, 0, -1, 0, 0, 2, 1]))
    batch.stopped[3] = False
    runs = torch.cat([torch.tensor([[row, 7, 1], [row, 8 + row, 2]]) for row in range(8)])  # as if of two versions each
    owners = Owners(torch.arange(8) % 3, torch.arange(8) % 2)
    batch = held_by(dataclasses.replace(batch, versions=runs, owners=owners), torch.tensor(held, dtype=torch.int64))
    assert [bool(tokens) for _, tokens, *_ in rows_of(batch)] == [row in held for row in range(8)]
    order = [6, 0, 3, 3]
    assert rows_of(batch.select(torch.tensor(order))) == [rows_of(batch)[i] for i in order]
    assert batch.select(torch.tensor(order)).group.tolist() == [3, 0, 1, 1]
    empty = batch.select(torch.zeros(0, dtype=torch.int64))
    assert len(empty) == 0
    assert rows_of(empty) == []

    other = held_by(ragged_batch(4, seed=9), torch.tensor([1, 2]))
    other = dataclasses.replace(other, owners=Owners(torch.arange(4), torch.arange(4)))
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
    write(path_of_dump, rollouts, tokenizer)
    return path_of_dump


def write(path: Path, batches: Sequence[Batch | None], tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Write labelled and unlabelled rollouts in windows of two rows."""
    with dump.Recorder(path, tokenizer) as recorder:
        for prompts, batch in zip((LABELLED, UNLABELLED), batches, strict=True):
            if batch is None:
                continue
            watch, rows = recorder.of(prompts, batch), torch.arange(len(batch))
            for pair in rows.split(2):
                part = batch.select(pair)
                watch(range(int(pair[0]), int(pair[-1]) + 1), part.response_tokens, part.engine_logprobs)


def read(
    path: Path, labelled: list[LabelledPrompt], unlabelled: list[UnlabelledPrompt], *, classes: bool = False
) -> list[Batch | None]:
    """What a run of one process replays."""
    collected = share_columns([*labelled, *unlabelled], dump.read(path, labelled, unlabelled, 2, classes=classes))
    parts = [
        collected.take(0, len(labelled), verdicts=True),
        collected.take(len(labelled), len(collected.prompts), classes=classes),
    ]
    return [receive(part, torch.arange(len(part.columns))) if part.prompts else None for part in parts]


def assert_equal(batch: Batch | None, wanted: Batch) -> None:
    assert batch is not None
    for field in dataclasses.fields(wanted):
        mine, theirs = getattr(batch, field.name), getattr(wanted, field.name)
        if isinstance(theirs, Tensor):
            assert isinstance(mine, Tensor), field.name
            assert mine.dtype == theirs.dtype, field.name
            assert torch.equal(mine, theirs), field.name
        else:
            assert mine == theirs, field.name


def test_what_is_written_is_read_bit_by_bit(single: None, rollouts: tuple[Batch, Batch], path: Path) -> None:
    assert path.name == "stage2-000012.jsonl"
    labelled, unlabelled = read(path, LABELLED, UNLABELLED)
    assert_equal(labelled, rollouts[0])
    assert_equal(unlabelled, rollouts[1])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_may_be_absent(
    single: None,
    rollouts: tuple[Batch, Batch],
    tokenizer: transformers.PreTrainedTokenizerBase,
    tmp_path: Path,
    which: int,
) -> None:
    path = tmp_path / "x.jsonl"
    write(path, [rollouts[0] if which == 0 else None, rollouts[1] if which == 1 else None], tokenizer)
    batches = read(path, LABELLED if which == 0 else [], UNLABELLED if which == 1 else [])
    assert_equal(batches[which], rollouts[which])
    assert batches[1 - which] is None


class Full:
    """A file on a disk that is full from the third line on."""

    def __init__(self) -> None:
        self.lines = 0

    def write(self, line: bytes) -> None:
        self.lines += 1
        if self.lines == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        assert self.lines < 3, "nothing is written after a failure"


def failing(path: Path, rollouts: tuple[Batch, Batch], tokenizer: Any, passed: list[int]) -> None:
    with dump.Recorder(path, tokenizer) as recorder:
        recorder._file = Full()  # type: ignore[assignment]
        watch = recorder.of(LABELLED, rollouts[0])
        for row in range(len(rollouts[0])):
            part = rollouts[0].select(torch.tensor([row]))
            watch(range(row, row + 1), part.response_tokens, part.engine_logprobs)
            passed.append(row)


def test_a_file_that_cannot_be_written_is_told_of_at_the_end(
    rollouts: tuple[Batch, Batch], tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The other ranks wait in the next window meanwhile."""
    passed: list[int] = []
    with pytest.raises(OSError, match="No space left"):
        failing(tmp_path / "x.jsonl", rollouts, tokenizer, passed)
    assert passed == [0, 1, 2, 3, 4, 5]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "rollouts").touch()  # a file, where a folder is wanted
    with pytest.raises(OSError, match="rollouts"):
        failing(tmp_path / "rollouts/x.jsonl", rollouts, tokenizer, passed)
    assert passed == [0, 1, 2, 3, 4, 5] * 2


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


def test_separators_of_lines_in_responses(path: Path) -> None:
    """A response may hold Unicode's separators, which JSON does not escape."""
    wanted = dump.read(path, LABELLED, UNLABELLED, 2)
    lines = [json.loads(line) | {"response": "a\u2028b\u2029c\u0085d"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    found = dump.read(path, LABELLED, UNLABELLED, 2)
    assert found.verdicts == wanted.verdicts
    lengths = [[len(one.token_ids) for of in answers.completions.values() for one in of] for answers in (found, wanted)]
    assert lengths[0] == lengths[1]


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


def test_a_verdict_on_an_unlabelled_prompt_is_not_read(single: None, path: Path) -> None:
    change(path, 8, lambda line: line.update(correct=1.0))
    assert set(dump.read(path, LABELLED, UNLABELLED, 2).verdicts) == {0, 1, 2}
    _, unlabelled = read(path, LABELLED, UNLABELLED)
    assert unlabelled is not None
    assert unlabelled.correct is None


@pytest.fixture
def classed(
    rollouts: tuple[Batch, Batch], tokenizer: transformers.PreTrainedTokenizerBase, tmp_path: Path
) -> tuple[Path, Batch]:
    """A record with the classes of the unlabelled prompts' answers."""
    unlabelled = dataclasses.replace(rollouts[1], answer_class=torch.tensor([0, -1, 0, 1]))
    path = tmp_path / "classed.jsonl"
    write(path, [rollouts[0], unlabelled], tokenizer)
    return path, unlabelled


def test_classes_are_written_and_read(single: None, classed: tuple[Path, Batch], rollouts: tuple[Batch, Batch]) -> None:
    path, wanted = classed
    labelled, unlabelled = read(path, LABELLED, UNLABELLED, classes=True)
    assert_equal(labelled, rollouts[0])
    assert_equal(unlabelled, wanted)
    _, unasked = read(path, LABELLED, UNLABELLED)
    assert_equal(unasked, rollouts[1])


@pytest.mark.parametrize("value", [None, -2, "0", True])
def test_a_record_without_classes_is_refused_where_they_are_needed(classed: tuple[Path, Batch], value: object) -> None:
    change(classed[0], 9, lambda line: line.update(answer_class=value))
    with pytest.raises(ValueError, match=rf"classed\.jsonl, line 9 has the answer_class {value!r}"):
        dump.read(classed[0], LABELLED, UNLABELLED, 2, classes=True)


def test_replayed_rollouts_that_are_older_than_their_iteration_want_a_correction() -> None:
    batch = gates.rows_of([[(2, 3), (4, 1)], [(4, 2)]], [0.0, 0.0])
    stage = Config().stage2
    assert uncorrected(batch, "stage2", stage, 2) is None
    said = uncorrected(batch, "stage2", stage, 4)
    assert said is not None
    assert "tokens that are 2 iterations old" in said
    assert "set stage2.actor.correction as" in said
    stage.actor.correction.level = CorrectionLevel.token
    assert uncorrected(batch, "stage2", stage, 4) is None
