"""What a worker of vLLM gets of a bucket: what it holds, cut by hand; checksums add up to the whole tensors'."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_checks import differing
from megatron_tempo.rollout.checksum import checksums_of, whole_checksums
from megatron_tempo.rollout.read_back import EVERYTHING
from megatron_tempo.rollout.slices import Block, Places, sliced
from megatron_tempo.rollout.vllm import READ_BACK, WORKER, Vllm
from megatron_tempo.types import Bucket, PartName
from tests.support.in_vllm import loaded
from tests.unit.test_read_back import ATTENTION, HEAD_NAME, MLP, NORM, WORDS, tensors, worker_of

CPU = torch.device("cpu")
CUT = 30  # rows of a part of the vocabulary


@pytest.fixture(scope="module")
def reader() -> Iterator[ModuleType]:
    with loaded(READ_BACK) as module:
        yield module


@pytest.fixture
def worker(reader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with loaded(WORKER) as module:
        monkeypatch.setattr(module, "block_checksum", reader.block_checksum)
        yield module


def places_of(reader: ModuleType, ranks: int, *, tied: bool = False) -> Places:
    workers = [worker_of(reader, rank, ranks, tensors()) for rank in range(ranks)]
    answer = {"results": [reader.places(one, tied=tied) for one in workers]}
    return Vllm(cpu=True, tensor=ranks).places(answer)


def buckets(sent: dict[str, Tensor]) -> Iterator[Bucket]:
    """The tensors in two buckets, but the head in parts, whose ends are not those of the workers' rows."""
    others = [(name, tensor) for name, tensor in sent.items() if name != HEAD_NAME]
    yield others[:4]
    yield others[4:]
    for start in range(0, WORDS, CUT):
        stop = min(start + CUT, WORDS)
        yield [(PartName(HEAD_NAME, start, stop, WORDS), sent[HEAD_NAME][start:stop])]


class Receiver:
    """What the worker does with a bucket, with the bytes that it would receive."""

    def __init__(self, worker: ModuleType, rank: int) -> None:
        self._worker, self._rank = worker, rank
        self.elsewhere: set[str] = set()  # of the experts of other workers
        self.tensors: dict[str, Tensor] = {}
        self.answer: dict[str, Any] = {"tensors": {}, "blocks": [], "missing": []}

    def receive(self, bucket: Bucket, adapter: Vllm, places: Places) -> None:
        slices = sliced(bucket, places, CPU)
        call = adapter.update(bucket, "group", 0, compare=True, slices=slices)
        assert call.body is not None
        info = self._worker.UpdateInfo(**call.body["update_info"])
        messages = [torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])]
        if slices is not None:
            common = [tensor.flatten().view(torch.uint8) for tensor in slices.common]
            own = slices.own[self._rank]
            messages = [*([torch.cat(common)] if common else []), *([own] if own.numel() else [])]
        receiver = self._worker.WeightReceiver.__new__(self._worker.WeightReceiver)
        receiver.parallel_config = type("Parallel", (), {"rank": self._rank})
        receiver.model_config = type("Model", (), {"hf_config": type("Config", (), {"tie_word_embeddings": False})})
        receiver.model = type("Model", (), {"load_weights": self._load, "modules": lambda _: []})()
        receiver.device, receiver._groups, receiver._begun = (
            CPU,
            {"group": "the group"},
            self.__dict__.setdefault("begun", {}),
        )
        receiver._received, receiver._blocks, receiver._missing = {}, [], set()
        receiver._elsewhere = self.elsewhere
        with pytest.MonkeyPatch.context() as monkeypatch:
            for kind in ("broadcast", "recv"):
                monkeypatch.setattr(torch.distributed, kind, lambda flat, **_: flat.copy_(messages.pop(0)))
            receiver.receive_weights(info)
        assert messages == []
        found = receiver.checksums()
        self.answer["tensors"] |= found["tensors"]
        self.answer["blocks"] += found["blocks"]

    def _load(self, named: Any) -> set[str]:
        given = dict(named)
        self.tensors |= {name: tensor.clone() for name, tensor in given.items()}
        return set(given)


