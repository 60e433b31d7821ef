"""The layers of Transformer Engine, as Megatron-Core's own extension builds them, on the stand-in in tests/support/te.

What this proves is our wiring and Megatron's calls: names, shapes, packing, windows, checkpoints, the optimizer's path.
That Transformer Engine itself computes the same, tests/gpu/test_fp8.py asks a GPU.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from megatron_tempo.config.choices import Fusions, Layers
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import InputError
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor
from tests.distributed import test_parity, test_update
from tests.support.fork_server import TE_FORK_SERVER
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model

TE = Layers.transformer_engine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return {"tied": write_model(out / "tied", tied=True), "olmo3": write_model(out / "olmo3", family="olmo3")}


@pytest.mark.parametrize("name", matrix(["tp1", "tp2-sequence", "tp2-pp2-sequence"], ["tp1", "tp2-pp2-sequence"]))
def test_logits_weights_and_export_agree_with_transformers(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    layout = test_parity.LAYOUTS[name]
    given = models, layout, tmp_path, TE
    by_rank = run_ranks(test_parity.measure_all, layout[3], tmp_path / "ranks", *given, server=TE_FORK_SERVER)
    for kind, model in models.items():
        ranks = [measured[kind] for measured in by_rank]
        test_parity.assert_logits(model, ranks)
        test_parity.assert_weights(model, [rank["weights"] for rank in ranks], tmp_path / kind)


CASES = [
    ("untied", "one"),
    ("untied", "tp2-sequence-attention"),
    ("tied", "tp2-layers"),
    ("untied", "cp2"),
    ("olmo3", "one"),
    ("olmo3", "tp2-sequence"),
    ("qwen2", "tp2-sequence"),
]


FEW = [("untied", "tp2-sequence-attention"), ("tied", "tp2-layers"), ("untied", "cp2"), ("olmo3", "one")]
FEW += [("qwen2", "tp2-sequence")]


@pytest.mark.parametrize(("model", "layout"), matrix(CASES, FEW))
def test_steps_agree_with_plain_torch(tmp_path: Path, model: str, layout: str) -> None:
    path = write_model(tmp_path / "model", **test_update.MODELS[model])
    given = path, "plain", layout, TE
    world = test_update.LAYOUTS[layout][0]
    result = run_ranks(test_update.updated, world, tmp_path / "ranks", *given, server=TE_FORK_SERVER)[0]
    test_update.assert_steps(path, "plain", result)


def fused(model: Path, fusions: Fusions) -> tuple[set[str], dict[str, dict[str, torch.Tensor]]]:
    """The fused operations that steps of actor and critic run, and the weights after them."""
    record = importlib.import_module("transformer_engine.pytorch.record")
    weights = test_update.updated(model, "plain", "dp2", TE, fusions)
    return record.fused, weights


def test_fused_operations_take_the_same_steps(tmp_path: Path) -> None:
    """Of which the stand-in's products leave nothing of use in a weight's own gradient, as TE's do."""
    path = write_model(tmp_path / "model")
    ran, weights = run_ranks(fused, 2, tmp_path / "auto", path, Fusions.auto, server=TE_FORK_SERVER)[0]
    assert ran == {"rotary", "swiglu", "weight gradient"}
    test_update.assert_steps(path, "plain", weights)
    ran, plain = run_ranks(fused, 2, tmp_path / "none", path, Fusions.none, server=TE_FORK_SERVER)[0]
    assert ran == set()
    for one, tensors in plain.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(weights[one][key], tensor, rtol=1e-5, atol=1e-6, msg=f"{one} {key}")


def refused(model: Path, layers: Layers, backend: str, out_of_memory: bool) -> tuple[str, bool]:
    """What a pass says where Transformer Engine chooses this attention, and whether a micro-batch has a grid."""
    config = Config()
    config.model.path, config.model.layers = str(model), layers
    record = importlib.import_module("transformer_engine.pytorch.record")
    record.backend, record.out_of_memory = backend, out_of_memory
    with open_context(config) as context:
        actor = build_actor(context)
        (micro,) = actor.model._packed(ragged_batch(2), torch.arange(2), torch.zeros(2, dtype=torch.int64))
        try:
            actor.logprobs(ragged_batch(2))
            return "", micro.packing.grids is not None
        except (InputError, torch.OutOfMemoryError) as error:
            return f"{type(error).__name__}: {error}", micro.packing.grids is not None


CHOICES = [
    (TE, "fused", False, "", False),
    (TE, "flash", True, "OutOfMemoryError: CUDA out of memory", False),
    (TE, "unfused", False, "InputError: Transformer Engine chose its unfused attention on this machine: ", False),
    (TE, "unfused", True, "InputError: Transformer Engine chose its unfused attention on this machine: ", False),
    (Layers.local, "unfused", True, "", True),
]


@pytest.mark.parametrize(("layers", "backend", "out_of_memory", "message", "grid"), CHOICES)
def test_an_attention_that_keeps_all_scores_is_refused(
    models: dict[str, Path], tmp_path: Path, layers: Layers, backend: str, out_of_memory: bool, message: str, grid: bool
) -> None:
    """The first pass may run out of memory before the choice can be read. Only local layers have a grid."""
    given = models["tied"], layers, backend, out_of_memory
    [(said, has_grid)] = run_ranks(refused, 1, tmp_path / "ranks", *given, server=TE_FORK_SERVER)
    assert said.startswith(message)
    assert bool(said) == bool(message)
    assert has_grid == grid
