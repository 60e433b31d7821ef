"""Builds a run's parts from its configuration: models, engine, verifiers, evaluator, weights for the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.choices import EngineKind, EnginePrecision, OnDrift, Precision, RouterReplay
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.routing import recorded_routing
from megatron_tempo.config.rules.extensions import imported_verifiers
from megatron_tempo.config.rules.rewards import runs_programs
from megatron_tempo.config.sampled import evaluation_seed, evaluation_stop, stop_strings
from megatron_tempo.config.schema import Config
from megatron_tempo.data.tokenizer import end_tokens
from megatron_tempo.evaluation.evaluator import Evaluator
from megatron_tempo.kernels import kernels_for
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.chunks import ModelChunks
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.families import DTYPES, transformer_config
from megatron_tempo.models.gpt import LanguageModel, PackedGPT, ValueModel
from megatron_tempo.models.machine import chosen_fusions, chosen_layers
from megatron_tempo.models.nonfinite_guard import NonFiniteGuard
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.router_replay import ReplayedRouters
from megatron_tempo.models.trained import Model, TrainedModel
from megatron_tempo.observability.logs import PACKAGE
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.build import engine_precision, server_adapter_of
from megatron_tempo.rollout.embedded import EmbeddedEngine
from megatron_tempo.rollout.engine import Engine, EngineSetup, Sampling
from megatron_tempo.rollout.imported import ImportedEngine
from megatron_tempo.training.context import RunContext, collective_timeout
from megatron_tempo.training.row_owners import RowOwners
from megatron_tempo.types import LabelledPrompt, Weights
from megatron_tempo.weights import folder
from megatron_tempo.weights.export import mappings_of, weights_of
from megatron_tempo.weights.precision import BLOCK, Quantised


def build_actor(context: RunContext) -> Actor:
    """The trainable actor with the weights of `model.path`. Collective."""
    model = _trained(context, _language_model(context, Path(context.config.model.path)), context.layouts.actor)
    if recorded_routing(context.config) is not None:
        model.replay = ReplayedRouters(model.net, replays=context.config.model.router_replay is RouterReplay.on)
    return Actor(model, _guard(context, "actor"))


def build_reference(context: RunContext, folder: Path) -> Actor:
    """The reference policy of the KL term, with the weights of `folder`. Collective."""
    config, net = context.config, _language_model(context, folder)
    tokens = config.parallel.micro_batch_tokens
    return Actor(Model.frozen(net, context.layouts.actor, context.device, tokens, context.offloader))


def build_critic(context: RunContext) -> Critic:
    """The critic with the weights of `model.critic_path`, or the actor's decoder and a zero head. Collective."""
    path = Path(context.config.model.critic_path or context.config.model.path)
    layout = context.layouts.critic
    model = _trained(context, _network(context, ValueModel, path, layout), layout)
    return Critic(model, _guard(context, "critic"), context.layouts.actor)


def build_engine(context: RunContext, *, trains: bool = True) -> Engine:
    """The engine of `rollout.engine`, without weights yet. `trains`: its rollouts are trained on. Collective."""
    config = context.config
    kind, model = config.rollout.engine, Path(config.model.path)
    routing = recorded_routing(config) if trains else None
    if kind is EngineKind.embedded:
        return EmbeddedEngine(model, context.device, DTYPES[config.run.precision], config.rollout.batch_rows, routing)
    if isinstance(kind, Extension):
        work, dtype = Path(config.run.dir) / "engine", DTYPES[config.run.precision.numbers]
        log = logging.getLogger(f"{PACKAGE}.{kind.module}")
        setup = EngineSetup(model, context.device, dtype, work, config.rollout, log)
        return ImportedEngine(kind, setup, read_model_shape(model).vocab, routing)
    from megatron_tempo.rollout.servers import ServersEngine  # an HTTP client, for these engines only

    adapter = server_adapter_of(config, cpu=context.device.type == "cpu", trains=trains)
    servers = config.rollout.servers
    work, vocab = Path(config.run.dir) / "engine", read_model_shape(model).vocab
    precision, timeout = engine_precision(config), collective_timeout(config)
    gpus = context.offloader if config.rollout.is_colocated else None
    given = (adapter, servers, model, work, precision, context.device, vocab, timeout, gpus)
    copy = context.layouts.actor.copy
    return ServersEngine(*given, copy=copy, resyncs=config.rollout.on_drift is OnDrift.resync)


