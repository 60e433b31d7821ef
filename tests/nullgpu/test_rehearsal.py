"""Rehearsals of a tiny model: every layout, method, kind of layers and precision; planted faults."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.config.method_settings import Method
from megatron_tempo.config.rules import Purpose
from megatron_tempo.config.schema import Config
from megatron_tempo.plan.memory import saved_bytes
from megatron_tempo.plan.parameters import Role
from megatron_tempo.rehearsal.model_folder import config_entries
from megatron_tempo.rehearsal.outcome import Outcome, over
from megatron_tempo.rehearsal.rehearse import Options, rehearse, rehearse_all
from megatron_tempo.rehearsal.text import report
from tests.nullgpu.child import REPOSITORY
from tests.support.shapes import qwen3_shape

pytestmark = [pytest.mark.nullgpu, pytest.mark.timeout(1800)]
TINY = qwen3_shape(
    layers=4, hidden=512, heads=8, groups=4, head_dim=64, ffn=1024, vocab=2048, max_positions=4096, tied=False
)
BASE = (
    *("experiment=qwen3_8b_aime", "cluster=h100x16", "rollout.max_prompt_tokens=128"),
    *("rollout.max_response_tokens=384", "parallel.micro_batch_tokens=512", "rollout.placement=disaggregated"),
)
PIPELINE = ("parallel.tensor=1", "parallel.pipeline=2", "parallel.sequence=false")
CASES = {
    "tensor 4": (),
    "tensor 2": ("parallel.tensor=2",),
    "data 8": ("parallel.tensor=1", "parallel.sequence=false"),
    "pipeline 2": PIPELINE,
    "pipeline 4": (*PIPELINE, "parallel.pipeline=4"),
    "pipeline 2, uneven": (*PIPELINE, "parallel.num_layers_in_first_pipeline_stage=3"),
    "pipeline 2, virtual 2": (*PIPELINE, "parallel.virtual_pipeline=2"),
    "context 2": ("parallel.tensor=2", "parallel.context=2"),
    "critic apart": ("parallel.critic.tensor=2", "parallel.critic.pipeline=2"),
    "resident, no recomputation": ("parallel.offload=false", "parallel.recompute=none", "model.logits=stored"),
    "KL": ("stage2.actor.kl_coef=0.01", "parallel.recompute=attention"),
    "colocated": (
        *("rollout.engine=vllm", "rollout.servers.python=sh", "rollout.placement=colocated", "parallel.tensor=2"),
        *("rollout.servers.transport=shared", "rollout.servers.tensor=2", "cluster.nodes=1", "parallel.offload=false"),
        *("rollout.servers.devices=null", "rollout.servers.each_node=false"),
    ),
    "fp32": ("run.precision=fp32", "parallel.tensor=2"),
    "ppo": ("stage2.iterations=0",),
    "ppo in stage 2": ("stage1.iterations=0", "algorithm=ppo"),
    "reference": ("stage1.iterations=0", "algorithm=reference"),
    "tempo_plus": ("stage1.iterations=0", "algorithm=tempo_plus"),
    "frozen critic": ("algorithm=frozen_critic",),
    "grpo": ("stage1.iterations=0", "algorithm=grpo"),
    "ttrl": ("stage1.iterations=0", "algorithm=ttrl", "data.unlabelled.verifier=math"),
    "empo": ("stage1.iterations=0", "algorithm=empo", "data.unlabelled.verifier=math"),
    "ttrl_guard": ("stage1.iterations=0", "algorithm=ttrl_guard", "data.unlabelled.verifier=math"),
    "scrl": ("stage1.iterations=0", "algorithm=scrl", "data.unlabelled.verifier=math"),
    "intuitor": ("stage1.iterations=0", "algorithm=intuitor"),
    "entropy_min": ("stage1.iterations=0", "algorithm=entropy_min"),
}
WITHOUT_CRITIC = ("grpo", "ttrl", "empo", "ttrl_guard", "scrl", "intuitor", "entropy_min")
TE_CASES = {
    name: (f"run.precision={name}", "model.layers=transformer_engine")
    for name in ("bf16", "fp8_blockwise", "fp8_tensorwise", "fp8_delayed")
}
HAS_TE = any(one.name.replace("_", "-") == "transformer-engine-torch" for one in importlib.metadata.distributions())


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json alone: no weights, no tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config_entries(TINY)))
    return folder


@cache
def built(model: Path, *words: str) -> Config:
    return cli.build([*BASE, f"model.path={model}", *words], purpose=Purpose.rehearse)


@pytest.fixture(scope="session")
def outcomes(model: Path) -> dict[str, tuple[Outcome, str]]:
    """All cases, in one process: outcome and report by name."""
    cases = CASES | (TE_CASES if HAS_TE else {})
    layers = ("model.layers=local",)  # torch's, also where Transformer Engine is installed
    given = [(built(model, *(layers if name in CASES else ()), *words), Options()) for name, words in cases.items()]
    found = rehearse_all(given)
    return {name: (one, report(one, plan)) for name, (one, plan) in zip(cases, found, strict=True)}


@cache
def kinds(name: str) -> int:
    """How many kinds of ranks a case has."""
    return {
        "pipeline 2": 2,
        "pipeline 2, uneven": 2,
        "pipeline 2, virtual 2": 2,
        "pipeline 4": 3,
        "context 2": 2,
        "critic apart": 2,
    }.get(name, 1)


@pytest.mark.parametrize("name", CASES)
def test_every_layout_and_method_runs(outcomes: dict[str, tuple[Outcome, str]], name: str) -> None:
    outcome, text = outcomes[name]
    assert outcome.fits, text
    assert len(outcome.ranks) == kinds(name)
    critic = set() if name in WITHOUT_CRITIC else {"values", "critic"}
    for rank in outcome.ranks:
        phases = {phase.phase: phase for phase in rank.phases}
        wanted = {"start", "sync", "generate", "logprobs", "actor", "checkpoint"}
        if name == "colocated":
            wanted.add("sleep")
            # While its servers generate, the trainer keeps what it keeps without any model: cuBLAS's workspaces.
            left = phases["generate"].peak
            assert left == phases["sleep"].peak == phases["checkpoint"].before < 80e6
            assert left < phases["sync"].before < phases["actor"].peak
        assert phases.keys() == wanted | critic
        for phase in phases.values():
            assert phase.before <= phase.reserved
            assert phase.peak <= phase.reserved
        assert phases["actor"].counts["products"] > 4 * 4  # more than one for each matrix of the layers
        assert phases["actor"].counts["kernel_launches"] > 100
        assert phases["start"].counts["host_bytes"] > 0
        assert phases["checkpoint"].counts["nccl_calls"] == 0
    if "parallel.tensor=1" not in CASES[name] or name.startswith("pipeline"):
        assert all(phase.counts["nccl_calls"] > 0 for phase in outcome.ranks[0].phases if phase.phase == "actor")
    last = outcome.ranks[-1].phases
    assert sum(phase.counts["triton_launches"] for phase in last) > 0  # of the losses, on the last stage


def test_a_checkpoint_copies_a_rank_s_share_once(outcomes: dict[str, tuple[Outcome, str]], model: Path) -> None:
    name = "resident, no recomputation"  # so that nothing else is copied
    config = built(model, "model.layers=local", *CASES[name])
    phases = {phase.phase: phase for phase in outcomes[name][0].ranks[0].phases}
    share = saved_bytes(config, TINY, dict.fromkeys(Role, 0))
    assert phases["checkpoint"].counts["host_bytes"] == pytest.approx(share, rel=0.001)
    assert phases["checkpoint"].peak == phases["checkpoint"].before


def test_every_method_and_algorithm_is_among_the_cases(model: Path) -> None:
    words = {word for words in CASES.values() for word in words}
    presets = {f"algorithm={path.stem}" for path in (REPOSITORY / "configs" / "algorithm").glob("*.yaml")}
    assert presets - words == {"algorithm=paper"}  # the default
    configs = [built(model, *words) for words in CASES.values()]
    assert {stage.method for one in configs for stage in one.stages().values() if stage.iterations} == set(Method)


@pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed")
@pytest.mark.parametrize("name", TE_CASES)
def test_every_precision_of_transformer_engine_runs(outcomes: dict[str, tuple[Outcome, str]], name: str) -> None:
    outcome, text = outcomes[name]
    assert outcome.fits, text
    assert f"Transformer Engine 2.11.0, {name}" in outcome.ranks[0].machine


# Delayed scaling needs as many tensor ranks in both layouts.
APART = dict.fromkeys(("torch's layers", *TE_CASES), ("parallel.critic.pipeline=2", "parallel.recompute=layers"))
APART |= {name: (*words, "parallel.critic.tensor=2") for name, words in APART.items() if name != "fp8_delayed"}
LAYERS = {"torch's layers": ("model.layers=local",)} | (TE_CASES if HAS_TE else {})


def test_models_of_two_layouts_take_no_group_from_megatrons_globals(model: Path) -> None:
    """A read of a group from the globals fails the rank. A layer that is computed again reads in its backward pass."""
    plant = "tests.support.group_reads:refuse_group_reads"
    given = [(built(model, *APART[name], *words), Options(plant=plant)) for name, words in LAYERS.items()]
    for name, (outcome, plan) in zip(LAYERS, rehearse_all(given), strict=True):
        assert outcome.fits, f"{name}: {report(outcome, plan)}"


PLANTED = {
    "device_mix": ("tensors on different devices", "actor", "megatron_tempo/kernels/"),
    "cpu_tensor_in_nccl_group": ("a CPU tensor in an NCCL group, or a CUDA tensor in a CPU group", "sync", ""),
    "wrong_type": ("a wrong type of numbers", "values", "megatron_tempo/models/attention.py"),
    "kernel_with_a_type_error": ("a kernel does not compile", "critic", "megatron_tempo/kernels/value_loss_triton.py"),
    "kernel_with_too_much_shared_memory": (
        *("a kernel does not compile", "critic", "megatron_tempo/kernels/value_loss_triton.py"),
    ),
}
SAYS = {
    "kernel_with_a_type_error": "CompilationError: ",
    "kernel_with_too_much_shared_memory": "out of resource: shared memory, Required: ",
}


@pytest.fixture(scope="session")
def planted(model: Path) -> dict[str, Outcome]:
    config = built(model, "parallel.recompute=none", "model.layers=local")
    given = [(config, Options(plant=f"tests.nullgpu.plants:{name}")) for name in PLANTED]
    given.append((config, Options(plant="tests.nullgpu.plants:hoarder", host_gb=1.4)))
    given.append((config, Options(plant="tests.nullgpu.plants:sleeper", seconds=20)))
    found = rehearse_all(given)
    return {name: one for name, (one, _) in zip([*PLANTED, "hoarder", "sleeper"], found, strict=True)}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_named(planted: dict[str, Outcome], name: str) -> None:
    kind, phase, where = PLANTED[name]
    outcome = planted[name]
    fault = outcome.ranks[0].fault
    assert fault is not None
    assert (fault.kind, fault.phase.split()[-1]) == (kind, phase), fault
    assert fault.where.startswith(where)
    assert SAYS.get(name, "") in fault.traceback
    assert not outcome.fits


def test_half_an_installation_of_transformer_engine_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TE 2.11's core raises where its part for torch is missing."""
    engine = tmp_path / "transformer_engine"
    engine.mkdir()
    (engine / "__init__.py").write_text("raise FileNotFoundError('Could not find shared object file: torch')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    tracebacks = tmp_path / "tracebacks.txt"
    code = cli.main(["rehearse", *BASE, f"model.path={model}", "--tracebacks", str(tracebacks)])
    console = "".join(capsys.readouterr())
    assert code == 1, console
    assert "Traceback" not in console
    assert (
        "FAULT before any rank ran: Transformer Engine cannot be imported, at megatron_tempo/models/megatron_compat/"
        "transformer_engine.py:"
    ) in console
    assert "FileNotFoundError: Could not find shared object file: torch. Reinstall it" in console
    assert tracebacks.read_text().startswith("Tracebacks of a rehearsal\n\nimports: Transformer Engine cannot be")


def test_too_much_memory_of_this_machine_ends_the_rank(planted: dict[str, Outcome]) -> None:
    ended = planted["hoarder"].ranks[0].ended
    assert ended is not None
    assert "of this machine's memory: allow more with --host-gb" in ended
    assert ended.startswith("in phase stage")


def test_a_rank_that_hangs_is_ended(planted: dict[str, Outcome]) -> None:
    ended = planted["sleeper"].ranks[0].ended
    assert ended is not None
    assert ended.endswith(": it runs for more than 20 s: allow more with --seconds")


def test_too_little_memory_of_the_gpu_tells_the_phase(model: Path) -> None:
    config = built(model, "parallel.recompute=none", "cluster.memory_gb=6.105", "parallel.bucket_mb=4")
    outcome, planned = rehearse(config, Options())
    (rank,) = outcome.ranks
    assert rank.fault is not None
    assert rank.fault.kind == "out of memory"
    assert rank.fault.wanted > 0
    assert rank.fault.where.startswith("megatron_tempo/")
    (line,) = over(planned, rank)
    assert line.startswith(f"{rank.fault.phase} runs out of memory at megatron_tempo/")


def test_nothing_is_left_behind(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    temporary, run = tmp_path / "tmp", tmp_path / "run"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = sorted(path.name for path in model.iterdir())
    words = [*BASE, f"model.path={model}", f"run.dir={run}", "stage1.iterations=0", "model.layers=local"]
    code = cli.main(["rehearse", *words, "--lengths", "lognormal:200", "--json", str(tmp_path / "out.json")])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "\nREHEARSAL: nothing is trained." in text  # after the lines of the log
    assert list(temporary.iterdir()) == []
    assert not run.exists()
    assert sorted(path.name for path in model.iterdir()) == before
    assert json.loads((tmp_path / "out.json").read_text())["fits"]
