"""Gradients are reduced in the last micro-batch's backward pass and weights gathered in the next forward pass.

Gathers are made late on purpose: only a wait does them. What reads a weight without a wait has the one of the step
before, on every run of the test.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.config.choices import Logits, Recompute
from megatron_tempo.config.schema import Config, ParallelConfig
from megatron_tempo.config.updates import CriticUpdateConfig
from megatron_tempo.models import ddp
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor, build_critic
from megatron_tempo.weights.export import weights_of
from tests.support.ranks import run_ranks
from tests.support.rows import from_owners
from tests.support.tiny import ragged_batch, write_model

# Rows of many lengths on two replicas, which have different numbers of micro-batches. One row: one has padding alone.
MINI_BATCHES = [torch.arange(8), torch.tensor([3]), torch.tensor([0, 2, 5]), torch.arange(8)]
OFF = {"overlap_grad_reduce": False, "overlap_param_gather": False}
# name: processes, and what of the layout is not as it comes
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {"ddp_bucket_size": 1}),
    "reduce alone": (2, {"ddp_bucket_size": 1, "overlap_param_gather": False}),
    "tp2-sequence": (4, {"ddp_bucket_size": 1, "tensor": 2, "sequence": True}),
    "pp2-offload": (4, {"ddp_bucket_size": 1, "pipeline": 2, "offload": True}),
    "cp2-layers": (2, {"ddp_bucket_size": 500, "context": 2, "recompute": Recompute.layers}),
}


class Late:
    """A gather that its wait makes. Replicas wait in the same order."""

    waits = 0

    def __init__(self, group: Any) -> None:
        self.group = group

    def wait(self) -> None:
        type(self).waits += 1
        self.group.param_gather_handle = None
        self.group.start_param_sync(force_sync=True)


def start_late(group: Any) -> None:
    assert group.param_gather_handle is None
    group.param_gather_handle, group.param_gather_dispatched = Late(group), True


def configured(model: Path, layout: dict[str, Any]) -> Config:
    config = Config()
    config.model.path, config.model.logits = str(model), Logits.stored
    config.parallel = ParallelConfig(micro_batch_tokens=12, **layout)
    return config


def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the first outputs of each row: log-probabilities of an actor, values of a critic."""
    own = output[0] if output.dim() == 2 else output
    rows = micro.response_rows if output.dim() == 2 else micro.value_rows
    by_row = torch.stack([(part - 0.5).square().mean() for part in own.split(rows.lengths.tolist())] or [own.sum()])
    by_row = by_row[: len(micro.rows)]
    return by_row, by_row.detach()[:, None]


def weights(one: Actor | Critic, config: Config) -> dict[str, Tensor]:
    return {key: value.clone() for bucket in weights_of(one.model, config).everywhere() for key, value in bucket}


