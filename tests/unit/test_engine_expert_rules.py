"""How an engine's workers may share a mixture's experts."""

from __future__ import annotations

import pytest

from megatron_tempo.config import Config, Problem
from megatron_tempo.config.choices import EngineKind, EnginePrecision
from megatron_tempo.config.model_shape import Experts
from megatron_tempo.config.rules.engine_experts import check

QWEN3_30B = Experts(count=128, per_token=8, ffn=768, normalized=True)
APART, MOVES = "--enable-expert-parallel", "--enable-eplb"


def problems(
    engine: EngineKind,
    tensor: int,
    arguments: list[str],
    experts: Experts | None = QWEN3_30B,
    precision: EnginePrecision | None = None,
) -> list[Problem]:
    config = Config()
    config.rollout.engine = engine
    servers = config.rollout.servers
    servers.tensor, servers.arguments, servers.precision = tensor, arguments, precision
    return list(check(config, experts))


@pytest.mark.parametrize(
    ("engine", "tensor", "arguments", "precision"),
    [
        (EngineKind.vllm, 8, [], None),
        (EngineKind.vllm, 5, [APART], None),  # vLLM deals out a remainder
        (EngineKind.vllm, 8, ["-ep"], EnginePrecision.fp8),
        (EngineKind.vllm, 2, [], EnginePrecision.fp8),
        (EngineKind.sglang, 8, ["--ep-size=8"], EnginePrecision.fp8),
        (EngineKind.sglang, 8, ["--expert-parallel-size=4", "--log-level=info"], EnginePrecision.fp8),
        (EngineKind.embedded, 5, [MOVES], None),
    ],
)
def test_layouts_that_an_engine_takes(
    engine: EngineKind, tensor: int, arguments: list[str], precision: EnginePrecision | None
) -> None:
    assert problems(engine, tensor, arguments, precision=precision) == []


@pytest.mark.parametrize(
    ("engine", "tensor", "arguments", "field", "wrong", "fix"),
    [
        (EngineKind.vllm, 5, [], "tensor", "does not divide the 768", f"arguments=['{APART}']"),
        (EngineKind.vllm, 5, ["--seed=1"], "tensor", "does not divide the 768", f"arguments=['--seed=1','{APART}']"),
        (EngineKind.sglang, 5, [], "tensor", "does not divide the 768", "tensor=one of 1, 2, 3, 4, 6, 8"),
        (EngineKind.vllm, 129, [APART], "tensor", "more workers than the 128 experts", "tensor=128 or less"),
        (EngineKind.vllm, 2, [APART, MOVES], "arguments", "move experts", f"arguments=['{APART}']"),
        (EngineKind.sglang, 8, ["--ep-size=3"], "arguments", "divides rollout.servers.tensor=8", "['--ep-size=8']"),
        (EngineKind.sglang, 4, ["--ep", "2", "--x=1"], "arguments", "written with =", "['--x=1','--ep-size=4']"),
        (EngineKind.sglang, 4, ["--ep-size=0"], "arguments", "has to be a number", "['--ep-size=4']"),
    ],
)
def test_layouts_that_an_engine_refuses(
    engine: EngineKind, tensor: int, arguments: list[str], field: str, wrong: str, fix: str
) -> None:
    (problem,) = problems(engine, tensor, arguments)
    assert problem.field == f"rollout.servers.{field}"
    assert wrong in problem.wrong
    assert fix in problem.fix


def test_fp8_experts_are_cut_in_whole_blocks_unless_each_is_on_one_worker() -> None:
    """768 units are six blocks of 128."""
    (problem,) = problems(EngineKind.vllm, 4, [], precision=EnginePrecision.fp8)
    assert "in blocks of 128" in problem.wrong
    assert "tensor=one of 1, 2, 3, 6;" in problem.fix
    assert problems(EngineKind.vllm, 4, [APART], precision=EnginePrecision.fp8) == []
    (problem,) = problems(EngineKind.sglang, 8, ["--ep-size=2"], precision=EnginePrecision.fp8)
    assert "tensor=one of 2, 4, 6, 12" in problem.fix


def test_whole_experts_are_for_models_that_have_some() -> None:
    (problem,) = problems(EngineKind.vllm, 2, ["--seed=1", APART], experts=None)
    assert "without a mixture of experts" in problem.wrong
    assert problem.fix == "rollout.servers.arguments=['--seed=1']"
    assert problems(EngineKind.vllm, 3, [], experts=None) == []
