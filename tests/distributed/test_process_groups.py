"""Models take their groups from their layout: whatever Megatron-Core's globals hold, a step and a checkpoint are equal.

test_layouts.py, test_mixture.py and test_optimizer_files.py refuse all other reads of the globals, in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_tempo.checkpoint.weight_files import weight_share
from megatron_tempo.config.schema import Config, CriticLayoutConfig, ParallelConfig
from megatron_tempo.config.updates import OptimizerConfig
from megatron_tempo.models.megatron_compat.process_groups import Groups, clear_globals
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.parallel import Layouts
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.training.context import RunContext, open_context
from megatron_tempo.training.setup import build_actor, build_critic
from tests.support.group_reads import refuse_group_reads
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model

ROWS = 6
ADAM = OptimizerConfig(lr=0.05, warmup_steps=0, weight_decay=0.1)
# By the model: actor and critic differ in every size that the four ranks allow.
LAYOUTS: dict[str, ParallelConfig] = {
    "tied": ParallelConfig(
        pipeline=2,
        virtual_pipeline=2,
        micro_batch_tokens=60,
        critic=CriticLayoutConfig(tensor=2, context=2, pipeline=1, sequence=True, virtual_pipeline=1),
    ),
    "olmo3": ParallelConfig(
        tensor=2,
        pipeline=2,
        sequence=True,
        num_layers_in_first_pipeline_stage=3,
        critic=CriticLayoutConfig(tensor=1, sequence=False, num_layers_in_first_pipeline_stage=1),
    ),
    "mixture": ParallelConfig(
        tensor=2,
        sequence=True,
        expert=2,
        expert_tensor=1,
        critic=CriticLayoutConfig(tensor=1, sequence=False, context=2, expert=2, expert_tensor=2),
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "olmo3": {"family": "olmo3"},
    "mixture": {"family": "qwen3_moe"},
}


@contextmanager
def all_globals(groups: Groups) -> Iterator[None]:
    """Stands for `Groups.current`: all of Megatron's globals are the layout's, as if Megatron took no groups at all."""
    before = {name: value for name, value in vars(parallel_state).items() if name.isupper()}
    vars(parallel_state).update(groups._globals)
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def steps_and_checkpoints(context: RunContext, swapped: dict[str, Groups]) -> dict[str, Any]:
    """What each model has after a step, and what this rank writes of it. `swapped`: the globals that are set."""
    batch, found = ragged_batch(ROWS), {}
    for role, build in (("actor", build_actor), ("critic", build_critic)):
        clear_globals()
        vars(parallel_state).update(swapped[role]._globals if role in swapped else {})
        one = build(context)
        model = one.model
        assert isinstance(model, TrainedModel)

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            numbers = output[0] if output.dim() == 2 else output
            by_row = numbers.new_zeros(len(micro.rows)) + (numbers + numbers.square()).sum() / 100
            return by_row, by_row.detach()[:, None]

        step = model.step(batch, torch.arange(ROWS), one.owners(batch), loss, 1, ADAM)
        assert step.made
        with model.at_work():
            share = weight_share(model.net.chunks)
        parts = {(chunk.key, chunk.offsets): chunk.data.clone() for chunk in share.chunks}
        found[role] = step.grad_norm, step.losses, parts
    return found


def measured(kind: str, model: Path) -> dict[str, dict[str, Any]]:
    """A step and a checkpoint with the globals of the model's own layout, of none, and of the other model's layout."""
    config, found = Config(), {}
    config.parallel, config.model.path = LAYOUTS[kind], str(model)
    with open_context(config) as context:
        layouts, current = context.layouts, Groups.current
        Groups.current = all_globals  # type: ignore[method-assign]
        found["swapped"] = steps_and_checkpoints(context, own_and_other(layouts, own=True))
        Groups.current = current  # type: ignore[method-assign]
        found["none"] = steps_and_checkpoints(context, {})
        found["other"] = steps_and_checkpoints(context, own_and_other(layouts, own=False))
    return found


def own_and_other(layouts: Layouts, *, own: bool) -> dict[str, Groups]:
    actor, critic = layouts.actor.groups, layouts.critic.groups
    return {"actor": actor, "critic": critic} if own else {"actor": critic, "critic": actor}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_step_and_a_checkpoint_do_not_depend_on_megatrons_globals(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path / "model", **KINDS[kind])
    written: dict[str, list[tuple[Any, ...]]] = {"actor": [], "critic": []}
    for rank in run_ranks(measured, 4, tmp_path / "ranks", kind, tmp_path / "model"):
        for role, keys in written.items():
            norm, losses, parts = rank["swapped"][role]
            keys += parts
            for globals_ in ("none", "other"):
                other_norm, other_losses, other_parts = rank[globals_][role]
                assert other_norm == norm > 0
                assert torch.equal(other_losses, losses)
                assert other_parts.keys() == parts.keys(), f"{role}: the rank writes something else"
                assert all(torch.equal(other_parts[key], part) for key, part in parts.items()), role
    for role, keys in written.items():
        assert len(keys) == len(set(keys)) > 10, f"{role}: each part is written once"


def read_globals() -> list[str]:
    """What is refused, of calls that read a group, a rank and a size, each by another way."""
    refuse_group_reads()
    refused = []
    calls = {
        "collection": ProcessGroupCollection.use_mpu_process_groups,
        "rank": parallel_state.get_tensor_model_parallel_rank,
        "chunks": parallel_state.get_virtual_pipeline_model_parallel_world_size,
    }
    with open_context(Config()):
        for name, call in calls.items():
            try:
                call()
            except AssertionError:
                refused.append(name)
    return refused


def test_reads_of_the_globals_are_refused(tmp_path: Path) -> None:
    """Or the tests that refuse them could not fail."""
    (refused,) = run_ranks(read_globals, 1, tmp_path)
    assert refused == ["collection", "rank", "chunks"]
