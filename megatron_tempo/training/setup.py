"""Builds a run's parts from its configuration: models, engine, verifiers, evaluator, weights for the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.choices import EngineKind, EnginePrecision, Precision
from megatron_tempo.config.schema import Config
from megatron_tempo.evaluation.evaluator import Evaluator
from megatron_tempo.kernels import kernels_for
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.families import DTYPES, read_shape, transformer_config
from megatron_tempo.models.gpt import LanguageModel, PackedGPT, ValueModel
from megatron_tempo.models.machine import chosen_layers
from megatron_tempo.models.nonfinite_guard import NonFiniteGuard
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.trained import Model, TrainedModel
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.build import dialect_of, engine_precision
from megatron_tempo.rollout.embedded import EmbeddedEngine
from megatron_tempo.rollout.engine import Engine
from megatron_tempo.training.context import Workplace, collective_timeout
from megatron_tempo.types import LabelledPrompt, Weights
from megatron_tempo.weights import folder
from megatron_tempo.weights.export import slots_of, weights_of
from megatron_tempo.weights.precision import Quantised


def build_actor(place: Workplace) -> Actor:
    """The actor with the weights of `model.path`, to be trained. Collective."""
    return Actor(_trained(place, _language_model(place), place.layouts.actor), _guard(place, "actor"))


def build_reference(place: Workplace) -> Actor:
    """The policy that the KL term holds to: `model.path` as it is. Collective."""
    config, net = place.config, _language_model(place)
    tokens = config.parallel.micro_batch_tokens
    return Actor(Model.frozen(net, place.layouts.actor, place.device, tokens, place.residence))


def build_critic(place: Workplace) -> Critic:
    """The critic with the weights of `model.critic_path`, or the actor's decoder and a zero head. Collective."""
    path = Path(place.config.model.critic_path or place.config.model.path)
    layout = place.layouts.critic
    with layout.groups.current():
        return Critic(_trained(place, _network(place, ValueModel, path, layout), layout), _guard(place, "critic"))


def build_engine(place: Workplace, tell: Callable[[str], None]) -> Engine:
    """The engine of `rollout.engine`, without weights yet. `tell` hears of servers that fail. Collective."""
    config = place.config
    kind, model = config.rollout.engine, Path(config.model.path)
    if kind is EngineKind.embedded:
        return EmbeddedEngine(model, place.device, DTYPES[config.run.precision], config.rollout.batch_rows)
    from megatron_tempo.rollout.servers import ServersEngine  # an HTTP client, for these engines only

    servers, dialect = config.rollout.servers, dialect_of(config, cpu=place.device.type == "cpu")
    work, vocab = Path(config.run.dir) / "engine", read_shape(model).vocab
    precision, timeout = engine_precision(config), collective_timeout(config)
    return ServersEngine(dialect, servers, model, work, precision, place.device, vocab, timeout, tell)


def build_verifiers(config: Config) -> Verifiers:
    """All verifiers, with the judge of `rewards.judge` where the config has one."""
    judge = config.rewards.judge
    if judge.url is None or judge.model is None:
        return Verifiers()
    from megatron_tempo.rewards.judge import JudgeScorer  # an HTTP client: for this one only

    return Verifiers(judge=JudgeScorer(judge, Path(judge.cache or f"{config.run.dir}/judge")))


def build_evaluator(
    config: Config,
    engine: Engine,
    verifiers: Verifiers,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, list[LabelledPrompt]],
    critic: Critic | None,
) -> Evaluator:
    """The evaluator of these sets."""
    values = None if critic is None else critic.values
    length = config.rollout.max_response_tokens
    return Evaluator(engine, verifiers, tokenizer, sets, config.evaluation, length, config.run.seed, values)


def engine_weights(actor: Actor, place: Workplace) -> Weights:
    """The actor's weights in the engine's precision."""
    return _in_engine_precision(place, partial(weights_of, actor.model, place.config))


def folder_weights(place: Workplace) -> Weights:
    """The weights of `model.path` as they are in the folder, in the engine's precision."""
    return _in_engine_precision(
        place, partial(folder.FolderWeights, Path(place.config.model.path), place.layouts.actor)
    )


def _in_engine_precision(place: Workplace, weights: Callable[..., Weights]) -> Weights:
    precision = engine_precision(place.config)
    if precision is EnginePrecision.fp8:
        return Quantised(weights(dtype=torch.bfloat16))
    return weights(dtype=DTYPES[Precision[precision.name]])


def _language_model(place: Workplace) -> PackedGPT:
    """The actor's network, with the weights of `model.path`."""
    config = place.config
    kind = partial(LanguageModel, logits=config.model.logits, temperature=config.rollout.temperature)
    return _network(place, kind, Path(config.model.path), place.layouts.actor)


def _network(place: Workplace, kind: Callable[..., PackedGPT], path: Path, layout: Layout) -> PackedGPT:
    place.residence.clear()
    shape = read_shape(path)
    given = place.config
    config = transformer_config(
        shape,
        layout,
        given.run.precision,
        given.parallel.recompute,
        chosen_layers(given, place.machine),
        given.model.bf16_ends,
    )
    net = kind(config, shape, layout, kernels_for(place.device))
    folder.load(net, layout, slots_of(net, layout), path)
    return net


def _trained(place: Workplace, net: PackedGPT, layout: Layout) -> TrainedModel:
    return TrainedModel.wrap(net, layout, place.device, place.config.parallel.micro_batch_tokens, place.residence)


def _guard(place: Workplace, model: str) -> NonFiniteGuard:
    return NonFiniteGuard(model, Path(place.config.run.dir) / "skipped", place.config.run.max_skipped, place.is_writer)
