"""Parts of the memory by hand, and the constants that stand in files with torch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_tempo.config.choices import EnginePrecision, Logits, Precision, Published, Recompute
from megatron_tempo.config.model_shape import Experts
from megatron_tempo.config.schema import Config
from megatron_tempo.kernels import linear_logprobs
from megatron_tempo.models import packing
from megatron_tempo.plan import activations, engine, head, layout
from megatron_tempo.plan.layout import PlannedLayout, PlannedMachine, PlannedMicroBatch, micro_batch_of, row_tokens
from megatron_tempo.plan.memory import MemoryPhase, Part, host_bytes, memory, place_memory, routed_bytes
from megatron_tempo.plan.parameters import Role, parameters
from megatron_tempo.plan.shapes import PUBLISHED, shape_of
from megatron_tempo.plan.split import Split, problems, split_of
from megatron_tempo.plan.times import iteration, row_operations, sync_seconds, times, turn_seconds
from megatron_tempo.rollout.build import engine_precision
from tests.support.shapes import qwen3_shape
from tests.unit.config_files import configure

TINY = qwen3_shape(layers=2, hidden=8, heads=4, groups=2, head_dim=2, ffn=16, vocab=32, max_positions=64)
FIRST = {Role.actor: 0, Role.critic: 0}  # on the first stage of both
MICRO = PlannedMicroBatch(tokens=100, responses=80, grid=120, count=4)
TURNS = 2 * 2 * 2 * 100  # cosines and sines of a micro-batch, in bf16
BF16, FP32 = PlannedMachine(2), PlannedMachine(4, cuda=False)
CLUSTER = ["cluster.memory_gb=80", "cluster.bf16_tflops=1000", "cluster.memory_tbs=3", "cluster.nvlink_gbs=450",
           "cluster.network_gbs=50"]  # fmt: skip


def planned(*overrides: str) -> Config:
    """Qwen3-8B on one node, a stage of PPO, in bf16."""
    base = ["model.shape=qwen3_8b", "run.precision=bf16", "stage1.iterations=1", "data.labelled.path=x.jsonl",
            "parallel.micro_batch_tokens=18432"]  # fmt: skip
    return configure([*base, *CLUSTER, *overrides])


def test_the_constants_are_those_of_the_code() -> None:
    assert packing.GRID_SLACK == layout.GRID_SLACK
    assert linear_logprobs.PIECE == head.PIECE


def test_the_constants_are_those_of_the_kernel() -> None:
    kernel = pytest.importorskip("megatron_tempo.kernels.linear_logprobs_triton")
    constants = (kernel._BLOCK_ROWS, kernel._BLOCK_BYTES, kernel._MOST_SHARES)
    assert constants == (head.BLOCK_ROWS, head.BLOCK_BYTES, head.MOST_SHARES)


@pytest.mark.parametrize("precision", [None, *EnginePrecision])
@pytest.mark.parametrize("kind", ["embedded", "vllm"])
def test_the_engines_precision_is_the_runs_or_its_own(precision: EnginePrecision | None, kind: str) -> None:
    config = configure([f"rollout.engine={kind}"])
    config.rollout.servers.precision = precision
    assert engine.precision_of(config) is engine_precision(config)


def test_a_layer_by_hand() -> None:
    # bf16, bytes a token. Norms: 2 (4 x 8 + 2 x 8 + 4) = 104. Feed-forward: 3 x 2 x 16 = 96. Attention: queries and
    # keys in fp32 4 (8 + 4) = 48, roots 4 (4 + 2) = 24, output 16; a cell of the grid: queries and output 2 x 2 x 8,
    # keys and values 2 x 2 x 4, log-sum-exps 16.
    own = activations.layer(TINY, PlannedLayout(), BF16, MICRO)
    assert own == (104 + 96 + 48 + 24 + 16) * 100 + 64 * 120
    # Transformer Engine's without fusions, 2 x 2 x 16 more in SwiGLU.
    fused, apart = (PlannedMachine(2, te=True, fused=fused) for fused in (True, False))
    assert activations.layer(TINY, PlannedLayout(), fused, MICRO) == own
    assert activations.layer(TINY, PlannedLayout(), apart, MICRO) == own + 64 * 100
    # fp32 on a CPU. Norms: 2 (12 x 8 + 4) = 200. Feed-forward: 192. Attention: joint 4 x 16, queries' copy and both
    # normed 4 x (8 + 12), roots 24, output 32; a cell: 4 x 4 x 8 + 16.
    assert activations.layer(TINY, PlannedLayout(), FP32, MICRO) == (200 + 192 + 64 + 80 + 24 + 32) * 100 + 144 * 120


def test_tensor_ranks_divide_a_layer_and_sequence_parallelism_the_rest() -> None:
    whole = activations.layer(TINY, PlannedLayout(), BF16, MICRO)
    half = activations.layer(TINY, PlannedLayout(tensor=2), BF16, MICRO)
    less = activations.layer(TINY, PlannedLayout(tensor=2, sequence=True), BF16, MICRO)
    undivided = 104 * 100  # norms
    assert half == (whole - undivided) / 2 + undivided
    assert half - less == 48 * 100  # half of the norms but for their roots


def test_recomputation_keeps_the_inputs_alone() -> None:
    """And cosines and sines: 2 x 2 x 2 bytes a token."""
    full = PlannedLayout(recompute=Recompute.layers)
    assert activations.kept(TINY, full, BF16, MICRO, 0) == (3 * 2 * 8 + 8) * 100
    grown = activations.backward(TINY, full, BF16, MICRO, 0) - activations.backward(
        TINY, PlannedLayout(), BF16, MICRO, 0
    )
    assert grown > 0


def test_the_first_stage_holds_as_many_micro_batches_as_there_are_stages() -> None:
    four = PlannedLayout(pipeline=4)
    assert [activations.in_flight(four, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert activations.in_flight(four, 0, 2) == 2


def test_virtual_stages_hold_more_passes_of_fewer_layers() -> None:
    """Narayanan et al. 2021: two passes for each later stage, and all chunks but the last of a group, and one more."""
    two = PlannedLayout(pipeline=4, virtual_pipeline=2)
    assert [activations.in_flight(two, stage, 8) for stage in range(4)] == [6 + 4 + 1, 4 + 4 + 1, 2 + 4 + 1, 4 + 1]
    assert activations.in_flight(two, 0, 4) == 8  # all passes of four micro-batches
    assert activations.in_flight(two, 0, 1) == 8  # three of them of padding
    shape, one = replace(TINY, layers=8), activations.layer(TINY, PlannedLayout(), BF16, MICRO)
    kept = [activations.kept(shape, two, BF16, MICRO, stage) for stage in range(4)]
    assert kept == [one + TURNS + states * 1600 for states in (1.5, 2, 2, 1.5)]


def test_a_stage_keeps_the_activations_of_its_own_layers() -> None:
    """bf16: a layer's activations for each layer, and the states that the stage received or sent, 2 x 8 x 100 bytes."""
    shape, one = replace(TINY, layers=5), activations.layer(TINY, PlannedLayout(), BF16, MICRO)
    uneven = PlannedLayout(pipeline=3, first_stage_layers=2)  # 2, 2, 1
    kept = [activations.kept(shape, uneven, BF16, MICRO, stage) for stage in range(3)]
    assert kept == [2 * one + 1600 + TURNS, 2 * one + 2 * 1600 + TURNS, one + 1600 + TURNS]
    layers = replace(uneven, recompute=Recompute.layers)  # each layer's input, and the stage's output
    kept = [activations.kept(shape, layers, BF16, MICRO, stage) for stage in range(3)]
    assert kept == [4800 + TURNS, 4800 + TURNS, 3200 + TURNS]


