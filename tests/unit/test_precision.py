"""Block-wise FP8 against a loop over blocks in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_tempo.types import Bucket
from megatron_tempo.weights.precision import quantised

NAME = "model.layers.0.mlp.down_proj.weight"


def one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in FP8, and its scales."""
    ((quantised_tensors,),) = [list(quantised([[(NAME, matrix)]]))]
    assert [name for name, _ in quantised_tensors] == [NAME, NAME + "_scale_inv"]
    return quantised_tensors[0][1], quantised_tensors[1][1]


def e4m3(codes: Tensor) -> NDArray[np.float64]:
    """The numbers of float8_e4m3fn, read from their bits."""
    bits = codes.view(torch.uint8).numpy().astype(np.int64)
    sign, exponent, mantissa = np.where(bits >> 7, -1.0, 1.0), bits >> 3 & 15, bits & 7
    assert not ((exponent == 15) & (mantissa == 7)).any(), "NaN"
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def assert_quantised(matrix: Tensor, weight: Tensor, scales: Tensor) -> None:
    """Scales are their block's largest magnitude over 448, and each number is the nearest of e4m3, up to a rounding.

    Neighbours in e4m3 are apart by 1/8 of the power of two below them, and by 2^-9 under 2^-6. So rounding is off by
    at most 1/16 of the number, or by 2^-10 scales: all in all by at most 1/28 of the block's largest magnitude.
    """
    rows, columns = matrix.shape
    assert weight.dtype == torch.float8_e4m3fn
    assert weight.shape == matrix.shape
    assert weight.is_contiguous()
    assert scales.dtype == torch.float32
    assert scales.shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    wanted, codes, factors = matrix.double().numpy(), e4m3(weight), scales.double().numpy()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            largest = np.abs(wanted[block]).max()
            if largest == 0:
                assert factors[i, j] == 1
            else:
                assert factors[i, j] == pytest.approx(largest / 448, rel=1e-6)
                assert np.abs(codes[block]).max() == 448
            error = np.abs(codes[block] * factors[i, j] - wanted[block])
            assert (error <= 1.00001 * np.maximum(np.abs(wanted[block]) / 16, factors[i, j] / 1024)).all()
            assert error.max() <= 1.00001 * largest / 28


@pytest.mark.parametrize(
    "shape", [(1, 1), (128, 128), (256, 384), (127, 129), (129, 1), (3, 300), (200, 128), (128, 257)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_agree_with_a_loop_over_them(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    # Magnitudes over many powers of two: some end below what e4m3 has an exponent for.
    powers = torch.randint(-20, 3, shape, generator=generator).float()
    matrix = (torch.randn(shape, generator=generator) * 2**powers).to(dtype)
    before = matrix.clone()
    assert_quantised(matrix, *one(matrix))
    assert torch.equal(matrix, before)


def test_every_block_has_its_own_scale() -> None:
    matrix = torch.ones(256, 256)
    matrix[128:, :128] = 7.0
    matrix[:128, 128:] = -448e-6
    weight, scales = one(matrix)
    assert scales.flatten().tolist() == pytest.approx([1 / 448, 1e-6, 7 / 448, 1 / 448])
    assert weight.float()[[0, 0, 255], [0, 255, 0]].tolist() == [448, -448, 448]


def test_a_block_of_zeros_has_scale_one() -> None:
    matrix = torch.randn(200, 200)
    matrix[128:, :128] = 0
    weight, scales = one(matrix)
    assert_quantised(matrix, weight, scales)
    assert scales[1, 0] == 1
    assert not weight[128:, :128].float().any()


def test_numbers_at_the_ends_of_float32_stay_finite() -> None:
    for value in (1e-45, 1e-40, 1e-37, 3e38):
        weight, scales = one(torch.full((2, 2), value))
        assert torch.isfinite(weight.float()).all()
        assert torch.isfinite(scales).all()
        assert (weight.double() * scales.double()).flatten().tolist() == pytest.approx(
            [value] * 4, rel=1 / 16, abs=1e-40
        )


def test_only_the_layers_matrices_are_quantised() -> None:
    parts = ["model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_norm"]
    left = [f"{name}.weight" for name in [*parts, "model.norm", "lm_head", "score"]]
    taken = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]
    taken += [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    buckets: list[Bucket] = [[(name, torch.randn(4, 4)) for name in part] for part in (left[:3], taken, left[3:])]
    results = list(quantised(buckets))
    assert [name for name, _ in results[0] + results[2]] == left
    for (_, tensor), (_, original) in zip(results[0] + results[2], buckets[0] + buckets[2], strict=True):
        assert tensor is original
    assert [name for name, _ in results[1]] == [part for name in taken for part in (name, name + "_scale_inv")]


def test_a_bucket_is_asked_for_when_it_is_wanted() -> None:
    """Buckets in shared memory are overwritten: none may be asked for ahead."""
    asked = []

    def buckets() -> list[Bucket]:
        for number in range(3):
            asked.append(number)
            yield [(NAME, torch.ones(1, 1))]

    stream = quantised(buckets())
    assert asked == []
    next(stream)
    assert asked == [0]
