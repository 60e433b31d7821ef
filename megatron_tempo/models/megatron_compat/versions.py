"""What differs between the two versions of Megatron-Core: 0.16.1, for Python 3.11, and 0.19.2, for later ones.

The functions here work with both. What each of them says of a version is all that depends on it: when 0.16.1 goes, what
it needs is removed here.
"""

from __future__ import annotations

import logging
from copy import copy
from functools import partial
from typing import Any

from megatron.core import package_info
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

IS_0_16 = (package_info.MAJOR, package_info.MINOR) < (0, 17)


def mlp_spec(*, linear_fc1: Any, activation_func: Any, linear_fc2: Any) -> Any:
    """The spec of an MLP of these modules in a decoder layer.

    The order of the fields of `MLPSubmodules` (transformer/mlp.py) depends on the version. 0.19 takes a `ModuleSpec` of
    an MLP, but warns at each layer (transformer/transformer_layer.py, `TransformerLayer`). 0.16 has no
    `as_mlp_submodule`.
    """
    parts = MLPSubmodules(linear_fc1=linear_fc1, activation_func=activation_func, linear_fc2=linear_fc2)
    return ModuleSpec(MLP, submodules=parts) if IS_0_16 else partial(MLP.as_mlp_submodule, submodules=parts)


def moe_spec(*, router: Any, experts: type, linear_fc1: Any, activation_func: Any, linear_fc2: Any) -> ModuleSpec:
    """The spec of a mixture of experts in a decoder layer. `experts`: the class that holds those of a rank.

    0.16 builds the module of a `ModuleSpec` if it is `MoELayer` itself, 0.19 calls the spec; the same for the experts.
    """
    parts = MLPSubmodules(linear_fc1=linear_fc1, activation_func=activation_func, linear_fc2=linear_fc2)
    return ModuleSpec(MoELayer, submodules=MoESubmodules(experts=ModuleSpec(experts, submodules=parts), router=router))


class Operation(nn.Module):
    """An operation without parameters, which a subclass computes in `forward`, as Megatron's MLP takes it.

    0.19 (transformer/mlp.py, `apply_module`) refuses what is not a module. 0.16 (transformer/mlp.py,
    `sharded_state_dict`) asks each module of an MLP for its part of a checkpoint by Megatron's method.
    """

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}


def config_of_attention(config: TransformerConfig, submodules: SelfAttentionSubmodules) -> TransformerConfig:
    """The config for an attention of these modules: `config`, or a copy for 0.19 if the model's must stay without
    `qk_layernorm`.

    0.19 (transformer/attention.py, `SelfAttention`) refuses norms of queries and keys without it. Both versions
    (distributed/finalize_model_grads.py) read it in the model's config, and sum the gradients of these norms over the
    tensor ranks if it is set. That is wrong for norms that are sharded over these ranks.
    """
    if IS_0_16 or config.qk_layernorm or submodules.q_layernorm is None:
        return config
    own = copy(config)
    own.qk_layernorm = True
    return own


def quiet_deprecations() -> None:
    """Keep Megatron-Core's advice to its own developers out of the user's console. A second call does nothing.

    0.19 warns at each start: of `GPTModel` (models/gpt/gpt_model.py), which it keeps, of gradient buffers whose layout
    it computes itself (distributed/distributed_data_parallel.py), and of common.pt, which our checkpoints have for 0.16
    (dist_checkpointing/strategies/common.py). A user can do nothing about them.
    """
    for module, _ in _DEVELOPERS_ADVICE:
        logging.getLogger(f"megatron.core.{module}").addFilter(_is_for_users)


_DEVELOPERS_ADVICE = (
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("dist_checkpointing.strategies.common", "load_common is deprecated"),
)


def _is_for_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(tuple(text for _, text in _DEVELOPERS_ADVICE))
