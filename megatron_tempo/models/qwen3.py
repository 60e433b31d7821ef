"""Qwen3's shape and its Megatron-Core layer spec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional

from megatron_tempo.config.schema import Precision
from megatron_tempo.errors import InputError
from megatron_tempo.models.layers import PackedAttention, RMSNorm
from megatron_tempo.models.parallel import Layout

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a Qwen3 config.json says about the network.

    >>> Shape(layers=36, hidden=4096, heads=32, groups=8, head_dim=128, ffn=12288, vocab=151936, rope_theta=1e6,
    ...       norm_eps=1e-6, tied=False, max_positions=40960)
    """

    layers: int
    hidden: int
    heads: int
    groups: int  # key/value heads
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float
    norm_eps: float
    tied: bool  # input and output embeddings are one matrix
    max_positions: int


def read_shape(folder: Path) -> Shape:
    """The shape of the model in a Hugging Face folder. Raises InputError for what is not a plain Qwen3."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3":
        raise InputError(f"{folder}/config.json: model_type is {config.model_type!r}; supported: qwen3")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{folder}/config.json: rope_type {rope['rope_type']!r} is not supported; use 'default'")
    if config.use_sliding_window:
        raise InputError(f"{folder}/config.json: use_sliding_window=true is not supported")
    if config.attention_bias:
        raise InputError(f"{folder}/config.json: attention_bias=true is not supported")
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        rope_theta=rope["rope_theta"],
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        max_positions=config.max_position_embeddings,
    )


def transformer_config(shape: Shape, layout: Layout, precision: Precision) -> TransformerConfig:
    """Megatron's config of this shape and layout. Weights are not initialised: they are always loaded."""
    dtype = DTYPES[precision]
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # Megatron marks its sharded parameters while initialising them, and without the mark their gradients are left
        # out of the norm: the initialisation must run, though it need not write anything.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
        # Every micro-batch has a length of its own, so pipeline stages tell each other the shapes they send.
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # unused, but the default one is refused beside variable lengths
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=precision is Precision.bf16,
    )


def _leave_as_is(weight: Tensor) -> Tensor:
    return weight


def block_spec(shape: Shape, layout: Layout) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the norm behind the last."""
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm,
        k_layernorm=RMSNorm,
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * (shape.layers // layout.pipeline), layer_norm=RMSNorm)
