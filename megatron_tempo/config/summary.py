"""A summary of a configuration in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tempo.config.rules.layout import laid_of
from megatron_tempo.config.schema import Config, ParallelConfig
from megatron_tempo.config.stages import StageConfig


def summary(config: Config) -> str:
    """Model, layout, stages and evaluation. The configuration has passed the check."""
    return "\n".join(f"  {name:<11} {text}" for name, text in _lines(config))


def _lines(config: Config) -> Iterator[tuple[str, str]]:
    yield "model", config.model.path
    yield "layout", _layout(config, "actor")
    if config.parallel.of_critic() != config.parallel:
        yield "critic", _layout(config, "critic")
    for name, stage in config.stages().items():
        if stage.iterations > 0:
            yield name, _stage(config, stage)
    evaluation = config.evaluation
    passes = "".join(f", pass@{k}" for k in evaluation.pass_k)
    yield "evaluation", f"avg@{evaluation.samples}{passes} on {', '.join(evaluation.sets) or 'nothing'}"
    yield "writes to", config.run.dir


def _layout(config: Config, role: str) -> str:
    laid = laid_of(config, role)
    return layout_words(laid.parallel, laid.replicas(None))


def layout_words(own: ParallelConfig, replicas: int | None) -> str:
    """A layout as text. `replicas` of the model: None if the number of processes is unknown."""
    data = f"data {replicas}" if replicas else "data by the number of processes"
    sequence = ", sequence parallel" if own.sequence else ""
    context = f"context {own.context} x " if own.context > 1 else ""
    ends = {"first": own.num_layers_in_first_pipeline_stage, "last": own.num_layers_in_last_pipeline_stage}
    details = [f"{count} layers {end}" for end, count in ends.items() if count is not None]
    details += [f"virtual {own.virtual_pipeline}"] if own.virtual_pipeline > 1 else []
    pipeline = f"pipeline {own.pipeline}" + (f" ({', '.join(details)})" if details else "")
    experts = f", expert {own.expert} x expert tensor {own.expert_cut}"
    shared = experts if own.expert > 1 or own.expert_cut != own.tensor else ""
    return f"tensor {own.tensor} x {pipeline} x {context}{data}{sequence}{shared}"


def _stage(config: Config, stage: StageConfig) -> str:
    kinds = sorted(stage.prompts(), key=lambda kind: kind.name)
    prompts = " + ".join(f"{stage.count({kind})} {kind.name}" for kind in kinds)
    row = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    tokens = stage.count(stage.prompts()) * stage.samples * row
    return (
        f"{stage.method.name}, {stage.iterations} iterations of {prompts} prompts"
        f" x {stage.samples} responses, at most {tokens:,} tokens each"
    )
