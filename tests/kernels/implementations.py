"""The kernels' implementations side by side, so that one test says of each what it must give."""

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
    """`dtype` is what its floats are in, `tolerance` how far a result may be from float64's, relative and absolute."""

    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    tolerance: float

    def __call__(self, numbers: Tensor | Sequence[float]) -> Tensor:
        """A copy of the numbers as this implementation takes them; integers stay integers."""
        tensor = torch.as_tensor(numbers).detach().clone()
        floating = tensor.is_floating_point() or not tensor.numel()
        return tensor.to(self.device, self.dtype if floating else None)

    def rows(self, lengths: Sequence[int]) -> Rows:
        return Rows.of(torch.tensor(lengths, dtype=torch.int64), self.device)

    def close(self, found: Tensor, expected: Tensor | Sequence[Any]) -> None:
        wanted = torch.as_tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(
            found.detach().cpu().double(), wanted.cpu(), rtol=self.tolerance, atol=self.tolerance
        )


def plain() -> Implementation:
    return Implementation(REFERENCE, torch.device("cpu"), torch.float64, 1e-10)


def triton() -> Implementation:
    """Triton's kernels: on CUDA where there is one, interpreted on the CPU elsewhere."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Implementation(kernels_for(torch.device("cuda")), device, torch.float32, 2e-5)


CUDA = torch.cuda.is_available()
IMPLEMENTATIONS = [
    pytest.param(plain, id="plain"),
    pytest.param(triton, id="triton", marks=pytest.mark.skipif(CUDA, reason="with CUDA nothing is interpreted")),
    pytest.param(triton, id="cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA")]),
]
