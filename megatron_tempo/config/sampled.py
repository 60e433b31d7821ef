"""What several fields together say about sampling."""

from __future__ import annotations

from megatron_tempo.config.schema import Config, EvaluationConfig, RolloutConfig


def truncates(settings: RolloutConfig | EvaluationConfig) -> bool:
    """Whether top-p, top-k or min-p restricts the tokens that are sampled."""
    return settings.top_p < 1 or settings.top_k is not None or settings.min_p > 0


def evaluation_stop(config: Config) -> list[str]:
    """The stop strings of evaluations."""
    return config.rollout.stop if config.evaluation.stop is None else config.evaluation.stop


def stop_strings(config: Config) -> list[str]:
    """All strings that end a response, in training or in an evaluation."""
    return list(dict.fromkeys([*config.rollout.stop, *evaluation_stop(config)]))


def rollout_seed(config: Config) -> int:
    """The seed of training responses."""
    return config.run.seed if config.rollout.seed is None else config.rollout.seed


def evaluation_seed(config: Config) -> int:
    """The seed of evaluations' responses."""
    return config.run.seed if config.evaluation.seed is None else config.evaluation.seed
