"""Requirements of Transformer Engine (TE) and its FP8 recipes, from the sources of TE 2.11 and Megatron-Core.

Those of Megatron-Core 0.16.1 and 0.19.2 are the same.

GPU and CUDA: the `check_*_support` functions of transformer_engine/pytorch/quantization.py. TE's version:
`get_fp8_recipe` in megatron/core/fp8_utils.py. Multiples: `assert_dim_for_fp8_exec` of TE's pytorch/utils.py requires
16 of a product's inner dimension (8 of the outer one, which is the inner one of a backward product). The quantizers'
`is_quantizable` requires whole blocks, of 32 or 128 numbers, in tensors that are gathered over tensor ranks. For
blockwise, Megatron's `get_fp8_align_size` returns 16; we require whole blocks everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tempo.config.choices import Precision

Version = tuple[int, ...]

# The oldest TE that is supported: since this version its FP8 recipes are as below.
TE_VERSION: Version = (2, 1)
BF16_CAPABILITY: Version = (8, 0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """An FP8 recipe.

    >>> RECIPES[Precision.fp8_blockwise].multiple
    128
    """

    megatron: str  # TransformerConfig.fp8_recipe
    format: str  # TransformerConfig.fp8: e4m3, or hybrid with e5m2 for gradients
    multiple: int  # of a linear layer's inputs and outputs on a rank, and of its tokens
    capability: Version  # the lowest compute capability of a GPU
    below: Version | None  # the first capability that is too new
    te: Version
    cuda: Version | None = None  # that torch is built with


RECIPES = {
    Precision.fp8_delayed: Recipe("delayed", "hybrid", 16, (8, 9), None, (2, 1)),
    Precision.fp8_tensorwise: Recipe("tensorwise", "hybrid", 16, (8, 9), None, (2, 2)),
    # On Blackwell TE computes it by MXFP8 ("Supported devices" in its documentation), which 12.0 does not have.
    Precision.fp8_blockwise: Recipe("blockwise", "e4m3", 128, (9, 0), (12, 0), (2, 3), (12, 9)),
    Precision.mxfp8: Recipe("mxfp8", "e4m3", 32, (10, 0), (12, 0), (2, 1)),
}

# Compute capabilities by NVIDIA's list, https://developer.nvidia.com/cuda-gpus.
GPUS: dict[str, Version] = {
    "A100": (8, 0),
    "A40": (8, 6),
    "L4": (8, 9),
    "L40": (8, 9),
    "L40S": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "H20": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
}


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def wanted_gpu(recipe: Recipe) -> str:
    """A text: which compute capabilities the recipe runs on."""
    least = f"compute capability {dotted(recipe.capability)} or more"
    return least if recipe.below is None else f"{least}, below {dotted(recipe.below)}"


def runs_on(recipe: Recipe, capability: Version) -> bool:
    return recipe.capability <= capability and (recipe.below is None or capability < recipe.below)
