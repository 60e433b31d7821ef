"""The parts in the order in which they run: what tells most in the least time comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEGATRON = ("torch", "megatron.core", "hydra", "omegaconf", "transformers", "safetensors", "psutil")
TRAINER = (*MEGATRON, "math_verify", "latex2sympy2_extended", "antlr4", "scipy", "sklearn", "matplotlib", "pyarrow")


@dataclass(frozen=True, slots=True)
class Part:
    """`seconds`: its time limit. `needs`: modules that it imports; `cuda_needs`: those that it needs on a GPU only."""

    name: str
    shows: str
    seconds: float
    needs: Sequence[str] = ("torch",)
    cuda_needs: Sequence[str] = ("triton",)


PARTS = (
    Part("versions", "GPU, driver, packages, and the environment variables that change results", 60, (), ()),
    Part("kernels", "each kernel against float64 at full size: error, time, bytes", 120),
    Part(
        "steps", "three steps of actor and critic: bf16 against fp32, recomputation, offload, a resume", 120, MEGATRON
    ),
    Part("memory", "four layers of Qwen3-8B, 18,432 tokens: peaks against the plan, syncs, a profile", 150, MEGATRON),
    Part("ranks", "two ranks on one GPU: TP2 + SP, PP2, DP2, CP2, and the weights they stream", 120, MEGATRON),
    Part(
        "transfer", "a bucket of 512 MB from a sender to a receiver, and a receiver that is killed", 90, ("torch",), ()
    ),
    Part("quickstart", "the quickstart in bf16, cut short", 150, TRAINER),
    Part("kernel_tests", "the tests that are marked gpu", 180, MEGATRON),
    Part("bench", "tools/bench_kernels.py, the smallest sizes first", 120),
)


def named(names: Sequence[str]) -> list[Part]:
    """The parts of these names in their order; all if there is no name. Raises KeyError for an unknown name."""
    known = {part.name: part for part in PARTS}
    for name in names:
        known[name]
    return [part for part in PARTS if not names or part.name in names]
