"""The parts of a rehearsal that need no CUDA build of torch: ranks, lengths, rows, faults, report, bad input."""

from __future__ import annotations

import json
import signal
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.parallel_state import RankGenerator
from safetensors import safe_open

from megatron_tempo import cli
from megatron_tempo.config.choices import Layers, Published
from megatron_tempo.config.model_shape import model_shape
from megatron_tempo.config.rules import Purpose
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import InputError
from megatron_tempo.plan.memory import MemoryPhase
from megatron_tempo.plan.shapes import PUBLISHED, shape_of
from megatron_tempo.plan.split import split_of
from megatron_tempo.rehearsal import ranks as rehearsed_ranks
from megatron_tempo.rehearsal import rehearse as rehearse_module
from megatron_tempo.rehearsal.faults import OUT_OF_MEMORY, Fault, fault_of
from megatron_tempo.rehearsal.lengths import Lengths
from megatron_tempo.rehearsal.model_folder import config_entries, write_model_folder
from megatron_tempo.rehearsal.outcome import Outcome, Planned, RankResult, over, roofline
from megatron_tempo.rehearsal.ranks import RankKind, kinds_of
from megatron_tempo.rehearsal.rollouts import MadeUpRequests
from megatron_tempo.rehearsal.scaled import least_rows, rehearsed_iteration, scaled
from megatron_tempo.rehearsal.text import as_json, report
from megatron_tempo.weights.folder import tensor_files
from tests.support.shapes import qwen3_shape
from tests.support.tiny import write_model

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = ["experiment=qwen3_8b_aime", "cluster=h100x8", "rollout.placement=disaggregated"]
EVERY_RANK = RankKind(0, 4, 0, 0, "every rank")
TINY = qwen3_shape(layers=2, hidden=8, heads=4, groups=2, head_dim=2, ffn=16, vocab=32, max_positions=64)


@cache
def built(*words: str) -> Config:
    return cli.build([*BASE, *words], purpose=Purpose.rehearse)


def chosen(world: int, rows: int, *words: str) -> list[tuple[int, str]]:
    return [(kind.rank, kind.label) for kind in kinds_of(built(*words), world, rows, 36)]


def test_alike_ranks_are_rehearsed_once() -> None:
    assert chosen(4, 2) == [(0, "every rank")]
    assert chosen(8, 4, "parallel.tensor=2") == [(0, "every rank")]  # four replicas of two ranks, a row each


def test_each_pipeline_stage_is_rehearsed_and_one_middle_stage_for_all() -> None:
    stages = ("parallel.tensor=1", "parallel.pipeline=4", "parallel.sequence=false")
    assert chosen(8, 8, *stages) == [(0, "stage 1 of 4"), (2, "stage 2 of 4"), (6, "stage 4 of 4")]


def test_middle_stages_with_more_layers_are_rehearsed_too() -> None:
    """36 layers over 8 stages: 4, 4, 4, 5, 5, 5, 5, 4."""
    stages = ("cluster=h100x16", "parallel.tensor=1", "parallel.pipeline=8", "parallel.sequence=false")
    labels = [(0, "stage 1 of 8"), (1, "stage 2 of 8"), (3, "stage 4 of 8"), (7, "stage 8 of 8")]
    assert chosen(8, 8, *stages) == labels


def test_replicas_with_a_row_less_are_rehearsed_too() -> None:
    assert chosen(4, 3, "parallel.tensor=2") == [(0, "with a row more"), (2, "with a row less")]


def test_the_first_and_another_context_rank_are_rehearsed() -> None:
    words = ("cluster=h100x16", "parallel.tensor=2", "parallel.context=4")
    assert chosen(8, 2, *words) == [(0, "context rank 0"), (2, "context rank 1")]


def test_each_pair_of_stages_of_actor_and_critic_is_rehearsed() -> None:
    words = ("parallel.critic.pipeline=2", "parallel.critic.tensor=2")
    assert chosen(8, 4, *words) == [
        (0, "actor stage 1 of 1, critic stage 1 of 2"),
        (4, "actor stage 1 of 1, critic stage 2 of 2"),
    ]


