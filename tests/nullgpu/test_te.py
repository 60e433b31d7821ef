"""The real Transformer Engine on the null GPU (make .venv-cuda/te)."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from megatron_tempo.nullgpu.build import transformer_engine
from tests.nullgpu.child import on_null_gpu
from tests.support import tiny

pytestmark = [
    pytest.mark.nullgpu,
    pytest.mark.skipif(len(transformer_engine()) < 2, reason="make .venv-cuda/te installs it"),
]

LAYER = """
import transformer_engine.pytorch as te
from transformer_engine.common import recipe
layer = te.LayerNormLinear(512, 1024, params_dtype=torch.bfloat16, device="cuda")
def step(rows, chosen):
    x = torch.empty(rows, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = counters.read()
    with te.autocast(enabled=chosen is not None, recipe=chosen):
        y = layer(x)
    y.sum().backward()
    return counters.read() - before
"""


@pytest.mark.parametrize(
    "chosen",
    ["None", "recipe.DelayedScaling()", "recipe.Float8CurrentScaling()", "recipe.Float8BlockScaling()"],
    ids=["bf16", "delayed", "tensorwise", "blockwise"],
)
def test_a_layers_products_are_counted_and_no_stub_is_called(chosen: str) -> None:
    told = on_null_gpu(
        f"{LAYER}\ndone = step(256, {chosen})\n"
        "tell([done.flops, done.products, done.kernel_launches, counters.stub_calls()])"
    )
    assert told[0] == 3 * 2 * 256 * 512 * 1024  # forward, and the gradients of input and weight
    assert told[1] == 3
    assert told[2] > 3
    assert told[3] == []


def test_a_size_that_fp8_does_not_take_is_found() -> None:
    told = on_null_gpu(f"{LAYER}\ntell(raised(lambda: step(250, recipe.Float8CurrentScaling())))")
    assert told is not None
    assert "divisible by 8" in told[1]
    assert "[250, 512]" in told[1]


@pytest.mark.parametrize("chosen", ["recipe.Float8CurrentScaling()", "recipe.Float8BlockScaling()"])
def test_fp8_copies_of_weights_stay_until_they_are_dropped(chosen: str) -> None:
    """What an offloaded model would keep on a GPU that servers share."""
    code = f"""
    from megatron_tempo.models.megatron_compat.transformer_engine import drop_fp8_weights
    import gc
    def kept(first):
        x = torch.empty(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with te.autocast(enabled=True, recipe={chosen}):
            layer(x, is_first_microbatch=first).sum().backward()
        layer.zero_grad()
        del x
        gc.collect()
        return torch.cuda.memory_allocated()
    first = kept(True)
    again = kept(False)
    net = torch.nn.Sequential(layer)
    drop_fp8_weights(net)
    dropped = torch.cuda.memory_allocated()
    tell([first, again, dropped, kept(False)])
    """
    first, again, dropped, made_anew = on_null_gpu(LAYER + textwrap.dedent(code))
    weights = 512 * 1024
    assert first - dropped >= 2 * weights, "a byte for each number, and the transposed copy of the backward pass"
    assert again == first
    assert made_anew == first, "the next pass makes them again"


MIXTURE = """
from megatron_tempo.config.choices import Layers, Precision
from megatron_tempo.config.schema import Config
from megatron_tempo.config.updates import OptimizerConfig
from megatron_tempo.rehearsal.takeover import take_over
guard.rehearse()
config = Config()
config.model.path, config.model.layers = {folder!r}, Layers.transformer_engine
config.run.precision, config.parallel.expert = Precision.{precision}, {ranks}
join = take_over(0, {ranks})
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor
from tests.support.tiny import ragged_batch
with open_context(config, join, watched=False) as context:
    actor, batch = build_actor(context), ragged_batch(6)
    actor.logprobs(batch)
    def loss(micro, output):
        by_row = output[0].sum() * output.new_ones(len(micro.rows))
        return by_row, by_row.detach()[:, None]
    step = actor.model.step(batch, torch.arange(6), actor.owners(batch), loss, 1, OptimizerConfig())
    kinds = {{type(module).__name__ for module in actor.model.net.modules()}}
    tell([sorted(kinds), step.made, sorted(actor.model.net.weights()), counters.stub_calls()])
"""


@pytest.mark.parametrize(
    ("precision", "ranks"), [("bf16", 1), ("bf16", 4), ("fp8_blockwise", 4), ("fp8_tensorwise", 1), ("fp8_delayed", 4)]
)
def test_a_mixture_of_experts_takes_a_step(
    precision: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one of four expert ranks, or of a single one: grouped products, which FP8 pads to sizes that it takes."""
    monkeypatch.setattr(tiny, "EXPERT_FFN", 64)
    folder = tiny.write_model(tmp_path / "model", family="qwen3_moe", layers=2, hidden=64, head_dim=64)
    kinds, made, names, stubs = on_null_gpu(MIXTURE.format(folder=str(folder), precision=precision, ranks=ranks))
    assert {"RoutedLayer", "Router", "TEGroupedMLP", "TEGroupedColumn", "TEGroupedRow"} <= set(kinds)
    assert ("Fp8Padding" in kinds) == (precision != "bf16")
    assert made
    experts = {name.split(".experts.")[1] for name in names if ".experts." in name}
    matrices = ("linear_fc1", "linear_fc2")
    assert experts == {f"{i}.{matrix}.weight" for i in range(tiny.EXPERTS // ranks) for matrix in matrices}
    assert stubs == []
