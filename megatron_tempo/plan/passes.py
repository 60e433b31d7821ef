"""What a pass of a model needs on a GPU: the micro-batches, and the moments of an optimizer step."""

from __future__ import annotations

from megatron_tempo.config.choices import Logits
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.plan import activations, head
from megatron_tempo.plan.layout import PlannedLayout, PlannedMachine, PlannedMicroBatch
from megatron_tempo.plan.parameters import Role


def update_moments(
    shape: ModelShape,
    layout: PlannedLayout,
    machine: PlannedMachine,
    micro: PlannedMicroBatch,
    logits: Logits,
    role: Role,
    stage: int,
) -> tuple[float, float, float]:
    """Bytes in an optimizer step: what is held when a backward pass begins, and beyond it the needs of the layers'
    backward pass and of the head's."""
    held = activations.held(shape, layout, machine, micro, stage)
    layers = activations.backward(shape, layout, machine, micro, stage)
    last = stage == layout.pipeline - 1
    ending = head.update(shape, layout, machine, micro, logits, role) if last else 0.0
    return held, layers, ending


def batch_bytes(micro: PlannedMicroBatch, machine: PlannedMachine) -> float:
    """Bytes of all micro-batches of a pass, which are on the device from its beginning (models/packing.py).

    Per token: its id, position, cell and grid index, int64. Per response token: where it is predicted, its id, and
    where its value is read; on a CPU also its indices in the batch.
    """
    return micro.count * (32.0 * micro.tokens + (24 if machine.cuda else 40) * micro.responses)
