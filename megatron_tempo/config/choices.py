"""The choices of the configuration: what a field may be, member by member."""

from __future__ import annotations

from enum import Enum


class Published(Enum):
    """Models whose shapes `plan` knows without their folders."""

    qwen3_8b = "qwen3_8b"
    qwen3_14b = "qwen3_14b"
    olmo3_7b = "olmo3_7b"


class Device(Enum):
    """Where the trainer computes."""

    auto = "auto"  # cuda where there is one, else cpu
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Number format of the trainer. FP8 is for the products of the layers' linear maps; all else is then as in bf16
    (docs/gpu.md).

    What each FP8 recipe needs stands in `config/recipes.py`.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp8_delayed = "fp8_delayed"  # one scale a tensor, from the largest magnitude of the pass before
    fp8_tensorwise = "fp8_tensorwise"  # one scale a tensor, from its own largest magnitude
    fp8_blockwise = "fp8_blockwise"  # a scale for 128 numbers, for 128 x 128 of a weight
    mxfp8 = "mxfp8"  # a scale for 32 numbers, a power of two

    @property
    def numbers(self) -> Precision:
        """What weights, and everything outside those products, are kept in: fp32 or bf16."""
        return Precision.fp32 if self is Precision.fp32 else Precision.bf16


class Layers(Enum):
    """Who implements the decoder's layers."""

    auto = "auto"  # Transformer Engine on CUDA in bf16 or FP8, where it is installed; else local
    local = "local"  # Megatron's own linear layers, torch's attention
    transformer_engine = "transformer_engine"  # NVIDIA's; FP8 needs it


class EngineKind(Enum):
    """Who generates the responses."""

    embedded = "embedded"  # a transformers model in the trainer's processes
    sglang = "sglang"  # SGLang servers
    vllm = "vllm"  # vLLM servers

    @property
    def is_served(self) -> bool:
        """Whether servers generate, not the trainer's processes."""
        return self is not EngineKind.embedded


class EnginePrecision(Enum):
    """Number format of a server's weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"  # the layers' matrices in blocks of 128 x 128, the rest in bf16


class Transport(Enum):
    """How weights go to a server."""

    group = "group"  # a process group with its workers: NCCL, gloo on a CPU
    shared = "shared"  # memory of this machine that its workers open: a GPU's (CUDA IPC), /dev/shm on a CPU


class Dispatch(Enum):
    """Which request goes next to the server that has the least to do."""

    in_order = "in_order"  # as they came
    longest_first = "longest_first"  # the longest prompt


class Recompute(Enum):
    """Which activations the backward pass makes once more instead of keeping them."""

    none = "none"  # all are kept
    attention = "attention"  # those inside the attention, between its projections
    layers = "layers"  # all but each layer's input


class Logits(Enum):
    """What becomes of the actor's logits between the forward and the backward pass."""

    recomputed = "recomputed"  # made a piece at a time, twice: memory does not grow with tokens times vocabulary
    stored = "stored"  # kept: one product with the output layer less


class Verifier(Enum):
    """Who compares a response with an answer, or with other responses; each is megatron_tempo/rewards/NAME.py."""

    math = "math"  # numbers and LaTeX, by math-verify
    countdown = "countdown"  # the arithmetic of the quickstart's questions
    choice = "choice"  # letters of options
    text = "text"  # a word, a number or a list of them
    grid = "grid"  # a logic grid
    judge = "judge"  # a language model, rewards.judge