def build_verifiers(config: Config) -> Verifiers:
    """All verifiers, the user's own included, with the judge of `rewards.judge` if the config has one."""
    judge, math = config.rewards.judge, config.rewards.math
    build = partial(
        Verifiers,
        math.workers,
        math.seconds,
        imported=imported_verifiers(config),
        code=config.rewards.code,
        threads=max(math.workers, config.rewards.code.workers if runs_programs(config) else 0) + 1,
        read_unfinished_thoughts=config.rewards.read_unfinished_thoughts,
        end_tokens=frozenset(end_tokens(Path(config.model.path))) if stop_strings(config) else None,
    )
    if judge.url is None or judge.model is None:
        return build()
    from megatron_tempo.rewards.judge import JudgeScorer  # an HTTP client: for this one only

    scorer = JudgeScorer(judge, Path(judge.cache or f"{config.run.dir}/judge"))
    return build(judge=scorer)


def build_evaluator(
    config: Config,
    engine: Engine,
    verifiers: Verifiers,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, list[LabelledPrompt]],
    keys: dict[str, dict[str, str]],
    critic: Critic | None,
    *,
    keeps_all: bool = False,
) -> Evaluator:
    """The evaluator of these sets. `keys`: the keys of each set's questions, by id. `keeps_all`: see `Evaluator`."""
    values = None if critic is None else critic.values_at
    length, seed, rows = config.rollout.max_response_tokens, evaluation_seed(config), RowOwners(None, critic)
    of_config = (replace(config.evaluation, stop=evaluation_stop(config)), length, seed)
    return Evaluator(engine, verifiers, tokenizer, sets, keys, *of_config, values, rows, keeps_all)


def engine_weights(actor: Actor, context: RunContext) -> Weights:
    """The actor's weights in the engine's precision."""
    return _in_engine_precision(context, partial(weights_of, actor.model, context.config))


def folder_weights(context: RunContext) -> Weights:
    """The unchanged weights of `model.path`, in the engine's precision."""
    path, bucket_bytes = Path(context.config.model.path), context.config.parallel.bucket_mb << 20
    return _in_engine_precision(
        context, partial(folder.FolderWeights, path, context.layouts.actor, bucket_bytes, context.device)
    )


def _in_engine_precision(context: RunContext, weights: Callable[..., Weights]) -> Weights:
    precision = engine_precision(context.config)
    if precision is EnginePrecision.fp8:
        return Quantised(weights(dtype=torch.bfloat16, multiple=BLOCK))
    return weights(dtype=DTYPES[Precision[precision.name]])


def _language_model(context: RunContext, folder: Path) -> PackedGPT | ModelChunks:
    """The actor's network, with the weights of `folder`."""
    config = context.config
    kind = partial(
        LanguageModel,
        logits=config.model.logits,
        temperature=config.rollout.temperature or 1.0,  # 0 only where nothing is trained
        truncation=Sampling.of(config.rollout, config.rollout.max_response_tokens).truncation,
    )
    return _network(context, kind, folder, context.layouts.actor)


def _network(
    context: RunContext, kind: Callable[..., PackedGPT], path: Path, layout: Layout
) -> PackedGPT | ModelChunks:
    context.offloader.offload_all()
    shape = read_model_shape(path)
    given = context.config
    config = transformer_config(
        shape,
        layout,
        given.run.precision,
        given.parallel.recompute,
        chosen_layers(given, context.machine),
        given.model.num_bf16_layers_at_ends,
        chosen_fusions(given, context.machine),
    )
    kernels = kernels_for(context.device)
    chunks = [kind(config, shape, layout, kernels, chunk=chunk) for chunk in range(layout.virtual_pipeline)]
    net = chunks[0] if len(chunks) == 1 else ModelChunks(chunks)
    folder.load(net, layout, mappings_of(net, layout), path)
    return net


def _trained(context: RunContext, net: PackedGPT | ModelChunks, layout: Layout) -> TrainedModel:
    config, coef = context.config, context.config.model.router_aux_loss_coef
    return TrainedModel.wrap(net, layout, context.device, config.parallel, context.offloader, coef)


def _guard(context: RunContext, model: str) -> NonFiniteGuard:
    return NonFiniteGuard(
        model,
        Path(context.config.run.dir) / "skipped",
        context.config.run.max_consecutive_nonfinite_steps,
        context.is_writer,
    )