def test_the_head_by_hand() -> None:
    # 80 response tokens, 32 rows of the matrix of 8: hidden states and their gradient, the matrix's gradient, and on
    # CUDA the kernel's own; on a CPU seven pieces of fp32.
    assert head.update(TINY, PlannedLayout(), BF16, MICRO, Logits.recomputed, Role.actor) == (
        2 * 2 * 80 * 8 + 2 * 32 * 8 + 4 * 8 * 80 + 2**29
    )
    assert head.update(TINY, PlannedLayout(), FP32, MICRO, Logits.recomputed, Role.actor) == (
        2 * 4 * 80 * 8 + 4 * 32 * 8 + 28 * 32 * 80
    )
    stored = head.update(TINY, PlannedLayout(), BF16, MICRO, Logits.stored, Role.actor)
    assert stored == 2 * 2 * 80 * 8 + 2 * 32 * 8 + 2 * 80 * 32
    assert (
        head.reading(TINY, PlannedLayout(), BF16, MICRO, Logits.recomputed, Role.actor)
        == 4 * 800 + 2 * 640 + 16 * 80 * 17
    )


@pytest.mark.parametrize(
    ("words", "step"),
    [("model.layers=local", 4.0), ("model.layers=transformer_engine", 0.0), ("run.precision=fp8_blockwise", 0.0)],
)
def test_a_step_of_torchs_adam_takes_a_tensor_of_each_parameter(words: str, step: float) -> None:
    layout = "parallel.tensor=4 parallel.sequence=true parallel.world_size=4 parallel.recompute=layers"
    config = planned(*layout.split(), words)
    phases = place_memory(config, PUBLISHED[Published.qwen3_8b], FIRST)
    count = parameters(PUBLISHED[Published.qwen3_8b], PlannedLayout(tensor=4), Role.actor, 0)
    grown = phases[MemoryPhase.actor][Part.optimizer] - phases[MemoryPhase.logprobs][Part.optimizer]
    assert grown == step * count


