"""Which operations of a decoder layer run as one kernel."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tempo.config.choices import Fusions, Layers
from megatron_tempo.config.rules.precision import Machine


@dataclass(frozen=True, slots=True)
class Fused:
    """The fused operations of a network.

    Megatron has more of them, which are not used: its SwiGLU for layers without Transformer Engine is compiled by torch
    for each range of shapes, and its fused softmax and dropout are for operations that our layers do not have.
    """

    rotary: bool = False  # Transformer Engine's: cosine, sine, rotation; angles stay in fp32
    swiglu: bool = False  # Transformer Engine's: silu of the gate, product
    weight_gradients: bool = False  # Transformer Engine's or Apex's: product, sum with the gradients in fp32

    def __str__(self) -> str:
        names = {"rotary embedding": self.rotary, "SwiGLU": self.swiglu, "weight gradients": self.weight_gradients}
        return ", ".join(name for name, chosen in names.items() if chosen) or "none"


def fused(fusions: Fusions, layers: Layers, machine: Machine) -> Fused:
    """What `fusions` means for these layers on this machine. `layers` is not auto."""
    assert layers is not Layers.auto
    if fusions is Fusions.none:
        return Fused()
    if layers is Layers.transformer_engine:
        return Fused(rotary=True, swiglu=True, weight_gradients=True)
    return Fused(weight_gradients=machine.capability is not None and machine.apex_gradients)
