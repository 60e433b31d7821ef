"""Every rule: a configuration that breaks it gets one problem, on the right field, with a fix that helps."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_tempo.config import Config, Problem, Purpose, check
from megatron_tempo.config.method_settings import NEEDS, Method, Prompts
from megatron_tempo.config.rules import evaluation
from megatron_tempo.config.tree import MISSING
from tests.unit.config_files import CORRECTED, configure, good_overrides, write_all, write_model


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_all(tmp_path)
    return tmp_path


def problems(files: Path, *overrides: str, purpose: Purpose = Purpose.train) -> list[Problem]:
    changes = [override.replace("TMP", str(files)) for override in overrides]
    return check(configure([*good_overrides(files), *changes]), world_size=None, purpose=purpose)


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, "\n".join(map(str, problems))
    return problems[0]


def test_the_good_configuration_has_no_problem(files: Path) -> None:
    assert problems(files) == []


def test_a_column_may_name_the_verifiers(files: Path) -> None:
    heldout = "evaluation.sets.heldout"
    assert problems(files, f"{heldout}.verifier=null", f"{heldout}.verifier_field=verifier") == []


S1, S2 = "stage1.actor", "stage2.critic"

FIRST, LAST = (f"parallel.num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))

# overrides, field, a part of what is wrong, a part of the fix
ONE_FIELD = [
    ("run.seed=-1", "run.seed", "0 or more", "run.seed=0"),
    ("parallel.tensor=0", "parallel.tensor", "1 or more", "parallel.tensor=1"),
    ("parallel.pipeline=-2", "parallel.pipeline", "1 or more", "parallel.pipeline=1"),
    ("parallel.micro_batch_tokens=0", "parallel.micro_batch_tokens", "1 or more", "micro_batch_tokens=1"),
    ("parallel.bucket_mb=0", "parallel.bucket_mb", "1 or more", "bucket_mb=1"),
    ("parallel.ddp_bucket_size=0", "parallel.ddp_bucket_size", "1 or more", "ddp_bucket_size=1"),
    (
        "parallel.overlap_grad_reduce=false",
        "parallel.overlap_param_gather",
        "gathers by the buckets of parallel.overlap_grad_reduce, which is false",
        "parallel.overlap_param_gather=false, or parallel.overlap_grad_reduce=true",
    ),
    ("data.labelled.limit=0", "data.labelled.limit", "1 or more", "limit=1"),
    ("rollout.max_prompt_tokens=0", "rollout.max_prompt_tokens", "1 or more", "max_prompt_tokens=1"),
    ("rollout.temperature=0", "rollout.temperature", "responses to a prompt are all equal", "temperature=1"),
    ("rollout.temperature=-1", "rollout.temperature", "0 (greedy) or more", "temperature=1"),
    ("rollout.temperature=.nan", "rollout.temperature", "0 (greedy) or more", "temperature=1"),
    ("rollout.top_p=0", "rollout.top_p", "above 0 and at most 1", "top_p=0.95"),
    ("rollout.top_p=1.1", "rollout.top_p", "above 0 and at most 1", "top_p=0.95"),
    ("rollout.top_k=0", "rollout.top_k", "1 or more", "top_k=1"),
    ("rollout.top_k=1", "rollout.top_k", "have no gradient to train on", "rollout.top_k=null"),
    ("rollout.min_p=1", "rollout.min_p", "below 1", "min_p=0.05"),
    ("rollout.seed=-1", "rollout.seed", "0 or more", "seed=0"),
    ("rollout.stop=['']", "rollout.stop", "an empty string", "rollout.stop=[]"),
    (f"rollout.stop=[{'x' * 65}]", "rollout.stop", "longer than 64 bytes", "at most 64 bytes"),
    (
        f"evaluation.stop=[{','.join(map(str, range(33)))}]".replace("[", "['").replace(",", "','").replace("]", "']"),
        "evaluation.stop",
        "33 strings",
        "at most 32",
    ),
    ("evaluation.top_k=1", "evaluation.top_k", "all 16 responses to a question are equal", "evaluation.samples=1"),
    ("evaluation.temperature=0", "evaluation.temperature", "avg@16 and pass@k say no more", "evaluation.pass_k=[1]"),
    ("rollout.batch_rows=0", "rollout.batch_rows", "1 or more", "batch_rows=1"),
    ("rollout.parity_tolerance=0", "rollout.parity_tolerance", "above 0", "parity_tolerance="),
    ("rollout.servers.tensor=0", "rollout.servers.tensor", "1 or more", "tensor=1"),
    ("rollout.servers.checksums_every=-1", "rollout.servers.checksums_every", "0 or more", "checksums_every=0"),
    ("rollout.servers.start_seconds=0", "rollout.servers.start_seconds", "above 0", "start_seconds=1"),
    (f"{S1}.correction.low=0", f"{S1}.correction.low", "above 0", "low=0.5"),
    (f"{S1}.correction.high=-1", f"{S1}.correction.high", "above 0", "high=2"),
    (f"{S1}.correction.level=token", f"{S1}.correction.high", "no upper bound", f"{S1}.correction.high=2"),
    (
        f"{S2.replace('critic', 'actor')}.correction.level=geometric",
        "stage2.actor.correction.high",
        "geometric",
        "=1.01",
    ),
    (f"{S2}.clip=-1", f"{S2}.clip", "above 0", "clip=1"),
    (f"{S1}.optimizer.lr=0", f"{S1}.optimizer.lr", "above 0", "lr=1e-6"),
    (f"{S1}.optimizer.lr=.inf", f"{S1}.optimizer.lr", "above 0", "lr=1e-6"),
    (f"{S2}.optimizer.warmup_steps=-1", f"{S2}.optimizer.warmup_steps", "0 or more", "warmup_steps=0"),
    (f"{S2}.optimizer.weight_decay=-1", f"{S2}.optimizer.weight_decay", "0 or more", "weight_decay=0"),
    (f"{S2}.optimizer.beta1=1", f"{S2}.optimizer.beta1", "below 1", "beta1=0.9"),
    (f"{S2}.optimizer.beta2=-0.1", f"{S2}.optimizer.beta2", "at least 0", "beta2=0.9"),
    (f"{S2}.optimizer.eps=0", f"{S2}.optimizer.eps", "above 0", "eps="),
    (f"{S2}.optimizer.clip_grad=0", f"{S2}.optimizer.clip_grad", "above 0", "clip_grad=1"),
    (f"{S1}.clip_low=1", f"{S1}.clip_low", "above 0 and below 1", "clip_low=3e-4"),
    (f"{S1}.clip_high=0", f"{S1}.clip_high", "above 0", "clip_high=5e-4"),
    (f"{S1}.dual_clip=1", f"{S1}.dual_clip", "above 1", "dual_clip=3"),
    (f"{S1}.entropy_coef=-1", f"{S1}.entropy_coef", "0 or more", "entropy_coef=0"),
    (f"{S1}.entropy_target=0", f"{S1}.entropy_target", "above 0", "entropy_target=1"),
    ("stage1.gae_lambda=1.5", "stage1.gae_lambda", "at least 0 and at most 1", "gae_lambda=0.5"),
    ("stage2.gae_lambda=-1", "stage2.gae_lambda", "at least 0 and at most 1", "gae_lambda=0.5"),
    ("stage2.pass_at_k=0", "stage2.pass_at_k", "1 or more", "pass_at_k=1"),
    ("stage2.pass_at_k=9", "stage2.pass_at_k", "8 responses to a prompt", "pass_at_k=8, or stage2.responses"),
    ("stage2.pessimism=-1", "stage2.pessimism", "0 or more", "pessimism=0"),
    ("stage2.estep_when_ece_above=1", "stage2.estep_when_ece_above", "below 1", "estep_when_ece_above=0.9"),
    ("stage2.actor.entropy_target=0.5", "stage2.actor.entropy_target", "no entropy bonus", "entropy_coef=0.01"),
    ("stage2.actor.kl_reference=start", "stage2.actor.kl_reference", "no KL term", "kl_coef=0.01"),
    (f"{S1}.kl_coef=-1", f"{S1}.kl_coef", "0 or more", "kl_coef=0"),
    (f"{S1}.epochs=0", f"{S1}.epochs", "1 or more", "epochs=1"),
    (f"{S2}.warmup_iterations=-1", f"{S2}.warmup_iterations", "0 or more", "warmup_iterations=0"),
    ("stage1.responses_per_prompt=0", "stage1.responses_per_prompt", "1 or more", "responses_per_prompt=1"),
    ("stage2.estep_every=-1", "stage2.estep_every", "0 or more", "estep_every=0"),
    ("stage2.iterations=-1", "stage2.iterations", "0 or more", "iterations=0"),
    ("evaluation.every=-1", "evaluation.every", "0 or more", "every=0"),
    ("evaluation.temperature=-1", "evaluation.temperature", "0 (greedy) or more", "temperature=1"),
    (
        "run.max_consecutive_nonfinite_steps=0",
        "run.max_consecutive_nonfinite_steps",
        "1 or more",
        "max_consecutive_nonfinite_steps=1",
    ),
    ("run.hang_minutes=0", "run.hang_minutes", "above 0", "hang_minutes=1"),
    ("checkpoint.keep=0", "checkpoint.keep", "1 or more", "keep=1"),
    ("checkpoint.every=-1", "checkpoint.every", "0 or more", "every=0"),
    # paths
    ("run.dir=???", "run.dir", "has no value", "run.dir=FOLDER"),
    ("run.dir=TMP/labelled.jsonl", "run.dir", "is a file", "another run.dir"),
    ("run.dir=TMP/labelled.jsonl/run", "run.dir", "is a file", "another run.dir"),
    ("model.path=???", "model.path", "has no value", "model.path=FOLDER"),
    ("model.path=TMP/none", "model.path", "does not exist", "save_pretrained"),
    ("model.path=TMP/heldout.jsonl", "model.path", "is not a folder", "save_pretrained"),
    ("model.critic_path=TMP/none", "model.critic_path", "does not exist", "save_pretrained"),
    ("data.labelled.path=???", "data.labelled.path", "has no value", "data.labelled.path=FILE"),
    ("data.labelled.path=TMP/none.jsonl", "data.labelled.path", "does not exist", "existing file"),
    ("data.labelled.path=none.jsonl", "data.labelled.path", "does not exist", os.getcwd()),
    ("data.unlabelled.path=TMP/model/config.json", "data.unlabelled.path", ".jsonl or .parquet", "convert"),
    ("evaluation.sets.heldout.path=TMP/none.parquet", "evaluation.sets.heldout.path", "not exist", "existing file"),
    # sets of questions
    ("data.labelled=null", "data.labelled", "needs labelled questions", "data.labelled.path=FILE"),
    ("data.unlabelled=null", "data.unlabelled", "needs unlabelled questions", "stage2.iterations=0"),
    ("data.labelled.answer_field=null", "data.labelled.answer_field", "answers are needed", "the column"),
    ("data.labelled.verifier=null", "data.labelled.verifier", "who compares", "one of math, countdown"),
    ("data.unlabelled.answer_field=answer", "data.unlabelled.answer_field", "no answers", "evaluation.sets"),
    ("data.unlabelled.verifier_field=who", "data.unlabelled.verifier_field", "no answers", "evaluation.sets"),
    ("data.unlabelled.path=TMP/labelled.jsonl", "data.unlabelled.path", "would be known", "two files"),
    ("data.unlabelled.path=TMP/model/../labelled.jsonl", "data.unlabelled.path", "would be known", "two files"),
    ("evaluation.sets.heldout.answer_field=null", "evaluation.sets.heldout.answer_field", "needed", "the column"),
    ("evaluation.sets.heldout.verifier=null", "evaluation.sets.heldout.verifier", "who compares", "math"),
    # layout
    ("parallel.tensor=3", "parallel.tensor", "8 attention heads and the 4 key-value heads", "one of 1, 2, 4"),
    ("parallel.tensor=8", "parallel.tensor", "4 key-value heads", "one of 1, 2, 4"),
    ("parallel.pipeline=7", "parallel.pipeline", "6 layers", "parallel.pipeline=6 or less"),
    (f"{FIRST}=2", FIRST, "parallel.pipeline is 1", f"{FIRST}=null"),
    ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline", "parallel.pipeline is 1", "virtual_pipeline=1"),
    ("parallel.virtual_pipeline=0", "parallel.virtual_pipeline", "1 or more", "virtual_pipeline=1"),
    (f"parallel.critic.{FIRST[9:]}=2", f"parallel.critic.{FIRST[9:]}", "parallel.pipeline is 1", "=null"),
    ("parallel.sequence=true", "parallel.sequence", "parallel.tensor is 1", "parallel.tensor=2"),
    ("parallel.critic.tensor=3", "parallel.critic.tensor", "8 attention heads", "critic.tensor=one of 1, 2, 4"),
    ("parallel.critic.tensor=0", "parallel.critic.tensor", "1 or more", "parallel.critic.tensor=1"),
    ("parallel.critic.pipeline=7", "parallel.critic.pipeline", "6 layers", "critic.pipeline=6 or less"),
    ("parallel.critic.sequence=true", "parallel.critic.sequence", "parallel.tensor is 1", "parallel.tensor=2"),
    ("rollout.max_response_tokens=30721", "rollout.max_response_tokens", "32768 positions", "=30720 or less"),
    ("rollout.max_prompt_tokens=32768", "rollout.max_response_tokens", "32768", "max_prompt_tokens=16384 or less"),
    ("evaluation.max_response_tokens=40000", "evaluation.max_response_tokens", "32768", "=30720 or less"),
    # stages
    (f"{S1}.mini_batch_prompts=48", f"{S1}.mini_batch_prompts", "the 256 prompts", "one of 4, 8, 16, 32, 64"),
    (f"{S2}.mini_batch_prompts=60", f"{S2}.mini_batch_prompts", "the 256 prompts", "64"),
    ("stage1.labelled_prompts=0", "stage1.labelled_prompts", "ppo needs labelled", "=1 or more"),
    ("stage2.labelled_prompts=0", "stage2.labelled_prompts", "tempo needs labelled", "=1 or more"),
    ("stage2.unlabelled_prompts=0", "stage2.unlabelled_prompts", "tempo needs unlabelled", "=1 or more"),
    ("stage1.unlabelled_prompts=8", "stage1.unlabelled_prompts", "ppo uses no unlabelled", "=0"),
    (f"{S2}.warmup_iterations=1", f"{S2}.warmup_iterations", "in the stage's 1 iterations", "iterations above 1"),
    # evaluation and metrics
    ("evaluation.pass_k=[32]", "evaluation.pass_k", "pass@32", "evaluation.samples=32"),
    ("evaluation.pass_k=[0]", "evaluation.pass_k", "pass@0", "evaluation.pass_k=[1]"),
    ("evaluation.calibration_set=heldot", "evaluation.calibration_set", "not in evaluation.sets", "heldout"),
    ("rewards.judge.retries=-1", "rewards.judge.retries", "0 or more", "retries=0"),
    ("rewards.math.workers=0", "rewards.math.workers", "must be 1 or more", "workers=1"),
    ("rewards.math.workers=1000000007", "rewards.math.workers", "at most 1,024", "workers=1024"),
    ("rewards.math.seconds=0", "rewards.math.seconds", "above 0", "seconds=5"),
    ("rewards.code.seconds=0", "rewards.code.seconds", "above 0", "seconds=6"),
    ("rewards.code.memory_mb=1", "rewards.code.memory_mb", "must be 128 or more", "memory_mb=128"),
    ("rewards.code.workers=0", "rewards.code.workers", "must be 1 or more", "workers=1"),
    ("rewards.code.wall_seconds=2", "rewards.code.wall_seconds", "rewards.code.seconds=6", "wall_seconds=60"),
    ("rewards.code.python=/none", "rewards.code.python", "no program that can be run", "rewards.code.python=null"),
    ("data.held_out=[heldot]", "data.held_out", "heldot is not in evaluation.sets", "heldout"),
    ("rollout.replay=TMP/none", "rollout.replay", "does not exist", "rollout.dump=true"),
]


@pytest.mark.parametrize(("override", "field", "wrong", "fix"), ONE_FIELD, ids=[row[0] for row in ONE_FIELD])
def test_one_field(files: Path, override: str, field: str, wrong: str, fix: str) -> None:
    problem = only(problems(files, override))
    assert problem.field == field
    assert wrong in problem.wrong
    assert fix in problem.fix
    assert "\n" not in str(problem)


# name, overrides, field, a part of what is wrong, a part of the fix
SERVERS = ["rollout.engine=vllm", f"rollout.servers.python={sys.executable}"]
PAUSED = [
    *(*SERVERS, "rollout.placement=colocated", "rollout.servers.transport=shared"),
    *("rollout.partial_rollouts=true", "rollout.max_staleness=1"),
]
ONE_SAMPLE = ["evaluation.samples=1", "evaluation.pass_k=[1]"]
SEVERAL_FIELDS = [
    (
        "greedy and top-p",
        ["evaluation.temperature=0", "evaluation.top_p=0.9", "evaluation.top_k=4", *ONE_SAMPLE],
        "evaluation.top_p",
        "takes the most probable token, whatever top_p leaves",
        "evaluation.top_p=1 and evaluation.top_k=null",
    ),
    (
        "a KL term over other tokens",
        ["rollout.min_p=0.1", "stage2.actor.kl_coef=0.1"],
        "stage2.actor.kl_coef",
        "with rollout.min_p, the reference would leave other tokens than the actor",
        "rollout.min_p=0",
    ),
    (
        "stop strings in parts of responses",
        [*PAUSED, "rollout.stop=[x]", *CORRECTED],
        "rollout.stop",
        "that began before a response was paused",
        "rollout.partial_rollouts=false",
    ),
    (
        "too cool for servers",
        [*SERVERS, "rollout.temperature=0.001"],
        "rollout.temperature",
        "vLLM would take 0.01",
        "rollout.temperature=0.01",
    ),
    (
        "too hot for vLLM",
        [*SERVERS, "evaluation.temperature=2.5"],
        "evaluation.temperature",
        "vLLM refuses more than 2",
        "evaluation.temperature=2",
    ),
    (
        "a seed for SGLang",
        ["rollout.engine=sglang", SERVERS[1], "evaluation.seed=3", "rollout.servers.arguments=[--log-level=info]"],
        "evaluation.seed",
        "only with --enable-deterministic-inference",
        "rollout.servers.arguments=['--log-level=info','--enable-deterministic-inference']",
    ),
    (
        "bf16 on a CPU",
        ["run.device=cpu", "run.precision=bf16"],
        "run.precision",
        "fp32",
        "run.device=cuda",
    ),
    (
        "no stage",
        ["stage1.iterations=0", "stage2.iterations=0"],
        "stage2.iterations",
        "no stage",
        "1 or more",
    ),
    (
        "world size and model",
        ["parallel.world_size=6", "parallel.tensor=4"],
        "parallel.world_size",
        "parallel.tensor * parallel.pipeline * parallel.context = 4",
        "launch 4 processes or a multiple",
    ),
    (
        "world size and the critic's layout",
        [
            "parallel.world_size=2",
            "parallel.tensor=2",
            "parallel.critic.tensor=1",
            "parallel.critic.pipeline=2",
            "parallel.critic.context=2",
        ],
        "parallel.world_size",
        "parallel.critic.tensor * parallel.critic.pipeline * parallel.critic.context = 4",
        "launch 4 processes or a multiple",
    ),
    (
        "sequence parallelism that the critic would inherit",
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.critic.tensor=1"],
        "parallel.sequence",
        "parallel.critic.tensor is 1",
        "parallel.critic.sequence=false",
    ),
    (
        "a first stage that leaves nothing to the others",
        ["parallel.pipeline=3", f"{FIRST}=5"],
        FIRST,
        "each of the other 2 stages needs one of the 6 layers",
        f"{FIRST}=4 or less",
    ),
    (
        "a last stage of the critic that leaves nothing to the others",
        ["parallel.critic.pipeline=2", f"parallel.critic.{LAST[9:]}=6"],
        f"parallel.critic.{LAST[9:]}",
        "each of the other 1 stages needs one of the 6 layers",
        f"parallel.critic.{LAST[9:]}=5 or less",
    ),
    (
        "more chunks than layers",
        ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
        "parallel.virtual_pipeline",
        "each chunk of 2 stages needs a layer, and model.path has 6 layers",
        "parallel.virtual_pipeline=3 or less",
    ),
    (
        "a first stage that is not chunks",
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", f"{FIRST}=3"],
        FIRST,
        "does not divide by parallel.virtual_pipeline=2",
        f"{FIRST}=4",
    ),
    (
        "a first stage that leaves too little for chunks",
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", f"{FIRST}=6"],
        FIRST,
        "each of the other 1 stages needs 2 of the 6 layers",
        f"{FIRST}=4",
    ),
    (
        "chunks of two stages that are not the whole model",
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", f"{FIRST}=2", f"{LAST}=2"],
        LAST,
        f"{FIRST}=2 leaves 4 of the 6 layers",
        f"{LAST}=4",
    ),
    ("an empty stage", ["parallel.pipeline=2", f"{LAST}=0"], LAST, "1 or more", f"{LAST}=1"),
    (
        "two stages that are not the whole model",
        ["parallel.pipeline=2", f"{FIRST}=3", f"{LAST}=2"],
        LAST,
        f"{FIRST}=3 leaves 3 of the 6 layers",
        f"{LAST}=3",
    ),
    (
        "first and last stages that leave nothing to those between",
        ["parallel.pipeline=4", f"{FIRST}=2", f"{LAST}=3"],
        LAST,
        f"{FIRST}=2 leaves 4 of the 6 layers of model.path, and each chunk of the stages between them (2) needs one",
        f"{LAST}=2 or less",
    ),
    (
        "rows and the critic's replicas",
        [
            "parallel.world_size=3",
            "parallel.pipeline=3",
            "parallel.critic.pipeline=1",
            "stage2.iterations=0",
            "stage1.labelled_prompts=768",
            "stage1.actor.mini_batch_prompts=96",
        ],
        "stage1.critic.mini_batch_prompts",
        "512 responses cannot be shared evenly by 3",
        "one of 6, 12, 24, 48, 96",
    ),
    (
        "rows and replicas",
        [
            "parallel.world_size=3",
            "stage2.iterations=0",
            "stage1.labelled_prompts=768",
            "stage1.critic.mini_batch_prompts=96",
        ],
        "stage1.actor.mini_batch_prompts",
        "512 responses cannot be shared evenly by 3",
        "one of 6, 12, 24, 48, 96",
    ),
    (
        "frozen critic that nobody trained",
        ["stage1.iterations=0", "stage2.estep_every=0"],
        "model.critic_path",
        "never trains its critic",
        "stage1.iterations=1",
    ),
    (
        "lambda-returns of values after the token",
        ["stage2.gae_lambda=0.9", "stage2.baseline=paper"],
        "stage2.gae_lambda",
        "baseline=paper reads the one after it",
        "stage2.baseline=before_token, or stage2.gae_lambda=1",
    ),
    (
        "a bound for the E-steps of a frozen critic",
        ["stage2.estep_every=0", "stage2.estep_when_ece_above=0.05"],
        "stage2.estep_when_ece_above",
        "never has an E-step",
        "stage2.estep_when_ece_above=null, or stage2.estep_every=1",
    ),
    (
        "two critics of a frozen one",
        ["stage2.estep_every=0", "stage2.pessimism=1"],
        "stage2.pessimism",
        "never has an E-step",
        "stage2.pessimism=0, or stage2.estep_every=1",
    ),
    (
        "warm-up of a frozen critic",
        ["stage2.estep_every=0", "stage2.critic.warmup_iterations=5"],
        "stage2.critic.warmup_iterations",
        "would do nothing",
        "stage2.critic.warmup_iterations=0",
    ),
    (
        "warm-up as long as the stage",
        ["stage1.iterations=5", "stage1.critic.warmup_iterations=5"],
        "stage1.critic.warmup_iterations",
        "actor would never be updated in the stage's 5 iterations",
        "stage1.critic.warmup_iterations below 5, or stage1.iterations above 5",
    ),
    (
        "mini-batch with labelled rows in the actor's batch",
        ["stage2.actor_on_labelled=true", "stage2.labelled_prompts=64", "stage2.actor.mini_batch_prompts=128"],
        "stage2.actor.mini_batch_prompts",
        "the 320 prompts",
        "80",
    ),
    (
        "dump into the replayed folder",
        ["rollout.dump=true", "rollout.replay=TMP/run/rollouts"],
        "rollout.replay",
        "is replayed",
        "rollout.dump=false",
    ),
    (
        "set name",
        ["evaluation.sets.a-b={path: TMP/heldout.jsonl, answer_field: answer, verifier: math}"],
        "evaluation.sets",
        "names",
        "letters, digits",
    ),
]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.pipeline=4"],  # 6 layers: 1, 2, 2, 1
        ["parallel.pipeline=6"],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],  # 2, 1, 2, 1
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", f"{FIRST}=2", f"{LAST}=4"],
        ["parallel.pipeline=2", "parallel.virtual_pipeline=3", "parallel.critic.pipeline=1"],
        ["parallel.pipeline=2", f"{FIRST}=5"],
        ["parallel.pipeline=2", f"{FIRST}=2", f"{LAST}=4"],
        ["parallel.pipeline=4", f"{FIRST}=2", f"{LAST}=2"],
        ["parallel.pipeline=2", f"{FIRST}=5", "parallel.critic.pipeline=1"],  # not the critic's
    ],
    ids=" ".join,
)
def test_stages_may_have_unequally_many_layers(files: Path, overrides: list[str]) -> None:
    assert problems(files, *overrides) == []


@pytest.mark.parametrize(
    ("overrides", "field", "wrong", "fix"), [row[1:] for row in SEVERAL_FIELDS], ids=[row[0] for row in SEVERAL_FIELDS]
)
def test_several_fields(files: Path, overrides: list[str], field: str, wrong: str, fix: str) -> None:
    (files / "run" / "rollouts").mkdir(parents=True)
    problem = only(problems(files, *overrides))
    assert problem.field == field
    assert wrong in problem.wrong
    assert fix in problem.fix


TTRL = ["stage2.method=ttrl", "stage2.labelled_prompts=0", "data.unlabelled.verifier=math"]
EMPO = ["stage2.method=empo", *TTRL[1:]]
GUARD = ["stage2.method=ttrl_guard", *TTRL[1:]]
SCRL = ["stage2.method=scrl", "stage2.vote_responses=16", *TTRL[1:]]
GRPO = ["stage2.method=grpo", "stage2.unlabelled_prompts=0"]
INTUITOR = ["stage2.method=intuitor", "stage2.labelled_prompts=0"]
ENTROPY_MIN = ["stage2.method=entropy_min", "stage2.labelled_prompts=0"]
# a stage without a critic, a change of it, the field that is wrong, a part of what is, a part of the fix
GROUPS = [
    (TTRL, "data.unlabelled.verifier=null", "data.unlabelled.verifier", "ttrl compares", "one of math, countdown"),
    (EMPO, "data.unlabelled.verifier=null", "data.unlabelled.verifier", "empo compares", "one of math, countdown"),
    (TTRL, "stage2.labelled_prompts=8", "stage2.labelled_prompts", "ttrl uses no labelled", "=0"),
    (GRPO, "stage2.unlabelled_prompts=8", "stage2.unlabelled_prompts", "grpo uses no unlabelled", "=0"),
    (GRPO, "stage2.labelled_prompts=0", "stage2.labelled_prompts", "grpo needs labelled", "=1 or more"),
    (EMPO, "stage2.responses_per_prompt=1", "stage2.responses_per_prompt", "a single one", "=2 or more"),
    (GRPO, "stage2.responses_per_prompt=1", "stage2.responses_per_prompt", "a single one", "=2 or more"),
    (GRPO, "stage2.refill_limit=256", "stage2.refill_limit", "asks for 256 labelled prompts already", "=768, or"),
    (TTRL, "stage2.refill_limit=0", "stage2.refill_limit", "1 or more", "refill_limit=1"),
    (TTRL, "stage2.truncated_responses=penalised", "stage2.length_penalty_tokens", "where below 16384", "tokens=3276"),
    (TTRL, "stage2.length_penalty_tokens=9", "stage2.length_penalty_tokens", "no length penalty", "=penalised, or"),
    (
        ["stage2.truncated_responses=penalised", "stage2.length_penalty_tokens=16384"],
        "stage2.length_penalty_tokens=16385",
        "stage2.length_penalty_tokens",
        "no response has more",
        "tokens=3276",
    ),
    (TTRL, "stage2.length_penalty=0", "stage2.length_penalty", "above 0", "length_penalty=1"),
    (TTRL, "stage2.vote_responses=7", "stage2.vote_responses", "responses_per_prompt=8 of them", "=8 or more, or null"),
    (TTRL, "stage2.vote_responses=0", "stage2.vote_responses", "1 or more", "vote_responses=1"),
    (TTRL, "stage2.critic.warmup_iterations=3", "stage2.critic.warmup_iterations", "method ttrl has none", "=0"),
    (EMPO, "stage2.entropy_low=-1", "stage2.entropy_low", "0 or more", "entropy_low=0"),
    (EMPO, "stage2.entropy_high=0", "stage2.entropy_high", "above 0", "entropy_high=1"),
    (
        GUARD,
        "data.unlabelled.verifier=null",
        "data.unlabelled.verifier",
        "ttrl_guard compares",
        "one of math, countdown",
    ),
    (GUARD, "stage2.vote_responses=7", "stage2.vote_responses", "responses_per_prompt=8 of", "=8 or more, or null"),
    (GUARD, "stage2.flip_window=0", "stage2.flip_window", "1 or more", "flip_window=1"),
    (GUARD, "stage2.flip_threshold=0", "stage2.flip_threshold", "above 0 and at most 1", "flip_threshold=0.5"),
    (GUARD, "stage2.flip_penalty=1.5", "stage2.flip_penalty", "at least 0 and at most 1", "flip_penalty=0.5"),
    (GUARD, "stage2.skip_probability=-1", "stage2.skip_probability", "at least 0", "skip_probability=0.5"),
    (SCRL, "data.unlabelled.verifier=null", "data.unlabelled.verifier", "scrl compares", "one of math, countdown"),
    (SCRL, "stage2.vote_responses=7", "stage2.vote_responses", "responses_per_prompt=8 of them", "=8 or more, or null"),
    (SCRL, "stage2.positive_share=0", "stage2.positive_share", "above 0 and at most 1", "positive_share=0.5"),
    (SCRL, "stage2.positive_margin=1", "stage2.positive_margin", "below 1", "positive_margin=0.9"),
    (SCRL, "stage2.entropy_penalty=-1", "stage2.entropy_penalty", "0 or more", "entropy_penalty=0"),
    (SCRL, "stage2.vote_responses=8", "stage2.negative_share", "of 8 responses that vote", "=9 or more, or stage2."),
    (SCRL, "stage2.negative_share=0.5", "stage2.negative_share", "could be right and wrong", "=0.375 or less"),
    (INTUITOR, "stage2.responses_per_prompt=1", "stage2.responses_per_prompt", "a single one", "=2 or more"),
    (INTUITOR, "stage2.refill_limit=999", "stage2.refill_limit", "intuitor does not compare", "=null, or"),
    (ENTROPY_MIN, "stage2.refill_limit=999", "stage2.refill_limit", "entropy_min does not compare", "=null, or"),
    (ENTROPY_MIN, "stage2.actor.entropy_coef=0.1", "stage2.actor.entropy_coef", "a bonus would raise it", "=0"),
    (ENTROPY_MIN, "stage2.actor.whiten_advantages=true", "stage2.actor.whiten_advantages", "no advantages", "=false"),
    (
        [*ENTROPY_MIN, "stage2.truncated_responses=masked"],
        "stage2.truncated_responses=penalised stage2.length_penalty_tokens=9",
        "stage2.truncated_responses",
        "no rewards to add a penalty to",
        "=masked and stage2.length_penalty_tokens=null",
    ),
]


@pytest.mark.parametrize(
    ("stage", "change", "field", "wrong", "fix"), GROUPS, ids=[f"{row[0][0]} {row[1]}" for row in GROUPS]
)
def test_methods_without_a_critic(files: Path, stage: list[str], change: str, field: str, wrong: str, fix: str) -> None:
    assert problems(files, *stage) == []
    problem = only(problems(files, *stage, *change.split()))
    assert problem.field == field
    assert wrong in problem.wrong
    assert fix in problem.fix


def test_one_response_to_a_prompt_is_enough_for_its_entropy(files: Path) -> None:
    one = ["stage2.responses_per_prompt=1", "stage2.unlabelled_prompts=1", "stage2.actor.mini_batch_prompts=1"]
    assert problems(files, *ENTROPY_MIN, *one) == []


def test_bounds_of_the_entropy(files: Path) -> None:
    assert problems(files, *EMPO, "stage2.entropy_low=0.1", "stage2.entropy_high=1.5") == []
    problem = only(problems(files, *EMPO, "stage2.entropy_low=1.5", "stage2.entropy_high=1.5"))
    assert (problem.field, problem.fix[:30]) == ("stage2.entropy_high", "stage2.entropy_high above 1.5,")


def test_a_run_has_a_critic_where_a_stage_has(files: Path) -> None:
    def config(*overrides: str) -> Config:
        return configure([*good_overrides(files), *overrides])

    assert config().has_critic
    assert config(*TTRL).has_critic, "of stage 1"
    alone = config(*TTRL, "stage1.iterations=0")
    assert not alone.has_critic
    assert alone.compares_answers
    assert problems(files, *TTRL, "stage1.iterations=0") == []
    assert problems(files, *TTRL, "stage1.iterations=0", "model.critic_path=TMP/critic") == [], "not used, not refused"
    assert not config().compares_answers


def test_what_the_critics_values_mean(files: Path) -> None:
    """The targets of the last stage that trained it."""
    other = "critic.targets=plus_minus_one"

    def targets(*overrides: str) -> list[str]:
        config = configure([*good_overrides(files), *overrides])
        return [config.critic_targets(name).name for name in config.stages()]

    assert targets(f"stage2.{other}") == ["zero_one", "plus_minus_one"]
    assert targets(f"stage1.{other}") == ["plus_minus_one", "zero_one"]
    assert targets(f"stage1.{other}", *TTRL) == ["plus_minus_one"] * 2
    assert targets(f"stage1.{other}", "stage2.estep_every=0") == ["plus_minus_one"] * 2
    assert targets(f"stage2.{other}", "stage1.iterations=0") == ["zero_one", "plus_minus_one"]


def rewrite(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def put(name: str, text: str | None) -> Callable[[Path], None]:
    """Writes a file of the model's folder; None: makes a folder in its place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir() if text is None else (folder / name).write_text(text)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def integers(folder: Path) -> None:
    save_file({"model.norm.weight": np.ones(4, dtype=np.int8)}, str(folder / "model.safetensors"))