@pytest.mark.parametrize("words", ["parallel.tensor=4", "parallel.tensor=4 parallel.offload=true"])
def test_a_save_takes_no_memory_of_the_gpu(words: str) -> None:
    """Its phase is the models that are there, so any phase that computes needs more."""
    phases = place_memory(planned(*words.split()), PUBLISHED[Published.qwen3_8b], FIRST)
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    assert totals[MemoryPhase.checkpoint] == totals[MemoryPhase.generate]
    assert totals[MemoryPhase.checkpoint] < min(totals[MemoryPhase.actor], totals[MemoryPhase.critic])


def test_context_parallelism_divides_the_tokens() -> None:
    config = planned()
    micro = micro_batch_of(config, PlannedLayout(context=4), 512)
    assert (micro.tokens, micro.responses, micro.grid) == (4608, 4608, 5760)
    assert micro_batch_of(config, PlannedLayout(), 512).count == 512


def test_a_short_budget_still_takes_a_whole_row() -> None:
    micro = micro_batch_of(planned("parallel.micro_batch_tokens=1000"), PlannedLayout(data=2), 100)
    assert (micro.tokens, micro.grid, micro.count) == (18432, 18432, 50)


def test_a_server_has_its_cache_in_what_is_left() -> None:
    config = planned("rollout.engine=vllm", "rollout.servers.tensor=2")
    shape = PUBLISHED[Published.qwen3_8b]
    of = engine.server(config, shape)
    assert of.weights == pytest.approx(8.19e9, rel=1e-3)
    assert of.sequence == 18432 * 2 * 2 * 36 * 128 * 4
    assert of.weights + of.cache == pytest.approx(72e9)
    config.rollout.servers.arguments = ["--enforce-eager", "--gpu-memory-utilization", "0.5"]
    assert engine.server(config, shape).total == pytest.approx(40e9)
    config.rollout.servers.arguments = ["--gpu-memory-utilization=0.25"]
    assert engine.server(config, shape).total == pytest.approx(20e9)
    config.rollout.servers.precision = EnginePrecision.fp8
    assert engine.server(config, shape).weights == pytest.approx((6.95 + 2 * 1.245) * 1e9 / 2, rel=2e-3)
    config.rollout.servers.tensor = 16  # more ranks than key-value heads: each has one
    assert engine.token_bytes(config, shape, 16) == 2 * 2 * 36 * 128


