"""What a verifier sees of a response, the process that decodes long ones, and verification while answers come."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_tempo.config.extensions import Extension
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rewards import choice, grid, text, verifiers
from megatron_tempo.rewards.answers import tail
from megatron_tempo.rewards.endings import behind_thoughts, without_end
from megatron_tempo.rewards.math import RESPONSE_CHARS, MathScorer
from megatron_tempo.rewards.math_pool import Worker
from megatron_tempo.rewards.responses import Responses, View, seen
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.statement import stated
from megatron_tempo.rewards.text_process import STARTS, TextProcess
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout import verifying_nodes
from megatron_tempo.rollout.supervisor import private_store
from megatron_tempo.rollout.verification import Verification, responses_of
from megatron_tempo.rollout.verifying_nodes import Lane, Node, VerifyingNodes, serve
from megatron_tempo.types import Completion, LabelledPrompt, UnlabelledPrompt
from tests.support.completions import completion

PROMPT = "Which?\n(A) one\n(B) two"
LONG = " and so it goes on, 1, 2, {x}" * (RESPONSE_CHARS // 20)
PIECES = (
    *("<think>", "</think>", "<thinking>", "[THINK]", "[/THINK]", "◁/think▷", "<|channel|>analysis<|message|>"),
    *("<|channel|>final<|message|>", r"\boxed{A}", r"\boxed{12", "}", "\nAnswer: B\n", "The answer is B.", "#### 7\n"),
    *(
        "<answer>two</answer>",
        "<|im_end|>",
        "</s>",
        " \n",
        "x",
        "{",
        '{"House 1": {"Name": "Eric"}}',
        "\n\n",
        LONG,
        LONG,
        LONG,
    ),
    *("é", "数", "🙂", "\n| House | Name |\n|-|-|\n| 1 | Bob |\n"),
)


def made_up(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(0, 12)))


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Each byte is a token, so that characters are split between tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def encoded(tokenizer: transformers.PreTrainedTokenizerBase, response: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(response, add_special_tokens=False))


def responses(
    tokenizer: transformers.PreTrainedTokenizerBase, verifier: str, answer: str | None, *said: str, end: str = "$"
) -> Responses:
    rows = [np.array(encoded(tokenizer, one + end), np.int32) for one in said]
    lengths = tuple(map(len, rows))
    begun = encoded(tokenizer, "What?<think>\n")
    return Responses(verifier, PROMPT, answer, begun, lengths, (bool(end),) * len(rows), np.concatenate(rows))


# What a verifier sees


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_verifier_reads_the_same_from_the_part_that_it_sees(unfinished: bool) -> None:
    """The reference is the whole text behind the last thought, without end tokens."""
    rng, answered, cut = random.Random(5), 0, 0
    for _ in range(400):
        response = made_up(rng)
        whole = without_end(behind_thoughts(response, read_unfinished=unfinished))
        part = seen(response, View.answer, read_unfinished_thoughts=unfinished)
        assert len(part) <= RESPONSE_CHARS
        assert seen(part, View.answer, read_unfinished_thoughts=unfinished) == part
        for read in (choice.read, text.read, grid.read):
            assert read(PROMPT, part) == read(PROMPT, whole)
        assert tail(part) == tail(whole)
        assert stated(part) == stated(whole[-RESPONSE_CHARS:])
        answered += choice.read(PROMPT, part) is not None
        cut += len(whole) > RESPONSE_CHARS
        bare = seen(response, View.response, read_unfinished_thoughts=unfinished)
        assert bare == without_end(response) == seen(bare, View.response, read_unfinished_thoughts=unfinished)
        assert seen(response, View.everything, read_unfinished_thoughts=unfinished) == response
    assert answered > 20
    assert cut > 20


def test_packed_responses_are_the_responses(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    for answer in ("2\n3", None):
        made = responses(tokenizer, "math", answer, "four\n", "", "12")
        back = Responses.unpack(made.pack())
        assert [*back.texts(tokenizer, View.answer)] == ["<think>four\n", "<think>", "<think>12"]
        assert [*back.texts(tokenizer, View.everything)] == ["four\n$", "$", "12$"]
        assert (back.verifier, back.prompt, back.answer, back.lengths) == ("math", PROMPT, answer, (6, 1, 3))
        assert back.tokens.dtype == np.int32
    empty = responses_of(UnlabelledPrompt("a", "b", (1,)), [], "math")
    assert [*Responses.unpack(empty.pack()).texts(tokenizer, View.answer)] == []


# The process that decodes


@pytest.fixture(scope="module")
def process() -> Iterator[TextProcess]:
    process = TextProcess()
    yield process
    process.close()


class Once(Verifiers):
    """With a process that exists already."""

    def __init__(self, process: TextProcess, **settings: Any) -> None:
        super().__init__(1, **settings)
        self._texts = process

    def close(self) -> None: ...


OWN = Extension("import:tests.unit.test_verification:own")


class Own:
    """A user's verifier: right is what ends in a thought's end tag."""

    @staticmethod
    def score(prompt: str, response: str, answer: str) -> float:
        return float(response.endswith(answer))

    @staticmethod
    def answer_of(prompt: str, response: str) -> str | None:
        return response[-2:] or None


own = Own()


@pytest.mark.parametrize("unfinished", [False, True])
def test_another_process_finds_the_same(
    process: TextProcess,
    tokenizer: transformers.PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    unfinished: bool,
) -> None:
    rng = random.Random(7)
    answers = {"choice": "B", "text": "two", "grid": '{"House 1": {"Name": "Eric"}}', OWN.name: "x"}
    ours = Once(process, imported=[OWN], read_unfinished_thoughts=unfinished)
    asked: list[Any] = []
    for verifier, answer in answers.items():
        for gold in (answer, None):
            said = [made_up(rng) for _ in range(12)]
            asked += [responses(tokenizer, verifier, gold, *said, end=end) for end in ("$", "")]
    found = []
    for at_least in (2**60, 0):
        monkeypatch.setattr(verifiers, "TOKENS_HERE", at_least)
        found.append([ours.verify(one, tokenizer) for one in asked])
    assert found[0] == found[1]
    assert {1.0, 0.0} <= {value for result in found[0] for value in result}


def test_short_responses_need_no_process(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    with Verifiers(1) as ours:
        assert ours.verify(responses(tokenizer, "choice", "B", "</think>B", "</think>A"), tokenizer) == [1.0, 0.0]
        assert ours._texts._process is None


def test_a_process_that_was_killed_is_replaced(
    process: TextProcess, tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    one = responses(tokenizer, "text", "x", "</think>It is x")

    def ask() -> Any:
        return process.ask(one, tokenizer, View.answer, quick=False, read_unfinished_thoughts=False)

    assert ask() == {"texts": ["It is x"]}
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert ask() == {"texts": ["It is x"]}


def test_a_question_that_cannot_be_used_is_an_error(
    process: TextProcess, tokenizer: transformers.PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifiers, "TOKENS_HERE", 0)
    with pytest.raises(InputError, match="is no countdown question"):
        Once(process).verify(responses(tokenizer, "countdown", None, "x"), tokenizer)


def test_a_tokenizer_that_cannot_be_sent_decodes_here(
    tokenizer: transformers.PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Local:
        """A class that no other process can import."""

        @staticmethod
        def decode(tokens: Sequence[int]) -> Any:
            return tokenizer.decode(tokens)

    monkeypatch.setattr(verifiers, "TOKENS_HERE", 0)
    one = responses(tokenizer, "choice", "B", "</think>B")
    with Verifiers(1) as ours:
        for _ in range(STARTS + 1):
            assert ours.verify(one, Local()) == [1.0]
        assert ours._texts._process is None
    assert caplog.text.count("failed 3 times in a row") == 1


def test_the_process_loads_no_torch() -> None:
    code = "import sys, megatron_tempo.rewards.text_worker; sys.exit(any(m in sys.modules for m in ('torch', 'sympy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Several threads


def test_workers_are_shared_by_calls_and_each_has_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of two items are at work on four workers at once."""
    meeting, users = threading.Barrier(4), []

    def correct(worker: Worker, answer: str, response: str) -> bool:
        users.append(id(worker))
        meeting.wait(timeout=60)
        return answer == response

    monkeypatch.setattr(Worker, "correct", correct)
    scorer, results = MathScorer(4, 1.0), {}

    def call(name: str) -> None:
        results[name] = scorer.score([Item("math", "", name, "a"), Item("math", "", name, "b")])

    threads = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scorer.close()
    assert results == {"a": [1.0, 0.0], "b": [0.0, 1.0]}
    assert len(set(users)) == 4


