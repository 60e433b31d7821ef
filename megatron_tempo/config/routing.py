"""How the choices of an engine's routers are stored: which experts each token of a rollout went through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tempo.config.choices import RouterReplay
from megatron_tempo.config.model_shape import ModelShape, read_model_shape
from megatron_tempo.config.schema import Config


@dataclass(frozen=True, slots=True)
class RoutingFormat:
    """`layers` * `per_token` numbers of experts for each token, as uint8 or int16.

    >>> RoutingFormat(layers=48, per_token=8, experts=128).bytes_per_token
    384
    """

    layers: int
    per_token: int  # experts of a token in each layer; they differ
    experts: int  # of each layer

    @staticmethod
    def of(shape: ModelShape) -> RoutingFormat | None:
        """None for a model without a mixture of experts."""
        experts = shape.experts
        return None if experts is None else RoutingFormat(shape.layers, experts.per_token, experts.count)

    @property
    def itemsize(self) -> int:
        """Bytes of an expert's number.

        With 256 experts one byte has no number left for `types.UNKNOWN_EXPERT`. But a token's experts differ, unless it
        has only one, so 255 in place of all of them still is one.
        """
        return 1 if self.experts < 256 + (self.per_token > 1) else 2

    @property
    def bytes_per_token(self) -> int:
        """Of rollouts in host memory and on disk."""
        return self.layers * self.per_token * self.itemsize


def recorded_routing(config: Config) -> RoutingFormat | None:
    """The format of the choices that the run's engine returns; None if it returns none."""
    if config.model.router_replay is RouterReplay.off:
        return None
    return RoutingFormat.of(read_model_shape(Path(config.model.path)))