SPLITS = {
    "": Split(8, 0, 0, 0),
    "rollout.engine=vllm rollout.servers.devices=[4,5,6,7] rollout.servers.replicas=4": Split(4, 4, 4, 0),
    "rollout.engine=vllm rollout.servers.devices=[6,7] rollout.servers.tensor=2 cluster.nodes=2 "
    "rollout.servers.each_node=true": Split(12, 2, 4, 0),
    "rollout.engine=vllm": Split(7, 1, 1, 0),
    "rollout.engine=vllm rollout.placement=colocated rollout.servers.replicas=2 rollout.servers.tensor=4 "
    "rollout.servers.each_node=true cluster.nodes=2": Split(16, 4, 16, 1),
    "rollout.engine=vllm rollout.placement=colocated cluster.nodes=2": Split(16, 1, 1, 1),
    "rollout.engine=vllm rollout.servers.replicas=2 rollout.servers.tensor=2": Split(4, 2, 4, 0),
    "rollout.engine=vllm rollout.servers.tensor=2 parallel.world_size=4": Split(4, 1, 2, 0),
    "rollout.engine=vllm rollout.servers.devices=[0,1,2,3] rollout.servers.replicas=4": Split(4, 4, 4, 1),
    "rollout.engine=vllm rollout.servers.devices=[0,1,2,3,4,5,6,7] rollout.servers.replicas=8": Split(8, 8, 8, 1),
    "rollout.engine=vllm rollout.servers.addresses=[http://a:1]": Split(8, 0, 0, 0),
}


@pytest.mark.parametrize("words", SPLITS)
def test_who_has_which_gpus(words: str) -> None:
    assert split_of(planned(*words.split())) == SPLITS[words]


def test_models_stay_and_a_reference_joins_them() -> None:
    config = planned("parallel.tensor=4", "stage1.actor.kl_coef=0.1")
    assert problems(config) == []
    shape, _ = shape_of(config)
    assert shape is not None
    phases = place_memory(config, shape, FIRST)
    weights = phases[MemoryPhase.generate][Part.weights]
    for parts in phases.values():
        assert parts[Part.weights] == weights
        assert parts[Part.reference] == pytest.approx(2 * 8.19e9 / 4, rel=1e-3)
    by_phase = memory(config, shape)
    assert by_phase.phases[MemoryPhase.sync][Part.buffers] == 2 * (512 << 20), "the embedding arrives in parts"
    assert Part.cache in by_phase.phases[MemoryPhase.generate]
    assert Part.cache not in by_phase.phases[MemoryPhase.actor]
    assert by_phase.phases[MemoryPhase.actor][Part.engine] == pytest.approx(2 * 8.19e9, rel=1e-3)


FOREIGN = ["rollout.servers.addresses=[http://127.0.0.1:8000]", "rollout.servers.key_file=key"]


@pytest.mark.parametrize(
    ("words", "buffers"),
    [
        (["rollout.engine=vllm"], 2 * 2**29),
        (["rollout.engine=vllm", "parallel.bucket_mb=64"], 2 * 2**26),
        (["rollout.engine=vllm", "rollout.servers.precision=fp8"], 2.5 * 2**29),
        (["rollout.engine=sglang"], 2 * 2**29),
        (["rollout.engine=sglang", "parallel.bucket_mb=64"], 2 * 2**26),
        (["rollout.engine=sglang", "parallel.bucket_mb=2048"], 2 * 2**31),
        # SGLang servers of others may take tensors whole: the embedding, and a message of a bucket.
        (["rollout.engine=sglang", *FOREIGN], 2 * 151936 * 4096 + 2**29),
        (["rollout.engine=sglang", "parallel.bucket_mb=64", *FOREIGN], 2 * 151936 * 4096 + 2**26),
    ],
)
def test_the_buffers_of_a_weight_sync(words: list[str], buffers: float) -> None:
    config = planned("parallel.tensor=4", "rollout.servers.tensor=4", *words)
    shape, _ = shape_of(config)
    assert shape is not None
    assert problems(config) == []
    assert place_memory(config, shape, FIRST)[MemoryPhase.sync][Part.buffers] == buffers


