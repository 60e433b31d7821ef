"""Responses that only the first rank has are verified by all nodes: the verdicts are the same, and errors arrive."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers

from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rewards import verifiers as verifiers_module
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout import verifying_nodes
from megatron_tempo.rollout.batches import Collected, ask, collect, summed_counts
from megatron_tempo.rollout.engine import AnswersOnFirstRank, Arrived, Request, Sampling
from megatron_tempo.rollout.group_answers import Asking, StreamedAnswers
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.rollout.supervisor import private_store
from megatron_tempo.rollout.verification import Verification
from megatron_tempo.rollout.verifying_nodes import VerifyingNodes, joined
from megatron_tempo.types import Completion, LabelledPrompt, UnlabelledPrompt
from tests.support.completions import completion
from tests.support.engines import AnsweringEngine
from tests.support.ranks import run_ranks
from tests.support.tiny import WORDS, write_model

SAMPLES, WAIT = 3, 60.0
LABELLED = [LabelledPrompt(f"l:{i}", f"{i}", (i,), str(i % 3), "text") for i in range(12)]
UNLABELLED = [UnlabelledPrompt(f"u:{i}", f"{i}", (i,)) for i in range(8)]
EXPECTED = (  # the columns `correct` and `answer_class`
    [float((i + sample) % 3 == i % 3) for i in range(12) for sample in range(SAMPLES)] + [0.0] * 8 * SAMPLES,
    [-1] * 12 * SAMPLES + [0, 1, 2] * 8,
)


class FirstRankEngine(AnsweringEngine):
    """Only the first rank has the answers, as with servers. Sample s of prompt i says (i + s) % 3, and ends."""

    def __init__(self, nodes: VerifyingNodes | None) -> None:
        self.nodes = nodes

    def start(
        self, requests: Sequence[Request], sampling: Sampling, arrived: Arrived | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        return iter(answered(requests))

    def stream(self, sampling: Sampling, arrived: Arrived) -> FirstRankStream:
        return FirstRankStream(arrived)


class FirstRankStream:
    """An `AnswerStream` whose answers arrive while nobody reads them."""

    def __init__(self, arrived: Arrived) -> None:
        self._arrived, self._answers = arrived, list[tuple[int, list[Completion]]]()

    def add(self, requests: Sequence[Request]) -> None:
        self._answers += answered(requests)
        for answer in self._answers:
            self._arrived(*answer)

    def read(self, enough: Callable[[], bool]) -> Iterator[tuple[int, list[Completion]]]:
        return iter(self._answers)

    def waiting(self) -> list[int]:
        return []

    def interrupt(self) -> None: ...

    def cancel(self, numbers: Collection[int]) -> None: ...

    def close(self) -> None: ...


def answered(requests: Sequence[Request]) -> list[tuple[int, list[Completion]]]:
    answers = []
    for i, request in enumerate(requests if dist.get_rank() == 0 else []):
        rows = [((request.token_ids[0] + s) % 3, WORDS.index("$")) for s in range(request.samples)]
        answers.append((i, [completion(row, (-0.5, -0.5)) for row in rows]))
    return answers


class Meeting(Verifiers):
    """The first rank begins its second item when the other node has verified one. Counts its items."""

    def __init__(self, flag: Path) -> None:
        super().__init__(1)
        self._flag, self.items, self.fail = flag, 0, False

    def score(self, items: Sequence[Item]) -> list[float]:
        rank = dist.get_rank()
        deadline = time.monotonic() + WAIT
        while rank == 0 and not self._flag.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.items += len(items)
        if rank != 0:
            self._flag.touch()
            if self.fail:
                raise InputError("import:mine:verifier failed on this node")
        return super().score(items)

    def take_counts(self) -> dict[str, int]:
        return {"items": self.items}


def as_two_nodes() -> VerifyingNodes | None:
    """Ranks 0 and 1 are one node, 2 and 3 the other."""
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank % 2)
    socket.gethostname = lambda: f"node{rank // 2}"  # type: ignore[assignment]
    engine = ServersEngine.__new__(ServersEngine)  # it only knows where servers are reached
    engine._config = ServersConfig(host="127.0.0.1")
    assert dist.group.WORLD is not None
    return joined(dist.group.WORLD, engine._open_store)


def columns_of(collected: Collected) -> tuple[list[float], list[int]]:
    columns = collected.columns
    assert columns.correct is not None
    assert columns.answer_class is not None
    return columns.correct.tolist(), columns.answer_class.tolist()


def spread(model: Path, flags: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    nodes = as_two_nodes()
    assert nodes is not None
    engine, found = FirstRankEngine(nodes), []
    assert isinstance(engine, AnswersOnFirstRank)
    prompts = [*LABELLED, *UNLABELLED]
    with Meeting(flags / "met") as verifiers:
        for at_least in (2**60, 0):  # decoded in the process itself, and by another
            verifiers_module.TOKENS_HERE = at_least
            collected = collect(ask(engine, prompts, SAMPLES, Sampling(1.0, 9)), verifiers, tokenizer, "text")
            found.append(columns_of(collected))
        counts, own = summed_counts(verifiers), verifiers.items
        verifiers.fail, message = True, ""
        verifiers._flag = flags / "again"
        verifiers_module.TOKENS_HERE = 2**60
        try:
            collect(ask(engine, prompts, SAMPLES, Sampling(1.0, 9)), verifiers, tokenizer, "text")
        except EngineError as error:
            message = str(error)
        verifiers.fail = False
        collected = collect(ask(engine, prompts, SAMPLES, Sampling(1.0, 9)), verifiers, tokenizer, "text")
        found.append(columns_of(collected))
        verification = Verification(verifiers, tokenizer, "text", nodes)
        early = StreamedAnswers(engine, Sampling(1.0, 9), verification, lambda *_: None)
        early.ask([Asking(i, prompt, Request(prompt.token_ids, SAMPLES, 0), 0) for i, prompt in enumerate(prompts)])
        now = collect(ask(engine, prompts, SAMPLES, Sampling(1.0, 9)), verifiers, tokenizer, "text")
        early.read(lambda: False)
        found += [columns_of(now), columns_of(early.collect(range(len(prompts)), prompts))]
        early.close()
    keys = nodes.store.num_keys() if nodes.store is not None else 0
    dist.destroy_process_group()
    return {"found": found, "counts": counts, "own": own, "message": message, "others": nodes.others, "keys": keys}


def test_two_nodes_find_what_one_finds(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tied=True, layers=1)
    ranks = run_ranks(spread, 4, tmp_path / "ranks", model, tmp_path)
    for rank in ranks:
        assert rank["found"] == [EXPECTED] * 5
        assert rank["message"] == "import:mine:verifier failed on this node"
        assert [(node.rank, node.host) for node in rank["others"]] == [(2, "node1")]
        # The quick verifiers of the second collection run in other processes and are not counted.
        assert rank["counts"] == {"items": len(LABELLED) * SAMPLES}
    assert ranks[0]["own"] > 0
    assert ranks[2]["own"] > 0
    assert (ranks[1]["own"], ranks[3]["own"]) == (0, 0)
    # What was ordered and answered is not kept: a sign of life, and the last order of a lane that was given up.
    assert ranks[0]["keys"] < 10


class Blocked(Verifiers):
    """Verifies nothing until `go`, so that the other node has its share."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.go = threading.Event()

    def score(self, items: Sequence[Item]) -> list[float]:
        assert self.go.wait(WAIT)
        return super().score(items)


