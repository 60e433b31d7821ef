"""Rules on single numbers: each has a minimum and a maximum.

The maximum is far above what a run can use. Without it, a mistyped number could cost hours or gigabytes before it is
rejected (a list as long as the number, a time that no clock has).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tempo.config import cluster, correction, method_settings, schema, stages, updates
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.tree import walk


@dataclass(frozen=True, slots=True)
class Bound:
    """A range of numbers.

    >>> Bound("above 0 and below 1", "3e-4", 0, 1, low_open=True, high_open=True).holds(0)
    False
    """

    words: str
    example: str
    low: float
    high: float
    low_open: bool = False
    high_open: bool = False
    states_high: bool = False  # `words` names the maximum too

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def wrong(self, value: float) -> str:
        """What is wrong with an invalid value."""
        too_large = not self.states_high and value > self.high
        return f"must be {self.words}" + (f", and at most {self._high(',')}" if too_large else "")

    def fix(self, value: float) -> str:
        """A valid value, as it is written in an override."""
        return self._high("") if not self.states_high and self.high < value < math.inf else self.example

    def _high(self, separator: str) -> str:
        """The maximum. A whole number keeps all its digits, as an override needs them."""
        return format(self.high, f"{separator}d" if isinstance(self.high, int) else f"{separator}.16g")


def _from(low: int, high: float) -> Bound:
    """At least `low` and at most `high`."""
    return Bound(f"{low} or more", f"{low}", low, high)


def _above(low: float, high: float, example: str = "1") -> Bound:
    """More than `low` and at most `high`."""
    return Bound(f"above {low:g}", example, low, high, low_open=True)


# Counts of things, of tokens, of GPUs in a node; seeds; seconds of a year; rates and sizes of hardware; factors.
COUNT, TOKENS, NODES, DEVICES, THREADS = 1_000_000, 100_000_000, 100_000, 256, 4096
YEAR = 31_536_000
SEED, HARDWARE, FACTOR = 2**63 - 1, 1e6, 1e6

_SHARE = Bound("above 0 and at most 1", "0.5", 0, 1, low_open=True, states_high=True)
_PART = Bound("at least 0 and at most 1", "0.5", 0, 1, states_high=True)
_DECAY = Bound("at least 0 and below 1", "0.9", 0, 1, high_open=True, states_high=True)
_SECONDS = _above(0, YEAR)
_ONE_TO_COUNT, _UP_TO_COUNT = _from(1, COUNT), _from(0, COUNT)
_ONE_TO_TOKENS = _from(1, TOKENS)
_RANKS = _from(1, NODES * DEVICES)
_RATE = _from(0, HARDWARE)
_SAMPLING = {
    "temperature": Bound("0 (greedy) or more", "1", 0, 1000),
    "top_p": Bound("above 0 and at most 1", "0.95", 0, 1, low_open=True, states_high=True),
    "top_k": _ONE_TO_TOKENS,
    "min_p": Bound("at least 0 and below 1", "0.05", 0, 1, high_open=True, states_high=True),
    "seed": _from(0, SEED),
}

_WITH_CRITIC = {"gae_lambda": _PART, "pass_at_k": _ONE_TO_COUNT}

_BOUNDS: dict[type, dict[str, Bound]] = {
    schema.RunConfig: {
        "seed": _from(0, SEED),
        "max_consecutive_nonfinite_steps": _ONE_TO_COUNT,
        "hang_minutes": _above(0, 2 * YEAR / 60),  # longer than any wait
    },
    schema.ModelConfig: {
        "num_bf16_layers_at_ends": _UP_TO_COUNT,
        "router_aux_loss_coef": _from(0, 1000),
    },
    schema.ParallelConfig: {
        "tensor": _RANKS,
        "pipeline": _RANKS,
        "num_layers_in_first_pipeline_stage": _ONE_TO_COUNT,
        "num_layers_in_last_pipeline_stage": _ONE_TO_COUNT,
        "virtual_pipeline": _ONE_TO_COUNT,
        "context": _RANKS,
        "expert": _RANKS,
        "expert_tensor": _RANKS,
        "world_size": _RANKS,
        "micro_batch_tokens": _ONE_TO_TOKENS,
        "bucket_mb": _ONE_TO_COUNT,
        "ddp_bucket_size": _ONE_TO_COUNT,
    },
    schema.CriticLayoutConfig: {
        "tensor": _RANKS,
        "pipeline": _RANKS,
        "num_layers_in_first_pipeline_stage": _ONE_TO_COUNT,
        "num_layers_in_last_pipeline_stage": _ONE_TO_COUNT,
        "virtual_pipeline": _ONE_TO_COUNT,
        "context": _RANKS,
        "expert": _RANKS,
        "expert_tensor": _RANKS,
    },
    schema.DatasetConfig: {"limit": _from(1, 10_000_000_000)},
    schema.RolloutConfig: {
        "max_prompt_tokens": _ONE_TO_TOKENS,
        "max_response_tokens": _ONE_TO_TOKENS,
        **_SAMPLING,
        "batch_rows": _ONE_TO_COUNT,
        "parity_tolerance": _above(0, 1000, "1e-6"),
        "parity_every": _UP_TO_COUNT,
        "max_staleness": _from(0, 1000),
    },
    schema.MathConfig: {"workers": _from(1, 1024), "seconds": _above(0, 3600, "5")},
    schema.CodeConfig: {
        "workers": _from(1, 1024),
        "seconds": _above(0, 3600, "6"),
        "wall_seconds": _above(0, 36000, "60"),
        "memory_mb": _from(128, 2**20),
    },
    schema.ServersConfig: {
        "replicas": _from(1, THREADS),
        "devices": _from(0, DEVICES - 1),
        "tensor": _from(1, DEVICES),
        "concurrency": _from(1, THREADS),
        "checksums_every": _UP_TO_COUNT,
        "restarts": _UP_TO_COUNT,
        "start_seconds": _SECONDS,
        "update_seconds": _SECONDS,
        "answer_seconds": _SECONDS,
        "hang_seconds": _SECONDS,
    },
    schema.JudgeConfig: {
        "concurrency": _from(1, THREADS),
        "retries": _from(0, 1000),
        "timeout_seconds": _SECONDS,
        "max_tokens": _ONE_TO_TOKENS,
    },
    updates.OptimizerConfig: {
        "lr": _above(0, 1000, "1e-6"),
        "warmup_steps": _UP_TO_COUNT,
        "weight_decay": _from(0, 1000),
        "beta1": _DECAY,
        "beta2": _DECAY,
        "eps": _above(0, 1, "1e-6"),
        "clip_grad": _above(0, 1e12),
    },
    updates.ActorUpdateConfig: {
        "mini_batch_prompts": _ONE_TO_COUNT,
        "epochs": _from(1, 1000),
        "clip_low": Bound("above 0 and below 1", "3e-4", 0, 1, low_open=True, high_open=True, states_high=True),
        "clip_high": _above(0, FACTOR, "5e-4"),
        "dual_clip": _above(1, FACTOR, "3"),
        "entropy_coef": _from(0, FACTOR),
        "entropy_target": _above(0, FACTOR),
        "kl_coef": _from(0, FACTOR),
    },
    correction.CorrectionConfig: {"low": _above(0, FACTOR, "0.5"), "high": _above(0, FACTOR, "2")},
    updates.CriticUpdateConfig: {
        "mini_batch_prompts": _ONE_TO_COUNT,
        "epochs": _from(1, 1000),
        "warmup_iterations": _UP_TO_COUNT,
        "clip": _above(0, 1e12),
    },
    stages.StageConfig: {
        "iterations": _UP_TO_COUNT,
        "labelled_prompts": _UP_TO_COUNT,
        "unlabelled_prompts": _UP_TO_COUNT,
        "responses_per_prompt": _ONE_TO_COUNT,
        "refill_limit": _ONE_TO_COUNT,
        "length_penalty_tokens": _ONE_TO_TOKENS,
        "length_penalty": _above(0, FACTOR),
    },
    method_settings.PpoSettings: _WITH_CRITIC,
    method_settings.TempoSettings: {
        **_WITH_CRITIC,
        "estep_every": _UP_TO_COUNT,
        "estep_when_ece_above": _DECAY,
        "pessimism": _from(0, FACTOR),
    },
    method_settings.TtrlSettings: {"vote_responses": _ONE_TO_COUNT},
    method_settings.GuardSettings: {
        "vote_responses": _ONE_TO_COUNT,
        "flip_window": _from(1, 1000),
        "flip_threshold": _SHARE,
        "agreement_threshold": _PART,
        "flip_penalty": _PART,
        "confident_penalty": _PART,
        "least_weight": _PART,
        "minority_weight": _PART,
        "minority_share": _SHARE,
        "calm_visits": _from(1, 1000),
        "risk_threshold": _PART,
        "skip_probability": _PART,
        "skipped_share": _PART,
    },
    method_settings.ScrlSettings: {
        "vote_responses": _ONE_TO_COUNT,
        "positive_share": _SHARE,
        "positive_margin": _DECAY,
        "negative_share": _PART,
        "entropy_penalty": _from(0, FACTOR),
    },
    method_settings.EmpoSettings: {"entropy_low": _from(0, FACTOR), "entropy_high": _above(0, FACTOR)},
    schema.EvaluationConfig: {
        "every": _UP_TO_COUNT,
        "samples": _ONE_TO_COUNT,
        **_SAMPLING,
        "max_response_tokens": _ONE_TO_TOKENS,
    },
    schema.CheckpointConfig: {"every": _UP_TO_COUNT, "keep": _ONE_TO_COUNT},
    cluster.ClusterConfig: {
        "nodes": _from(1, NODES),
        "rollout_nodes": _from(0, NODES),
        "gpus_per_node": _from(1, DEVICES),
        "memory_gb": _RATE,
        "reserve_gb": _RATE,
        "asleep_gb": _RATE,
        "bf16_tflops": _RATE,
        "memory_tbs": _RATE,
        "nvlink_gbs": _RATE,
        "network_gbs": _RATE,
        "host_gbs": _above(0, HARDWARE),
        "compute_share": _SHARE,
        "memory_share": _SHARE,
        "link_share": _SHARE,
    },
    cluster.SlurmConfig: {"grace_seconds": _from(1, YEAR), "cpus_per_task": _from(1, COUNT)},
}


# Lists with rules elsewhere: evaluation.pass_k by evaluation.samples, profile.steps by the iterations.
ELSEWHERE = {(schema.EvaluationConfig, "pass_k"), (schema.ProfileConfig, "steps")}


def bound_of(group: type, name: str) -> Bound | None:
    """The bound of a field, by the class of its group. None for fields that are not numbers, and for `ELSEWHERE`."""
    return _BOUNDS.get(group, {}).get(name)


def check(config: schema.Config) -> Iterator[Problem]:
    for field, value, bound, number in _refused(config):
        example = f"[{bound.fix(number)}]" if isinstance(value, list) else bound.fix(number)
        yield Problem(field, value, bound.wrong(number), f"for example {field}={example}")


def are_usable(config: schema.Config) -> bool:
    """Whether no number is above its bound, so that rules that count up to one, or convert it, can run."""
    return not any(number > bound.high for _, _, bound, number in _refused(config))


def _refused(config: schema.Config) -> Iterator[tuple[str, object, Bound, float]]:
    """(field, value, bound, number) of every field with a number outside its bound."""
    for path, node in walk(config):
        for name, bound in _BOUNDS.get(type(node), {}).items():
            value = getattr(node, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not bound.holds(number):
                    yield f"{path}.{name}", value, bound, number
                    break
