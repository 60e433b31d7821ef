"""What Transformer Engine and FP8 ask of a configuration before it queues, and of the machine where it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tempo.config import Problem, check
from megatron_tempo.config.choices import Fusions, Layers, Precision
from megatron_tempo.config.recipes import GPUS, RECIPES
from megatron_tempo.config.rules.precision import Machine, check_machine
from megatron_tempo.config.schema import Config
from megatron_tempo.models.fusions import Fused, fused
from megatron_tempo.models.machine import chosen_layers
from tests.unit.config_files import MOE, configure, good_overrides, write_all, write_model

# Sizes that are multiples of 128 on each of two tensor ranks, and of 16 on each of four.
EVEN = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 768}
H100 = Machine("NVIDIA H100 80GB HBM3", (9, 0), (13, 0), (2, 11, 0))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_all(tmp_path)
    write_model(tmp_path / "even", **EVEN)
    return tmp_path


def problems(files: Path, *overrides: str, model: str = "even") -> list[Problem]:
    given = [*good_overrides(files), f"model.path={files}/{model}", *overrides]
    if any(override.startswith("cluster.") for override in overrides):
        rates = ("memory_gb", "bf16_tflops", "memory_tbs", "nvlink_gbs", "network_gbs", "host_gbs")
        given += [f"cluster.{name}=80" for name in rates]
    return check(configure(given), world_size=None)


FINE = [
    "run.precision=bf16",
    "run.precision=fp8_delayed parallel.tensor=4",
    "run.precision=fp8_tensorwise model.num_bf16_layers_at_ends=2 parallel.pipeline=3",
    "run.precision=fp8_blockwise parallel.tensor=2 cluster.gpu=H100",
    "run.precision=fp8_blockwise model.layers=transformer_engine cluster.gpu=B200",
    "run.precision=mxfp8 cluster.gpu=B200",
    "run.precision=fp8_delayed parallel.tensor=2 parallel.critic.pipeline=3",
    "run.precision=fp8_delayed parallel.tensor=2 parallel.critic.tensor=1 parallel.critic.context=2",
    "run.precision=fp8_delayed parallel.tensor=2 parallel.critic.tensor=2",
    "run.precision=fp8_tensorwise parallel.tensor=2 parallel.critic.tensor=1",
    "run.precision=fp8_delayed cluster.gpu=L40S",
    "run.precision=mxfp8 cluster.gpu=unheard-of",  # nothing is known of it; where the job starts it is looked at
    "run.precision=fp32 model.layers=local cluster.gpu=A100",
]


@pytest.mark.parametrize("words", FINE)
def test_what_is_let_through(files: Path, words: str) -> None:
    assert problems(files, *words.split()) == []


# overrides, field, a part of what is wrong, the fix
BROKEN = [
    (
        "run.precision=fp8_delayed parallel.tensor=2 parallel.critic.tensor=1",
        "parallel.critic.tensor",
        "shares scales over tensor * context ranks",
        "parallel.critic.tensor=null, or run.precision=fp8_tensorwise",
    ),
    (
        "run.precision=fp8_delayed parallel.critic.context=2",
        "parallel.critic.context",
        "shares scales",
        "parallel.critic.context=null, or",
    ),
    ("run.precision=fp8_delayed run.device=cpu", "run.precision", "on a CPU", "run.precision=fp32, or run.device=cuda"),
    ("run.precision=mxfp8 model.layers=local", "model.layers", "Transformer Engine's", "model.layers=auto"),
    ("model.layers=transformer_engine", "model.layers", "for bf16", "run.precision=bf16"),
    (
        "model.num_bf16_layers_at_ends=-1",
        "model.num_bf16_layers_at_ends",
        "0 or more",
        "model.num_bf16_layers_at_ends=0",
    ),
    (
        "model.num_bf16_layers_at_ends=1 run.precision=bf16",
        "model.num_bf16_layers_at_ends",
        "no FP8",
        "model.num_bf16_layers_at_ends=0",
    ),
    (
        "model.num_bf16_layers_at_ends=1 run.precision=fp8_delayed",
        "model.num_bf16_layers_at_ends",
        "delayed",
        "run.precision=fp8_tensorwise",
    ),
    (
        "model.num_bf16_layers_at_ends=3 run.precision=fp8_tensorwise",
        "model.num_bf16_layers_at_ends",
        "6 layers",
        "model.num_bf16_layers_at_ends=2 or less",
    ),
    (
        "model.num_bf16_layers_at_ends=2 run.precision=fp8_tensorwise parallel.pipeline=6",
        "model.num_bf16_layers_at_ends",
        "one pipeline stage",
        "model.num_bf16_layers_at_ends=1 or less",
    ),
    (
        "run.precision=fp8_blockwise parallel.tensor=4",
        "run.precision",
        "multiples of 128, which the feed-forward units of a tensor rank (192) of model.path",
        "parallel.tensor=2 or run.precision=fp8_delayed or fp8_tensorwise or mxfp8 or bf16",
    ),
    (
        "run.precision=fp8_blockwise parallel.critic.tensor=4",
        "run.precision",
        "(192) of model.path",
        "parallel.critic.tensor=2 or run.precision=",
    ),
    ("run.precision=fp8_delayed cluster.gpu=A100", "run.precision", "8.9 or more, and A100 has 8.0", "=bf16"),
    ("run.precision=fp8_blockwise cluster.gpu=L40S", "run.precision", "9.0 or more, below 12.0", "fp8_tensorwise"),
    (
        "run.precision=mxfp8 cluster.gpu=H100",
        "run.precision",
        "10.0 or more, below 12.0, and H100 has 9.0",
        "run.precision=bf16 or fp8_delayed or fp8_tensorwise or fp8_blockwise",
    ),
]


@pytest.mark.parametrize(("words", "field", "wrong", "fix"), BROKEN)
def test_what_is_refused(files: Path, words: str, field: str, wrong: str, fix: str) -> None:
    (problem,) = problems(files, *words.split())
    assert problem.field == field
    assert wrong in problem.wrong
    assert fix in problem.fix


def test_every_uneven_size_of_every_model_is_told(files: Path) -> None:
    overrides = "run.precision=fp8_tensorwise", f"model.critic_path={files}/critic", "parallel.tensor=4"
    write_model(files / "odd", hidden_size=40, head_dim=20, intermediate_size=136)
    parts = "the hidden size (40)", "the queries of a tensor rank (40)", "the feed-forward units of a tensor rank (34)"
    actor, critic = sorted(problems(files, *overrides, model="odd"), key=lambda problem: "critic" in problem.wrong)
    assert actor.wrong == f"multiplies in multiples of 16, which {' and '.join(parts)} of model.path are not"
    assert "feed-forward units of a tensor rank (24) of model.critic_path" in critic.wrong


def test_heads_without_a_size_share_the_hidden_one(files: Path) -> None:
    write_model(files / "plain", **EVEN | {"head_dim": None, "hidden_size": 1024})  # 8 heads of 128
    assert problems(files, "run.precision=fp8_blockwise", "parallel.tensor=4", model="plain")[0].wrong.count("(") == 1


def on(machine: Machine, precision: Precision, layers: Layers = Layers.auto) -> list[Problem]:
    config = Config()
    config.run.precision, config.model.layers = precision, layers
    return list(check_machine(config, machine))


def test_the_machines_that_run_each_recipe() -> None:
    for precision, recipe in RECIPES.items():
        for gpu, capability in GPUS.items():
            machine = Machine(gpu, capability, (12, 9), (2, 11), flash_attn=True)
            runs = recipe.capability <= capability
            assert (on(machine, precision) == []) is runs, (precision, gpu)


TE = Layers.transformer_engine
B200 = replace(H100, capability=(10, 0), flash_attn=True)
A100 = replace(H100, capability=(8, 0))
CPU = Machine("", None, None, None)
# machine, precision, layers, field, parts of what is wrong and of the fix
ELSEWHERE = [
    (CPU, Precision.bf16, Layers.auto, "run.precision", "there is none", "fp32"),
    (CPU, Precision.mxfp8, Layers.auto, "run.precision", "there is none", "fp32"),
    (CPU, Precision.fp32, Layers.transformer_engine, "model.layers", "not installed", "auto"),
    (replace(H100, te=None), Precision.fp8_delayed, Layers.auto, "run.precision", "not installed", "bf16"),
    (replace(H100, te=(2, 1)), Precision.fp8_tensorwise, Layers.auto, "run.precision", "2.2 or later", "2.2"),
    (replace(H100, te=(1, 13)), Precision.bf16, Layers.transformer_engine, "model.layers", "2.1 or later", "2.1"),
    (replace(H100, cuda=(12, 6)), Precision.fp8_blockwise, Layers.auto, "run.precision", "CUDA 12.9", "tensorwise"),
    (replace(B200, capability=(12, 0)), Precision.mxfp8, Layers.auto, "run.precision", "below 12.0", "delayed"),
    (replace(B200, capability=(7, 5)), Precision.bf16, Layers.auto, "run.precision", "8.0 or more", "fp32"),
    (A100, Precision.bf16, Layers.auto, "model.layers", "needs flash-attn on", "install flash-attn, or model.layers="),
    (replace(A100, capability=(8, 9)), Precision.fp8_delayed, Layers.auto, "model.layers", "flash-attn", "=bf16 with"),
    (replace(B200, flash_attn=False), Precision.bf16, TE, "model.layers", "deterministic step", "run.deterministic="),
]


@pytest.mark.parametrize(("machine", "precision", "layers", "field", "wrong", "fix"), ELSEWHERE)
def test_where_a_job_starts(
    machine: Machine, precision: Precision, layers: Layers, field: str, wrong: str, fix: str
) -> None:
    (problem,) = on(machine, precision, layers)
    assert problem.field == field
    assert wrong in problem.wrong
    assert fix in problem.fix


def test_where_transformer_engine_s_attention_is_not_unfused() -> None:
    def found(machine: Machine, *, deterministic: bool = True, context: int = 1, layers: Layers = TE) -> list[Problem]:
        config = Config()
        config.run.precision, config.run.deterministic, config.model.layers = Precision.bf16, deterministic, layers
        config.parallel.context = context
        return list(check_machine(config, machine))

    unfused = replace(B200, flash_attn=False)
    assert found(unfused)
    assert not found(unfused, deterministic=False)
    assert not found(unfused, context=2), "the attention is ours"
    assert not found(unfused, layers=Layers.local)
    assert not found(replace(unfused, te=None), layers=Layers.auto)
    assert not found(H100), "cuDNN's is deterministic on Hopper"
    assert found(A100, deterministic=False)
    assert not found(replace(A100, flash_attn=True))


def test_what_is_fused() -> None:
    """By layers: all of Transformer Engine's, and of Apex the one kernel that Megatron's own layers take."""
    whole, weights = Fused(rotary=True, swiglu=True, weight_gradients=True), Fused(weight_gradients=True)
    apex = replace(H100, apex_gradients=True)
    assert fused(Fusions.auto, TE, H100) == fused(Fusions.auto, TE, apex) == whole
    assert fused(Fusions.auto, Layers.local, H100) == fused(Fusions.auto, Layers.local, CPU) == Fused()
    assert fused(Fusions.auto, Layers.local, apex) == weights
    assert fused(Fusions.auto, Layers.local, replace(CPU, apex_gradients=True)) == Fused()
    assert fused(Fusions.none, TE, apex) == fused(Fusions.none, Layers.local, apex) == Fused()
    assert [str(one) for one in (whole, weights, Fused())] == [
        "rotary embedding, SwiGLU, weight gradients",
        "weight gradients",
        "none",
    ]


def test_what_auto_means() -> None:
    def chosen(machine: Machine, precision: Precision, layers: Layers = Layers.auto) -> Layers:
        config = Config()
        config.run.precision, config.model.layers = precision, layers
        return chosen_layers(config, machine)

    assert chosen(H100, Precision.bf16) is chosen(H100, Precision.fp8_blockwise) is Layers.transformer_engine
    assert chosen(H100, Precision.bf16, Layers.local) is Layers.local
    assert chosen(H100, Precision.fp32) is Layers.local
    assert chosen(replace(H100, te=None), Precision.bf16) is Layers.local
    assert chosen(Machine("", None, None, (2, 11)), Precision.fp32) is Layers.local


@pytest.mark.parametrize("ranks", [0, -1])
def test_an_expert_on_no_rank_is_a_problem_of_its_own(files: Path, ranks: int) -> None:
    """The sizes of FP8's rule are of an expert's part, which has to exist."""
    if not (files / "mixture").exists():
        write_model(files / "mixture", **MOE)
    given = ["run.precision=fp8_blockwise", f"parallel.expert_tensor={ranks}"]
    found = {problem.field for problem in problems(files, *given, model="mixture")}
    assert found == {"run.precision", "parallel.expert_tensor"}
