"""Attention, without the names for inference and for fused rotary embeddings, which our models do not use."""

from transformer_engine.pytorch.attention.dot_product_attention import DotProductAttention

__all__ = ["DotProductAttention"]
