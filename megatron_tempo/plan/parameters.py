"""The number of parameters on a rank, and the bytes of weights, gradients and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import chain

from megatron_tempo.config.model_shape import ModelShape, QKNorm
from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.config.schema import Config
from megatron_tempo.config.sizes import padded_vocab
from megatron_tempo.plan.layout import PlannedLayout, PlannedMachine


class Role(Enum):
    actor = "actor"
    critic = "critic"


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Bytes that a model holds on a GPU in all phases."""

    weights: float
    gradients: float
    optimizer: float


def layer_parameters(shape: ModelShape, tensor: int = 1) -> int:
    """Parameters of one layer on one tensor rank, without its experts.

    Matrices and biases are divided over the tensor ranks, norms and routers are not.

    (queries + 2 keys + queries) hidden of the attention, 3 ffn hidden of the gated feed-forward part or experts hidden
    of the router, two norms of the hidden size; in some families, a norm on queries and one on keys, and biases on
    queries, keys and values.
    """
    attention = (2 * shape.queries + 2 * shape.keys) * shape.hidden // tensor
    biases = (shape.queries + 2 * shape.keys) // tensor if shape.family.qkv_biases else 0
    of_queries_and_keys = {
        QKNorm.none: 0,
        QKNorm.head: 2 * shape.head_dim,
        QKNorm.projection: shape.queries + shape.keys,
    }
    norms = 2 * shape.hidden + of_queries_and_keys[shape.family.qk_norm]
    feed_forward = 3 * shape.ffn * shape.hidden // tensor if shape.experts is None else router(shape)
    return attention + biases + norms + feed_forward


def router(shape: ModelShape) -> int:
    """Parameters of a layer's router; 0 without experts."""
    return 0 if shape.experts is None else shape.experts.count * shape.hidden


def experts(shape: ModelShape, expert: int = 1, cut: int = 1) -> int:
    """Parameters of a layer's experts on one of `expert` ranks that share them, of `cut` that share the matrices of
    each: 3 ffn hidden of each expert. 0 without experts."""
    own = shape.experts
    return 0 if own is None else own.count // expert * (3 * own.ffn * shape.hidden // cut)


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token uses: all but the experts that are not chosen for it."""
    own = shape.experts
    unused = 0 if own is None else experts(shape) // own.count * (own.count - own.per_token)
    return total_parameters(shape) - shape.layers * unused


def fp8_copies(config: Config, shape: ModelShape, layout: PlannedLayout, stage: int, *, trained: bool) -> float:
    """Bytes of the FP8 copies of a model's matrices, which Transformer Engine makes from the bf16 ones and keeps.

    A byte per number, and another one in a model that is trained, because the backward pass needs them transposed. (On
    Blackwell, per-tensor scaling needs no transposed copy; the estimate is too high there.) Scales, up to a 32nd of the
    copies, are not counted.
    """
    if config.run.precision not in RECIPES:
        return 0.0
    of_stage = chain.from_iterable(layout.pipeline_layers.chunks(shape.layers)[stage])
    ends = config.model.num_bf16_layers_at_ends
    inside = sum(ends <= layer < shape.layers - ends for layer in of_stage)
    ffn = 3 * shape.ffn if shape.experts is None else 0
    matrices = (2 * shape.queries + 2 * shape.keys + ffn) * shape.hidden / layout.tensor
    matrices += experts(shape, layout.expert, layout.expert_cut)
    return (2.0 if trained else 1.0) * inside * matrices


def parameters(shape: ModelShape, layout: PlannedLayout, role: Role, stage: int) -> int:
    """Parameters on a rank of pipeline stage `stage`, including the padding of the vocabulary.

    A tied output matrix is the embedding itself if both are on one stage. Otherwise Megatron keeps a second copy on the
    last stage.
    """
    tensor, last = layout.tensor, layout.pipeline - 1
    table = padded_vocab(shape.vocab, tensor) // tensor * shape.hidden
    total = layout.pipeline_layers.counts(shape.layers)[stage] * layer_parameters(shape, tensor)
    total += expert_parameters(shape, layout, stage)
    if stage == 0:
        total += table
    if stage == last:
        total += shape.hidden
        if role is Role.critic:
            total += shape.hidden + 1
        elif not shape.tied or last > 0:
            total += table
    return total


def expert_parameters(shape: ModelShape, layout: PlannedLayout, stage: int) -> int:
    """Those of `parameters` that belong to experts."""
    layers = layout.pipeline_layers.counts(shape.layers)[stage]
    return layers * experts(shape, layout.expert, layout.expert_cut)


def owned(shape: ModelShape, layout: PlannedLayout, role: Role, stage: int) -> float:
    """Parameters whose optimizer state a rank keeps: its share of those on the rank. Dense ones are shared among the
    ranks of data and context parallelism, experts' among the ranks with the same experts."""
    of_experts = expert_parameters(shape, layout, stage)
    dense = parameters(shape, layout, role, stage) - of_experts
    return dense / (layout.data * layout.context) + of_experts / layout.expert_data


def total_parameters(shape: ModelShape, role: Role = Role.actor) -> int:
    """Parameters of the whole model as in its Hugging Face folder, without padding."""
    head = shape.hidden + 1 if role is Role.critic else 0 if shape.tied else shape.vocab * shape.hidden
    return shape.vocab * shape.hidden + shape.layers * (layer_parameters(shape) + experts(shape)) + shape.hidden + head


def resident(shape: ModelShape, layout: PlannedLayout, machine: PlannedMachine, role: Role, stage: int) -> ModelBytes:
    """Bytes of a trained model (models/trained.py).

    Weights are in the run's precision. Megatron's DDP keeps a gradient of each weight in fp32 (`grad_reduce_in_fp32`)
    for the whole run. The distributed optimizer (Rajbhandari et al. 2020, ZeRO-1) divides its state over the ranks that
    have the same parameters (`owned`): two moments in fp32, 8 bytes, and for bf16 weights fp32 main weights, 4 more.
    For fp32 weights the main weights are views of the model's.
    """
    count = parameters(shape, layout, role, stage)
    state = 12 if machine.mixed else 8
    return ModelBytes(machine.size * count, 4.0 * count, state * owned(shape, layout, role, stage))