# While answers come


class Stub:
    """Verifiers that note how many prompts are verified at a time; `verify` waits until `go`."""

    threads, judge_threads, end_tokens = 3, 2, None

    def __init__(self) -> None:
        self.go = threading.Event()
        self.alive, self.most, self.seen = 0, 0, 0
        self.entered = threading.Semaphore(0)
        self._lock = threading.Lock()

    def verify(self, one: Responses, tokenizer: Any) -> list[float] | list[int | None]:
        with self._lock:
            self.alive += 1
            self.seen += 1
            self.most = max(self.most, self.alive)
        self.entered.release()
        assert self.go.wait(60)
        with self._lock:
            self.alive -= 1
        if one.answer == "wrong":
            raise InputError("the verifier cannot use it")
        return [float(one.tokens[0])] if one.answer is not None else [int(one.tokens[0])]


def labelled(i: int, verifier: str = "math", answer: str = "1") -> LabelledPrompt:
    return LabelledPrompt(str(i), "?", (1,), answer, verifier)


def said(first: int) -> list[Completion]:
    return [completion((first, 2), (-0.1, -0.1), "length")]


def test_no_more_prompts_than_threads_have_texts_at_a_time() -> None:
    stub = Stub()
    with Verification(stub, None, "math") as verification:  # type: ignore[arg-type]
        for i in range(40):
            prompt = labelled(i) if i % 2 else UnlabelledPrompt(str(i), "?", (1,))
            verification.submit(i, prompt, said(i))
        for _ in range(stub.threads):
            stub.entered.acquire(timeout=60)
        stub.go.set()
        verdicts, classes = verification.results()
    assert verdicts == {i: [float(i)] for i in range(1, 40, 2)}
    assert classes == {i: [i] for i in range(0, 40, 2)}
    assert stub.most == stub.threads