def test_a_run_without_a_critic_has_no_kinds_by_its_layout() -> None:
    words = ("algorithm=grpo", "stage1.iterations=0", "parallel.critic.pipeline=2", "parallel.critic.tensor=2")
    assert chosen(8, 4, *words) == [(0, "every rank")]


@pytest.mark.parametrize(("tensor", "context", "data", "pipeline"), [(2, 2, 3, 2), (1, 4, 1, 2), (4, 1, 2, 1)])
def test_positions_are_those_of_megatron(tensor: int, context: int, data: int, pipeline: int) -> None:
    world = tensor * context * data * pipeline
    own = replace(Config().parallel, tensor=tensor, context=context, pipeline=pipeline)
    megatron = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    for axis, name in (("cp", "context"), ("dp", "data"), ("pp", "stage")):
        for group in megatron.get_ranks(axis):
            at = [getattr(rehearsed_ranks._Position.of(rank, world, own), name) for rank in group]
            assert at == list(range(len(group)))


def test_lengths_are_the_longest_by_default() -> None:
    assert Lengths.parse("longest").draw(3, 100, seed=1) == [100, 100, 100]


def test_drawn_lengths_have_the_mean_that_is_given_and_are_cut_off() -> None:
    drawn = Lengths.parse("lognormal:6000,0.5").draw(20_000, 10**9, seed=3)
    assert statistics.mean(drawn) == pytest.approx(6000, rel=0.02)  # its standard error is 0.4%
    assert drawn == Lengths(6000, 0.5).draw(20_000, 10**9, seed=3)
    assert max(Lengths(6000, 0.5).draw(100, 5000, seed=3)) == 5000
    assert min(Lengths(0.01, 0.5).draw(100, 5000, seed=3)) == 1


@pytest.mark.parametrize("text", ["short", "lognormal", "lognormal:", "lognormal:-1", "lognormal:5,0", "lognormal:inf",
                                  "lognormal:nan", "lognormal:1,2,3", "normal:5"])  # fmt: skip
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--lengths={text}: give longest, or lognormal:MEAN"):
        Lengths.parse(text)


@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=[name.name for name in PUBLISHED])
def test_a_shapes_config_json_is_read_back_as_the_shape(shape) -> None:
    assert model_shape(json.loads(json.dumps(config_entries(shape)))) == shape


