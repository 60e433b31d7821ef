"""What an engine's steps cost: decoding by a roofline, prefill by its arithmetic.

A decoding step reads the weights once, and the keys and values of all tokens in the cache; or it takes as long as its
arithmetic, if that is longer. Launches, scheduling and sampling are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.schema import Config
from megatron_tempo.plan import engine
from megatron_tempo.plan.parameters import active_parameters, experts, total_parameters


@dataclass(frozen=True, slots=True)
class DecodeCosts:
    """Seconds of a server, or of a process with the embedded engine.

    >>> DecodeCosts(weights=0.5, full=0.25, windowed=0.0, row=1.0, window=None).step(rows=1, cached=6.0, inside=6.0)
    2.0
    """

    weights: float  # to read the weights once, without experts
    full: float  # to read the keys and values of a cached token, in layers that attend to all tokens
    windowed: float  # the same, in layers that attend to a window
    row: float  # the arithmetic of a token, decoded or prefilled
    window: int | None  # tokens of that window
    experts: float = 0.0  # to read all experts once
    unused: float = 1.0  # share of the experts that a token does not choose

    def step(self, rows: float, cached: float, inside: float) -> float:
        """Seconds of a step that decodes a token of each of `rows` rows.

        cached: tokens in the cache of these rows; inside: those of them that are inside their rows' window. Of a
        mixture of experts, the experts are read that at least one of the rows chooses, if all are equally likely.
        """
        weights = self.weights + self.experts * (1 - self.unused**rows)
        return max(weights + self.full * cached + self.windowed * inside, rows * self.row)

    def inside(self, length: float) -> float:
        """Tokens inside the window of a row of `length` tokens."""
        return min(length, self.window or length)


def decode_costs(config: Config, shape: ModelShape) -> DecodeCosts:
    """The costs of the configured engine, at the cluster's rates.

    The embedded engine accesses its cache more than once per step: it repeats it to the number of query heads (read,
    written, and read as often).
    """
    cluster = config.cluster
    assert cluster is not None
    alone = not config.rollout.is_served
    tensor = 1 if alone else config.rollout.servers.tensor
    memory = cluster.memory_tbs * 1e12 * cluster.memory_share
    handled = 1 + 2 * shape.heads / shape.groups if alone else 1
    token = handled * engine.token_bytes(config, shape, tensor) / memory
    windowed = shape.windowed_layers / shape.layers
    rate = tensor * cluster.bf16_tflops * 1e12 * cluster.compute_share
    weights = engine.weight_bytes(config, shape) / tensor / memory
    own = shape.experts
    of_experts = weights * shape.layers * experts(shape) / total_parameters(shape)
    return DecodeCosts(
        weights=weights - of_experts,
        full=token * (1 - windowed),
        windowed=token * windowed,
        row=2.0 * active_parameters(shape) / rate,
        window=shape.window,
        experts=of_experts,
        unused=1.0 if own is None else 1 - own.per_token / own.count,
    )
