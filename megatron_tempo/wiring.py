"""From a config to a run's parts: process groups, models, engine, data; and back to Hugging Face folders."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.problem import ConfigErrors
from megatron_tempo.config.rules.precision import Machine, check_machine
from megatron_tempo.config.schema import Config, EngineKind, EnginePrecision, Precision
from megatron_tempo.config.stages import CriticTargets
from megatron_tempo.data.dataset import load_labelled, load_unlabelled, overlap, question_keys
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.errors import InputError
from megatron_tempo.evaluation.evaluator import Evaluator
from megatron_tempo.kernels import kernels_for
from megatron_tempo.liveness import Liveness
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.device import select_device
from megatron_tempo.models.families import DTYPES, FAMILIES, read_shape, transformer_config
from megatron_tempo.models.gpt import LanguageModel, PackedGPT, ValueModel
from megatron_tempo.models.machine import chosen_layers, machine_of
from megatron_tempo.models.parallel import Layout, Layouts, parallel_groups
from megatron_tempo.models.residence import Residence
from megatron_tempo.models.shape import Shape
from megatron_tempo.models.skips import Skips
from megatron_tempo.models.trained import Model, TrainedModel
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.dialect import Dialect
from megatron_tempo.rollout.embedded import EmbeddedEngine
from megatron_tempo.rollout.engine import Engine
from megatron_tempo.together import together
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt, Weights
from megatron_tempo.weights import folder, tables
from megatron_tempo.weights.precision import Quantised
from megatron_tempo.weights.slots import Slot
from megatron_tempo.weights.stream import WeightStream

# Entry of an exported critic's config.json: the targets it was trained on, which say what its values mean.
TARGETS = "tempo_critic_targets"

_P = TypeVar("_P", LabelledPrompt, UnlabelledPrompt)


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a run computes: its config, this rank's places in actor and critic, its device and who is on it."""

    config: Config
    layouts: Layouts
    device: torch.device
    residence: Residence
    machine: Machine

    @property
    def is_writer(self) -> bool:
        """The one rank that writes the run's plain files."""
        return self.layouts.actor.is_writer


@contextmanager
def open_workplace(config: Config) -> Iterator[Workplace]:
    """The device and the process groups, for the time of a job, which ends where a rank is lost or hangs."""
    device = select_device(config.run.device, int(os.environ.get("LOCAL_RANK", "0")))
    machine = machine_of(device)
    if problems := list(check_machine(config, machine)):
        raise ConfigErrors(problems)
    # On CUDA some operations have no deterministic form; there torch warns instead of stopping.
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=device.type == "cuda")
    # Beside it, torch fills all memory that is asked for unfilled: a launch more for each of a kernel's results.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    transformers.utils.logging.disable_progress_bar()
    with (
        parallel_groups(config.parallel, device, config.run.seed, collective_timeout(config)) as layouts,
        Liveness(Path(config.run.dir), config.run.hang_minutes),
    ):
        yield Workplace(config, layouts, device, Residence(one_at_a_time=config.parallel.offload), machine)


def collective_timeout(config: Config) -> timedelta:
    """How long a rank waits for the others: so long that `run.hang_minutes` is over before, and a hang has been named.

    A rank may also wait for one that is at work, which is no hang.
    """
    minutes = config.run.hang_minutes
    return timedelta(days=1) if minutes is None else timedelta(minutes=2 * minutes)


def build_actor(place: Workplace) -> Actor:
    """The actor with the weights of `model.path`, to be trained. Collective."""
    return Actor(_trained(place, _language_model(place), place.layouts.actor), _skips(place, "actor"))


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
        return Critic(_trained(place, _network(place, ValueModel, path, layout), layout), _skips(place, "critic"))


def targets_of(critic: Path) -> CriticTargets:
    """What the critic in a Hugging Face folder was trained on; 0 and 1 where its config.json does not say."""
    config = json.loads((critic / "config.json").read_text())
    return CriticTargets[config.get(TARGETS, CriticTargets.zero_one.name)]


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