@pytest.mark.parametrize(
    ("tensor", "servers", "models"),
    [
        # Four ranks. One copy gathers the model, and sends it to each server.
        (4, 1, 1 + 1),
        (4, 4, 1 + 4),
        # Two copies: each gathers and sends half, but the server receives all. With more servers, each gathers all.
        (2, 1, 0.5 + 1),
        (2, 4, 1 + 2),
        # Four copies of one rank: one server each.
        (1, 4, 1),
    ],
)
def test_the_copies_divide_a_weight_sync(tensor: int, servers: int, models: float) -> None:
    """By hand: how often the model's bytes pass over the busiest link."""
    words = ["rollout.engine=vllm", f"rollout.servers.replicas={servers}", "rollout.servers.tensor=1"]
    config = planned(f"parallel.tensor={tensor}", "parallel.world_size=4", "rollout.placement=disaggregated", *words)
    shape, _ = shape_of(config)
    assert shape is not None
    assert config.cluster is not None
    rate = config.cluster.nvlink_gbs * 1e9 * config.cluster.link_share
    assert sync_seconds(config, shape) * rate / engine.weight_bytes(config, shape) == pytest.approx(models)


def test_a_stage_without_a_critic_needs_none() -> None:
    grpo, ppo = planned("stage1.method=grpo", "parallel.tensor=4"), planned("parallel.tensor=4")
    shape, _ = shape_of(grpo)
    assert shape is not None
    assert problems(grpo) == []
    alone, both = (place_memory(one, shape, FIRST) for one in (grpo, ppo))
    assert both.keys() - alone.keys() == {MemoryPhase.values, MemoryPhase.critic}
    for phase, parts in alone.items():
        for part in (Part.weights, Part.gradients, Part.optimizer):
            # The critic is the actor less its output layer.
            if part in parts and phase is not MemoryPhase.actor:
                assert 1.8 < both[phase][part] / parts[part] < 2
    assert times(grpo, shape, memory(grpo, shape)).keys() == alone.keys() - {MemoryPhase.checkpoint}
    # After a stage that has one it stays.
    later = ["stage2.method=ttrl", "stage2.iterations=1", "stage2.labelled_prompts=0", "data.unlabelled.path=y.jsonl",
             "data.unlabelled.verifier=math"]  # fmt: skip
    mixed = planned("parallel.tensor=4", *later)
    assert problems(mixed) == []
    assert place_memory(mixed, shape, FIRST).keys() == both.keys()
    seconds = times(mixed, shape, memory(mixed, shape))
    assert MemoryPhase.values not in seconds, "in the last stage no value is read"
    assert MemoryPhase.critic not in seconds


def test_more_responses_are_judged_where_an_estep_or_a_reward_asks_for_it() -> None:
    """With as many labelled prompts as unlabelled ones: once more for the E-step's bound, once more for pessimism."""
    words = ["stage1.iterations=0", "stage2.iterations=1", "stage2.labelled_prompts=64", "data.unlabelled.path=y.jsonl",
             "stage2.unlabelled_prompts=64"]  # fmt: skip
    more = ["stage2.estep_when_ece_above=0.1"], ["stage2.estep_when_ece_above=0.1", "stage2.pessimism=1"]
    configs = [planned(*words, *each) for each in ([], *more)]
    shape, _ = shape_of(configs[0])
    assert shape is not None
    seconds = [times(config, shape, memory(config, shape)) for config in configs]
    plain, *rest = (each[MemoryPhase.values] for each in seconds)
    assert [one / plain for one in rest] == pytest.approx([2, 3], rel=0.05)
    assert seconds[2][MemoryPhase.critic] == seconds[0][MemoryPhase.critic]