# name, what is done to the model's folder, a part of what is wrong, a part of the fix
FOLDERS = [
    (
        "another family",
        rewrite(model_type="mistral"),
        'model_type is "mistral"; supported',
        "llama, olmo3, qwen2, qwen3, qwen3_moe",
    ),
    ("no model_type", rewrite(model_type=None), "model_type is null; supported", "qwen3"),
    ("no layers", rewrite(num_hidden_layers=None), "num_hidden_layers", "save_pretrained"),
    ("text for heads", rewrite(num_attention_heads="8"), "num_attention_heads", "save_pretrained"),
    ("no config", lambda folder: (folder / "config.json").unlink(), "no config.json", "save_pretrained"),
    ("config cut short", put("config.json", '{"mo'), "config.json is not JSON", "whole copy"),
    ("config a list", put("config.json", "[]"), "config.json holds a JSON array, not an object", "whole copy"),
    ("config a folder", put("config.json", None), "config.json is a folder, not a file", "fetch the file again"),
    ("quantised", rewrite(quantization_config={"quant_method": "fp8"}), "weights are quantised", "before quantisation"),
    ("tokenizer cut short", put("tokenizer.json", '{"model": {'), "tokenizer.json ends too early", "a whole copy"),
    ("tokenizer a pipe", pipe("tokenizer.json"), "tokenizer.json is a named pipe, not a file", "fetch the file"),
    (
        "a token without embedding",
        put("tokenizer.json", '{"model": {"vocab": {"a": 99}}, "added_tokens": [{"id": 100, "content": "<new>"}]}'),
        "tokenizer.json: 1 tokens have no embedding, first '<new>' with id 100: config.json says vocab_size=100",
        "resize the model's embeddings, or remove the tokens",
    ),
    (
        "an added token without embedding",
        put("tokenizer_config.json", '{"chat_template": "", "added_tokens_decoder": {"100": {"content": "<new>"}}}'),
        "tokenizer_config.json: 1 tokens have no embedding, first '<new>' with id 100",
        "resize the model's embeddings, or remove the tokens",
    ),
    ("settings a number", put("tokenizer_config.json", "3"), "tokenizer_config.json holds a JSON number", "whole copy"),
    ("generation", put("generation_config.json", '{"eos_token_id": "$"}'), "eos_token_id=$ is no token id", "correct"),
    ("weights cut short", cut_weights, "model.safetensors is cut short: it has ", "fetch the file again"),
    ("weights empty", put("model.safetensors", ""), "model.safetensors is not a whole safetensors file", "fetch"),
    ("weights a text", put("model.safetensors", "version https://git-lfs"), "is not a whole safetensors file", "fetch"),
    ("weights a folder", put("model.safetensors", None), "model.safetensors is a folder, not a file", "fetch"),
    ("weights of integers", integers, "model.norm.weight is I8: weights are BF16, F16, F32, F64", "quantisation"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), "no safetensors", "save_pretrained"),
    ("absent shard", shard, "model-00002.safetensors", "copy"),
    (
        "bad index",
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "no readable weight_map",
        "save_pretrained",
    ),
    ("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer", "copy"),
]