def test_the_judge_keeps_no_other_verifier_waiting() -> None:
    """Judged prompts fill the judge's threads, and the others are verified meanwhile."""
    stub = Stub()
    with Verification(stub, None, None) as verification:  # type: ignore[arg-type]
        for i in range(10):
            verification.submit(i, labelled(i, "judge"), said(i))
        for i in range(10, 13):
            verification.submit(i, labelled(i), said(i))
        for _ in range(5):
            assert stub.entered.acquire(timeout=60)
        stub.go.set()
        assert len(verification.results()[0]) == 13
    assert stub.most == 5


def test_after_a_failure_nothing_more_is_begun() -> None:
    stub = Stub()
    with Verification(stub, None, None) as verification:  # type: ignore[arg-type]
        verification.submit(0, labelled(0, answer="wrong"), said(0))
        assert stub.entered.acquire(timeout=60)
        stub.go.set()
        with pytest.raises(InputError, match="cannot use it"):
            verification.results()
        for i in range(1, 30):
            verification.submit(i, labelled(i), said(i))
        with pytest.raises(InputError, match="cannot use it"):
            verification.results()
    assert stub.seen == 1


def test_nothing_to_verify_starts_no_thread() -> None:
    before = threading.active_count()
    with Verification(Stub(), None, None) as verification:  # type: ignore[arg-type]
        verification.submit(0, UnlabelledPrompt("0", "?", (1,)), said(0))
        assert threading.active_count() == before
        assert verification.results() == ({}, {})


# Another node


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Lane, Callable[[Callable[[bytes], Any]], None]]]:
    """The first rank's end of a lane to a thread that plays another node, and what lets it serve by a function."""
    monkeypatch.setattr(verifying_nodes, "ALIVE_SECONDS", 0.01)
    store = private_store("127.0.0.1", timedelta(minutes=1))
    node, address = Node(4, "node1"), (store.host, store.port)
    first = VerifyingNodes(address, [node], None, store)
    other = VerifyingNodes(address, [node], 0, None)
    threads: list[threading.Thread] = []

    def play(verify: Callable[[bytes], Any]) -> None:
        threads.append(threading.Thread(target=serve, args=(other, 1, 0, verify)))
        threads[0].start()

    lane = Lane(first, 1, 0, 0)
    yield lane, play
    lane.end()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_errors_of_another_node_keep_their_kind(lane: Any) -> None:
    def verify(order: bytes) -> list[float]:
        if order == b"user":
            raise InputError("import:mine failed")
        if order == b"engine":
            raise EngineError("the judge is lost")
        if order == b"bug":
            raise KeyError("x")
        return [float(len(order))]

    ours, play = lane
    play(verify)
    assert ours.verify(bytes(range(256)), lambda: False) == [256.0]
    for order, kind, words in (
        (b"user", InputError, "import:mine failed"),
        (b"engine", EngineError, "the judge is lost"),
        (b"bug", RuntimeError, "rank 4 on node1 verified responses: KeyError: 'x'"),
    ):
        with pytest.raises(kind, match=words):
            ours.verify(order, lambda: False)
    assert ours.verify(b"abc", lambda: False) == [3.0]


def test_an_order_that_nobody_needs_any_more_is_not_waited_for(lane: Any) -> None:
    """The node ends its lane when it has finished the order."""
    begun, go = threading.Event(), threading.Event()

    def verify(order: bytes) -> list[float]:
        begun.set()
        assert go.wait(60)
        return []

    ours, play = lane
    play(verify)
    assert ours.verify(b"long", begun.is_set) is None
    go.set()
