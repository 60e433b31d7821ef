"""The shape of a network, from a Hugging Face config.json, in one form for all families."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from megatron_tempo.config.sizes import Sizes
from megatron_tempo.errors import InputError


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN (arXiv 2309.00071): extends a rotary embedding to longer sequences than it was trained on.

    >>> Yarn(factor=8.0, trained_positions=8192, beta_fast=32.0, beta_slow=1.0, attention_factor=1.2079)
    """

    factor: float  # ratio of the new length to the trained one
    trained_positions: int
    beta_fast: float  # pairs with more turns than this over the trained positions are not changed
    beta_slow: float  # pairs with fewer turns are divided by `factor`
    attention_factor: float  # multiplies rotated queries and rotated keys


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding: pair i of a head's d dimensions turns by theta^(-2i/d) radians per position, before YaRN."""

    theta: float
    yarn: Yarn | None = None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The attention settings that may differ between a model's layers."""

    rope: Rope
    window: int | None = None  # a token attends to itself and the window - 1 tokens before it. None: to all before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape(Sizes):
    """The network's sizes, and the attention of each layer.

    >>> Shape(family="qwen3", layers=36, hidden=4096, heads=32, groups=8, head_dim=128, ffn=12288, vocab=151936,
    ...       norm_eps=1e-6, max_positions=40960, attention=(LayerAttention(Rope(1e6)),) * 36)
    """

    family: str  # model_type of the config.json
    norm_eps: float
    attention: tuple[LayerAttention, ...]  # by layer, counted over all pipeline stages

    @classmethod
    def of(cls, config: PretrainedConfig, attention: tuple[LayerAttention, ...]) -> Shape:
        """Read the sizes, which have the same names in all families."""
        return cls(
            family=config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            tied=config.tie_word_embeddings,
            max_positions=config.max_position_embeddings,
            attention=attention,
        )

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The distinct rotary embeddings of the layers."""
        return tuple(dict.fromkeys(layer.rope for layer in self.attention))


def unsupported(file: Path, field: str, value: object, known: object) -> InputError:
    """The error for a value in a config.json that these networks do not implement. `known`: a value that they do."""
    given, supported = (json.dumps(x) for x in (value, known))
    return InputError(f"{file}: {field}={given} is not supported. Supported: {supported}")


def expect(file: Path, config: PretrainedConfig, **known: object) -> None:
    """Raises InputError that names the first of these fields that the config.json sets to another value."""
    for field, value in known.items():
        if getattr(config, field, value) != value:
            raise unsupported(file, field, getattr(config, field), value)
