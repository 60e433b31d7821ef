"""Megatron-Core's token dispatcher of a mixture of experts, and what it keeps between passes."""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

# What a pass leaves: where each row of its last micro-batch went, and with which weight.
_OF_A_PASS = ("probs", "routing_map", "reversed_local_input_permutation_mapping", "tokens_per_expert")


def drop_routes(net: nn.Module) -> None:
    """Free what the dispatchers of a network keep of the last micro-batch. The next pass makes it anew.

    Megatron-Core 0.16.1 and 0.19.2 (transformer/moe/token_dispatcher.py, `MoEAlltoAllTokenDispatcher`) keep it as
    attributes. Without this, a model in host memory still takes GPU memory: 58 MB a layer of Qwen3-30B-A3B.
    """
    for module in net.modules():
        if isinstance(module, MoELayer):
            vars(module.token_dispatcher).update(dict.fromkeys(_OF_A_PASS))