def test_the_models_folder_has_all_tensors_and_takes_no_disk_space(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", TINY)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    assert tensor_files(tmp_path / "model").keys() == set(safe_open(file, "pt").keys())
    with safe_open(file, "pt") as opened:
        assert len(opened.keys()) == 3 + 11 * TINY.layers  # embedding, head, last norm; 7 matrices and 4 norms a layer
        assert opened.get_tensor("model.layers.1.mlp.down_proj.weight").shape == (8, 16)
        assert not opened.get_tensor("lm_head.weight").any()


def test_a_large_models_folder_has_no_file_larger_than_a_small_machines_memory(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "large", PUBLISHED[Published.qwen3_14b])
    sizes = [path.stat() for path in (tmp_path / "large").glob("*.safetensors")]
    assert sum(size.st_size for size in sizes) > 29e9
    assert max(size.st_size for size in sizes) < 4.1e9
    assert sum(512 * size.st_blocks for size in sizes) < 1e6


def test_as_few_rows_as_fill_the_micro_batches_of_both_models() -> None:
    assert least_rows(built(), 4) == 2
    assert least_rows(built("parallel.tensor=2"), 4) == 4  # two replicas, two micro-batches of one row each
    assert least_rows(built("parallel.micro_batch_tokens=40000"), 4) == 4  # two rows fit in one
    assert least_rows(built("cluster=h100x16", "parallel.critic.pipeline=4", "parallel.critic.tensor=2"), 8) == 4
    small = scaled(built(), 4, None)
    assert (small.stage2.labelled_prompts, small.stage2.unlabelled_prompts, small.stage2.samples) == (1, 1, 2)
    voting = scaled(built("algorithm=ttrl", "data.unlabelled.verifier=math", "stage2.vote_responses=64"), 4, 6)
    assert (voting.stage2.samples, voting.stage2.responses_per_prompt) == (6, 6)
    always = scaled(built("stage2.estep_when_ece_above=0.1"), 4, None).stage2.method_settings
    assert always.estep_when_ece_above is None, "made-up responses have an E-step whatever their values are"


def test_the_rehearsed_iteration_has_all_phases() -> None:
    stage = built("stage2.critic.warmup_iterations=3", "stage2.estep_every=4").stage2
    assert rehearsed_iteration(stage) == 4
    assert stage.critic_learns(4)
    assert not stage.warms_up(4)
    assert rehearsed_iteration(built("stage2.estep_every=0").stage2) == 0


@pytest.mark.parametrize("method", ["ppo", "grpo", "ttrl", "empo", "scrl", "ttrl_guard"])
def test_made_up_rollouts_are_what_a_method_needs(method: str) -> None:
    config = scaled(built(f"algorithm={method}", "data.unlabelled.verifier=math"), 4, 4)
    stage = config.stage2
    every = torch.arange(4)  # a rank that holds the first two rows
    owners: Any = SimpleNamespace(of_iteration=lambda rollouts, *_: rollouts, held=lambda batch: every[:2])
    made = MadeUpRequests(config, 1000, Lengths(3000), owners).generate("stage2", stage, rehearsed_iteration(stage))
    batches = [batch for batch in (made.labelled, made.unlabelled) if batch is not None]
    assert batches
    for batch in batches:
        assert len(batch) == 4
        assert batch.lengths.max() <= 2048 + 16384
        assert int(batch.response_tokens.max()) < 1000
        assert len(batch.response_tokens) == int(batch.response_lengths[:2].sum()) == len(batch.engine_logprobs)
        assert len(batch.prompt_tokens) == int(batch.prompt_lengths[:2].sum())
        assert batch.versions[:, 2].tolist() == batch.response_lengths.tolist()
    if made.labelled is not None:
        assert set(made.labelled.correct.tolist()) == {0.0, 1.0}
    if stage.needs.classes:
        assert made.unlabelled.answer_class.tolist() == [0, 1, 0, 1]


def raised(act) -> Exception:
    try:
        act()
    except Exception as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


FAULTS = [
    (lambda: torch.zeros(2, 2) @ torch.zeros(2, 2, dtype=torch.float64), "a wrong type of numbers"),
    (lambda: torch.zeros(2, 2) @ torch.zeros(3, 2), "a wrong shape"),
    (lambda: __import__("no_such_module"), "a module cannot be imported"),
    (lambda: [].pop(), "a Python error on the GPU path"),
]


@pytest.mark.parametrize(("act", "kind"), FAULTS, ids=[kind for _, kind in FAULTS])
def test_faults_of_torch_and_python_are_named(act, kind: str) -> None:
    fault = fault_of(raised(act), "stage2 actor")
    assert (fault.kind, fault.phase) == (kind, "stage2 actor")
    assert "Traceback" in fault.traceback


MESSAGES = {  # as torch, Triton and Transformer Engine word them on a GPU
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!": "devices",
    "Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)": "devices",
    "No backend type associated with device type cpu": "NCCL group",
    "Tensors must be CUDA and dense": "NCCL group",
    "FP8 execution requires the product of all dimensions except the last to be divisible by 8 and the last dimension"
    " to be divisible by 16, but got tensor with dims=[100, 64]": "FP8",
    "expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16": "type of numbers",
    "Expected tensor to have scalar type Long; but got CUDAType": "type of numbers",
}


@pytest.mark.parametrize("text", MESSAGES)
def test_messages_of_a_gpu_are_told_apart(text: str) -> None:
    assert MESSAGES[text] in fault_of(RuntimeError(text), "actor").kind


def test_memory_that_is_wanted_is_read_from_torchs_message() -> None:
    text = "CUDA out of memory. Tried to allocate 15.26 GiB. GPU 0 has a total capacity of 68.92 GiB"
    fault = fault_of(torch.OutOfMemoryError(text), "stage1 logprobs")
    assert fault.kind == OUT_OF_MEMORY
    assert fault.wanted == int(15.26 * 2**30)
    assert replace(fault, allocated=50 * 10**9, reserved=70 * 10**9).in_pieces
    assert not replace(fault, allocated=60 * 10**9, reserved=70 * 10**9).in_pieces


def test_a_fault_names_the_innermost_frame_of_the_program() -> None:
    fault = fault_of(raised(lambda: Lengths.parse("short")), "start")  # only the rehearsal itself is in the package
    assert fault.where.startswith("megatron_tempo/rehearsal/lengths.py:")
    fault = fault_of(raised(lambda: model_shape({"model_type": "gpt2"})), "start")
    assert fault.where.startswith("megatron_tempo/config/model_shape.py:")


COUNTS = dict.fromkeys(("kernel_launches", "triton_launches", "products", "nccl_calls", "synchronisations"), 3.0) | {
    "flops": 4e14,
    "nccl_bytes": 45e9,
    "host_bytes": 16e9,
    "triton_compilations": 2.0,
    "dynamo_graphs": 0.0,
}


def measured(name: str, peak: float, **changed: float) -> dict[str, object]:
    sizes = {"before": 30e9, "loading": 31e9, "reserved": 60e9, "after": 33e9, "largest_free": 2e9, "retries": 1}
    return {"name": name, "peak": int(peak), "seconds": 1.0, "counts": COUNTS, **sizes, **changed}


def planned(*words: str) -> Planned:
    config = built(*words)
    shape = shape_of(config)[0]
    assert shape is not None
    return Planned.of(config, scaled(config, 4, None), shape, 4)


def outcome_of(plan: Planned, *phases: dict[str, object], fault: Fault | None = None) -> Outcome:
    result = RankResult(
        EVERY_RANK, "device: H100", plan.results(EVERY_RANK, phases), 9.0, 7.0, 10**9, fault, layers=Layers.local
    )
    return Outcome((result,), 2, "longest", 12.0)


def test_the_time_by_the_roofline_is_the_sum_of_its_parts() -> None:
    cluster = built().cluster
    assert cluster is not None
    # 989 TFLOP/s at 40%, NVLink 450 GB/s and PCIe 64 GB/s at 50%
    expected = 4e14 / (989e12 * 0.4) + 45 / (450 * 0.5) + 16 / (64 * 0.5)
    assert roofline(COUNTS, cluster, across=False) == pytest.approx(expected)
    assert roofline(COUNTS, cluster, across=True) == pytest.approx(expected - 45 / 225 + 45 / 25)


def test_phases_stand_next_to_the_plan_of_the_rows_that_were_rehearsed() -> None:
    plan = planned()
    few = plan.phases(EVERY_RANK, small=True)
    actor = sum(few["actor"].values())
    (result,) = plan.results(EVERY_RANK, [measured("stage1 actor", 40e9), measured("stage2 actor", 44e9)])
    assert (result.phase, result.peak, result.planned) == ("actor", 44 * 10**9, actor)
    assert result.error == pytest.approx(actor / 44e9 - 1)
    # all tokens of the configuration lie on the GPU: those of 2,048 rows in 32 mini-batches of 64 * 8
    more = sum(plan.phases(EVERY_RANK, small=False)["actor"].values()) - actor
    assert more == pytest.approx((512 - 2) * 18432 * (32 + 24))
    assert result.corrected == pytest.approx(44e9 + more)
    assert result.fits


def test_the_peak_while_models_are_exchanged_counts() -> None:
    (result,) = planned().results(EVERY_RANK, [measured("stage1 values", 40e9, loading=73.9e9)])
    assert (result.corrected, result.fits) == (73.9e9, True)
    (result,) = planned().results(EVERY_RANK, [measured("stage1 values", 40e9, loading=74.1e9)])
    assert not result.fits


def test_a_phase_that_does_not_fit_is_told_with_what_helps() -> None:
    plan = planned()
    outcome = outcome_of(plan, measured("sync", 38e9), measured("checkpoint", 75e9))
    assert not outcome.fits
    (line,) = over(plan, outcome.ranks[0])
    assert line.startswith(
        "checkpoint needs 75.0 GB with all rows, and a process has 74.0. What helps: parallel.offload=true, more "
    )
    assert f"DOES NOT FIT: rank 0 (every rank): {line}" in report(outcome, plan)


def test_running_out_of_memory_names_phase_place_and_bytes() -> None:
    plan = planned()
    sizes = {"wanted": 16 * 10**9, "allocated": 50 * 10**9, "reserved": 72 * 10**9, "largest_free": 9 * 10**9}
    fault = Fault(OUT_OF_MEMORY, "stage1 logprobs", "megatron_tempo/models/offload.py:177 copy_in", "text", **sizes)
    (line,) = over(plan, outcome_of(plan, fault=fault).ranks[0])
    assert line.startswith(
        "stage1 logprobs runs out of memory at megatron_tempo/models/offload.py:177 copy_in: it asks"
    )
    assert "16.00 GB when 50.0 GB are allocated and 72.0 GB reserved, of 74.0 GB (largest free piece: 9.00 GB)" in line
    assert "expandable_segments" in line
    (line,) = over(plan, outcome_of(plan, fault=replace(fault, phase="stage1 actor", wanted=30 * 10**9)).ranks[0])
    assert "expandable_segments" not in line
    assert "parallel." in line


def test_servers_on_the_trainers_gpus_leave_less_of_them() -> None:
    servers = {"devices": "[0,1,2,3]", "each_node": "false", "transport": "shared"}
    shared = planned("parallel.world_size=4", *(f"rollout.servers.{name}={value}" for name, value in servers.items()))
    assert planned().server_bytes == 0.0
    assert shared.server_bytes > 0.0
    assert shared.limit == 74e9 - shared.server_bytes
    colocated = planned("rollout.placement=colocated")
    assert colocated.server_bytes == 5e9, "they sleep while the trainer works"


def test_the_report_has_every_phase_and_says_what_corrects_the_plan() -> None:
    plan = planned()
    outcome = outcome_of(plan, measured("sync", 38e9), measured("stage1 actor", 50e9))
    text = report(outcome, plan)
    assert text.startswith("REHEARSAL: nothing is trained.")
    lines = text.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("  actor") and "%" in line)
    assert row[:8] == ["actor", "30.0", "31.0", "50.0", "60.0", "33.0", "2.0", "1"]
    assert "it fits: the largest phase is actor" in text
    assert "plan, furthest off: actor, 45.1 GB planned, 50.0 GB measured; correct it by a factor of 1.11" in text
    plain = as_json(outcome, plan)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["fits"]
    assert plain["ranks"][0]["layers"] == "local"
    assert [phase["phase"] for phase in plain["ranks"][0]["phases"]] == ["sync", "actor"]


