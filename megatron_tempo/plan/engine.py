"""Memory of the engine: of a server's GPU, or of the transformers model in a trainer process.

Keys and values take 2 layers k / t numbers per token and GPU: k is the width of the key projection, t the server's
tensor parallelism. If t exceeds the number of key-value heads, heads are repeated. Windowed layers are counted as if
they cached all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tempo.config.choices import EngineKind, EnginePrecision
from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.schema import Config
from megatron_tempo.config.sizes import CACHE_ROOM
from megatron_tempo.plan.layout import row_tokens
from megatron_tempo.plan.parameters import experts, layer_parameters, router, total_parameters
from megatron_tempo.plan.split import Split

# Share of a GPU's memory that a server takes unless its arguments set one: vLLM's default, and about SGLang's.
FRACTION = 0.9
FRACTION_OPTIONS = {EngineKind.vllm: "--gpu-memory-utilization", EngineKind.sglang: "--mem-fraction-static"}


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on a GPU that generates."""

    weights: float
    cache: float
    sampling: float  # in addition to the cache, while tokens are sampled
    rows: float  # rows of full length that fit at a time: in the whole engine, one server, one process
    sequence: float  # of one such row

    @property
    def total(self) -> float:
        return self.weights + self.cache


def precision_of(config: Config) -> EnginePrecision:
    """Precision of the engine's weights, as rollout.build.engine_precision, which imports torch (a test compares)."""
    servers = config.rollout.servers if config.rollout.is_served else None
    return (servers and servers.precision) or EnginePrecision[config.run.precision.numbers.name]


def weight_bytes(config: Config, shape: ModelShape) -> float:
    """Bytes of the whole model in the engine's precision. In fp8 the layers' matrices take a byte per number and a
    scale of four bytes per block of 128 x 128; the rest is bf16."""
    precision, total = precision_of(config), total_parameters(shape)
    if precision is EnginePrecision.fp8:
        matrices = shape.layers * (layer_parameters(shape) + experts(shape) - router(shape) - 2 * shape.hidden)
        return matrices * (1 + 4 / 128**2) + 2.0 * (total - matrices)
    return {EnginePrecision.fp32: 4.0, EnginePrecision.bf16: 2.0}[precision] * total


def token_bytes(config: Config, shape: ModelShape, tensor: int = 1) -> float:
    """Bytes of keys and values of one token on a GPU. The cache of an FP8 engine is bf16."""
    size = 4 if precision_of(config) is EnginePrecision.fp32 else 2
    return 2.0 * size * shape.layers * shape.head_dim * max(1.0, shape.groups / tensor)


def fraction_of(config: Config) -> float:
    """The share of a GPU's memory that a server is configured to take."""
    words = [word for text in config.rollout.servers.arguments for word in text.replace("=", " ").split()]
    for option in FRACTION_OPTIONS.values():
        if option in words[:-1]:
            return float(words[words.index(option) + 1])
    return FRACTION


def server(config: Config, shape: ModelShape) -> EngineMemory:
    """A server's GPU: its share of the memory contains the weights, and the cache takes the rest."""
    assert config.cluster is not None
    tensor = config.rollout.servers.tensor
    weights = weight_bytes(config, shape) / tensor
    sequence = token_bytes(config, shape, tensor) * row_tokens(config)
    cache = max(0.0, fraction_of(config) * config.cluster.memory_gb * 1e9 - weights)
    return EngineMemory(weights, cache, 0.0, cache / sequence, sequence)


def embedded(config: Config, shape: ModelShape, rows: int, least: int, split: Split) -> EngineMemory:
    """The whole model in every process (rollout/embedded.py), for `rows` rows over all processes.

    A process decodes `rollout.batch_rows` rows together, or all its rows if there are fewer, but at least `least`. On
    top of the cache: when its room is used up, the keys or values of one layer are copied, and for each token both are
    repeated to the number of query heads. While it is sampled, a row has its logits in fp32 twice and in float64 three
    times: 32 bytes per token of the vocabulary.
    """
    rows = max(least, min(config.rollout.batch_rows, -(-rows // split.trainers)))
    sequence = token_bytes(config, shape) * (row_tokens(config) + CACHE_ROOM)
    copies = 1 + (0.5 + shape.heads / shape.groups) / shape.layers
    drawing = 32.0 * rows * shape.vocab
    return EngineMemory(weight_bytes(config, shape), rows * sequence * copies, drawing, rows, sequence)
