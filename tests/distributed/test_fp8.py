"""FP8 on the stand-in for Transformer Engine: which layers are in it, how many tokens they see, when weights are cast.

Nothing is computed in FP8 here. The stand-in's layers refuse the shapes that Transformer Engine refuses.
"""

from __future__ import annotations

import gc
import importlib
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.config.choices import Layers, Precision, Recompute
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.config.schema import Config
from megatron_tempo.config.updates import CriticUpdateConfig
from megatron_tempo.models.machine import described
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor, build_critic
from tests.support.fork_server import TE_FORK_SERVER
from tests.support.ranks import run_ranks
from tests.support.storages import Storages
from tests.support.tiny import ragged_batch, write_model

LAYERS = 4
ROWS = [torch.arange(4), torch.arange(4, 8)]  # two optimizer steps
CLASSES = {
    Precision.fp8_delayed: "TEDelayedScaling",  # of Megatron, for that of Transformer Engine
    Precision.fp8_tensorwise: "Float8CurrentScaling",
    Precision.fp8_blockwise: "Float8BlockScaling",
    Precision.mxfp8: "MXFP8BlockScaling",
}


def tried(model: Path, precision: Precision, tensor: int, ends: int, recompute: Recompute) -> dict[str, Any]:
    """The values before and after two steps of a critic in bf16 or FP8, and what the stand-in saw meanwhile.

    A CPU's precision is fp32 by the rules; the other one is put in behind them.
    """
    config = Config()
    config.model.path, config.model.layers, config.model.num_bf16_layers_at_ends = (
        str(model),
        Layers.transformer_engine,
        ends,
    )
    config.parallel.tensor, config.parallel.sequence, config.parallel.recompute = tensor, tensor > 1, recompute
    config.parallel.micro_batch_tokens = 64
    record = importlib.import_module("transformer_engine.pytorch.record")
    state = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    batch = ragged_batch(8)
    assert batch.correct is not None
    with open_context(config) as context:
        config.run.precision = precision
        critic = build_critic(context)
        head = critic.model.net.output_layer.weight
        result: dict[str, Any] = {"layers": described(config, context.machine), "head": head.dtype}
        del record.calls[:], record.packed[:]
        updates = state.updates
        result["before"] = critic.values(batch)
        result["reading"], result["updates"] = list(map(seen, record.calls)), state.updates - updates
        del record.calls[:]
        critic.update(batch, batch.correct, CriticUpdateConfig(), ROWS)
        result |= {"training": list(map(seen, record.calls)), "after": critic.values(batch)}
        result |= {"packed": list(record.packed), "learnt": head.detach().clone()}
        result["micro"] = len(critic.model._packed(batch, torch.arange(len(batch)), critic.owners(batch)))
        return result


def seen(call: Any) -> SimpleNamespace:
    """A record of the stand-in, as a process without it can read it."""
    return SimpleNamespace(**asdict(call))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers' sizes are multiples of 128 on each of two tensor ranks."""
    return write_model(tmp_path_factory.mktemp("model"), layers=LAYERS, hidden=128, head_dim=64, ffn=256)