def test_responses_that_only_vote_are_generated_and_not_learnt_from() -> None:
    words = ["stage1.iterations=0", "stage2.method=ttrl", "stage2.iterations=1", "stage2.labelled_prompts=0",
             "data.unlabelled.path=y.jsonl", "data.unlabelled.verifier=math", "rollout.batch_rows=99999"]  # fmt: skip
    few, many = planned(*words), planned(*words, "stage2.vote_responses=16")
    shape, _ = shape_of(few)
    assert shape is not None
    assert problems(many) == []
    one, two = (memory(config, shape).phases for config in (few, many))
    assert two[MemoryPhase.actor] == one[MemoryPhase.actor]
    assert two[MemoryPhase.generate][Part.cache] == pytest.approx(2 * one[MemoryPhase.generate][Part.cache])
    first, second = (times(config, shape, memory(config, shape)) for config in (few, many))
    assert second[MemoryPhase.actor] == first[MemoryPhase.actor]
    assert second[MemoryPhase.generate] > 1.5 * first[MemoryPhase.generate]


@pytest.mark.parametrize("precision", [Precision.fp8_delayed, Precision.fp8_blockwise])
def test_fp8_adds_its_copies_of_the_matrices(precision: Precision) -> None:
    config = planned("parallel.tensor=4", "parallel.pipeline=2", "stage1.actor.kl_coef=0.1")
    shape = PUBLISHED[Published.qwen3_8b]
    places = [dict.fromkeys(Role, stage) for stage in (0, 1)]
    bf16 = [place_memory(config, shape, place)[MemoryPhase.generate] for place in places]
    config.run.precision = precision
    if precision is Precision.fp8_blockwise:
        config.model.num_bf16_layers_at_ends = 2
    # A layer of Qwen3-8B: (2 x 4096 + 2 x 1024 + 3 x 12288) x 4096 numbers, over 4 tensor ranks; 18 layers a stage.
    numbers = (18 - config.model.num_bf16_layers_at_ends) * 192_937_984 / 4
    fp8 = [place_memory(config, shape, place)[MemoryPhase.generate] for place in places]
    for before, after in zip(bf16, fp8, strict=True):
        assert after.pop(Part.fp8) == 2 * 2 * numbers
        assert after.pop(Part.reference) == before.pop(Part.reference) + numbers
        assert after == before
    config.parallel.offload = True
    offloaded = place_memory(config, shape, places[0])[MemoryPhase.generate]
    assert offloaded[Part.fp8] == 2 * 2 * numbers, "they stay when their model leaves"
    assert engine.precision_of(config) is engine_precision(config) is EnginePrecision.bf16


def test_a_server_on_a_gpu_of_the_trainer_that_does_not_sleep_keeps_its_memory() -> None:
    colocated = ["parallel.world_size=8", "rollout.servers.devices=[0]", "rollout.servers.transport=shared"]
    config = planned("parallel.tensor=4", "rollout.engine=vllm", *colocated)
    shape, _ = shape_of(config)
    assert shape is not None
    assert problems(config) == []
    phases = memory(config, shape)
    assert MemoryPhase.serve not in phases.phases
    for parts in phases.phases.values():
        assert parts[Part.engine] + parts[Part.cache] == pytest.approx(72e9)


COLOCATED = ["rollout.engine=vllm", "rollout.placement=colocated", "rollout.servers.transport=shared",
             "rollout.servers.tensor=4", "rollout.servers.replicas=2", "parallel.tensor=4"]  # fmt: skip


