"""The stand-in for Transformer Engine against the recorded names and signatures of the real one.

So a stand-in that takes what the real one refuses fails here. tests/nullgpu/test_te_api.py compares the record with the
installed Transformer Engine.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.te_signatures import DROPPED, STAND_IN, differences, signatures

RECORD = json.loads((Path(__file__).parents[1] / "fixtures/te_signatures.json").read_text())
REAL: dict[str, Any] = RECORD["signatures"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in, imported here. Nothing of it is left: Megatron-Core in this process must not find it."""
    assert not [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]
    monkeypatch.syspath_prepend(STAND_IN)
    yield importlib.import_module("transformer_engine")
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_the_stand_in_has_nothing_that_transformer_engine_has_not(stand_in: ModuleType) -> None:
    ours = signatures()
    assert set(ours) == set(REAL), "after a change: python -m tests.support.te_signatures, where the real one is"
    assert not [name for name, found in ours.items() if found == "absent"]
    assert differences(ours, REAL) == []
    assert stand_in.__version__ == RECORD["transformer_engine"]


def test_the_record_is_of_the_real_one() -> None:
    assert RECORD["transformer_engine"] == "2.11.0"
    assert "absent" not in REAL.values()
    parameters = [name for name, _, _ in REAL["transformer_engine.pytorch.module.Linear"]]
    assert {"ub_overlap_ag", "symmetric_ar_type", "delay_wgrad_compute"} < set(parameters)  # not the stand-in's


LAYER = "transformer_engine.pytorch.module.Linear"
DRIFT = [
    (LAYER, ["invented", "POSITIONAL_OR_KEYWORD", None], "TE has no parameter invented"),
    (LAYER, ["kwargs", "VAR_KEYWORD", "required"], "TE has no parameter kwargs"),
    (LAYER, ["ub_name", "KEYWORD_ONLY", None], "ub_name is KEYWORD_ONLY=None, and TE's is POSITIONAL_OR_KEYWORD=None"),
    (LAYER, ["ub_name", "POSITIONAL_OR_KEYWORD", "a"], "ub_name is POSITIONAL_OR_KEYWORD=a, and TE's is"),
    (LAYER, ["parameters_split", "POSITIONAL_OR_KEYWORD", None], "are in another order than TE's"),
    (LAYER + ".forward", None, "TE requires inp"),
]


@pytest.mark.parametrize(("name", "parameter", "words"), DRIFT)
def test_a_drift_is_found(name: str, parameter: list[Any] | None, words: str) -> None:
    parts = [one for one in REAL[name] if one[0] not in ("ub_name", "parameters_split")]
    mine = [*parts, parameter] if parameter else [one for one in parts if one[0] != "inp"]
    assert differences({name: parts}, REAL) == []
    assert any(words in found for found in differences({name: mine}, REAL))


def test_names_that_transformer_engine_has_not_are_found() -> None:
    assert differences({"transformer_engine.pytorch.nothing": []}, REAL) == [
        "transformer_engine.pytorch.nothing is not in TE's record"
    ]
    wrong = {"transformer_engine.common.recipe.Format": {"members": ["E4M3", "E3M4"]}}
    assert differences(wrong, REAL) == ["transformer_engine.common.recipe.Format.E3M4 is not TE's"]


# A recipe, and keywords that TE checks or drops. Here all but Megatron-Core's own are errors.
WRONG = [
    ("DelayedScaling", {"nonsense": 1}),
    ("DelayedScaling", {"margin": "three"}),
    ("DelayedScaling", {"fp8_format": "hybrid"}),
    ("DelayedScaling", {"amax_compute_algo": "least"}),
    ("DelayedScaling", {"interval": 1}),
    ("Float8CurrentScaling", {"margin": 0}),
    ("Float8CurrentScaling", {"fp8_dpa": "no"}),
    ("Float8BlockScaling", {"device": "cpu"}),
    ("Float8BlockScaling", {"x_block_scaling_dim": 128.0}),
    ("MXFP8BlockScaling", {"use_power_2_scales": True}),
]


@pytest.mark.parametrize(("name", "keywords"), WRONG, ids=lambda value: str(value))
def test_recipes_are_strict(stand_in: ModuleType, name: str, keywords: dict[str, Any]) -> None:
    recipe = getattr(stand_in.common.recipe, name)
    recipe()
    with pytest.raises((TypeError, AssertionError)):
        recipe(**keywords)


def test_delayed_scaling_takes_what_megatron_passes(stand_in: ModuleType) -> None:
    recipe = stand_in.common.recipe
    given = {"override_linear_precision": (False, False, True), "params_dtype": torch.bfloat16, "device": 0}
    assert set(given) == set(DROPPED["transformer_engine.common.recipe.DelayedScaling"])
    made = recipe.DelayedScaling(margin=0, fp8_format=recipe.Format.HYBRID, amax_history_len=1, **given)
    assert (made.amax_history_len, made.reduce_amax) == (1, True)
