"""The layers, where TE has them."""

from transformer_engine.pytorch.module.linear import LayerNormLinear, Linear

__all__ = ["LayerNormLinear", "Linear"]