def test_a_colocated_server_and_the_trainer_take_turns() -> None:
    """Qwen3-8B, tensor 4 x data 2. The actor has 8.19 billion parameters, the critic 7.57; a quarter of them on a GPU:
    2 bytes of weights, 4 of gradients, and 12 / 2 of the optimizer. The server has 2 bytes, of 72 GB in all."""
    config = planned(*COLOCATED)
    shape, _ = shape_of(config)
    assert shape is not None
    assert problems(config) == []
    assert split_of(config) == Split(trainers=8, servers=2, serving=8, shared=1)
    phases = memory(config, shape).phases
    assert [phase.value for phase in phases] == [
        "generate", "values", "critic", "logprobs", "actor", "sync", "checkpoint"]  # fmt: skip
    actor, critic = 8.19e9 / 4, 7.57e9 / 4
    assert phases[MemoryPhase.generate] == {
        Part.engine: pytest.approx(2 * actor, rel=1e-3),
        Part.cache: pytest.approx(72e9 - 2 * actor, rel=1e-3),
    }, "the trainer leaves nothing but its context, which is in the reserve"
    for phase, model in ((MemoryPhase.values, critic), (MemoryPhase.logprobs, actor), (MemoryPhase.checkpoint, actor)):
        parts = phases[phase]
        held = [parts[part] for part in (Part.weights, Part.gradients, Part.optimizer)]
        assert held == pytest.approx([2 * model, 4 * model, 6 * model], rel=1e-2)
        assert parts[Part.asleep] == 5e9
        assert not parts.keys() & {Part.engine, Part.cache}
    assert phases[MemoryPhase.sync] == {
        Part.weights: pytest.approx(2 * actor, rel=1e-3),
        Part.engine: pytest.approx(2 * actor, rel=1e-3),
        Part.asleep: 5e9,
        Part.buffers: 2 * (512 << 20),
    }, "both have their weights; no gradients, no optimizer, no KV cache"


def test_fp8_copies_of_the_trainer_stay_beside_a_colocated_server() -> None:
    config = planned(*COLOCATED, "run.precision=fp8_blockwise")
    shape = PUBLISHED[Published.qwen3_8b]
    parts = memory(config, shape).phases[MemoryPhase.generate]
    assert parts[Part.fp8] == 2 * 2 * 36 * 192_937_984 / 4
    over = memory(config, shape).over()
    assert over is not None, "72 GB of the server and 6.9 of these exceed 74"
    assert over.phase is MemoryPhase.generate
    config.rollout.servers.arguments = ["--gpu-memory-utilization=0.8"]
    assert memory(config, shape).total(MemoryPhase.generate) == pytest.approx(64e9 + parts[Part.fp8])


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_all_models_of_a_colocated_trainer_are_in_host_memory(method: str) -> None:
    """Weights and optimizer, 2 + 12 / 2 bytes a parameter, even of the only model. The server keeps no copy."""
    config = planned(*COLOCATED, f"stage1.method={method}")
    shape = PUBLISHED[Published.qwen3_8b]
    models = 8.19e9 / 4 + (7.57e9 / 4 if method == "ppo" else 0)
    assert host_bytes(config, shape, FIRST) == pytest.approx(8 * models, rel=1e-3)
    if method == "grpo":
        apart = planned("parallel.tensor=4", "parallel.offload=true", "stage1.method=grpo")
        assert host_bytes(apart, shape, FIRST) == 0.0


def test_the_time_of_taking_turns() -> None:
    """Loads at 64 GB/s and half of it: the critic, then the actor for it; after the updates the actor leaves; its
    weights come again for the sync, and leave. A swap takes as long as the larger side, here half of both models."""
    config = planned(*COLOCATED)
    shape = PUBLISHED[Published.qwen3_8b]
    swap, weights = 8 * (8.19e9 + 7.57e9) / 4 / 2 / 32e9, 2 * 8.19e9 / 4 / 32e9
    assert turn_seconds(config, shape) == {
        MemoryPhase.values: pytest.approx(swap, rel=1e-3),
        MemoryPhase.logprobs: pytest.approx(swap, rel=1e-3),
        MemoryPhase.sync: pytest.approx(swap + 2 * weights, rel=1e-3),
    }
    assert set(turn_seconds(planned("parallel.tensor=4"), shape).values()) == {0.0}
    apart = planned("parallel.tensor=4", "parallel.offload=true")
    assert [seconds > 0 for seconds in turn_seconds(apart, shape).values()] == [True, True, False]