def stopped(model: Path) -> str:
    """The second node's process stands still, as one does whose machine is gone."""
    dist.init_process_group("gloo")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    os.environ["LOCAL_RANK"] = "0"
    verifying_nodes.ALIVE_SECONDS, verifying_nodes.LOST_SECONDS = 0.05, 0.5
    year, rank = timedelta(days=365), dist.get_rank()
    assert dist.group.WORLD is not None
    nodes = joined(dist.group.WORLD, lambda: private_store("127.0.0.1", year) if rank == 0 else None)
    pids: list[Any] = [None, None]
    dist.all_gather_object(pids, os.getpid())
    message, verifiers = "", Blocked(1)
    with verifiers, Verification(verifiers, tokenizer, None, nodes) as verification:
        if rank == 0:
            os.kill(pids[1], signal.SIGSTOP)
            try:
                for i, prompt in enumerate(LABELLED):
                    verification.submit(i, prompt, [completion((1,), (-0.5,), "length")])
                verification.results()
            except EngineError as error:
                message = str(error)
            finally:
                os.kill(pids[1], signal.SIGCONT)
        verifiers.go.set()
    dist.barrier()
    dist.destroy_process_group()
    return message


def test_a_node_that_is_lost_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tied=True, layers=1)
    messages = run_ranks(stopped, 2, tmp_path / "ranks", model)
    assert messages[0].startswith(
        f"rank 1 on {socket.gethostname()}, which verifies responses, has not been heard from"
    )
    assert messages[1] == ""
