"""Names that Megatron-Core requires when it is imported, but that our models do not use."""

from __future__ import annotations

from typing import Any

from torch import nn


class GroupedLinear(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("the stand-in has no grouped layers")


class RMSNorm(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("the norms are our own")