def dialect_of(config: Config, *, cpu: bool) -> Dialect:
    """How the servers of `rollout.engine` are started and spoken to."""
    from megatron_tempo.rollout.sglang import Sglang
    from megatron_tempo.rollout.vllm import Vllm

    kinds: dict[EngineKind, type[Sglang | Vllm]] = {EngineKind.sglang: Sglang, EngineKind.vllm: Vllm}
    return kinds[config.rollout.engine](cpu=cpu, tensor=config.rollout.servers.tensor)


def engine_precision(config: Config) -> EnginePrecision:
    servers = config.rollout.servers if config.rollout.engine is not EngineKind.embedded else None
    return (servers and servers.precision) or EnginePrecision[config.run.precision.numbers.name]


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


def weights_of(model: Model, place: Workplace, dtype: torch.dtype | None = None) -> WeightStream:
    """All weights of a model, by their Hugging Face names, as they are and will be. `dtype`: none is the model's."""
    net, layout, bucket_bytes = model.net, model.layout, place.config.parallel.bucket_mb << 20
    return WeightStream(net, layout, _slots(net, layout), bucket_bytes, dtype, partial(place.residence.bring, model))


def engine_weights(actor: Actor, place: Workplace) -> Weights:
    """The actor's weights in the engine's precision."""
    return _in_engine_precision(place, partial(weights_of, actor.model, place))


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


def export_hf(place: Workplace, actor: Actor, critic: Critic | None, out: Path, seen: Path | None = None) -> None:
    """Write the Hugging Face folders `out`/actor and, of a critic, `out`/critic, with the tokenizer. Collective.

    `seen`, the file that says what they were trained on, goes into both.
    A folder that is there already stays as it is: it appeared whole. UnwrittenError where one cannot be written.
    """
    model = place.config.model
    models: list[tuple[str, Model, str, dict[str, Any]]] = [("actor", actor.model, model.path, {})]
    if critic is not None:
        changes = critic_changes(critic.model.net.shape, last_targets(place.config))
        models.append(("critic", critic.model, model.critic_path or model.path, changes))
    for name, trained, like, changes in models:
        there = [(out / name).exists()]
        dist.broadcast_object_list(there, src=0)
        if not there[0]:
            dtype = str(trained.net.config.params_dtype).removeprefix("torch.")
            buckets = weights_of(trained, place).everywhere()
            described = {**changes, "dtype": dtype}
            together(partial(folder.save, buckets, out / name, Path(like), trained.layout, described, seen))


def critic_changes(shape: Shape, targets: CriticTargets | None) -> dict[str, Any]:
    """What a critic's config.json says otherwise than its model's: a token classifier with one label, the value.

    `targets`: none if it is not known on what it was trained, or if the config.json says it already.
    """
    changes: dict[str, Any] = {"architectures": [FAMILIES[shape.family].TOKEN_CLASSIFIER], "tie_word_embeddings": False}
    changes |= {"id2label": {"0": "value"}, "label2id": {"value": 0}}
    return changes if targets is None else changes | {TARGETS: targets.name}


def last_targets(config: Config) -> CriticTargets:
    """What a run's critic is trained on at its end."""
    return config.critic_targets(list(config.stages())[-1])


@dataclass(frozen=True, slots=True)
class QuestionKeys:
    """What the questions of each set are known by, by their ids (`data.dataset.question_keys`)."""

    labelled: dict[str, str]
    unlabelled: dict[str, str]
    evaluation: dict[str, dict[str, str]]  # by set

    @classmethod
    def read(cls, config: Config) -> QuestionKeys:
        data = config.data
        labelled = {} if data.labelled is None else question_keys(data.labelled)
        unlabelled = {} if data.unlabelled is None else question_keys(data.unlabelled)
        return cls(labelled, unlabelled, cls.evaluated(config))

    @staticmethod
    def evaluated(config: Config) -> dict[str, dict[str, str]]:
        """Of the evaluation sets alone."""
        return {name: question_keys(dataset) for name, dataset in config.evaluation.sets.items()}


