"""A critic in bf16 with its value head in fp32: trained, saved, and gone on with in another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tempo.checkpoint.checkpoints import Checkpoints
from megatron_tempo.config.choices import Precision
from megatron_tempo.config.schema import Config, ParallelConfig
from megatron_tempo.config.updates import CriticUpdateConfig, OptimizerConfig
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_critic
from megatron_tempo.weights.export import weights_of
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model

UPDATE = CriticUpdateConfig(OptimizerConfig(lr=2e-3))


def steps(model: Path, parallel: ParallelConfig, folder: Path, first: int, last: int) -> dict[str, Tensor]:
    """The weights after steps `first` to `last`, from the checkpoint before `first` on; after each, one is saved."""
    config = Config()
    config.model.path, config.parallel = str(model), parallel
    batch = ragged_batch(8)
    assert batch.correct is not None
    with open_context(config) as context:
        config.run.precision = Precision.bf16  # not on a CPU by the rules, but it runs
        critic = build_critic(context)
        checkpoints = Checkpoints(folder, 9, context.layouts.critic)
        if first > 0:
            checkpoints.load(checkpoints.find(), {"critic": critic.model})
        for step in range(first, last + 1):
            critic.update(batch, batch.correct, UPDATE, [torch.arange(8)])
            checkpoints.save(step, {"critic": critic.model}, {})
        checkpoints.wait()
        wide = {name for name, p in critic.model.net.named_parameters() if p.dtype != torch.bfloat16}
        assert wide == ({"output_layer.weight", "output_layer.bias"} if context.layouts.critic.is_last_stage else set())
        stream = weights_of(critic.model, context.config, torch.float32)
        whole = {name: x for bucket in stream.everywhere() for name, x in bucket}
        return {name: tensor.clone() for name, tensor in whole.items()}


LAYOUTS = {"dp2": ParallelConfig(), "pp2": ParallelConfig(pipeline=2)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_goes_on_from_a_checkpoint(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "model")
    (alone,) = run_ranks(steps, 1, tmp_path / "ranks", model, ParallelConfig(), tmp_path / "alone", 0, 1)
    run_ranks(steps, 2, tmp_path / "first", model, LAYOUTS[name], tmp_path / "parted", 0, 0)
    (result,) = run_ranks(steps, 1, tmp_path / "then", model, ParallelConfig(), tmp_path / "parted", 1, 1)
    for key, expected in alone.items():
        # Sums in bf16 differ by the layout; an Adam that had lost its moments would be off by a whole step.
        assert (result[key] - expected).abs().mean() < 0.1 * UPDATE.optimizer.lr + 2**-9 * expected.abs().mean(), key
    head = result["score.weight"]
    assert not torch.equal(head, head.bfloat16().float())