def test_generation_overlaps_with_training_on_gpus_of_its_own_alone() -> None:
    seconds = {MemoryPhase.generate: 5.0, MemoryPhase.actor: 3.0, MemoryPhase.sync: 1.0}
    apart = ["rollout.engine=vllm", "rollout.servers.devices=[7]", "rollout.max_staleness=1"]
    assert iteration(planned(*apart), seconds) == 5.0
    assert iteration(planned(*apart[:-1]), seconds) == 9.0
    assert iteration(planned(*COLOCATED, "rollout.max_staleness=1"), seconds) == 9.0
    config = planned()
    config.rollout.max_staleness = 1
    assert iteration(config, seconds) == 9.0, "the embedded engine generates in the trainer's processes"


def test_operations_of_a_row() -> None:
    layers, ending = row_operations(TINY, 10, 20, Role.actor)
    matrices = 2 * (192 + 384)
    assert layers == 2 * 30 * matrices + 2 * 4 * 8 * 30**2 / 2
    assert ending == 2 * 20 * 8 * 32
    assert row_operations(TINY, 10, 20, Role.critic)[1] == 0
    windowed = qwen3_shape(2, 8, 4, 2, 2, 16, 32, 64, window=10, windowed=1)
    assert row_operations(windowed, 10, 20, Role.actor)[0] == 2 * 30 * matrices + 4 * 8 * (450 + 30 * 10 - 50)


# A mixture of 8 experts of 6 units, of which a token uses 2, in the place of TINY's feed-forward part.
MIXTURE = replace(TINY, experts=Experts(count=8, per_token=2, ffn=6, normalized=True))


def test_a_mixture_saves_its_rows_and_its_router() -> None:
    """In bf16: 9 bytes per expert of the router; two rows of a state, 3 x 6 numbers, a probability and a place."""
    dense = replace(TINY, ffn=0)
    one = activations.layer(MIXTURE, PlannedLayout(), BF16, MICRO) - activations.layer(
        dense, PlannedLayout(), BF16, MICRO
    )
    row = 2 * TINY.hidden + 2 * 3 * 6 + 12
    assert one == (9 * 8 + 2 * row) * MICRO.tokens


def test_expert_ranks_are_planned_with_their_imbalance() -> None:
    def mixture(layout: PlannedLayout) -> float:
        return activations.layer(MIXTURE, layout, BF16, MICRO) - activations.layer(
            replace(TINY, ffn=0), layout, BF16, MICRO
        )

    router, alone = 9 * 8 * MICRO.tokens, mixture(PlannedLayout(expert=1, data=4))
    shared = mixture(PlannedLayout(expert=4, data=4))
    assert shared - router == activations.IMBALANCE * (alone - router)
    # Two tensor ranks divide the tokens: half of the rows of whole experts each.
    half = mixture(PlannedLayout(tensor=2, expert_tensor=1, sequence=True))
    assert half == alone / 2
    # Where they share each expert, both have all rows, of half the inner width.
    cut = mixture(PlannedLayout(tensor=2, sequence=True))
    assert cut == router / 2 + 2 * (2 * TINY.hidden + 2 * 3 * 3 + 12) * MICRO.tokens


def test_host_memory_of_routed_experts() -> None:
    """A prompt's 8 responses of 2K + 16K tokens: 48 layers of 8 experts of one byte each."""
    config = planned("stage1.iterations=0", "stage2.iterations=1")
    stage = config.stage2
    rows = stage.count(stage.prompts()) * stage.samples
    assert routed_bytes(config, PUBLISHED[Published.qwen3_30b_a3b]) == rows * row_tokens(config) * 384
    assert routed_bytes(config, TINY) == 0