def prompt_streams(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    verifiers: Verifiers,
    keys: QuestionKeys,
    tell: Callable[[str], None],
) -> tuple[PromptStream[LabelledPrompt] | None, PromptStream[UnlabelledPrompt] | None]:
    """The training prompts but those of `data.held_out`, in their shuffled order.

    Questions that were left out, and those that stand in both sets, are told of.
    """
    length, seed = config.rollout.max_prompt_tokens, config.run.seed
    labelled = load_labelled(config.data.labelled, tokenizer, length) if config.data.labelled else None
    unlabelled = load_unlabelled(config.data.unlabelled, tokenizer, length) if config.data.unlabelled else None
    if labelled is not None:
        labelled = _trained_on("labelled", labelled, keys.labelled, config, keys, tell)
        verifiers.check(labelled)
    if unlabelled is not None:
        unlabelled = _trained_on("unlabelled", unlabelled, keys.unlabelled, config, keys, tell)
    if unlabelled is not None and config.compares_answers:
        assert config.data.unlabelled is not None
        assert config.data.unlabelled.verifier is not None
        verifiers.check_questions(config.data.unlabelled.verifier.name, unlabelled)
    if shared := overlap(_keys_of(labelled, keys.labelled), _keys_of(unlabelled, keys.unlabelled)):
        first = " and ".join(shared[0])
        tell(f"warning: {len(shared)} unlabelled questions stand in the labelled set too, first {first}")
    return (
        None if labelled is None else PromptStream(labelled, seed, "labelled"),
        None if unlabelled is None else PromptStream(unlabelled, seed, "unlabelled"),
    )


def _trained_on(
    name: str,
    prompts: list[_P],
    own: dict[str, str],
    config: Config,
    keys: QuestionKeys,
    tell: Callable[[str], None],
) -> list[_P]:
    """The prompts of a training set but those of `data.held_out`. InputError where none is left."""
    where = {key: held for held in config.data.held_out for key in keys.evaluation[held].values()}
    kept = [prompt for prompt in prompts if own[prompt.id] not in where]
    if len(kept) < len(prompts):
        count = Counter(where[own[prompt.id]] for prompt in prompts if own[prompt.id] in where)
        sets = ", ".join(f"{held} {number}" for held, number in count.items())
        tell(f"held out of the {name} set: {len(prompts) - len(kept)} of {len(prompts)} questions ({sets})")
    if not kept:
        raise InputError(
            f"data.held_out={config.data.held_out} leaves no question of data.{name}: take a set out of it"
        )
    return kept


def _keys_of(prompts: Sequence[_P] | None, keys: dict[str, str]) -> dict[str, str]:
    return {prompt.id: keys[prompt.id] for prompt in prompts or ()}


def evaluation_sets(
    config: Config, tokenizer: PreTrainedTokenizerBase, verifiers: Verifiers
) -> dict[str, list[LabelledPrompt]]:
    """The evaluation sets by name."""
    sets = {
        name: load_labelled(dataset, tokenizer, config.rollout.max_prompt_tokens)
        for name, dataset in config.evaluation.sets.items()
    }
    for prompts in sets.values():
        verifiers.check(prompts)
    return sets


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
    folder.load(net, layout, _slots(net, layout), path)
    return net


def _slots(net: PackedGPT, layout: Layout) -> list[Slot]:
    return tables.slots(net.shape, layout.pipeline, critic=isinstance(net, ValueModel))


def _trained(place: Workplace, net: PackedGPT, layout: Layout) -> TrainedModel:
    return TrainedModel.wrap(net, layout, place.device, place.config.parallel.micro_batch_tokens, place.residence)


def _skips(place: Workplace, model: str) -> Skips:
    return Skips(model, Path(place.config.run.dir) / "skipped", place.config.run.max_skipped, place.is_writer)
