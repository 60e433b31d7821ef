"""The networks of the model families (`config.model_shape`) in Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_tempo.config.choices import Layers, Precision, Recompute
from megatron_tempo.config.model_shape import Experts, LayerAttention, ModelShape, QKNorm
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.models.decoder import Norms, local_layer
from megatron_tempo.models.fusions import Fused
from megatron_tempo.models.norms import ProjectionNorm, RMSNorm
from megatron_tempo.models.parallel import Layout

# Megatron's settings for each choice.
_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    Recompute.none: {},
    Recompute.attention: {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    Recompute.layers: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
# The type of weights, activations and gradients. With FP8, layers convert from this type.
DTYPES = {precision: torch.float32 if precision is Precision.fp32 else torch.bfloat16 for precision in Precision}


@dataclass
class NetworkConfig(TransformerConfig):
    """Megatron's config, and what it has no field for."""

    fuses_te_weight_gradients: bool = False  # in Transformer Engine's linear layers alone
    # A token goes through one expert, whose weight is divided by itself. Megatron takes its probability.
    normalizes_single_expert: bool = False


def transformer_config(
    shape: ModelShape,
    layout: Layout,
    precision: Precision,
    recompute: Recompute = Recompute.none,
    layers: Layers = Layers.local,
    num_bf16_layers_at_ends: int = 0,
    fused: Fused = Fused(),  # noqa: B008 - frozen
) -> NetworkConfig:
    """Megatron's config for this shape and layout. Weights are not initialised, because they are always loaded.

    `layers` is not auto: `models.machine.chosen_layers` resolves auto for this machine.
    """
    assert layers is not Layers.auto
    dtype = DTYPES[precision]
    local = layers is Layers.local
    return NetworkConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn if shape.experts is None else shape.experts.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        # If True, Megatron sums the gradients of these norms over the tensor ranks. That is wrong for sharded norms.
        qk_layernorm=shape.family.qk_norm is QKNorm.head,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_biases,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused.rotary,
        use_te_activation_func=local or fused.swiglu,  # `SwiGLU` of models/swiglu.py, or Transformer Engine's
        # Megatron's own output layer requires Apex's kernel for it, and does not use it here.
        gradient_accumulation_fusion=local and fused.weight_gradients,
        fuses_te_weight_gradients=not local and fused.weight_gradients,
        persist_layer_norm=False,
        # Megatron marks its sharded parameters while it initialises them. Without the mark, the gradient norm skips
        # them. So the initialisation must run, even though it does not write anything.
        init_method=_no_init,
        output_layer_init_method=_no_init,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_model_parallel_layout=_uneven_stages(shape, layout),
        **_interleaved(layout),
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        # Micro-batches have different lengths, so pipeline stages must send the shapes too.
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # Megatron refuses the default with variable lengths
        **_mixture(shape.experts, layout, layers),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        transformer_impl=layers.name,
        **_RECOMPUTE[recompute],
        **_fp8(precision, num_bf16_layers_at_ends),
    )


def _uneven_stages(shape: ModelShape, layout: Layout) -> list[list[str]] | None:
    """What each part of the model has, in Megatron's words; None if all have equally many layers.

    Megatron numbers layers by it, in checkpoints and for FP8. Its own fields for the first and the last stage would do
    only if all other stages had equally many layers.
    """
    if layout.pipeline_layers.is_even(shape.layers):
        return None
    chunks = zip(*layout.pipeline_layers.chunks(shape.layers), strict=True)  # by chunk, by stage: the model's order
    parts = [["decoder"] * len(part) for stages in chunks for part in stages]
    parts[0].insert(0, "embedding")
    parts[-1].append("loss")
    return parts


def _interleaved(layout: Layout) -> dict[str, Any]:
    """Megatron's settings for virtual pipeline stages.

    In one batch of messages it can send to the next and to the previous stage, but with two stages these are the same
    rank, which would take one message for the other. So messages overlap with computation instead, one at a time.
    """
    if layout.virtual_pipeline == 1:
        return {}
    sizes = {"virtual_pipeline_model_parallel_size": layout.virtual_pipeline}
    return {**sizes, "overlap_p2p_comm": True, "batch_p2p_comm": False}


def _mixture(experts: Experts | None, layout: Layout, layers: Layers) -> dict[str, Any]:
    """Megatron's settings for a mixture of experts. No token is dropped; `Router` has the auxiliary loss.

    The order of softmax and choice differs, the weights of the chosen experts do not: divided by their sum,
    probabilities are the softmax of the chosen experts' logits.
    """
    if experts is None:
        return {}
    grouped = layers is Layers.transformer_engine
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalized or experts.per_token == 1,
        "normalizes_single_expert": experts.normalized and experts.per_token == 1,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": grouped,
        "moe_permute_fusion": grouped,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }


def _fp8(precision: Precision, num_bf16_layers_at_ends: int) -> dict[str, Any]:
    """Megatron's settings for an FP8 recipe. Weights, attention and the output layer stay in bf16."""
    if precision not in RECIPES:
        return {}
    recipe = RECIPES[precision]
    return {
        "fp8": recipe.format,
        "fp8_recipe": recipe.megatron,
        # Delayed scaling reduces the largest magnitudes over a group at each pass. Replicas may have different numbers
        # of micro-batches, so this group must not contain several replicas.
        "tp_only_amax_red": True,
        # Actor and critic share Transformer Engine's history of magnitudes. If it were longer than one pass, passes of
        # one model would displace those of the other.
        "fp8_amax_history_len": 1,
        "fp8_amax_compute_algo": "most_recent",
        "first_last_layers_bf16": num_bf16_layers_at_ends > 0,
        "num_layers_at_start_in_bf16": num_bf16_layers_at_ends,
        "num_layers_at_end_in_bf16": num_bf16_layers_at_ends,
    }


def token_multiple(config: TransformerConfig) -> int:
    """Token-count multiple that FP8 requires per rank."""
    multiples = {recipe.megatron: recipe.multiple for recipe in RECIPES.values()}
    return multiples[config.fp8_recipe] if config.fp8 else 1


def _no_init(weight: Tensor) -> Tensor:
    return weight


def block_spec(
    config: TransformerConfig, shape: ModelShape, layout: Layout, chunk: int = 0
) -> TransformerBlockSubmodules:
    """The layers of a chunk of this rank's pipeline stage, and the norm after the model's last layer."""
    of_chunk = layout.pipeline_layers.chunks(shape.layers)[layout.pipeline_rank][chunk]
    layer, norms = _layer(Layers[config.transformer_impl]), _norms(shape, layout)
    specs = [layer(shape, attention, norms) for attention in shape.attention[of_chunk.start : of_chunk.stop]]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _norms(shape: ModelShape, layout: Layout) -> Norms:
    pre_norm = shape.family.pre_norm
    if shape.family.qk_norm is QKNorm.none:
        return Norms(query=None, key=None, pre_norm=pre_norm)
    if shape.family.qk_norm is QKNorm.head:
        return Norms(query=RMSNorm, key=RMSNorm, pre_norm=pre_norm)
    ranks = layout.groups.tp
    query, key = (ModuleSpec(ProjectionNorm, {"heads": of, "group": ranks}) for of in (shape.heads, shape.groups))
    return Norms(query, key, pre_norm=pre_norm)


def _layer(layers: Layers) -> Callable[[ModelShape, LayerAttention, Norms], ModuleSpec]:
    if layers is Layers.local:
        return local_layer
    from megatron_tempo.models.te import te_layer  # imports Transformer Engine

    return te_layer
