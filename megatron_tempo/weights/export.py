"""Exports actor and critic as Hugging Face folders."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import CriticTargets
from megatron_tempo.config.trained_with import ENTRY, trained_with
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.families import FAMILIES
from megatron_tempo.models.gpt import PackedGPT, ValueModel
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.shape import Shape
from megatron_tempo.models.trained import Model
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.weights import folder, tables
from megatron_tempo.weights.param_mapping import ParamMapping
from megatron_tempo.weights.stream import WeightStream

# Entry of an exported critic's config.json: the targets it was trained on, which say what its values mean.
TARGETS = "tempo_critic_targets"


def targets_of(critic: Path) -> CriticTargets:
    """What the critic in a Hugging Face folder was trained on; 0 and 1 where its config.json does not say."""
    config = json.loads((critic / "config.json").read_text())
    return CriticTargets[config.get(TARGETS, CriticTargets.zero_one.name)]


def weights_of(model: Model, config: Config, dtype: torch.dtype | None = None) -> WeightStream:
    """All weights of a model, by their Hugging Face names, as they are and will be. `dtype`: none is the model's."""
    net, layout, bucket_bytes = model.net, model.layout, config.parallel.bucket_mb << 20
    return WeightStream(
        net, layout, mappings_of(net, layout), bucket_bytes, dtype, partial(model.offloader.load, model)
    )


def export_hf(
    config: Config,
    actor: Actor,
    critic: Critic | None,
    out: Path,
    seen: Path | None = None,
    seen_summary: dict[str, Any] | None = None,
) -> None:
    """Write the Hugging Face folders `out`/actor and, of a critic, `out`/critic, with the tokenizer. Collective.

    `seen`, the file that says what they were trained on, goes into both, and its summary into both config.json.
    A folder that is there already stays as it is: it appeared whole. UnwrittenError where one cannot be written.
    """
    model = config.model
    about = {ENTRY: trained_with(config) | ({} if seen_summary is None else {"seen": seen_summary})}
    models: list[tuple[str, Model, str, dict[str, Any]]] = [("actor", actor.model, model.path, about)]
    if critic is not None:
        changes = critic_changes(critic.model.net.shape, last_targets(config)) | about
        models.append(("critic", critic.model, model.critic_path or model.path, changes))
    for name, trained, like, changes in models:
        there = [(out / name).exists()]
        dist.broadcast_object_list(there, src=0)
        if not there[0]:
            dtype = str(trained.net.config.params_dtype).removeprefix("torch.")
            buckets = weights_of(trained, config).everywhere()
            described = {**changes, "dtype": dtype}
            raise_on_all_ranks(partial(folder.save, buckets, out / name, Path(like), trained.layout, described, seen))


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


def mappings_of(net: PackedGPT, layout: Layout) -> list[ParamMapping]:
    return tables.mappings(net.shape, layout.pipeline, critic=isinstance(net, ValueModel))
