"""The choices of configuration fields."""

from __future__ import annotations

from enum import Enum


class LogLevel(Enum):
    """Messages on the console, from the least severe ones. The names are those of the standard library's logging."""

    info = 20  # all: each iteration, alerts, what has been restarted or left out
    warning = 30  # warnings, alerts and errors
    error = 40  # errors


class Published(Enum):
    """Models that `plan` knows without their folders."""

    qwen3_4b = "qwen3_4b"
    qwen3_8b = "qwen3_8b"
    qwen3_14b = "qwen3_14b"
    qwen3_32b = "qwen3_32b"
    olmo3_7b = "olmo3_7b"
    qwen3_30b_a3b = "qwen3_30b_a3b"
    qwen2_5_1_5b = "qwen2_5_1_5b"
    qwen2_5_3b = "qwen2_5_3b"
    qwen2_5_7b = "qwen2_5_7b"
    qwen2_5_14b = "qwen2_5_14b"
    qwen2_5_32b = "qwen2_5_32b"
    llama3_2_1b = "llama3_2_1b"
    llama3_2_3b = "llama3_2_3b"
    llama3_1_8b = "llama3_1_8b"
    llama3_1_70b = "llama3_1_70b"


class Device(Enum):
    """Where the trainer computes."""

    auto = "auto"  # cuda where there is one, else cpu
    cpu = "cpu"
    cuda = "cuda"


class Precision(Enum):
    """Number format of the trainer. FP8 applies to the products of the layers' linear maps; the rest is as in bf16
    (docs/gpu.md).

    `config/recipes.py` has the requirements of each FP8 recipe.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp8_delayed = "fp8_delayed"  # one scale per tensor, from the largest magnitude of the previous pass
    fp8_tensorwise = "fp8_tensorwise"  # one scale per tensor, from its own largest magnitude
    fp8_blockwise = "fp8_blockwise"  # one scale per 128 numbers, per 128 x 128 of a weight
    mxfp8 = "mxfp8"  # one scale per 32 numbers, a power of two

    @property
    def numbers(self) -> Precision:
        """Number format of weights and of everything outside those products: fp32 or bf16."""
        return Precision.fp32 if self is Precision.fp32 else Precision.bf16


class Layers(Enum):
    """The implementation of the decoder's layers."""

    auto = "auto"  # Transformer Engine on CUDA in bf16 or FP8 if it is installed; else local
    local = "local"  # Megatron's own linear layers, torch's attention
    transformer_engine = "transformer_engine"  # NVIDIA's; FP8 needs it


class EngineKind(Enum):
    """What generates the responses."""

    embedded = "embedded"  # a transformers model in the trainer's processes
    sglang = "sglang"  # SGLang servers
    vllm = "vllm"  # vLLM servers

    @property
    def is_served(self) -> bool:
        """Whether servers generate, not the trainer's processes."""
        return self is not EngineKind.embedded


class StaleGroups(Enum):
    """What happens to a prompt group whose tokens would exceed `rollout.max_staleness` when it is trained on."""

    wait = "wait"  # none gets so old: an iteration waits for the groups that it is the last one for
    ask_again = "ask_again"  # its prompt is asked again, with the current weights
    drop = "drop"  # it is not trained on; the next prompt of the set takes its place


class EnginePrecision(Enum):
    """Number format of a server's weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"  # the layers' matrices in blocks of 128 x 128, the rest in bf16


class Placement(Enum):
    """Where servers are, next to the trainer."""

    disaggregated = "disaggregated"  # on GPUs of their own; both keep their memory
    colocated = "colocated"  # on the trainer's GPUs, by turns: a server sleeps while the trainer works


class Transport(Enum):
    """How weights go to a server."""

    group = "group"  # a process group with its workers: NCCL, or gloo on a CPU
    shared = "shared"  # memory of the server's machine: CUDA IPC on a GPU, /dev/shm on a CPU


class OnDrift(Enum):
    """What happens when the engine's weights or log-probabilities are not the actor's."""

    stop = "stop"  # the run stops
    resync = "resync"  # all weights are sent once more; the run stops if that does not help


class Dispatch(Enum):
    """Which request is sent next, to the server with the lowest load."""

    in_order = "in_order"  # the oldest
    longest_first = "longest_first"  # the longest prompt


class Recompute(Enum):
    """Which activations the backward pass recomputes instead of storing them."""

    none = "none"  # all are stored
    attention = "attention"  # those inside the attention, between its projections
    layers = "layers"  # all except each layer's input


class RouterReplay(Enum):
    """What happens to the experts that the engine's routers chose for each token.

    Replay is R3 ("rollout routing replay", arXiv 2510.11370). The critic has routers of its own, which always choose.
    """

    off = "off"  # the engine does not return them; the trainer's routers choose
    rollout = "rollout"  # the engine returns them, and metrics compare them with the actor's, which the actor uses
    on = "on"  # the actor's old log-probabilities and updates use the engine's choices


class Fusions(Enum):
    """Operations of a decoder layer that run as one kernel: rotary embedding, SwiGLU, and a weight gradient with its
    addition to the gradients in fp32."""

    auto = "auto"  # all three with Transformer Engine's layers; weight gradients with Apex's kernel; else none
    none = "none"  # one kernel for each operation, as without them


class Logits(Enum):
    """Whether the actor's logits are stored between the forward and the backward pass."""

    recomputed = "recomputed"  # computed in chunks, twice: memory does not grow with tokens times vocabulary
    stored = "stored"  # saves one product with the output layer


class Verifier(Enum):
    """Compares a response with an answer, or with other responses; each is megatron_tempo/rewards/NAME.py."""

    math = "math"  # numbers and LaTeX, by math-verify
    countdown = "countdown"  # the arithmetic of the quickstart's questions
    choice = "choice"  # letters of multiple-choice options
    text = "text"  # a word, a number or a list of them
    grid = "grid"  # a logic grid
    judge = "judge"  # a language model (rewards.judge)
    code = "code"  # a Python program, run against tests (rewards.code)


class SandboxKind(Enum):
    """Where the programs of `verifier=code` run (docs/code.md)."""

    auto = "auto"  # bubblewrap where it works, else subprocess
    bubblewrap = "bubblewrap"  # namespaces
    subprocess = "subprocess"  # a process that locks itself
