"""The installed Transformer Engine against the record by which `make test` compares the stand-in (test_te_api.py).

It can be imported without a GPU. Its C++ part is compiled by `make test-rehearsal`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.te_signatures import DROPPED, signatures

pytestmark = pytest.mark.nullgpu
te: Any = pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
RECORD = json.loads((Path(__file__).parents[1] / "fixtures/te_signatures.json").read_text())


def test_the_record_is_that_of_the_installed_one() -> None:
    assert importlib.import_module("transformer_engine").__version__ == RECORD["transformer_engine"]
    assert signatures() == RECORD["signatures"]


def test_recipes_drop_the_keywords_that_megatron_passes() -> None:
    """And any other. So it is the stand-in, which refuses others, that finds a misspelt one."""
    recipe = importlib.import_module("transformer_engine.common.recipe")
    for keyword in (*DROPPED["transformer_engine.common.recipe.DelayedScaling"], "nonsense"):
        assert keyword not in inspect.signature(recipe.DelayedScaling).parameters
        assert not hasattr(recipe.DelayedScaling(**{keyword: (False, False, False)}), keyword)
    with pytest.raises(ValueError, match="fp8_format"):
        recipe.DelayedScaling(fp8_format="hybrid")


def test_the_choice_of_attention_is_where_we_read_it() -> None:
    """`refuse_unfused_attention` reads it. Before the first pass nothing is chosen."""
    backends = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention")._attention_backends
    module = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention")
    assert backends is module._attention_backends
    assert backends["use_unfused_attention"] is None
    assert '_attention_backends["use_unfused_attention"] = use_unfused_attention' in inspect.getsource(module)


def test_maxima_of_all_models_are_reduced_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rule on `parallel.critic` with `fp8_delayed` is for, and the stand-in imitates."""
    state = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    recipe = importlib.import_module("transformer_engine.common.recipe").DelayedScaling()
    reduced: list[str] = []
    monkeypatch.setenv("NVTE_UNFUSED_FP8_UPDATE", "1")  # in Python, not by a kernel
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1 if group == "alone" else 2)
    monkeypatch.setattr(state, "reduce_tensor_across_group_op_max", lambda _, group: reduced.append(group))
    for name in ("autocast_arguments", "global_amax_buffer", "global_amax_history_buffer", "global_scale_buffer"):
        monkeypatch.setattr(state, name, {})
    for group in ("actor's", "critic's", "alone"):
        key = state.get_key_in_buffer(True, recipe, group)
        state.autocast_arguments[state.get_unique_autocast_key(recipe, group)] = recipe, group
        state.global_amax_buffer[key] = [torch.ones(1)]
        state.global_amax_history_buffer[key] = state.global_scale_buffer[key] = []
    state.reduce_and_update_fp8_tensors(forward=True)
    assert reduced == ["actor's", "critic's"]
