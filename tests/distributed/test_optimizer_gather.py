"""The optimizer's state, gathered for a checkpoint in pieces: Megatron's own numbers, in the memory that is planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tempo.checkpoint import checkpoints
from megatron_tempo.config import Config
from megatron_tempo.config.choices import Device
from megatron_tempo.config.schema import ClusterConfig, ParallelConfig
from megatron_tempo.config.stages import PpoSettings, StageConfig
from megatron_tempo.models.megatron_compat import optimizer_gather
from megatron_tempo.models.megatron_compat.optimizer import optimizer_parts
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.plan import memory
from megatron_tempo.plan.memory import MemoryPhase, Part, place_memory
from megatron_tempo.plan.parameters import Role
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor, build_critic
from tests.support.ranks import run_ranks
from tests.support.storages import Storages
from tests.support.tiny import write_model

ODD = 1004  # bytes: 125 numbers of each of two ranks, a number that divides no parameter
PIECE = 100_000


def configured(model: Path) -> Config:
    config = Config()
    config.model.path, config.run.device = str(model), Device.cpu
    config.parallel = ParallelConfig(world_size=2, micro_batch_tokens=64)
    config.stage1 = StageConfig(PpoSettings(), 1)
    config.cluster = ClusterConfig(gpus_per_node=2, memory_gb=1.0)
    return config


def numbers_apart(model: TrainedModel) -> None:
    """Different numbers in all states and ranks, so that none is taken for another."""
    generator = torch.Generator().manual_seed(model.layout.rank)
    for part in optimizer_parts(model.optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for tensor in (parameter.data, state["exp_avg"], state["exp_avg_sq"]):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator))


def same_as_megatron(model: TrainedModel, patched: pytest.MonkeyPatch) -> list[bool]:
    """For each buffer and state, whether the pieces are what Megatron gathers as a whole."""
    asked = {"use_gloo_comm": False, "empty_data": False, "return_on_all_ranks": True}
    patched.setattr(optimizer_gather, "GATHERED_BYTES", ODD)
    same = []
    for part in optimizer_parts(model.optimizer):
        whole = part.get_parameter_state_dp_zero(**asked)
        with optimizer_gather.gathered_in_pieces(model.optimizer):
            pieces = part.get_parameter_state_dp_zero(**asked)
        assert whole.keys() == pieces.keys()
        for buffer in range(len(part.buffers)):
            for dtype, states in whole[buffer].items():
                found = pieces[buffer][dtype]
                assert states.keys() == found.keys()
                same += [torch.equal(states[name], found[name]) for name in optimizer_gather.STATES]
    return same


def gather(config: Config) -> dict[str, Any]:
    with open_context(config) as context, Storages() as storages, pytest.MonkeyPatch.context() as patched:
        found: dict[str, Any] = {}
        for model in (build_actor(context).model, build_critic(context).model):
            assert isinstance(model, TrainedModel)
            with model.at_work():
                numbers_apart(model)
                found.setdefault("same", []).extend(same_as_megatron(model, patched))
                patched.setattr(optimizer_gather, "GATHERED_BYTES", PIECE)
                storages.restart()
                state = checkpoints.sharded_state(model, is_loading=False)
                # On a CPU the gathered state itself, which stays, counts too.
                found.setdefault("beyond", []).append(storages.peak - storages.now())
                del state
        return found


def test_pieces_are_what_megatron_gathers_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(write_model(tmp_path / "model", tied=True))
    shape, _ = shape_of(config)
    assert shape is not None
    monkeypatch.setattr(memory, "GATHERED_BYTES", PIECE)
    planned = place_memory(config, shape, dict.fromkeys(Role, 0))[MemoryPhase.checkpoint][Part.buffers]
    for found in run_ranks(gather, 2, tmp_path / "ranks", config):
        assert len(found["same"]) >= 2 * len(optimizer_gather.STATES)
        assert all(found["same"])
        assert found["beyond"] == pytest.approx([planned, planned], rel=0.01)
