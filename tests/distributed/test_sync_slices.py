"""Each worker of a server gets its own part of the tensors, and the bytes are counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_tempo.rollout.server_adapter import Call
from megatron_tempo.rollout.slices import Block, Places, Slices
from megatron_tempo.types import Bucket, PartName, whole_name
from tests.distributed import test_sync_counts as counts
from tests.support.ports import reserve_port
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
KEY_HEADS = 2  # of the tiny model


def place_of(name: str, shape: Sequence[int], number: int, workers: int) -> Block | None:
    """What worker `number` holds of a tensor, as in Megatron's papers; None: all of it.

    A vocabulary is padded to 64 rows for all workers together. Workers that are more than the heads of keys share them.
    """
    if len(shape) != 2:
        return None
    rows, columns = shape
    if "embed_tokens" in name or "lm_head" in name:
        step = (rows + 63) // 64 * 64 // workers
        first = min(number * step, rows)
        return Block(first, min(step, rows - first), 0, columns)
    if name.split(".")[-2] in ROWS:
        shards = min(workers, KEY_HEADS) if name.split(".")[-2] in ROWS[1:3] else workers
        return Block(number * shards // workers * (rows // shards), rows // shards, 0, columns)
    return Block(0, rows, number * (columns // workers), columns // workers)


class Adapter(counts.Adapter):
    def __init__(self, places: Places) -> None:
        self._places = places

    def asks_for_places(self) -> Call | None:
        return Call("/places", {})

    def places(self, answer: Any) -> Places:
        assert answer == {}
        return self._places

    def update(
        self, bucket: Bucket, group: str | None, version: int, *, compare: bool, slices: Slices | None = None
    ) -> Call:
        tensors = [
            (whole_name(name), list(tensor.shape), [name.start, name.rows] if isinstance(name, PartName) else None)
            for name, tensor in bucket
        ]
        return Call("/update", {"group": group, "tensors": tensors, "blocks": slices and slices.blocks})


class Worker(counts.Worker):
    """Puts what it receives into tensors that are NaN elsewhere."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.tensors: dict[str, Tensor] = {}

    def places(self, call: dict[str, Any]) -> None: ...

    def update(self, call: dict[str, Any]) -> None:
        common, own = [], []
        blocks = call["blocks"][self.number] if call["blocks"] else [None] * len(call["tensors"])
        for (name, shape, part), block in zip(call["tensors"], blocks, strict=True):
            start, rows = part or (0, shape[0])
            self.tensors.setdefault(name, torch.full((rows, *shape[1:]), float("nan")))
            here = self.tensors[name][start : start + shape[0]]
            if block is None:
                common.append(here)
            else:
                own.append(here[block[0] : block[0] + block[1], block[2] : block[2] + block[3]])
        group = self.groups[call["group"]]
        self._receive(common, lambda flat: dist.broadcast(flat, src=0, group=group))
        self._receive(own, lambda flat: dist.recv(flat, group=group, group_src=0))
        self.messages += 1

    def _receive(self, views: list[Tensor], receive: Any) -> None:
        flat = torch.empty(sum(view.numel() for view in views))
        self.bytes += flat.nbytes
        if flat.numel():
            receive(flat.view(torch.uint8))
        for view, part in zip(views, flat.split([view.numel() for view in views]), strict=True):
            view.copy_(part.view(view.shape))


def places_of(tensors: Mapping[str, Tensor], workers: int) -> Places:
    blocks = [
        {name: place_of(name, tensor.shape, one, workers) for name, tensor in tensors.items()} for one in range(workers)
    ]
    return [{name: block for name, block in of.items() if block is not None} for of in blocks]


def assert_holds(receiver: dict[str, Any], wanted: Mapping[str, Tensor], places: Mapping[str, Block]) -> None:
    """It has its blocks bit for bit, and nothing else."""
    assert receiver["tensors"].keys() == wanted.keys()
    for name, tensor in wanted.items():
        row, rows, column, columns = places.get(name, (0, len(tensor), 0, tensor.shape[-1]))
        held = torch.full_like(tensor, float("nan"))
        area = (slice(row, row + rows), slice(column, column + columns))[: tensor.ndim]
        held[area] = tensor[area]
        torch.testing.assert_close(receiver["tensors"][name], held, rtol=0, atol=0, equal_nan=True)


# (tensor, pipeline, data), servers, workers of each, the number of a server that dies
CASES = {
    "1 server of 2": ((1, 1, 1), 1, 2, None),
    "1 server of 4": ((1, 1, 1), 1, 4, None),
    "dp2, 1 server of 2": ((1, 1, 2), 1, 2, None),
    "2 servers of 2, one dies": ((1, 1, 1), 2, 2, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_each_worker_gets_its_own_part(tmp_path: Path, case: str) -> None:
    layout, servers, workers, dies = CASES[case]
    senders = layout[2]
    model = write_model(tmp_path / "model", tied=False, ffn=192, layers=4)
    wanted = load_file(model / "model.safetensors")
    places = places_of(wanted, workers)
    ports = [(reserve_port(), reserve_port()) for _ in range(servers)]
    arguments = (model, layout, servers, workers, ports, dies, Worker, Adapter(places))
    results = run_ranks(counts.take_part, senders + servers * workers, tmp_path / "ranks", *arguments)
    trainers, receivers = results[:senders], results[senders:]
    print(case, json.dumps(trainers), [one["bytes"] for one in receivers], file=sys.stderr)
    for number, receiver in enumerate(receivers):
        if number // workers == dies:
            assert receiver["messages"] == counts.DIES_AT
        else:
            assert_holds(receiver, wanted, places[number % workers])
    assert [list(trainer["failed"]) for trainer in trainers] == [[] if dies is None else [dies]] * senders
    if dies is None:
        _assert_counts(wanted, places, trainers, receivers)


def _assert_counts(
    wanted: Mapping[str, Tensor], places: Places, trainers: list[dict[str, Any]], receivers: list[dict[str, Any]]
) -> None:
    """A worker receives its blocks and the norms. They cross the sender's link once, the norms by one broadcast."""
    norms = sum(tensor.nbytes for name, tensor in wanted.items() if name not in places[0])
    own = [4 * sum(block.rows * block.columns for block in place.values()) for place in places]
    assert [receiver["bytes"] for receiver in receivers] == [norms + one for one in own]
    assert sum(trainer["to servers, bytes"] for trainer in trainers) == norms + sum(own)
