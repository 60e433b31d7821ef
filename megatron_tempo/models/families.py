"""The supported model families (FAMILIES), and their networks in Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_tempo.config.choices import Layers, Precision, Recompute
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.errors import InputError
from megatron_tempo.input_files import read_json
from megatron_tempo.models import olmo3, qwen3
from megatron_tempo.models.decoder import Norms, local_layer
from megatron_tempo.models.norms import RMSNorm
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.shape import LayerAttention, Shape

# Megatron's settings for each choice.
_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    Recompute.none: {},
    Recompute.attention: {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    Recompute.layers: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
# The type of weights, activations and gradients. With FP8, layers convert from this type.
DTYPES = {precision: torch.float32 if precision is Precision.fp32 else torch.bfloat16 for precision in Precision}


class Family(Protocol):
    """The interface of a family's module."""

    NORMS_EACH_HEAD: bool  # queries and keys are normed per head, so all tensor ranks hold the same norm weights
    TOKEN_CLASSIFIER: str  # the architecture that an exported critic's config.json names

    def shape_of(self, config: transformers.PretrainedConfig, file: Path) -> Shape: ...

    def norms(self, shape: Shape) -> Norms: ...


FAMILIES: dict[str, Family] = {"olmo3": olmo3, "qwen3": qwen3}  # by their model_type


def read_shape(folder: Path) -> Shape:
    """The shape of the model in a Hugging Face folder. Raises InputError for anything that no family implements."""
    file = folder / "config.json"
    read_json(file, dict)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds for values of a wrong type
        raise InputError(f"{file}: transformers cannot read it: {str(error).splitlines()[0]}") from error
    if config.model_type not in FAMILIES:
        raise InputError(f"{file}: model_type is {config.model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type].shape_of(config, file)


def transformer_config(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    recompute: Recompute = Recompute.none,
    layers: Layers = Layers.local,
    num_bf16_layers_at_ends: int = 0,
) -> TransformerConfig:
    """Megatron's config for this shape and layout. Weights are not initialised, because they are always loaded.

    `layers` is not auto: `models.machine.chosen_layers` resolves auto for this machine.
    """
    assert layers is not Layers.auto
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
        # If True, Megatron sums the gradients of these norms over the tensor ranks. That is wrong for sharded norms.
        qk_layernorm=FAMILIES[shape.family].NORMS_EACH_HEAD,
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
        # Megatron marks its sharded parameters while it initialises them. Without the mark, the gradient norm skips
        # them. So the initialisation must run, even though it does not write anything.
        init_method=_no_init,
        output_layer_init_method=_no_init,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        # Micro-batches have different lengths, so pipeline stages must send the shapes too.
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # unused, but Megatron refuses the default with variable lengths
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        transformer_impl=layers.name,
        **_RECOMPUTE[recompute],
        **_fp8(precision, num_bf16_layers_at_ends),
    )


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


def block_spec(config: TransformerConfig, shape: Shape, layout: Layout) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage, and the norm after the model's last layer."""
    of_stage = shape.layers // layout.pipeline
    first = layout.pipeline_rank * of_stage
    layer, norms = _layer(Layers[config.transformer_impl]), FAMILIES[shape.family].norms(shape)
    specs = [layer(shape, attention, norms) for attention in shape.attention[first : first + of_stage]]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _layer(layers: Layers) -> Callable[[Shape, LayerAttention, Norms], ModuleSpec]:
    if layers is Layers.local:
        return local_layer
    from megatron_tempo.models.te import te_layer  # imports Transformer Engine

    return te_layer
