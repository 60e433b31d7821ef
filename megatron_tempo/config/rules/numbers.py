"""Rules on single numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_tempo.config import schema, stages
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.tree import walk


@dataclass(frozen=True, slots=True)
class _Bound:
    words: str
    example: str
    holds: Callable[[float], bool]


_ONE_OR_MORE = _Bound("1 or more", "1", lambda x: x >= 1)
_ZERO_OR_MORE = _Bound("0 or more", "0", lambda x: x >= 0)
_ZERO_OR_ONE = _Bound("0 or 1", "1", lambda x: x in (0, 1))
_ABOVE_ZERO = _Bound("above 0", "1", lambda x: x > 0)
_SMALL = _Bound("above 0", "1e-6", lambda x: x > 0)
_DECAY = _Bound("at least 0 and below 1", "0.9", lambda x: 0 <= x < 1)
_CLIP_LOW = _Bound("above 0 and below 1", "3e-4", lambda x: 0 < x < 1)
_CLIP_HIGH = _Bound("above 0", "5e-4", lambda x: x > 0)
_SHARE = _Bound("above 0 and at most 1", "0.5", lambda x: 0 < x <= 1)
_DUAL_CLIP = _Bound("above 1", "3", lambda x: x > 1)
_PROCESSES = _Bound("1 to 1024", "2", lambda x: 1 <= x <= 1024)
_ANSWER_SECONDS = _Bound("above 0 and at most 3600", "5", lambda x: 0 < x <= 3600)

_BOUNDS: dict[type, dict[str, _Bound]] = {
    schema.RunConfig: {
        "seed": _ZERO_OR_MORE,
        "max_consecutive_nonfinite_steps": _ONE_OR_MORE,
        "hang_minutes": _ABOVE_ZERO,
    },
    schema.ModelConfig: {"num_bf16_layers_at_ends": _ZERO_OR_MORE},
    schema.ParallelConfig: {
        "tensor": _ONE_OR_MORE,
        "pipeline": _ONE_OR_MORE,
        "context": _ONE_OR_MORE,
        "world_size": _ONE_OR_MORE,
        "micro_batch_tokens": _ONE_OR_MORE,
        "bucket_mb": _ONE_OR_MORE,
    },
    schema.CriticLayoutConfig: {"tensor": _ONE_OR_MORE, "pipeline": _ONE_OR_MORE, "context": _ONE_OR_MORE},
    schema.DatasetConfig: {"limit": _ONE_OR_MORE},
    schema.RolloutConfig: {
        "max_prompt_tokens": _ONE_OR_MORE,
        "max_response_tokens": _ONE_OR_MORE,
        "temperature": _ABOVE_ZERO,
        "batch_rows": _ONE_OR_MORE,
        "parity_tolerance": _SMALL,
        "max_staleness": _ZERO_OR_ONE,
    },
    schema.MathConfig: {"workers": _PROCESSES, "seconds": _ANSWER_SECONDS},
    schema.ServersConfig: {
        "replicas": _ONE_OR_MORE,
        "tensor": _ONE_OR_MORE,
        "concurrency": _ONE_OR_MORE,
        "checksums_every": _ZERO_OR_MORE,
        "restarts": _ZERO_OR_MORE,
        "start_seconds": _ABOVE_ZERO,
        "update_seconds": _ABOVE_ZERO,
        "answer_seconds": _ABOVE_ZERO,
        "hang_seconds": _ABOVE_ZERO,
    },
    schema.JudgeConfig: {
        "concurrency": _ONE_OR_MORE,
        "retries": _ZERO_OR_MORE,
        "timeout_seconds": _ABOVE_ZERO,
        "max_tokens": _ONE_OR_MORE,
    },
    stages.OptimizerConfig: {
        "lr": _SMALL,
        "warmup_steps": _ZERO_OR_MORE,
        "weight_decay": _ZERO_OR_MORE,
        "beta1": _DECAY,
        "beta2": _DECAY,
        "eps": _SMALL,
        "clip_grad": _ABOVE_ZERO,
    },
    stages.ActorUpdateConfig: {
        "mini_batch_prompts": _ONE_OR_MORE,
        "epochs": _ONE_OR_MORE,
        "clip_low": _CLIP_LOW,
        "clip_high": _CLIP_HIGH,
        "dual_clip": _DUAL_CLIP,
        "importance_cap": _ABOVE_ZERO,
        "entropy_coef": _ZERO_OR_MORE,
        "kl_coef": _ZERO_OR_MORE,
    },
    stages.CriticUpdateConfig: {
        "mini_batch_prompts": _ONE_OR_MORE,
        "epochs": _ONE_OR_MORE,
        "warmup_iterations": _ZERO_OR_MORE,
        "clip": _ABOVE_ZERO,
    },
    stages.StageConfig: {
        "iterations": _ZERO_OR_MORE,
        "labelled_prompts": _ZERO_OR_MORE,
        "unlabelled_prompts": _ZERO_OR_MORE,
        "responses_per_prompt": _ONE_OR_MORE,
        "estep_every": _ZERO_OR_MORE,
        "vote_responses": _ONE_OR_MORE,
        "entropy_low": _ZERO_OR_MORE,
        "entropy_high": _ABOVE_ZERO,
    },
    schema.EvaluationConfig: {
        "every": _ZERO_OR_MORE,
        "samples": _ONE_OR_MORE,
        "temperature": _ABOVE_ZERO,
        "max_response_tokens": _ONE_OR_MORE,
    },
    schema.CheckpointConfig: {"every": _ZERO_OR_MORE, "keep": _ONE_OR_MORE},
    schema.ClusterConfig: {
        "nodes": _ONE_OR_MORE,
        "rollout_nodes": _ZERO_OR_MORE,
        "gpus_per_node": _ONE_OR_MORE,
        "memory_gb": _ZERO_OR_MORE,
        "reserve_gb": _ZERO_OR_MORE,
        "bf16_tflops": _ZERO_OR_MORE,
        "memory_tbs": _ZERO_OR_MORE,
        "nvlink_gbs": _ZERO_OR_MORE,
        "network_gbs": _ZERO_OR_MORE,
        "host_gbs": _ABOVE_ZERO,
        "compute_share": _SHARE,
        "memory_share": _SHARE,
        "link_share": _SHARE,
    },
    schema.SlurmConfig: {"grace_seconds": _ONE_OR_MORE, "cpus_per_task": _ONE_OR_MORE},
}


def check(config: schema.Config) -> Iterator[Problem]:
    for path, node in walk(config):
        for name, bound in _BOUNDS.get(type(node), {}).items():
            value = getattr(node, name)
            if value is not None and not (math.isfinite(value) and bound.holds(value)):
                field = f"{path}.{name}"
                yield Problem(field, value, f"must be {bound.words}", f"for example {field}={bound.example}")