def test_a_fault_is_in_the_report_and_nothing_fits_then() -> None:
    plan = planned()
    fault = Fault(
        "tensors on different devices", "stage2 actor", "megatron_tempo/models/actor.py:10 f", "RuntimeError: x"
    )
    outcome = outcome_of(plan, fault=fault)
    expected = (
        "FAULT: rank 0 (every rank), stage2 actor: tensors on different devices, at megatron_tempo/models/actor.py"
    )
    assert expected in report(outcome, plan)
    assert not outcome.fits
    early = Outcome((), 2, "longest", 1.0, fault)
    assert "FAULT before any rank ran" in report(early, plan)
    assert not early.fits


def test_every_phase_of_a_plan_has_a_knob_that_helps() -> None:
    plan = planned()
    for phase in MemoryPhase:
        result = replace(plan.results(EVERY_RANK, [measured(phase.value, 99e9)])[0])
        rank = RankResult(EVERY_RANK, "", (result,), 1.0, 1.0, 1, None)
        (line,) = over(plan, rank)
        assert line.endswith(tuple("abcdefghijklmnopqrstuvwxyz=s"))
        assert "What helps: " in line


def command(capsys, *words: str) -> tuple[int, str]:
    code = cli.main(["rehearse", *words])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_all_problems_are_in_one_report(capsys) -> None:
    words = ("parallel.pipeline=5", "stage1.actor.clip_low=-1", "run.device=cpu", "typo.field=1")
    code, text = command(capsys, *BASE, *words)
    assert code == 2
    for field in ("parallel.pipeline", "stage1.actor.clip_low", "typo"):
        assert field in text


