"""Router replay (R3, arXiv 2510.11370): the actor's tokens go through the experts that the engine chose for them.

A router's probabilities stay its own: softmax of its logits over the replayed experts. So its gradients are those of
the current weights, and only the choice is the engine's. A token without a recorded choice, such as the last one of a
response, and padding go where the actor's router sends them.

A micro-batch's choices are part of its `Packing`, which Megatron hands to every layer, also when it computes a layer
again in the backward pass. So a layer sees the same choice both times, whatever other micro-batches ran in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.models.chunks import ModelChunks
from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.types import known_experts

# (scores, k, groups, k of groups) -> the k greatest scores of each token and their experts, [tokens, k] each.
TopK = Callable[..., tuple[Tensor, Tensor]]


class LayerChoice:
    """The choice of one layer's router. It has the method that Megatron's `TopKRouter.router_replay` is asked for."""

    def __init__(self, replay: ReplayedRouters) -> None:
        self.given: Tensor | None = None  # uint8 or int16 [tokens, k], of the micro-batch that is computed
        self._replay = replay

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK = torch.topk,
    ) -> tuple[Tensor, Tensor]:
        """The scores of the chosen experts, and which they are: [tokens, experts] -> [tokens, k] each."""
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.given is None:
            return values, own
        assert self.given.shape == own.shape, "recorded choices of other tokens"
        known, given = known_experts(self.given), self.given.long()
        if self._replay.is_counting:
            agrees = (given.sort(1).values == own.sort(1).values).all(1) & known
            self._replay.counts += torch.stack([agrees.sum(), known.sum()])
        if not self._replay.replays:
            return values, own
        chosen = torch.where(known[:, None], given, own)
        return scores.gather(1, chosen), chosen


class ReplayedRouters:
    """The routers of this rank's part of an actor.

    `replays`: whether they take over recorded choices. `layers`: the network's layers that this rank has, from 0, which
    is also what `Batch.experts` has of each token. `counts`: int64 [2], the choices of (token, layer) that agree with
    the engine's as sets, and those that were compared.
    """

    def __init__(self, net: PackedGPT | ModelChunks, *, replays: bool) -> None:
        self.replays, self.is_counting = replays, False
        numbers = [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in net.chunks]
        self.layers = sorted(number for of in numbers for number in of)
        self._columns = [[self.layers.index(number) for number in of] for of in numbers]  # of each chunk
        self._choices = [[self._attach(layer, i) for i, layer in enumerate(c.decoder.layers)] for c in net.chunks]
        self.counts = torch.zeros(2, dtype=torch.int64, device=next(net.parameters()).device)

    def given_to(self, micro: MicroBatch, chunk: int) -> MicroBatch:
        """The micro-batch with the recorded choices in the layers of a chunk, on its device."""
        if micro.choices is None or not (self.replays or self.is_counting):
            return micro
        experts = micro.choices.of_layers(self._columns[chunk]).to(micro.tokens.device)
        return replace(micro, packing=replace(micro.packing, experts=experts))

    @contextmanager
    def counting(self, *, replays: bool | None = None) -> Iterator[None]:
        """Count agreements inside. `replays`: whether choices are taken over inside; None: as always."""
        before = self.replays
        self.replays = before if replays is None else replays
        self.is_counting = True
        try:
            yield
        finally:
            self.replays, self.is_counting = before, False

    def take_agreement(self) -> float | None:
        """The share of recorded choices that the routers agree with, since the last call. None: none. Collective."""
        counts = self.counts.cpu().clone()
        self.counts.zero_()
        dist.all_reduce(counts)
        return float(counts[0]) / float(counts[1]) if counts[1] else None

    def clear(self) -> None:
        """Forget the choices of the last pass."""
        for choice in (one for of_chunk in self._choices for one in of_chunk):
            choice.given = None

    def _attach(self, layer: Any, index: int) -> LayerChoice:
        """Let a decoder layer's router ask for its choice. `index`: of the layer in its chunk."""
        choice = LayerChoice(self)
        assert not layer.config.moe_router_fusion, "Transformer Engine's fused router does not ask"
        layer.mlp.router.router_replay = choice

        def before(module: object, args: Sequence[Any], given: dict[str, Any]) -> None:
            experts = given["packed_seq_params"].experts
            choice.given = None if experts is None else experts[:, index]

        layer.register_forward_pre_hook(before, with_kwargs=True)
        return choice
