"""Checkpoints on the GPU path: written with one kind of layers and precision, and read with every other."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

from megatron_tempo import cli
from megatron_tempo.config.rules import Purpose
from megatron_tempo.nullgpu.build import transformer_engine
from megatron_tempo.rehearsal import rehearse as rehearsing
from megatron_tempo.rehearsal.model_folder import config_entries
from megatron_tempo.rehearsal.outcome import Outcome
from megatron_tempo.rehearsal.rehearse import Options, rehearse_all
from tests.nullgpu.checkpoint_plants import FOLDER, STEP
from tests.support.shapes import qwen3_shape

pytestmark = [pytest.mark.nullgpu, pytest.mark.timeout(1800)]
# The least that FP8 takes: every matrix has sides that are multiples of 128.
TINY = qwen3_shape(
    layers=2, hidden=128, heads=4, groups=2, head_dim=64, ffn=256, vocab=512, max_positions=512, tied=False
)
BASE = (
    *("experiment=qwen3_8b_aime", "cluster=h100x8", "parallel.world_size=1", "parallel.tensor=1"),
    "rollout.placement=disaggregated",
    *("parallel.sequence=false", "rollout.max_prompt_tokens=64", "rollout.max_response_tokens=192"),
    *("parallel.micro_batch_tokens=256", "parallel.bucket_mb=4", "stage1.critic.warmup_iterations=0"),
)
LOCAL = "local-bf16"
KINDS = (LOCAL, *(f"transformer_engine-{name}" for name in ("bf16", "fp8_blockwise", "fp8_tensorwise", "fp8_delayed")))
NORMS = 2 * 4 + 1  # of a model: in each layer two, and those of queries and keys; the last one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def resumed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, Outcome]]:
    """Every kind saves, then every kind reads all checkpoints: the outcomes of both, by kind."""
    kinds = KINDS if len(transformer_engine()) == 2 else KINDS[:1]
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(config_entries(TINY)))
    cases = []
    for plant in ("saves", "resumes"):
        for kind in kinds:
            layers, precision = kind.split("-")
            words = [*BASE, f"model.path={model}", f"model.layers={layers}", f"run.precision={precision}"]
            options = Options(plant=f"tests.nullgpu.checkpoint_plants:{plant}")
            cases.append((cli.build(words, purpose=Purpose.rehearse), options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        patch.setattr(rehearsing, "environment", partial(rehearsing.environment, copy_max_bytes=1 << 26))
        found = [outcome for outcome, _ in rehearse_all(cases)]
    return dict(zip(kinds, zip(found[: len(kinds)], found[len(kinds) :], strict=True), strict=True))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, resumed: dict[str, tuple[Outcome, Outcome]]) -> str:
    name: str = request.param
    if name not in resumed:
        pytest.skip("Transformer Engine is not installed")
    return name


def fault_text(outcome: Outcome) -> str:
    """Why a rank did not come to its end; empty if it did."""
    (rank,) = outcome.ranks
    return f"{rank.ended or ''}{rank.fault.traceback if rank.fault else ''}"


def test_every_kind_of_layers_reads_every_other_s_checkpoint(
    resumed: dict[str, tuple[Outcome, Outcome]], folder: Path, kind: str
) -> None:
    saved, read = resumed[kind]
    assert not fault_text(saved)
    assert not fault_text(read)
    found = json.loads((folder / f"{kind}.json").read_text())
    assert found.keys() == resumed.keys()
    for name, one in found.items():
        assert one["marked"] == {"actor": NORMS, "critic": NORMS + 1}, name  # and the value head
        assert one["steps"]["actor"] > 0


def test_the_files_hold_the_shapes_of_the_model_whatever_the_layers(folder: Path, kind: str) -> None:
    for role in ("actor", "critic"):
        sizes = sizes_of(folder / kind / f"step_{STEP:08d}" / role)
        assert sizes == sizes_of(folder / LOCAL / f"step_{STEP:08d}" / role)
        assert sizes["decoder.final_layernorm.weight|tp 0 of 1|0:128|exp_avg"] == [128]
        assert sizes["decoder.layers.mlp.linear_fc2.weight"] == [2, 128, 256]


def sizes_of(checkpoint: Path) -> dict[str, list[int]]:
    """The shapes of a checkpoint's tensors by name."""
    entries = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    sizes = {name: list(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}
    with safe_open(checkpoint / "optimizer/rank_00000.safetensors", "pt") as states:
        return sizes | {name: states.get_slice(name).get_shape() for name in states.keys()}  # noqa: SIM118, no dict