def test_a_cpu_run_is_not_rehearsed(capsys) -> None:
    code, text = command(capsys, *BASE, "run.device=cpu", "run.precision=fp32")
    assert code == 2
    assert "run.device=cpu: a rehearsal is of a run on GPUs" in text


def test_an_unknown_gpu_and_no_cluster_are_refused(capsys) -> None:
    code, text = command(capsys, *BASE, "cluster.gpu=Mystery")
    assert code == 2
    assert "cluster.gpu=Mystery: the GPU's compute capability is unknown" in text
    code, text = command(capsys, "experiment=qwen3_8b_aime")
    assert code == 2
    assert "cluster=h100x8" in text


def test_files_that_only_the_jobs_machines_have_are_not_asked_for() -> None:
    assert built("data.labelled.path=/no/such/file.jsonl", "run.dir=/no/such/folder/run").cluster is not None


@pytest.mark.parametrize(("words", "expected"), [
    (("--rows", "1"), "--rows=1: give a number from 2 to 999,999,999"),
    (("--rows", "10000000000000000000"), "--rows=10000000000000000000: give a number from 2 to 999,999,999"),
    (("--host-gb", "nan"), "--host-gb=nan: give a number from 1 to 999,999,999"),
    (("--host-gb", "inf"), "--host-gb=inf: give a number from 1 to 999,999,999"),
    (("--seconds", "0"), "--seconds=0.0: give a number from 1 to 999,999,999"),
    (("--json", "/no/such/folder/x.json"), "--json=/no/such/folder/x.json: give a file in a folder that exists"),
    (("--json", "/"), "--json=/: give a file in a folder that exists"),
    (("--tracebacks", ""), "--tracebacks=.: give a file in a folder that exists"),
    (("--lengths", "x"), "--lengths=x: give longest"),
    (("--lengths", "lognormal:1e308,1"), "with numbers above 0 and up to 1,000,000,000 and 10, such as --lengths"),
    (("--lengths", "lognormal:6000,1e200"), "with numbers above 0 and up to 1,000,000,000 and 10, such as --lengths"),
])  # fmt: skip
def test_bad_options_are_refused_before_work_begins(capsys, words: tuple[str, ...], expected: str) -> None:
    code, text = command(capsys, *BASE, *words)
    assert code == 2
    assert expected in text
    assert "REHEARSAL" not in text


