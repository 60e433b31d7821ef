"""Of Transformer Engine's common part, the recipes."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
