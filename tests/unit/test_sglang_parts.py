"""The plugin that runs in SGLang's processes, as far as it needs no SGLang: rows of a vocabulary, tensors in parts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.rollout import supervisor
from megatron_tempo.rollout.server_adapter import Start
from megatron_tempo.rollout.sglang import PLUGIN, Sglang
from megatron_tempo.rollout.supervisor import parts_are_taken
from megatron_tempo.rollout.whole_tensors import WholeParameters
from megatron_tempo.types import Bucket, PartName
from tests.support.tiny import write_model

ROWS = 10  # of the vocabulary; two tensor ranks have 6 rows each, of which the last two are padding


class Vocabulary(torch.nn.Module):
    """A layer with the rows of one of two tensor ranks, full of ones."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.org_vocab_size = ROWS
        last = min(6 * rank + 6, ROWS)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=6 * rank, org_vocab_end_index=last)
        self.weight = torch.nn.Parameter(torch.ones(6, 3))


class Served(torch.nn.Module):
    """A model as SGLang has it: it refuses what its loaders refuse, and notes what they load."""

    def __init__(self, rank: int, *, tied: bool, head: bool) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = Vocabulary(rank)
        self.lm_head = Vocabulary(rank) if head else self.model.embed_tokens
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, named: list[tuple[str, Tensor]]) -> None:
        self.loaded |= {name: tensor.clone() for name, tensor in named}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plugin's module, with stand-ins for what it imports of SGLang."""
    layers, hooks = ModuleType("vocab_parallel_embedding"), ModuleType("hook_registry")
    layers.VocabParallelEmbedding = Vocabulary  # type: ignore[attr-defined]
    hooks.hooked = {}  # type: ignore[attr-defined]
    hooks.HookType = SimpleNamespace(AROUND="around")  # type: ignore[attr-defined]
    hooks.HookRegistry = SimpleNamespace(register=lambda *words: hooks.hooked.update({words[0]: words[1:]}))  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.vocab_parallel_embedding", layers)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", hooks)
    spec = importlib.util.spec_from_file_location("sglang_parts", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register()
    module.hooked = hooks.hooked  # type: ignore[attr-defined]
    return module


def parts_of(name: str, tensor: Tensor, *cuts: int) -> list[Bucket]:
    return [
        [(PartName(name, start, stop, len(tensor)), tensor[start:stop])]
        for start, stop in pairwise((0, *cuts, len(tensor)))
    ]


def sent(bucket: Bucket) -> list[tuple[str, Tensor]]:
    """The bucket with the names that a server receives."""
    call = Sglang(cpu=True, tensor=1).update(bucket, "group", 0, compare=False)
    assert call.body is not None
    return [(name, tensor) for name, (_, tensor) in zip(call.body["names"], bucket, strict=True)]


@pytest.mark.parametrize("cuts", [(), (4,), (6,), (7,), (2, 4, 8)])
def test_each_rank_gets_its_rows_of_a_vocabulary(plugin: ModuleType, cuts: tuple[int, ...]) -> None:
    matrix = torch.randn(ROWS, 3)
    padded = torch.cat([matrix, torch.zeros(2, 3)])
    for rank in (0, 1):
        model = Served(rank, tied=False, head=True)
        for bucket in parts_of("lm_head.weight", matrix, *cuts):
            plugin.load(model, sent(bucket))
        assert torch.equal(model.lm_head.weight, padded[6 * rank : 6 * rank + 6])
        assert (model.model.embed_tokens.weight == 1).all(), "another matrix stays as it was"
        assert model.loaded == {}


@pytest.mark.parametrize("head", [False, True])
def test_a_tied_head_gets_the_embedding(plugin: ModuleType, head: bool) -> None:
    model, matrix = Served(0, tied=True, head=head), torch.randn(ROWS, 3)
    for bucket in parts_of("model.embed_tokens.weight", matrix, 4):
        plugin.load(model, sent(bucket))
    assert torch.equal(model.model.embed_tokens.weight, matrix[:6])
    assert torch.equal(model.lm_head.weight, matrix[:6])


def test_other_tensors_are_loaded_when_they_are_whole(plugin: ModuleType) -> None:
    model, name, matrix, norm = (
        Served(0, tied=False, head=True),
        "model.layers.0.mlp.up_proj.weight",
        torch.randn(7, 2),
        torch.ones(2),
    )
    first, *rest = parts_of(name, matrix, 2, 5)
    plugin.load(model, sent([(PartName(name, 0, 3, 7), torch.zeros(3, 2))]))  # of an update that broke off
    plugin.load(model, sent(first) + sent([("model.norm.weight", norm)]))
    assert list(model.loaded) == ["model.norm.weight"]
    for bucket in rest:
        plugin.load(model, sent(bucket))
    assert torch.equal(model.loaded[name], matrix)


def test_what_a_group_receives_is_loaded_by_the_hook(plugin: ModuleType) -> None:
    ((target, (hook, kind)),) = plugin.hooked.items()
    assert target.endswith("WeightUpdater.load_weights_from_distributed")
    assert kind == "around"
    model, matrix = Served(1, tied=False, head=True), torch.randn(ROWS, 3)
    updater = SimpleNamespace(get_model=lambda: model)

    def original(updater: Any, named: list[tuple[str, Tensor]]) -> tuple[bool, str]:
        updater.get_model().load_weights(named)
        return True, "done"

    for bucket in parts_of("lm_head.weight", matrix, 4):
        assert hook(original, updater, sent(bucket)) == (True, "done")
    assert torch.equal(model.lm_head.weight[:4], matrix[6:])
    wrong = sent([(PartName("lm_head.weight", 0, 2, 11), torch.zeros(2, 3))])
    assert hook(original, updater, wrong) == (
        False,
        "Failed to load a part of a tensor: the vocabulary has 10 rows, not 11",
    )


# How a server finds it


def test_the_server_finds_the_plugin_as_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "mine")
    model = write_model(tmp_path / "theirs", layers=1)
    start = Start(ServersConfig(), model, tmp_path, "127.0.0.1", 1, "key", EnginePrecision.fp32)
    launch = Sglang(cpu=True, tensor=1).launch(start)
    assert launch.environment["SGLANG_PLUGINS"] == "mine,megatron_tempo_parts"
    folder = launch.environment["PYTHONPATH"]
    assert (Path(folder) / "sglang_parts.py").read_text() == PLUGIN.read_text()
    monkeypatch.syspath_prepend(folder)
    (entry,) = importlib.metadata.entry_points(group="sglang.srt.plugins")
    assert (entry.name, entry.value) == ("megatron_tempo_parts", "sglang_parts:register")
    assert "--custom-weight-loader=sglang_parts.load" in launch.command