@pytest.mark.parametrize(("damage", "wrong", "fix"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_model_folder(files: Path, damage: Callable[[Path], None], wrong: str, fix: str) -> None:
    damage(files / "model")
    problem = only(problems(files))
    assert problem.field == "model.path"
    assert wrong in problem.wrong
    assert fix in problem.fix


@pytest.mark.parametrize("family", ["olmo3", "qwen3"])
def test_every_family_passes_and_is_held_to_the_layout(files: Path, family: str) -> None:
    rewrite(model_type=family)(files / "model")
    assert problems(files, "parallel.tensor=4", "parallel.pipeline=3") == []
    report = problems(files, "parallel.tensor=8", "parallel.pipeline=7")
    assert [problem.field for problem in report[:2]] == ["parallel.tensor", "parallel.pipeline"]


def test_a_critic_to_be_given(files: Path) -> None:
    config = configure(good_overrides(files))
    config.model.critic_path = MISSING
    problem = only(check(config, world_size=None))
    assert (problem.field, problem.fix[-7:]) == ("model.critic_path", "or null")


def test_shards_that_are_all_there(files: Path) -> None:
    shard(files / "model")
    shutil.copyfile(files / "model" / "model.safetensors", files / "model" / "model-00002.safetensors")
    assert problems(files) == []


def test_a_critic_has_its_own_shape(files: Path) -> None:
    write_model(files / "small", num_hidden_layers=3, vocab_size=101)
    report = problems(files, "model.critic_path=TMP/small", "parallel.pipeline=4")
    assert [problem.field for problem in report] == ["model.critic_path", "parallel.pipeline"]
    assert "model.path 100 and model.critic_path 101" in report[0].wrong
    assert "model.critic_path has 3 layers" in report[1].wrong


def test_no_chat_template(files: Path) -> None:
    (files / "model" / "tokenizer_config.json").unlink()
    report = problems(files, "data.labelled.chat_template=false")
    assert [p.field for p in report] == ["data.unlabelled.chat_template", "evaluation.sets.heldout.chat_template"]
    assert "chat_template=false" in report[0].fix
    (files / "model" / "chat_template.jinja").touch()
    assert problems(files) == []


def test_files_that_cannot_be_opened(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's, whom a test that root runs cannot be."""
    (files / "key").write_text("k")
    refused = {"labelled.jsonl", "tokenizer.json", "model.safetensors", "config.json", "key"}
    opened = os.open

    def open_or_refuse(path: str | Path, *arguments: int) -> int:
        if Path(path).name in refused and "critic" not in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr("megatron_tempo.files.os.open", open_or_refuse)
    report = problems(
        files, "rewards.judge.key_file=TMP/key", "rewards.judge.url=http://h:1/v1", "rewards.judge.model=m"
    )
    assert {problem.field for problem in report} == {"model.path", "data.labelled.path", "rewards.judge.key_file"}
    assert all("cannot be read: Permission denied" in problem.wrong for problem in report)
    message = " ".join(problem.wrong for problem in report)
    assert all(name in message for name in ("tokenizer.json", "model.safetensors", "config.json"))


@pytest.mark.parametrize("kind", ["pipe", "loop", "long name"])
def test_what_is_no_file_of_data(files: Path, kind: str) -> None:
    path = files / ("x" * 300 if kind == "long name" else "other")
    path = path.with_suffix(".jsonl")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    problem = only(problems(files, f"data.labelled.path={path}"))
    assert problem.field == "data.labelled.path"
    assert {"pipe": "named pipe", "loop": "levels of symbolic", "long name": "too long"}[kind] in problem.wrong


@pytest.mark.parametrize(
    ("override", "wrong"),
    [("profile.steps=[2,0]", "count from 1"), ("profile.steps=[1,9999]", "the run has 2 iterations")],
)
def test_steps_to_trace(files: Path, override: str, wrong: str) -> None:
    assert problems(files, "profile.steps=[1,2]") == []
    problem = only(problems(files, override))
    assert problem.field == "profile.steps"
    assert wrong in problem.wrong


def test_resume_false_keeps_checkpoints(files: Path) -> None:
    assert problems(files, "run.resume=false") == []
    (files / "run" / "checkpoints" / "step_00000020").mkdir(parents=True)
    problem = only(problems(files, "run.resume=false"))
    assert problem.field == "run.resume"
    assert "already has checkpoints" in problem.wrong
    assert "run.resume=true" in problem.fix
    assert problems(files) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_run_folder_that_cannot_be_written(files: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(code, os.strerror(code), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    problem = only(problems(files))
    assert problem.field == "run.dir"
    assert problem.wrong == f"{files} cannot be written: {os.strerror(code)}"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="wants a file system that nobody can write")
def test_a_run_folder_where_not_even_root_can_write(files: Path) -> None:
    problem = only(problems(files, "run.dir=/sys/kernel/run"))
    assert problem.field == "run.dir"
    assert problem.wrong.startswith("/sys/kernel cannot be written: ")


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "seen.jsonl", "config.json"])
def test_a_record_that_cannot_be_written(files: Path, name: str) -> None:
    (files / "run" / name).mkdir(parents=True)
    problem = only(problems(files))
    assert problem.field == "run.dir"
    assert problem.wrong == f"{files / 'run' / name} is not a file that can be written"


@pytest.mark.parametrize(("name", "override"), [("checkpoints", "run.seed=1"), ("rollouts", "rollout.dump=true")])
def test_a_folder_in_the_runs_that_cannot_be_written(files: Path, name: str, override: str) -> None:
    (files / "run").mkdir()
    (files / "run" / name).write_text("a file")
    problem = only(problems(files, override))
    assert problem.field == "run.dir"
    assert problem.wrong == f"{files / 'run' / name} cannot be written: Not a directory"


@pytest.mark.parametrize(
    ("override", "package"), [("metrics.tensorboard=true", "tensorboard"), ("metrics.wandb_project=p", "wandb")]
)
def test_absent_tracker(files: Path, monkeypatch: pytest.MonkeyPatch, override: str, package: str) -> None:
    spec = ModuleSpec(package, None)
    monkeypatch.setattr(evaluation, "find_spec", lambda name: spec if name == package else None)
    assert problems(files, override) == []
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None if name == package else spec)
    problem = only(problems(files, override))
    assert problem.field == override.partition("=")[0]
    assert package in problem.wrong
    assert problem.fix.startswith(f"pip install {package}, or ")


def test_all_problems_at_once_in_the_order_of_the_tree(files: Path) -> None:
    bad = [row[0] for row in ONE_FIELD if row[1] in ("run.seed", "checkpoint.keep", "rollout.batch_rows")]
    report = problems(files, *reversed(bad), "parallel.tensor=3")
    assert [p.field for p in report] == ["run.seed", "parallel.tensor", "rollout.batch_rows", "checkpoint.keep"]


def test_frozen_critic_after_stage_one_needs_no_labelled_set(files: Path) -> None:
    frozen = ["stage2.estep_every=0", "stage2.critic.mini_batch_prompts=7"]
    assert problems(files, *frozen) == []
    loaded = ["stage1.iterations=0", "model.critic_path=TMP/critic", "data.labelled=null"]
    assert problems(files, *frozen, *loaded) == []


def test_a_warm_up_that_leaves_the_actor_an_iteration(files: Path) -> None:
    assert problems(files, "stage1.iterations=6", "stage1.critic.warmup_iterations=5") == []


def test_a_stage_that_is_passed_over_may_hold_anything_unused(files: Path) -> None:
    assert len(problems(files, "stage1.critic.warmup_iterations=9", "stage1.labelled_prompts=0")) == 2
    passed = ("stage1.critic.warmup_iterations=9", "stage1.labelled_prompts=0", "stage1.iterations=0")
    assert problems(files, *passed) == []


def test_a_set_that_no_stage_uses_needs_no_file(files: Path) -> None:
    assert problems(files, "stage2.iterations=0", "data.unlabelled.path=???") == []


def test_launched_processes(files: Path) -> None:
    config = configure(good_overrides(files))
    assert check(config, world_size=64) == []
    problem = only(check(config, world_size=7)[:1])
    assert (problem.field, "7 data-parallel" in problem.wrong) == ("stage1.actor.mini_batch_prompts", True)
    config.parallel.world_size = 4
    problem = only(check(config, world_size=2))
    assert (problem.field, problem.wrong) == ("parallel.world_size", "2 processes were launched")


def test_eval_looks_at_no_stage(files: Path) -> None:
    bad = ["data.labelled.path=TMP/none.jsonl", "stage1.actor.mini_batch_prompts=7", "data.unlabelled=null"]
    assert len(problems(files, *bad)) == 3
    assert problems(files, *bad, purpose=Purpose.eval) == []
    assert only(problems(files, "model.path=TMP/none", purpose=Purpose.eval)).field == "model.path"
    config = configure(good_overrides(files))
    config.evaluation.sets.clear()
    problem = only(check(config, world_size=None, purpose=Purpose.eval))
    assert (problem.field, "data=FILE" in problem.fix) == ("evaluation.sets", True)


def test_every_method_has_its_needs() -> None:
    assert set(NEEDS) == set(Method)
    stage = Config().stage2
    assert (stage.prompts(), stage.actor_prompts(), stage.critic_prompts()) == (
        {Prompts.labelled, Prompts.unlabelled},
        {Prompts.unlabelled},
        {Prompts.labelled},
    )
    assert Config().stage1.prompts() == {Prompts.labelled}


def test_a_server_that_cannot_be_started(files: Path) -> None:
    nowhere = [f"rollout.servers.python={files}/none/bin/python", "rollout.servers.devices=[0,1]"]
    assert problems(files, *nowhere) == [], "another engine is asked for"
    for engine in ("sglang", "vllm"):
        first, second = problems(files, *nowhere, f"rollout.engine={engine}")
        assert first.field == "rollout.servers.python"
        assert "no program that can be run" in first.wrong
        assert engine in first.fix
        assert second.field == "rollout.servers.devices"
        assert "give 1 of them" in second.fix


NODE = ["cluster.nodes=1", "cluster.gpus_per_node=8", "cluster.gpu=H100"]


@pytest.mark.parametrize(
    ("launched", "words", "wrong"),
    [
        # Nothing says how many nodes there are: the first process has the first GPU.
        (None, ["devices=[0]"], "the trainer uses GPU 0 too"),
        (8, ["devices=[1]"], None),
        (None, ["devices=[0]", "transport=shared"], None),
        (8, [], None),
        # On a known node.
        (4, ["devices=[3]", *NODE], "the trainer uses GPU 3 too"),
        (4, ["devices=[4]", *NODE], None),
        (None, ["devices=[4]", "parallel.world_size=5", *NODE], "the trainer uses GPU 4 too"),
        (None, ["devices=[3]", *NODE], "the trainer uses GPU 3 too"),  # seven processes
        (None, ["devices=[7]", *NODE], None),
        (4, ["devices=[2,3]", "tensor=2", "transport=shared", *NODE], None),
        # devices=null: the GPUs after the trainer's
        (4, ["tensor=4", *NODE], None),
        (4, ["tensor=4", "replicas=2", *NODE], "4 processes of the trainer and 2 x 4 GPUs"),
        (8, [*NODE], "8 processes of the trainer and 1 x 1 GPUs"),
        (8, ["transport=shared", *NODE], "8 processes of the trainer and 1 x 1 GPUs"),
        (None, ["tensor=8", *NODE], "8 processes of the trainer and 1 x 8 GPUs"),
        (8, ["tensor=4", "host=hostname", "cluster.rollout_nodes=1", *NODE, "cluster.nodes=2"], None),
    ],
)
def test_trainer_and_server_on_one_gpu_need_shared_memory(
    files: Path, launched: int | None, words: list[str], wrong: str | None
) -> None:
    """NCCL refuses two members of a group on one GPU."""
    words = [word if word.startswith(("cluster.", "parallel.")) else f"rollout.servers.{word}" for word in words]
    words += ["rollout.engine=vllm", f"rollout.servers.python={sys.executable}"]
    problems = check(configure([*good_overrides(files), *words]), world_size=launched)
    found = [problem for problem in problems if problem.field == "rollout.servers.devices"]
    assert [wrong in problem.wrong for problem in found if wrong] == ([True] if wrong else [])
    assert len(found) == (wrong is not None)


FOUND = ["rollout.engine=vllm", "rollout.servers.python=/none"]


@pytest.mark.parametrize(
    ("overrides", "field", "wrong"),
    [
        (["addresses=[http://127.0.0.1]"], "rollout.servers.addresses", "no address"),
        (["addresses=[http://127.0.0.1:70000]"], "rollout.servers.addresses", "no address"),
        (["addresses=[http://127.0.0.1:1]", "host='::1'"], "rollout.servers.host", "IPv6"),
        (["addresses=[http://127.0.0.1:1]", "host=0.0.0.0"], "rollout.servers.host", "every address"),
        (["addresses=[http://127.0.0.1:1]", "host='a b'"], "rollout.servers.host", "no host"),
        (["addresses=[http://10.0.0.5:8000]", "host=127.0.1.1"], "rollout.servers.host", "cannot be reached"),
        (["addresses=[http://10.0.0.5:8000]", "host=localhost"], "rollout.servers.host", "cannot be reached"),
        (["addresses=[]"], "rollout.servers.addresses", "is empty"),
        (["addresses=[http://127.0.0.1:1,http://127.0.0.1:1]"], "rollout.servers.addresses", "twice"),
        (["addresses=[http://10.0.0.5:8000]"], "rollout.servers.host", "cannot be reached"),
        (["addresses=[http://127.0.0.1:1]", "each_node=true"], "rollout.servers.each_node", "none is started"),
        (["addresses=[http://127.0.0.1:1]", "key_file=null"], "rollout.servers.key_file", "without a key"),
        (["addresses=[http://127.0.0.1:1]", "key_file=/none"], "rollout.servers.key_file", "does not exist"),
    ],
)
def test_servers_that_are_found(files: Path, overrides: list[str], field: str, wrong: str) -> None:
    key = files / "key"
    key.write_text("secret")
    words = [*FOUND, f"rollout.servers.key_file={key}", *(f"rollout.servers.{text}" for text in overrides)]
    problem = only(problems(files, *words))
    assert problem.field == field
    assert wrong in problem.wrong
    good = [*FOUND, f"rollout.servers.key_file={key}", "rollout.servers.addresses=[http://127.0.0.1:1]"]
    assert problems(files, *good) == []


def test_an_empty_key(files: Path) -> None:
    (files / "key").write_text("\n")
    words = [*FOUND, f"rollout.servers.key_file={files / 'key'}", "rollout.servers.addresses=[http://127.0.0.1:1]"]
    assert "is empty" in only(problems(files, *words)).wrong


def test_a_key_is_for_servers_that_are_found(files: Path) -> None:
    words = ["rollout.engine=vllm", "rollout.servers.key_file=/none", f"rollout.servers.python={sys.executable}"]
    assert only(problems(files, *words)).field == "rollout.servers.key_file"


def test_memory_is_shared_between_equals(files: Path) -> None:
    servers = [f"rollout.servers.{text}" for text in (f"python={sys.executable}", "transport=shared")]
    assert problems(files, "rollout.engine=vllm", *servers) == []
    assert problems(files, "rollout.engine=vllm", *servers, "rollout.servers.each_node=true") == [], "one node, or none"
    problem = only(problems(files, "rollout.engine=vllm", *servers, "rollout.servers.precision=fp8"))
    assert (problem.field, problem.fix) == ("rollout.servers.transport", "rollout.servers.transport=group")


@pytest.mark.parametrize(
    ("given", "field", "wrong", "fix"),
    [
        (["high=2"], "high", "without a level", "level=token, or"),
        (["low=0.5"], "low", "without a level", "low=null"),
        (["level=token", "low=2", "high=2"], "low", "between it and high=2.0", "low=null"),
        (["level=sequence", "out_of_bounds=mask", "high=0.9"], "out_of_bounds", "whose ratio is 1, are masked", "=2"),
        (["level=geometric", "out_of_bounds=mask", "low=1.5", "high=9"], "out_of_bounds", "masked", "=1.01"),
    ],
)
def test_bounds_of_a_correction(files: Path, given: list[str], field: str, wrong: str, fix: str) -> None:
    below = "stage2.actor.correction"
    problem = only(problems(files, *(f"{below}.{word}" for word in given)))
    assert problem.field == f"{below}.{field}"
    assert wrong in problem.wrong
    assert fix in problem.fix


TURNS = [
    "rollout.engine=vllm",
    f"rollout.servers.python={sys.executable}",
    "rollout.placement=colocated",
    "rollout.servers.transport=shared",
]


TWO = [*NODE, "cluster.nodes=2", "rollout.servers.each_node=true", "rollout.servers.host=hostname"]


@pytest.mark.parametrize(
    ("launched", "words", "field", "wrong", "fix"),
    [
        (4, [*NODE], None, "", ""),
        (4, ["rollout.servers.tensor=4", *NODE], None, "", ""),
        (4, ["rollout.servers.devices=[3]", *NODE], None, "", ""),
        (8, ["rollout.servers.replicas=8", *NODE], None, "", ""),  # a trainer process on each GPU
        (None, ["rollout.servers.tensor=8", *NODE], None, "", ""),
        (2, ["rollout.servers.replicas=9"], None, "", ""),  # nothing says how many GPUs there are
        (
            2,
            ["rollout.servers.tensor=4", *NODE],
            "rollout.servers.devices",
            "more than the 2 of the trainer",
            "tensor=2",
        ),
        (2, ["rollout.servers.devices=[2]", *NODE], "rollout.servers.devices", "no process", "devices=null"),
        (2, ["rollout.servers.transport=group"], "rollout.servers.transport", "two members", "transport=shared"),
        (2, ["rollout.engine=embedded"], "rollout.placement", "no servers that sleep", "placement=disaggregated"),
        (2, ["rollout.servers.each_node=true"], None, "", ""),
        (16, [*TWO, "parallel.tensor=2"], None, "", ""),
        (16, [*TWO, "parallel.tensor=2", "parallel.context=4"], None, "", ""),
        (
            16,
            [*TWO, "parallel.tensor=2", "parallel.pipeline=2"],
            "parallel.pipeline",
            "several nodes",
            "pipeline=1, or",
        ),
        (2, [*TWO, "parallel.tensor=2"], "parallel.tensor", "1 processes of the trainer", "parallel.tensor=1, or"),
        (
            2,
            [*TWO, "parallel.tensor=2", "parallel.sequence=true"],
            "parallel.tensor",
            "whole",
            "parallel.sequence=false",
        ),
        (
            16,
            [*TWO, "cluster.rollout_nodes=1", "rollout.servers.each_node=false"],
            "rollout.placement",
            "trainer's GPUs",
            "placement=disaggregated",
        ),
        (2, ["rollout.servers.precision=fp8"], "rollout.servers.transport", "FP8", "precision=bf16"),
    ],
)
def test_colocated_servers(
    files: Path, launched: int, words: list[str], field: str | None, wrong: str, fix: str
) -> None:
    found = check(configure([*good_overrides(files), *TURNS, *words]), world_size=launched)
    if field is None:
        assert found == []
        return
    problem = only(found)
    assert problem.field == field
    assert wrong in problem.wrong
    assert fix in problem.fix


def test_stale_tokens_need_a_correction_in_every_stage_that_trains_the_actor(files: Path) -> None:
    servers = ["rollout.engine=sglang", f"rollout.servers.python={sys.executable}", "rollout.max_staleness=1"]
    assert problems(files, *servers, *CORRECTED) == []
    found = problems(files, *servers)
    assert [problem.field for problem in found] == [f"stage{i}.actor.correction.level" for i in (1, 2)]
    assert "stage1.actor.correction.level=token and stage1.actor.correction.high=2" in found[0].fix
    for method in (TTRL, GUARD, SCRL, EMPO, GRPO):
        fields = [problem.field for problem in problems(files, *servers, *method, CORRECTED[0])]
        assert fields == ["stage2.actor.correction.level"]
    assert problems(files, *servers, CORRECTED[0], "stage2.iterations=0") == []


def test_refill_compares_responses_by_verdicts_or_classes(files: Path) -> None:
    for method in (GRPO, TTRL, GUARD, SCRL, EMPO):
        assert problems(files, *method, "stage2.refill_limit=4000") == []
        replayed = only(problems(files, *method, "stage2.refill_limit=4000", f"rollout.replay={files}"))
        assert (replayed.field, replayed.fix) == ("stage2.refill_limit", "stage2.refill_limit=null")
    assert problems(files, "stage1.refill_limit=4000") == [], "PPO, by verdicts"
    problem = only(problems(files, "stage2.refill_limit=4000"))
    assert problem.wrong == "method tempo does not compare the responses of a prompt"


def test_staleness_is_of_generated_responses(files: Path) -> None:
    assert problems(files, "rollout.max_staleness=4", *CORRECTED) == []
    servers = ["rollout.engine=sglang", f"rollout.servers.python={sys.executable}", "rollout.max_staleness=1"]
    servers += CORRECTED
    assert problems(files, *servers) == []
    assert only(problems(files, *servers, f"rollout.replay={files}")).field == "rollout.max_staleness"


def test_servers_that_never_pause_see_whole_stop_strings(files: Path) -> None:
    given = [*SERVERS, "rollout.partial_rollouts=true", "rollout.max_staleness=1", *CORRECTED]
    assert problems(files, *given, "rollout.stop=[x]") == []


@pytest.mark.parametrize("string", ["\n\n", "\t", "</answer>"])
def test_stop_strings_may_have_line_ends(files: Path, string: str) -> None:
    assert problems(files, f"rollout.stop=['{string}']", f"evaluation.stop=['{string}']") == []


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (["rollout.stale_groups=drop"], "rollout.stale_groups"),
        (["stage1.actor.correction.out_of_bounds=mask"], "stage1.actor.correction.out_of_bounds"),
        (["stage1.length_penalty=0.5"], "stage1.length_penalty"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(files: Path, given: list[str], field: str) -> None:
    assert only(problems(files, *given)).field == field


def test_one_response_cannot_disagree(files: Path) -> None:
    found = problems(files, "stage1.refill_limit=4000", "stage1.responses_per_prompt=1")
    assert [problem.wrong for problem in found if problem.field == "stage1.refill_limit"] == [
        "one response to a prompt always agrees with itself, so each prompt would be thrown away"
    ]


def test_the_largest_seed_has_all_its_digits(files: Path) -> None:
    problem = only(problems(files, "rollout.seed=" + "9" * 30))
    assert problem.fix == "for example rollout.seed=9223372036854775807"
    assert problems(files, "rollout.seed=9223372036854775807") == []


def test_partial_rollouts_are_stale(files: Path) -> None:
    problem = only(problems(files, "rollout.partial_rollouts=true"))
    assert (problem.field, problem.fix) == (
        "rollout.partial_rollouts",
        "rollout.max_staleness=1 or more, or rollout.partial_rollouts=false",
    )
    assert problems(files, "rollout.partial_rollouts=true", "rollout.max_staleness=1", *CORRECTED) == []


JUDGED, JUDGE = "evaluation.sets.heldout.verifier=judge", ("rewards.judge.url=http://h:1/v1", "rewards.judge.model=m")


@pytest.mark.parametrize(
    ("words", "wait"),
    [
        (["rollout.servers.update_seconds=600"], "rollout.servers.update_seconds=600"),
        (["rollout.servers.hang_seconds=700"], "rollout.servers.hang_seconds=700"),
        ([JUDGED, *JUDGE, "rewards.judge.timeout_seconds=600"], "rewards.judge.timeout_seconds=600"),
        (["rewards.math.seconds=600"], "rewards.math.seconds=600"),
    ],
)
def test_a_wait_with_a_limit_of_its_own_is_no_hang(files: Path, words: list[str], wait: str) -> None:
    servers = ["rollout.engine=vllm", f"rollout.servers.python={sys.executable}"]
    problem = only(problems(files, *servers, *words, "run.hang_minutes=10"))
    assert problem.field == "run.hang_minutes"
    assert f"a wait of {wait} would count as a hang" in problem.wrong
    assert problems(files, *servers, *words, "run.hang_minutes=12") == []
    assert problems(files, *servers, *words, "run.hang_minutes=null") == []
    if wait.startswith("rollout"):
        assert problems(files, *words, "run.hang_minutes=10") == [], "there are no servers"


def test_a_judge_that_is_there_is_no_problem(files: Path) -> None:
    (files / "key").write_text("k")
    assert problems(files, JUDGED, "data.labelled.verifier=judge", *JUDGE, f"rewards.judge.key_file={files}/key") == []


JUDGES = [
    ((JUDGED,), ["rewards.judge.url", "rewards.judge.model"], "evaluation.sets.heldout.verifier=judge asks"),
    (("data.labelled.verifier=judge", JUDGE[0]), ["rewards.judge.model"], "data.labelled.verifier=judge asks"),
    (JUDGE[1:], ["rewards.judge.url"], "is required: url and model"),
    (("rewards.judge.url=h:1", JUDGE[1]), ["rewards.judge.url"], "is no address"),
    (("rewards.judge.url=http://h:1/v1/chat/completions", JUDGE[1]), ["rewards.judge.url"], "is added to it"),
    ((*JUDGE, "rewards.judge.key_file=TMP/none"), ["rewards.judge.key_file"], "does not exist"),
    ((*JUDGE, "rewards.judge.key_file=TMP/empty"), ["rewards.judge.key_file"], "is empty"),
    (
        (*JUDGE, "data.unlabelled.verifier=judge", "stage2.method=ttrl", "stage2.labelled_prompts=0"),
        ["data.unlabelled.verifier"],
        "not responses with one another",
    ),
]


@pytest.mark.parametrize(("overrides", "fields", "wrong"), JUDGES, ids=[row[2] for row in JUDGES])
def test_rules_on_the_judge(files: Path, overrides: tuple[str, ...], fields: list[str], wrong: str) -> None:
    (files / "empty").write_text("\n")
    report = problems(files, *overrides)
    assert [problem.field for problem in report] == fields, "\n".join(map(str, report))
    assert wrong in report[0].wrong


def test_an_eval_needs_no_judge_for_training_sets(files: Path) -> None:
    assert problems(files, "data.labelled.verifier=judge", purpose=Purpose.eval) == []