@pytest.mark.parametrize("lengths", ["lognormal:1e9,10", "lognormal:1e-300,1e-300", "lognormal:6000,10"])
def test_lengths_within_the_bounds_are_drawn(lengths: str) -> None:
    drawn = Lengths.parse(lengths).draw(1000, 500, seed=1)
    assert all(1 <= length <= 500 for length in drawn)


@pytest.mark.parametrize("option", ["--json", "--tracebacks"])
@pytest.mark.parametrize("text", ['{"run": {"dir": "runs/one"}}', "[1]", "notes", "\x00"])
def test_a_file_that_no_rehearsal_wrote_is_not_replaced(capsys, tmp_path: Path, option: str, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    code, told = command(capsys, *BASE, option, str(file))
    assert code == 2
    assert f"{option}={file}: this file is not of an earlier rehearsal; give another, or move it away" in told
    assert file.read_text() == text


def test_the_files_of_an_earlier_rehearsal_are_replaced(capsys, tmp_path: Path, monkeypatch) -> None:
    plan = planned()
    fault = fault_of(raised(lambda: [].pop()), "stage1 actor")
    outcome = outcome_of(plan, measured("sync", 38e9), fault=fault)
    monkeypatch.setattr("megatron_tempo.commands.rehearse.rehearse", lambda *_: (outcome, plan))
    files = tmp_path / "out.json", tmp_path / "tracebacks.txt"
    files[0].touch()  # as mktemp makes it
    for _ in range(2):
        code, _ = command(capsys, *BASE, "--json", str(files[0]), "--tracebacks", str(files[1]))
        assert code == 1
    assert json.loads(files[0].read_text())["ranks"]
    assert "IndexError" in files[1].read_text()


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_rehearsal_as_ctrl_c_does(monkeypatch, signal_: signal.Signals) -> None:
    """So that its folder is removed. Handlers are as they were afterwards."""
    before = signal.getsignal(signal_)
    monkeypatch.setattr("megatron_tempo.commands.rehearse.rehearse", lambda *_: signal.raise_signal(signal_))
    with pytest.raises(SystemExit) as ended:
        cli.main(["rehearse", *BASE])
    assert ended.value.code == 128 + signal_
    assert signal.getsignal(signal_) is before


def presets(group: str, *without: str) -> list[str]:
    return [f"{group}={path.stem}" for path in sorted((CONFIGS / group).glob("*.yaml")) if path.stem not in without]


PRESETS = {
    **{word: (word, "cluster=h100x16") for word in presets("experiment")},
    **{word: ("experiment=qwen3_8b_aime", word) for word in presets("cluster")},
    **{
        word: (*BASE, word)
        # the quickstart's model has 64 positions, the second task's 256, SmolLM2 8192, the mixture of experts needs 8
        # ranks: their experiments rehearse them
        for word in [
            *presets("model", "logic_dates", "quickstart", "qwen2_5_32b", "qwen3_30b_a3b", "smollm2_135m"),
            *(w for g in ("data", "engine", "algorithm") for w in presets(g)),
        ]
    },
    "model=qwen2_5_32b": ("experiment=qwen3_8b_aime", "cluster=h100x16", "model=qwen2_5_32b"),  # needs 8 ranks, too
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_rehearsed(name: str, tmp_path: Path) -> None:
    words = PRESETS[name]
    if "smollm2" in name:  # its model has to be fetched first
        words = (*words, f"model.path={write_model(tmp_path, family='llama')}")
    if name == "experiment=logic_dates":  # its model has to be trained first
        words = (*words, f"model.path={write_model(tmp_path)}")
    config = cli.build(words, purpose=Purpose.rehearse)
    world, shape = split_of(config).trainers, shape_of(config)[0]
    assert shape is not None
    small = scaled(config, world, None)
    plan = Planned.of(config, small, shape, world)
    assert 0 < plan.limit <= plan.whole.limit
    kinds = kinds_of(config, world, small.stage2.responses_per_prompt, shape.layers)
    assert kinds[0].rank == 0
    for kind in kinds:
        assert {"sync", "logprobs", "actor", "checkpoint"} <= plan.phases(kind, small=True).keys()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_named_with_its_fix(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code, text = command(capsys, *BASE)
    assert code == 2
    assert "is a build without CUDA. A rehearsal needs torch with CUDA" in text
    assert list(tmp_path.iterdir()) == []


def test_plan_counts_the_layers_that_the_ranks_chose() -> None:
    """Transformer Engine's Adam needs no memory in a step; torch's needs some for each parameter."""
    plan = planned("model.layers=auto")
    engine = plan.with_layers(Layers.transformer_engine)
    given = planned("model.layers=transformer_engine")
    actor = [sum(one.phases(EVERY_RANK, small=True)["actor"].values()) for one in (plan, engine, given)]
    assert actor[0] > actor[1] == actor[2]
    assert plan.with_layers(None) is plan


def test_the_load_of_a_mixture_of_experts_is_said_to_be_even() -> None:
    notes = list(rehearse_module._notes(Config(), None, has_experts=True))
    assert "equally many rows here, while plan counts 1.5 times" in notes[0]
    assert not any("equally many" in note for note in rehearse_module._notes(Config(), None, has_experts=False))
