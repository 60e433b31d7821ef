"""How many parameters a rank holds, and what stays with them from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megatron_tempo.config.recipes import RECIPES
from megatron_tempo.config.schema import Config
from megatron_tempo.config.sizes import padded_vocab
from megatron_tempo.plan.layout import PlannedLayout, PlannedMachine
from megatron_tempo.plan.shapes import PlannedShape


class Role(Enum):
    actor = "actor"
    critic = "critic"


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """Bytes that a model holds on a GPU whatever is being done."""

    weights: float
    gradients: float
    optimizer: float


def layer_parameters(shape: PlannedShape, tensor: int = 1) -> int:
    """One layer's, on one tensor rank: matrices are divided, norms are not.

    (queries + 2 keys + queries) hidden of the attention, 3 ffn hidden of the gated feed-forward part, two norms of the
    hidden size, and one on queries and keys.
    """
    attention = (2 * shape.queries + 2 * shape.keys) * shape.hidden // tensor
    norms = 2 * shape.hidden + (shape.queries + shape.keys if shape.whole_norm else 2 * shape.head_dim)
    return attention + 3 * shape.ffn * shape.hidden // tensor + norms


def fp8_copies(config: Config, shape: PlannedShape, layout: PlannedLayout, stage: int, *, trained: bool) -> float:
    """Bytes of the FP8 forms of a model's matrices, which Transformer Engine makes of the bf16 ones and keeps.

    A byte a number, and in a model that is trained another one for the backward pass, which wants them transposed (on
    Blackwell a scale a tensor does without: too much is told there). Scales, up to a 32nd of it, are left out.
    """
    if config.run.precision not in RECIPES:
        return 0.0
    of_stage = shape.layers // layout.pipeline
    ends = config.model.num_bf16_layers_at_ends
    inside = sum(ends <= layer < shape.layers - ends for layer in range(stage * of_stage, (stage + 1) * of_stage))
    matrices = (2 * shape.queries + 2 * shape.keys + 3 * shape.ffn) * shape.hidden / layout.tensor
    return (2.0 if trained else 1.0) * inside * matrices


def parameters(shape: PlannedShape, layout: PlannedLayout, role: Role, stage: int) -> int:
    """Parameters on a rank of pipeline stage `stage`, padding of the vocabulary included.

    A tied output matrix is the embedding where both are on one stage; else Megatron keeps a second copy on the last.
    """
    tensor, last = layout.tensor, layout.pipeline - 1
    table = padded_vocab(shape.vocab, tensor) // tensor * shape.hidden
    total = shape.layers // layout.pipeline * layer_parameters(shape, tensor)
    if stage == 0:
        total += table
    if stage == last:
        total += shape.hidden
        if role is Role.critic:
            total += shape.hidden + 1
        elif not shape.tied or last > 0:
            total += table
    return total


def total_parameters(shape: PlannedShape, role: Role = Role.actor) -> int:
    """Of the whole model, as its Hugging Face folder holds it, without padding."""
    head = shape.hidden + 1 if role is Role.critic else 0 if shape.tied else shape.vocab * shape.hidden
    return shape.vocab * shape.hidden + shape.layers * layer_parameters(shape) + shape.hidden + head


def resident(shape: PlannedShape, layout: PlannedLayout, machine: PlannedMachine, role: Role, stage: int) -> ModelBytes:
    """Bytes of a trained model (models/trained.py).

    Weights in the run's precision; Megatron's DDP keeps a gradient of each in fp32 (`grad_reduce_in_fp32`), for the
    whole run. The distributed optimizer (Rajbhandari et al. 2020, ZeRO-1) divides its state over the data-parallel
    ranks: two moments in fp32, 8 bytes, and beside bf16 weights fp32 main weights, 4 more. In fp32 the main weights are
    views of the model's.
    """
    count = parameters(shape, layout, role, stage)
    state = 12 if machine.mixed else 8
    return ModelBytes(machine.size * count, 4.0 * count, state * count / (layout.data * layout.context))
