"""The part for torch."""

from transformer_engine.pytorch import distributed, fp8, ops, optimizers, record
from transformer_engine.pytorch.absent import GroupedLinear, RMSNorm
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast
from transformer_engine.pytorch.module.linear import LayerNormLinear, Linear

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "fp8_autocast",
    "ops",
    "optimizers",
    "record",
]
