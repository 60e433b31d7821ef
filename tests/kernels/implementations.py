"""The implementations of the kernels, so that one test checks all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.kernels import REFERENCE, Kernels, kernels_for
from megatron_tempo.kernels.rows import Rows


@dataclass(frozen=True, slots=True)
class Implementation:
    """`dtype`: the type of its floats. `tolerance`: the allowed error, relative and absolute, compared with float64."""

    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    tolerance: float

    def __call__(self, numbers: Tensor | Sequence[float]) -> Tensor:
        """A copy of the numbers on the device and in the type of this implementation. Integers stay integers."""
        tensor = torch.as_tensor(numbers).detach().clone()
        floating = tensor.is_floating_point() or not tensor.numel()
        return tensor.to(self.device, self.dtype if floating else None)

    def rows(self, lengths: Sequence[int]) -> Rows:
        return Rows.of(torch.tensor(lengths, dtype=torch.int64), self.device)

    def close(self, actual: Tensor, expected: Tensor | Sequence[Any]) -> None:
        wanted = torch.as_tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(
            actual.detach().cpu().double(), wanted.cpu(), rtol=self.tolerance, atol=self.tolerance
        )


def plain() -> Implementation:
    return Implementation(REFERENCE, torch.device("cpu"), torch.float64, 1e-10)


def triton() -> Implementation:
    """Triton's kernels: on CUDA if available, else interpreted on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Implementation(kernels_for(torch.device("cuda")), device, torch.float32, 2e-5)


CUDA = torch.cuda.is_available()
IMPLEMENTATIONS = [
    pytest.param(plain, id="plain"),
    pytest.param(triton, id="triton", marks=pytest.mark.skipif(CUDA, reason="kernels are not interpreted on CUDA")),
    pytest.param(triton, id="cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA")]),
]
