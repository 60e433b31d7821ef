"""The recipes, with the fields of TE 2.11's.

TE's are pydantic dataclasses: they check the types of their fields, and drop keywords that they do not know without a
message. Here such a keyword is an error, except those that Megatron-Core 0.16.1 passes and TE drops.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, fields
from enum import Enum
from typing import Any

import torch


class Format(Enum):
    E4M3 = "E4M3"
    E5M2 = "E5M2"
    HYBRID = "HYBRID"


@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


_FAST, _EXACT = MMParams(use_split_accumulator=False), MMParams()


class Recipe:
    """Checks the types of fields, as pydantic does."""

    def __post_init__(self, *_: Any) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, field.name), type(field.default)
            if field.default is not None:
                assert isinstance(value, kind), f"{type(self).__name__}.{field.name}={value!r} is no {kind.__name__}"


@dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    scaling_factor_compute_algo: None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    # Of `TEDelayedScaling` in megatron/core/extensions/transformer_engine.py.
    override_linear_precision: InitVar[tuple[bool, bool, bool]] = (False, False, False)
    params_dtype: InitVar[torch.dtype | None] = None
    device: InitVar[int | str | None] = None

    def __post_init__(self, *dropped: Any) -> None:
        super().__post_init__()
        assert self.fp8_format is not Format.E5M2, "Pure E5M2 training is not supported."
        assert self.amax_compute_algo in ("max", "most_recent")


@dataclass
class Float8CurrentScaling(Recipe):
    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = _FAST
    fp8_gemm_dgrad: MMParams = _EXACT
    fp8_gemm_wgrad: MMParams = _EXACT
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = _EXACT
    fp8_gemm_dgrad: MMParams = _EXACT
    fp8_gemm_wgrad: MMParams = _EXACT
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class MXFP8BlockScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
