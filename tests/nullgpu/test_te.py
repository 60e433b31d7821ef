"""The real Transformer Engine on the null GPU (make .venv-cuda/te)."""

from __future__ import annotations

import textwrap

import pytest

from megatron_tempo.nullgpu.build import transformer_engine
from tests.nullgpu.child import on_null_gpu

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