@pytest.mark.parametrize(
    ("answers", "taken"),
    [
        ([{"custom_weight_loader": ["sglang_parts.load"]}] * 2, True),
        ([{"custom_weight_loader": ["sglang_parts.load"]}, {"custom_weight_loader": []}], False),
        ([{}, {}], False),
        ([None, None], False),
    ],
)
def test_servers_of_others_are_asked_whether_they_have_it(
    monkeypatch: pytest.MonkeyPatch, answers: list[dict[str, Any] | None], taken: bool
) -> None:
    left = iter(answers)

    def get(address: str, **options: Any) -> httpx.Response:
        assert address == "http://one:1/server_info"
        assert options["headers"] == {"Authorization": "Bearer key"}
        answer = next(left)
        if answer is None:
            raise httpx.ConnectError("gone")
        return httpx.Response(200, text=json.dumps(answer))

    monkeypatch.setattr(supervisor.httpx, "get", get)
    assert parts_are_taken(Sglang(cpu=True, tensor=1), ["http://one:1"] * 2, "key") == taken


# Checksums of whole parameters


def test_tensors_of_one_parameter_come_together_and_whole() -> None:
    wholes = WholeParameters([("self_attn.q_proj", "self_attn.k_proj")])
    q, k, other = torch.randn(6, 2), torch.randn(4, 2), torch.randn(5, 2)
    name = "model.layers.0.self_attn.{}_proj.weight".format
    given = [*parts_of(name("q"), q, 4), *parts_of(name("k"), k, 2), *parts_of("lm_head.weight", other, 2)]
    found = [wholes.add(bucket) for bucket in given]
    assert [[str(name) for name, _ in bucket] for bucket in found] == [
        *([], [], []),
        [name("q"), name("k")],
        [],
        ["lm_head.weight"],
    ]
    assert all(torch.equal(a, b) for a, b in zip((t for b in found for _, t in b), (q, k, other), strict=True))
    whole: Bucket = [("model.norm.weight", other)]
    assert wholes.add(whole) is whole


def test_the_expected_checksums_do_not_depend_on_the_parts() -> None:
    adapter = Sglang(cpu=True, tensor=1)
    matrix = torch.randn(70, 3)
    expected = adapter.expected([("lm_head.weight", matrix)])
    found: dict[str, tuple[str, float]] = {}
    for bucket in parts_of("lm_head.weight", matrix, 8, 64):
        found |= adapter.expected(bucket)
    assert {name: total for name, (total, _) in found.items()} == {name: total for name, (total, _) in expected.items()}