@pytest.fixture(scope="module")
def bf16(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    given = model, Precision.bf16, 1, 0, Recompute.none
    return run_ranks(tried, 1, tmp_path_factory.mktemp("bf16"), *given, server=TE_FORK_SERVER)[0]


# The scales of delayed scaling need a pass of one micro-batch with gradient before the first reading.
CASES = [
    (Precision.fp8_delayed, 2, 0, Recompute.none),
    (Precision.fp8_tensorwise, 1, 1, Recompute.none),
    (Precision.fp8_blockwise, 2, 1, Recompute.layers),
    (Precision.mxfp8, 2, 0, Recompute.attention),
]


@pytest.mark.parametrize(("precision", "tensor", "ends", "recompute"), CASES, ids=lambda value: str(value))
def test_what_is_in_fp8(
    model: Path,
    bf16: dict[str, Any],
    tmp_path: Path,
    precision: Precision,
    tensor: int,
    ends: int,
    recompute: Recompute,
) -> None:
    given = model, precision, tensor, ends, recompute
    for result in run_ranks(tried, tensor, tmp_path / "ranks", *given, server=TE_FORK_SERVER):
        delayed = precision is Precision.fp8_delayed
        reading, recipe = result["reading"], CLASSES[precision]
        assert len(reading) == 4 * LAYERS * (result["micro"] + delayed)
        assert result["updates"] == delayed
        by_pass = [reading[i : i + 4 * LAYERS] for i in range(0, len(reading), 4 * LAYERS)]
        inside = [recipe if ends <= layer < LAYERS - ends else None for layer in range(LAYERS) for _ in range(4)]
        for number, calls in enumerate(by_pass):
            assert [call.recipe for call in calls] == inside
            # A weight is cast in the first micro-batch after it may have changed.
            assert {call.first for call in calls} == {number <= delayed}
            assert {call.grad for call in calls} == {delayed and number == 0}
        for call in reading + result["training"]:
            assert call.tokens % RECIPES[precision].multiple == 0
            assert call.group == (tensor if call.recipe else 1), "no replica waits for another"
        assert {call.recipe for call in result["training"] if call.grad} == {*inside}
        # Padding is a sequence of its own: what the rows' tokens give is as without it.
        torch.testing.assert_close(result["before"], bf16["before"], atol=0.05, rtol=0.05)
        torch.testing.assert_close(result["after"], bf16["after"], atol=0.05, rtol=0.05)


def warmed_up(model: Path) -> dict[str, Any]:
    """The first and the second pass of a critic with delayed scaling: what they need, leave behind and saw."""
    config = Config()
    config.model.path, config.model.layers = str(model), Layers.transformer_engine
    config.parallel.micro_batch_tokens = 64
    record = importlib.import_module("transformer_engine.pytorch.record")
    batch, found = ragged_batch(8), {}
    with open_context(config) as context, Storages() as storages:
        config.run.precision = Precision.fp8_delayed
        critic = build_critic(context)
        for name in ("first", "second"):
            del record.calls[:]
            gc.collect()
            before = storages.restart()
            values = critic.values(batch)
            peak = storages.peak - before
            gc.collect()
            left = storages.now() - before - values.untyped_storage().nbytes()
            found[name] = {"peak": peak, "left": left, "grad": values.requires_grad, "calls": list(record.calls)}
            found[name]["largest"] = [call.largest for call in found[name].pop("calls")]
    return found


def test_the_pass_for_the_first_scales_keeps_nothing(model: Path, tmp_path: Path) -> None:
    first, second = run_ranks(warmed_up, 1, tmp_path, model, server=TE_FORK_SERVER)[0].values()
    assert not first["grad"]
    assert first["left"] <= second["left"] + 1024
    assert first["peak"] <= 1.1 * second["peak"]
    of_pass = 4 * LAYERS
    assert len(first["largest"]) == len(second["largest"]) + of_pass
    # The scales are made of these: as of the same micro-batch in a pass that keeps everything, or nothing.
    assert first["largest"][:of_pass] == first["largest"][of_pass : 2 * of_pass] == second["largest"][:of_pass]


def test_without_fp8_nothing_is_filled_up_or_cast(bf16: dict[str, Any]) -> None:
    batch = ragged_batch(8)
    assert {call.recipe for call in bf16["training"]} == {None}
    assert sum(tokens for _, tokens in bf16["packed"]) % (LAYERS * int(batch.lengths.sum())) == 0


def test_the_value_head_is_fp32(bf16: dict[str, Any]) -> None:
    assert bf16["head"] == torch.float32
    assert not torch.equal(bf16["learnt"], bf16["learnt"].bfloat16().float()), "it has learnt more than bf16 can tell"


def test_the_log_names_layers_precision_and_optimizer(bf16: dict[str, Any]) -> None:
    wanted = "device: CPU; layers: Transformer Engine 2.11.0, bf16; fused: rotary embedding, SwiGLU, weight gradients; "
    wanted += "optimizer: Transformer Engine's FusedAdam"
    assert bf16["layers"] == wanted


def reduced(model: Path, critic_tensor: int | None) -> dict[tuple[int, ...], int]:
    """How often each group reduces magnitudes in an iteration of an actor at tensor 2 and a critic of another layout.

    The rules refuse it; they are passed by.
    """
    config = Config()
    config.model.path, config.model.layers = str(model), Layers.transformer_engine
    config.parallel.tensor, config.parallel.critic.tensor = 2, critic_tensor
    config.parallel.micro_batch_tokens = 1  # a row each: a step of three rows is uneven over two replicas
    record = importlib.import_module("transformer_engine.pytorch.record")
    batch = ragged_batch(8)
    assert batch.correct is not None
    with open_context(config) as context:
        config.run.precision = Precision.fp8_delayed
        actor, critic = build_actor(context), build_critic(context)
        actor.logprobs(batch)
        critic.update(batch, batch.correct, CriticUpdateConfig(), [torch.arange(3)])
    return dict(record.reductions)


@pytest.mark.parametrize("critic_tensor", [None, 1])
def test_delayed_scaling_reduces_as_often_on_every_rank_of_a_group(
    model: Path, tmp_path: Path, critic_tensor: int | None
) -> None:
    """Else one of them waits for ever. A critic of another tensor size has it so: hence the rule on the layouts."""
    first, second = run_ranks(reduced, 2, tmp_path / "ranks", model, critic_tensor, server=TE_FORK_SERVER)
    assert set(first) == set(second) == {(0, 1)}
    assert min(first[0, 1], second[0, 1]) > 0
    assert (first == second) == (critic_tensor is None)


def actor_logprobs(model: Path) -> Tensor:
    config = Config()
    config.model.path = str(model)
    with open_context(config) as context:
        config.run.precision, config.model.layers = Precision.fp8_blockwise, Layers.transformer_engine
        return build_actor(context).logprobs(ragged_batch(2))


def test_the_stand_in_refuses_what_transformer_engine_refuses(tmp_path: Path) -> None:
    """Or else the test above could not fail."""
    odd = write_model(tmp_path / "model", hidden=24, head_dim=12, ffn=48)
    with pytest.raises(AssertionError, match="FP8 execution requires"):
        run_ranks(actor_logprobs, 1, tmp_path / "ranks", odd, server=TE_FORK_SERVER)
