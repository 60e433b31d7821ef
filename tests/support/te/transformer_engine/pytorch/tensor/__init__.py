"""The class that Megatron-Core asks whether a weight is in FP8: none is."""

from __future__ import annotations

from typing import Any


class QuantizedTensor:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("weights stay in bf16")
