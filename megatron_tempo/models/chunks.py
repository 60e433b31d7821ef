"""Virtual pipeline stages: a rank has several chunks of a model, which Megatron's schedule interleaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.kernels import Kernels
from megatron_tempo.models.gpt import LAYER_NAME, PackedGPT


class ModelChunks(nn.Module):
    """A rank's chunks of a model as one network. Names count the layers of all chunks from 0, as weight tables do."""

    def __init__(self, chunks: Sequence[PackedGPT]) -> None:
        super().__init__()
        self._chunks = nn.ModuleList(chunks)
        self._before = [0, *accumulate(len(chunk.decoder.layers) for chunk in chunks)]  # layers before each chunk

    @property
    def chunks(self) -> list[PackedGPT]:
        """In the model's order."""
        return list(self._chunks)  # type: ignore[arg-type]

    @property
    def config(self) -> TransformerConfig:
        """Of all chunks."""
        return self.chunks[0].config

    @property
    def shape(self) -> ModelShape:
        """Of the whole model."""
        return self.chunks[0].shape

    @property
    def kernels(self) -> Kernels:
        """Of all chunks."""
        return self.chunks[0].kernels

    @property
    def token_multiple(self) -> int:
        """As `PackedGPT.token_multiple`."""
        return self.chunks[0].token_multiple

    @property
    def attends_on_grid(self) -> bool:
        """As `PackedGPT.attends_on_grid`."""
        return self.chunks[0].attends_on_grid

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters, by the names that weight tables use."""
        return self._joined([chunk.weights() for chunk in self.chunks])

    def names_in_checkpoints(self) -> dict[nn.Parameter, str]:
        """As `PackedGPT.names_in_checkpoints`."""
        return {one: name for chunk in self.chunks for one, name in chunk.names_in_checkpoints().items()}

    def sharded_state_dict(self, **given: Any) -> dict[str, Any]:
        """Megatron's description of all chunks' weights for a checkpoint."""
        return self._joined([chunk.sharded_state_dict(**given) for chunk in self.chunks])

    def load_state_dict(self, state: dict[str, Any], **given: Any) -> None:  # type: ignore[override]
        """Load what `sharded_state_dict` described and a checkpoint filled."""
        states: list[dict[str, Any]] = [{} for _ in self.chunks]
        for name, value in state.items():
            chunk, own = self._place(name)
            states[chunk][own] = value
        for one, own_state in zip(self.chunks, states, strict=True):
            one.load_state_dict(own_state, **given)

    def _joined(self, dicts: list[dict[str, Any]]) -> dict[str, Any]:
        joined: dict[str, Any] = {}
        for before, one in zip(self._before, dicts, strict=False):
            own = {_renumbered(name, before): value for name, value in one.items()}
            assert not own.keys() & joined.keys()
            joined |= own
        return joined

    def _place(self, name: str) -> tuple[int, str]:
        """The chunk that has a name, and its name there. The embedding is in the first chunk, the head in the last."""
        match = LAYER_NAME.match(name)
        if match is None:
            return (0 if name.startswith("embedding.") else len(self.chunks) - 1), name
        chunk = max(i for i in range(len(self.chunks)) if self._before[i] <= int(match[1]))
        return chunk, _renumbered(name, -self._before[chunk])


class WrappedChunks:
    """A rank's chunks of a model, each with Megatron's wrappers, used as one wrapped network is."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = list(chunks)

    @property
    def buffers(self) -> Iterator[Any]:
        """The gradient buffers of all chunks, except the experts'."""
        return (buffer for chunk in self.chunks for buffer in chunk.buffers)

    @property
    def expert_parallel_buffers(self) -> Iterator[Any]:
        """The gradient buffers of all chunks' experts."""
        return (buffer for chunk in self.chunks for buffer in chunk.expert_parallel_buffers)

    def train(self) -> None:
        """Training mode."""
        for chunk in self.chunks:
            chunk.train()

    def eval(self) -> None:
        """Evaluation mode."""
        for chunk in self.chunks:
            chunk.eval()

    def zero_grad_buffer(self) -> None:
        """Set all gradients to zero."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()


def _renumbered(name: str, by: int) -> str:
    return LAYER_NAME.sub(lambda match: f"decoder.layers.{int(match[1]) + by}.", name, count=1)
