"""The layers of Transformer Engine, as Megatron-Core's own extension builds them, on the stand-in in tests/support/te.

What this proves is our wiring and Megatron's calls: names, shapes, packing, windows, checkpoints, the optimizer's path.
That Transformer Engine itself computes the same, tests/gpu/test_fp8.py asks a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tempo.config.choices import Layers
from tests.distributed import test_parity, test_update
from tests.support.fork_server import TE_FORK_SERVER
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model

TE = Layers.transformer_engine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return {"tied": write_model(out / "tied", tied=True), "olmo3": write_model(out / "olmo3", family="olmo3")}


@pytest.mark.parametrize("name", ["tp1", "tp2-sequence", "tp2-pp2-sequence"])
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
]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_steps_agree_with_plain_torch(tmp_path: Path, model: str, layout: str) -> None:
    path = write_model(tmp_path / "model", **test_update.MODELS[model])
    given = path, "plain", layout, TE
    world = test_update.LAYOUTS[layout][0]
    result = run_ranks(test_update.updated, world, tmp_path / "ranks", *given, server=TE_FORK_SERVER)[0]
    test_update.assert_steps(path, "plain", result)
