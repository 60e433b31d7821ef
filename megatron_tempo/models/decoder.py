"""A decoder layer for Megatron-Core: attention, then a gated MLP, each added to the residual stream.

Here it is made of Megatron's own linear layers; models/te.py makes the same layer of Transformer Engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_tempo.models.attention import PackedAttention, RotatedAttention
from megatron_tempo.models.norms import NormedRowParallelLinear, RMSNorm
from megatron_tempo.models.shape import LayerAttention, Shape

# Norms that an implementation keeps inside the linear layer behind them, by the beginnings of their parameters' names
# in a layer; and what the weight tables and the checkpoints call them, whoever implements the layers.
NORMS_WITHIN = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True, slots=True)
class Norms:
    """Where a family has its norms, and of what kind those of queries and keys are."""

    query: ModuleSpec | type
    key: ModuleSpec | type
    pre_norm: bool  # norms before attention and MLP, or else behind them


@dataclass(frozen=True, slots=True)
class Parts:
    """What an implementation makes a layer of."""

    norm: type  # before attention and MLP; IdentityOp where the next has it within, or where norms stand behind
    column: Any  # linear maps into attention and MLP
    row: Any  # and out of them
    core_attention: Callable[..., Any]  # takes also `window` and `softmax_scale_multiplier`


def local_layer(shape: Shape, attention: LayerAttention, norms: Norms) -> ModuleSpec:
    """The spec of a layer that attends so, of Megatron's linear layers and torch's attention."""
    if norms.pre_norm:
        parts = Parts(RMSNorm, ColumnParallelLinear, RowParallelLinear, PackedAttention)
    else:
        parts = Parts(IdentityOp, ColumnParallelLinear, NormedRowParallelLinear, PackedAttention)
    return layer_of(parts, shape, attention, norms)


def layer_of(parts: Parts, shape: Shape, attention: LayerAttention, norms: Norms) -> ModuleSpec:
    """The spec of a layer that attends so, made of these parts."""
    yarn = attention.rope.yarn
    inner = SelfAttentionSubmodules(
        linear_qkv=parts.column,
        core_attention=partial(
            parts.core_attention,
            window=attention.window,
            # YaRN's factor of both queries and keys, as one of their products.
            softmax_scale_multiplier=yarn.attention_factor**2 if yarn else 1.0,
        ),
        linear_proj=parts.row,
        q_layernorm=norms.query,
        k_layernorm=norms.key,
    )
    rotated = {"attn_mask_type": AttnMaskType.causal, "rope": shape.ropes.index(attention.rope)}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(RotatedAttention, rotated, inner),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=NORMS_WITHIN,
        ),
    )
