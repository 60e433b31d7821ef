"""A decoder layer for Megatron-Core: attention, then a gated MLP, each added to the residual stream.

This file builds it from Megatron's linear layers. models/te.py builds the same layer from Transformer Engine's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_tempo.config.model_shape import LayerAttention, ModelShape
from megatron_tempo.config.rope import Yarn
from megatron_tempo.models.attention import PackedAttention, RotatedAttention
from megatron_tempo.models.megatron_compat.versions import mlp_spec, moe_spec
from megatron_tempo.models.norms import NormedRowParallelLinear, RMSNorm
from megatron_tempo.models.routing import RoutedLayer, Router
from megatron_tempo.models.swiglu import SwiGLU

# Transformer Engine fuses a norm with the linear layer after it. This maps the prefixes of its parameter names to the
# names that weight tables and checkpoints use for all implementations.
NORMS_WITHIN = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


# Where the experts of a rank have their matrices, and the names that weight tables and checkpoints use: in Megatron's
# sequential experts, and in Transformer Engine's grouped ones.
_EXPERTS_WITHIN = (
    (re.compile(r"\.experts\.local_experts\.(\d+)\."), r".experts.\1."),
    (re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$"), r".experts.\2.\1.weight"),
)


def canonical_name(name: str) -> str:
    """The name of a parameter that weight tables and checkpoints use, whatever the implementation of its layer."""
    for ours, theirs in NORMS_WITHIN.items():
        name = name.replace(ours, theirs)
    for pattern, theirs in _EXPERTS_WITHIN:
        name = pattern.sub(theirs, name)
    return name


@dataclass(frozen=True, slots=True)
class Norms:
    """Where a family has its norms, and the modules that norm queries and keys; None if it does not norm them."""

    query: ModuleSpec | type | None
    key: ModuleSpec | type | None
    pre_norm: bool  # True: norms before attention and MLP. False: norms after them


@dataclass(frozen=True, slots=True)
class Parts:
    """The modules that an implementation builds a layer from."""

    norm: type  # before attention and MLP; IdentityOp if the linear layer contains it, or if norms come after
    column: Any  # linear layers into attention and MLP
    row: Any  # linear layers out of them
    core_attention: Callable[..., Any]  # also takes `window` and `softmax_scale_multiplier`
    swiglu: Any  # used unless Transformer Engine's is to be and is not fused: then Megatron's own operations are
    mlp_norm: type  # as `norm`, before the MLP only
    experts: type  # the experts of a rank, in a mixture of experts
    expert_column: Any  # linear layers into and out of an expert
    expert_row: Any


def local_layer(shape: ModelShape, attention: LayerAttention, norms: Norms) -> ModuleSpec:
    """The spec of a layer with this attention, built from Megatron's linear layers and torch's attention."""
    if norms.pre_norm:
        norm, row = RMSNorm, RowParallelLinear
    else:
        norm, row = IdentityOp, NormedRowParallelLinear
    of_experts = SequentialMLP, ColumnParallelLinear, RowParallelLinear
    parts = Parts(norm, ColumnParallelLinear, row, PackedAttention, SwiGLU, norm, *of_experts)
    return layer_of(parts, shape, attention, norms)


def layer_of(parts: Parts, shape: ModelShape, attention: LayerAttention, norms: Norms) -> ModuleSpec:
    """The spec of a layer with this attention, built from these parts."""
    scaling = attention.rope.scaling
    inner = SelfAttentionSubmodules(
        linear_qkv=parts.column,
        core_attention=partial(
            parts.core_attention,
            window=attention.window,
            # YaRN scales queries and keys by a factor each. Here their product scales the scores.
            softmax_scale_multiplier=scaling.attention_factor**2 if isinstance(scaling, Yarn) else 1.0,
        ),
        linear_proj=parts.row,
        q_layernorm=norms.query,
        k_layernorm=norms.key,
    )
    rotated = {"attn_mask_type": AttnMaskType.causal, "rope": shape.ropes.index(attention.rope)}
    return ModuleSpec(
        module=TransformerLayer if shape.experts is None else RoutedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(RotatedAttention, rotated, inner),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.mlp_norm,
            mlp=_mlp(parts, shape),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=NORMS_WITHIN,
        ),
    )


def _mlp(parts: Parts, shape: ModelShape) -> Any:
    """The spec of a layer's gated MLP, or of its mixture of experts."""
    if shape.experts is None:
        return mlp_spec(linear_fc1=parts.column, activation_func=parts.swiglu, linear_fc2=parts.row)
    return moe_spec(
        router=Router,
        experts=parts.experts,
        linear_fc1=parts.expert_column,
        activation_func=parts.swiglu,
        linear_fc2=parts.expert_row,
    )
