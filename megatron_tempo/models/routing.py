"""The routers of a mixture of experts: what they choose by, the loss that balances their load, and what they report.

A router is Megatron's `TopKRouter`, in fp32, without its auxiliary losses. Megatron scales these by micro-batches, and
ours have different numbers of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


@dataclass(slots=True)
class RoutedTokens:
    """The tokens of a micro-batch that pass this rank's routers, and what the routers report of them.

    A rank has n of them: its share by context and by sequence parallelism. A micro-batch's object travels with its
    `Packing`, so a layer that is computed again in the backward pass finds it, and only writes the same report again.
    """

    real: Tensor  # bool [n]: no padding
    count: int  # real tokens of the micro-batch, over all ranks that share it
    aux_loss_scale: float = 0.0  # weight of a real token's part in the auxiliary loss; 0: there is none
    # By the layer's number from 0: float32 [2 experts + 1], sums over the real tokens: how often each expert is chosen,
    # the probabilities of each expert, and the entropies of the probabilities, in nats. In training passes only.
    reports: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def none(cls) -> RoutedTokens:
        """Of no tokens."""
        return cls(torch.zeros(0, dtype=torch.bool), 0)


class Router(TopKRouter):
    """Chooses the experts of each token, as Megatron's router does, and reports on the micro-batch's `RoutedTokens`."""

    routed: RoutedTokens | None = None  # of the layer's pass that runs

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [n, 1, experts] -> weights of the experts, 0 of those not chosen, and which are chosen: [n, experts].

        Padding is routed like other tokens. It is in neither the reports nor the loss.
        """
        probs, chosen = super().routing(logits)
        if self.config.normalizes_single_expert:
            probs = probs / probs.sum(-1, keepdim=True)
        if self.routed is None or not self.training:
            return probs, chosen
        routed = self.routed
        assert self.layer_number is not None
        logprobs = logits.view(-1, logits.shape[-1]).float().log_softmax(-1)
        real = routed.real[:, None]
        with torch.no_grad():
            load = (chosen & real).sum(0).float()
            shares = logprobs.exp() * real
            entropy = -(shares * logprobs).sum()
            routed.reports[self.layer_number - 1] = torch.cat([load, shares.sum(0), entropy[None]])
        if routed.aux_loss_scale and torch.is_grad_enabled():
            loss = self._aux_loss(load, (logprobs.exp() * real).sum(0), routed)
            probs = _WithLoss.apply(probs, loss)
        return probs, chosen

    def _aux_loss(self, load: Tensor, shares: Tensor, routed: RoutedTokens) -> Tensor:
        """This rank's part of `aux_loss` of the micro-batch, times its real tokens and the scale. Collective."""
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(load, group=self.tp_cp_group)
        return aux_loss(load, shares, max(routed.count, 1), self.topk) * routed.count * routed.aux_loss_scale


def aux_loss(load: Tensor, shares: Tensor, tokens: int, per_token: int) -> Tensor:
    """The auxiliary loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) for one layer; 1 if balanced.

    experts * sum over the experts of (share of all choices that fall on it) * (its mean probability). `load`,
    `shares`: float [experts], sums of choices and of probabilities over the `tokens`.
    """
    return len(load) / (per_token * tokens**2) * (load * shares).sum()


class _WithLoss(torch.autograd.Function):
    """Passes a tensor on. In the backward pass, `loss` is added to the loss of the network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


class RoutedLayer(TransformerLayer):
    """A decoder layer with a mixture of experts, whose router knows the micro-batch that passes."""

    def forward(self, *args: Any, **given: Any) -> Any:
        """`packed_seq_params`: the micro-batch's `Packing`."""
        router = self.mlp.router
        router.routed = given["packed_seq_params"].routed
        try:
            return super().forward(*args, **given)
        finally:
            router.routed = None


@dataclass(frozen=True, slots=True)
class RouterReport:
    """What all routers report of a mini-batch, or of several."""

    sums: Tensor  # float [layers, 2 experts + 1]: as `RoutedTokens.reports`, over all ranks
    tokens: int  # real tokens
    per_token: int  # experts of each token

    def __add__(self, other: RouterReport) -> RouterReport:
        return RouterReport(self.sums + other.sums, self.tokens + other.tokens, self.per_token)

    def metrics(self) -> dict[str, float]:
        """By name; docs/monitoring.md describes them."""
        experts = self.sums.shape[1] // 2
        load, shares, entropy = self.sums.double().split((experts, experts, 1), dim=1)
        relative = load.max(1).values / load.mean(1).clamp(min=1e-9)  # of each layer
        losses = [aux_loss(*one, self.tokens, self.per_token) for one in zip(load, shares, strict=True)]
        return {
            "router_load_max": float(relative.mean()),
            "router_load_max_layer": float(relative.max()),
            "router_unused_experts": float((load == 0).double().mean()),
            "router_dropped": 1.0 - float(load.sum()) / (len(load) * self.per_token * self.tokens),
            "router_entropy": float(entropy.sum()) / (len(load) * self.tokens),
            "router_aux_loss": float(torch.stack(losses).mean()),
        }


def layer_reports(parts: list[RoutedTokens], layers: int, experts: int) -> Tensor:
    """The sums of `RoutedTokens.reports` over micro-batches: float32 [layers, 2 experts + 1] on the CPU.

    Layers of other pipeline stages are zero.
    """
    total = torch.zeros(layers, 2 * experts + 1)
    numbers = sorted({layer for part in parts for layer in part.reports})
    if numbers:
        own = torch.stack([torch.stack([part.reports[layer] for part in parts]).sum(0) for layer in numbers])
        total[numbers] = own.cpu()
    return total
