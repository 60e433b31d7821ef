"""From a config to the models in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tempo.config.schema import Config
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.gpt import LanguageModel, PackedGPT, ValueModel
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.qwen3 import Shape, read_shape, transformer_config
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.weights import folder, qwen3


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a run computes: its config, this rank's place and device."""

    config: Config
    layout: Layout
    device: torch.device


def build_actor(place: Workplace) -> Actor:
    """The actor with the weights of `model.path`. Collective."""
    path = Path(place.config.model.path)
    return Actor(_build(place, LanguageModel, read_shape(path), path), place.config.rollout.temperature)


def build_critic(place: Workplace) -> Critic:
    """The critic with the weights of `model.critic_path`, or the actor's decoder and a zero head. Collective."""
    path = Path(place.config.model.critic_path or place.config.model.path)
    return Critic(_build(place, ValueModel, read_shape(path), path))


def _build(
    place: Workplace, network: type[LanguageModel] | type[ValueModel], shape: Shape, path: Path
) -> TrainedModel:
    layout, config = place.layout, place.config
    net: PackedGPT = network(transformer_config(shape, layout, config.run.precision), shape, layout)
    slots = qwen3.slots(shape, layout.pipeline, critic=network is ValueModel)
    folder.load(net, layout, slots, path)
    return TrainedModel.wrap(net, layout, place.device, config.parallel.micro_batch_tokens, config.run.precision)