def trained(model: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Steps of both models on mini-batches of many sizes, one of them not finite, and the weights after each pair."""
    config, batch = configured(model, layout), ragged_batch(8)
    optimizer = CriticUpdateConfig().optimizer
    # The large epsilon keeps Adam from making a full step of what is rounding noise in a gradient.
    optimizer.lr, optimizer.eps = 5e-3, 1e-4
    found: dict[str, Any] = {"norms": [], "reduced": []}
    ddp.start_gather = start_late
    with open_context(config) as context:
        models = {"actor": build_actor(context), "critic": build_critic(context)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(buckets_of(models["actor"].model)[-1], "start_grad_sync", noted(found, models["actor"].model))
            for number, rows in enumerate(MINI_BATCHES):
                for one in models.values():
                    assert isinstance(one.model, TrainedModel)
                    step = one.model.step(
                        batch, rows, one.owners(batch), loss if number != 2 else not_finite, 1, optimizer
                    )
                    assert step.made == (number != 2)
                    found["norms"].append(step.grad_norm)
                if layout.get("offload"):  # nothing arrives in memory that the critic has now
                    assert all(group.param_gather_handle is None for group in buckets_of(models["actor"].model))
                if number == 1:  # a pass without gradient, then an offload in between
                    found["values"] = models["critic"].values(batch)
                    found["logprobs"] = from_owners(models["actor"], batch, models["actor"].logprobs(batch))
        found |= {name: weights(one, config) for name, one in models.items()}
        found["waits"] = Late.waits
    return found


def not_finite(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
    by_row, metrics = loss(micro, output)
    return by_row * torch.inf, metrics


def buckets_of(model: Any) -> list[Any]:
    groups: list[Any] = model.module.bucket_groups
    return groups


def noted(found: dict[str, Any], model: Any) -> Any:
    """Notes, at each reduction of a bucket, how many micro-batches' forward passes had begun."""
    group = buckets_of(model)[-1]
    original, counted = group.start_grad_sync, {"passes": 0}

    def count(*_: Any) -> None:
        counted["passes"] += 1

    model.module.register_forward_pre_hook(count)

    def start(*args: Any, **kwargs: Any) -> None:
        found["reduced"].append((counted["passes"], torch._C._current_autograd_node() is not None))
        original(*args, **kwargs)

    return start


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head has a weight of its own."""
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, which overlaps nothing."""
    found: dict[str, Any] = run_ranks(trained, 1, tmp_path_factory.mktemp("one"), model, {})[0]
    assert found["waits"] == 0
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_overlaps_change_no_result(model: Path, plain: dict[str, Any], tmp_path: Path, name: str) -> None:
    world, layout = LAYOUTS[name]
    for found in run_ranks(trained, world, tmp_path / "ranks", model, layout):
        for one in ("actor", "critic"):
            for key, weight in found[one].items():
                torch.testing.assert_close(weight, plain[one][key], rtol=1e-4, atol=2e-6, msg=f"{one} {key}")
        for key in ("values", "logprobs"):
            torch.testing.assert_close(found[key], plain[key], rtol=1e-4, atol=1e-5, msg=key)
        finite = [(a, b) for a, b in zip(found["norms"], plain["norms"], strict=True) if b < torch.inf]
        assert len(finite) == 6
        assert [a for a, _ in finite] == pytest.approx([b for _, b in finite], rel=1e-4)
        assert (found["waits"] > 0) == layout.get("overlap_param_gather", True)


def test_a_bucket_is_reduced_in_the_last_backward_pass_alone(model: Path, tmp_path: Path) -> None:
    """Of each step but the first, in which Megatron learns which gradients a bucket waits for."""
    ranks = [found["reduced"] for found in run_ranks(trained, 2, tmp_path / "ranks", model, LAYOUTS["dp2"][1])]
    for reduced in ranks:
        assert len(reduced) == len(MINI_BATCHES)
        assert [inside for _, inside in reduced] == [False, True, True, True]
    passes = [[b[0] - a[0] for a, b in itertools.pairwise(reduced)] for reduced in ranks]
    assert passes[0] != passes[1], "the replicas have different numbers of micro-batches"
    plain = run_ranks(trained, 2, tmp_path / "plain", model, OFF)[0]["reduced"]
    assert [inside for _, inside in plain] == [False] * 4


def freed(model: Path) -> bool:
    config = configured(model, {"ddp_bucket_size": 1})
    with open_context(config) as context:
        critic = build_critic(context)
        assert isinstance(critic.model, TrainedModel)
        assert critic.model.gather is not None
        batch = ragged_batch(8)
        critic.update(batch, batch.correct, CriticUpdateConfig(), [torch.arange(8)])
        net = weakref.ref(critic.model.net)
        del critic
        gc.collect()
        return net() is None


def test_a_model_with_overlaps_is_freed(model: Path, tmp_path: Path) -> None:
    assert run_ranks(freed, 2, tmp_path / "ranks", model) == [True, True]