def received(worker: ModuleType, places: Places, sent: list[dict[str, Tensor]]) -> list[Receiver]:
    """What each worker gets if `sent` is sent to it."""
    adapter = Vllm(cpu=True, tensor=len(places))
    receivers = [Receiver(worker, rank) for rank in range(len(places))]
    for receiver, own in zip(receivers, sent, strict=True):
        for bucket in buckets(own):
            receiver.receive(bucket, adapter, places)
    return receivers


def differences(receivers: list[Receiver], sent: dict[str, Tensor]) -> set[str]:
    expected: dict[str, tuple[str, float]] = {}
    for bucket in buckets(sent):
        expected |= checksums_of(bucket)
    answer = {"results": [receiver.answer for receiver in receivers]}
    held = Vllm(cpu=True, tensor=len(receivers)).parse_checksums(answer)
    for worker in held:
        for name, (total, size) in whole_checksums(expected).items():
            if worker[name][0] == total:
                assert worker[name][1] == pytest.approx(size, rel=1e-5)
    return {name for worker in held for name, _ in differing(whole_checksums(expected), worker)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_worker_gets_what_it_holds_and_nan_elsewhere(reader: ModuleType, worker: ModuleType, ranks: int) -> None:
    """With four ranks two have the same head of keys, and the last of the vocabulary's shards has only padding."""
    sent = tensors()
    places = places_of(reader, ranks)
    receivers = received(worker, places, [sent] * ranks)
    assert differences(receivers, sent) == set()
    for rank, receiver in enumerate(receivers):
        assert receiver.tensors.keys() == sent.keys()
        for part in reader._pieces(worker_of(reader, rank, ranks, sent), tied=False):
            loaded = receiver.tensors[part.tensor].reshape(-1, part.width)
            area = (slice(part.row, part.row + len(part.rows)), slice(part.column, part.column + part.rows.shape[1]))
            assert torch.equal(loaded[area], part.rows)
            assert loaded.isnan().sum() == (0 if ranks == 1 else loaded.numel() - part.rows.numel())


def test_bytes_are_sent_once_except_copies(reader: ModuleType) -> None:
    """Four workers share two heads of keys and of values; the norm is common."""
    sent = tensors()
    slices = sliced(list(sent.items()), places_of(reader, 4), CPU)
    assert slices is not None
    keys = sum(sent[f"{ATTENTION}.{name}.weight"].nbytes for name in ("k_proj", "v_proj"))
    assert [tensor.shape for tensor in slices.common] == [sent[NORM].shape]
    assert sum(own.nbytes for own in slices.own) == sum(one.nbytes for one in sent.values()) - sent[NORM].nbytes + keys


@pytest.mark.parametrize("name", list(tensors()))
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_number_that_arrives_wrong_at_one_worker_is_found(
    reader: ModuleType, worker: ModuleType, name: str, rank: int
) -> None:
    sent = tensors()
    changed = {key: tensor.clone() for key, tensor in sent.items()}
    changed[name].flatten()[-1] += 0.5
    receivers = received(worker, places_of(reader, 4), [changed if one == rank else sent for one in range(4)])
    # The last element is on the last rank, of keys on the last two, of a vocabulary of 67 words on the third.
    held = {"k_proj": (2, 3), "v_proj": (2, 3), "embed_tokens": (2,), "lm_head": (2,), "norm": (0, 1, 2, 3)}
    assert differences(receivers, sent) == ({name} if rank in held.get(name.split(".")[-2], (3,)) else set())


def test_a_block_that_nobody_holds_is_found(reader: ModuleType, worker: ModuleType) -> None:
    places = [dict(place) for place in places_of(reader, 2)]
    places[1][f"{MLP}.up_proj.weight"] = places[0][f"{MLP}.up_proj.weight"]
    sent = tensors()
    assert differences(received(worker, places, [sent] * 2), sent) == {f"{MLP}.up_proj.weight"}


def test_a_loader_that_takes_another_part_than_the_worker_asked_for_installs_nan(
    reader: ModuleType, worker: ModuleType
) -> None:
    """The second worker's layers are cut at the first one's places. The rest is NaN, which the read-back shows."""
    sent = tensors()
    first, second = received(worker, places_of(reader, 2), [sent] * 2)
    right = [worker_of(reader, rank, 2, one.tensors) for rank, one in enumerate((first, second))]
    wrong = worker_of(reader, 1, 2, second.tensors)
    shard = worker_of(reader, 0, 2, second.tensors).get_submodule(f"{ATTENTION}.o_proj").weight
    wrong.get_submodule(f"{ATTENTION}.o_proj").weight = shard
    assert shard.isnan().any()
    expected = checksums_of(list(sent.items()))
    found = []
    for workers in (right, [right[0], wrong]):
        answer = {"results": [reader.read_back(one, 0, 1, tied=False) for one in workers]}
        found.append([name for name, _ in Vllm(cpu=True, tensor=2).not_installed(expected, EVERYTHING, answer)])
    assert found == [[], [f"{ATTENTION}.o_proj.weight"]]


def test_quantised_layers_and_heads_that_differ_from_the_embedding_are_needed_whole(reader: ModuleType) -> None:
    model = worker_of(reader, 1, 2, tensors())
    model.get_submodule(f"{MLP}.gate_up_proj").quant_method = object()
    assert not any(name.startswith(MLP) for name in reader.places(model, tied=False))
    tied = reader.places(model, tied=True)
    assert tied["model.embed_tokens.weight"] == [64, 3, 0, 16]
    assert HEAD_NAME not in tied
    model.lm_head.shard_indices = type("Indices", (), {"org_vocab_start_index": 32, "num_org_elements": 35})
    assert "model.embed_tokens.weight" not in reader.places(model, tied=True)


@pytest.mark.parametrize(
    ("tensor", "blocks"),
    [
        (torch.zeros(4, 6).bfloat16(), [Block(0, 4, 0, 3), Block(0, 4, 3, 3)]),  # half a word
        (torch.zeros(4, 3).bfloat16(), [Block(0, 2, 0, 3), Block(2, 2, 0, 3)]),
        (torch.zeros(4, 4).double(), [Block(0, 2, 0, 4), Block(2, 2, 0, 4)]),
        (torch.zeros(4, 4), [Block(0, 4, 0, 4)] * 2),  # all of it
        (torch.zeros(4, 4), [Block(0, 2, 0, 4), None]),
        (torch.zeros(4), [Block(0, 2, 0, 1), Block(2, 2, 0, 1)]),
    ],
)
def test_what_cannot_be_cut_is_sent_whole(tensor: Tensor, blocks: list[Block | None]) -> None:
    assert sliced([("a", tensor)], [{"a": block} if block else {} for block in blocks], CPU) is None


@pytest.mark.parametrize("block", [Block(2, 3, 0, 4), Block(0, 2, 1, 4), Block(-1, 2, 0, 4)])
def test_a_block_outside_of_the_tensor_is_refused(block: Block) -> None:
    with pytest.raises(EngineError, match="which has 4 rows and 4 columns"):
        sliced([("a", torch.zeros(4, 4))], [{"a": Block(0, 2, 0, 4)}, {"a": block}], CPU)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "does not say"),
        ({"results": [None, None]}, "does not say"),
        ({"results": [{"a": [1, 2]}, {}]}, "does not say"),
        ({"results": [{}]}, "has 1 workers, not rollout.servers.tensor=2"),
    ],
)
def test_an_answer_about_places_that_makes_no_sense_is_an_error_of_the_server(answer: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Vllm(cpu=True, tensor=2).places(answer)


def test_a_server_of_one_worker_is_not_asked() -> None:
    assert Vllm(cpu=True, tensor=1).asks_for_places() is None
    assert Vllm(cpu=True, tensor=2).asks_for_places() is not None
