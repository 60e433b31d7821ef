"""Runs Megatron-Core on a machine without CUDA, by redirecting its CUDA calls to the CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
# Megatron-Core's modules that create tensors with device="cuda", as far as a run here gets to them.
_MODULES = (
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "rerun_state_machine",
    "tensor_parallel.data",
    "tensor_parallel.random",
    "transformer.utils",
    "utils",
)
_FACTORIES = ("arange", "as_tensor", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros")


def install_cpu_backend() -> None:
    """Redirect Megatron-Core's CUDA calls in this process to the CPU. A second call does nothing.

    Megatron-Core 0.16.1 uses the device "cuda" in many calls (optimizer/clip_grads.py, pipeline_parallel/schedules.py),
    and its optimizers accept only CUDA's tensor types (optimizer/distrib_optimizer.py, `model_param.type()`). Without
    this, no model can be built without a GPU.

    Only names are replaced, so that other calls cost nothing more. A call that is missed here fails, because there is
    no CUDA.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend of Megatron-Core must not be installed where CUDA is available")
    if isinstance(getattr(torch.cuda, "current_device", None), _Replacement):
        return
    for name, answer in _CUDA_REPLACEMENTS.items():
        setattr(torch.cuda, name, _Replacement(answer))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.type = _type  # type: ignore[method-assign, assignment]
    on_cpu = _TorchOnCpu()
    for name in _MODULES:
        vars(importlib.import_module(f"megatron.core.{name}"))["torch"] = on_cpu

    from megatron.core.tensor_parallel import random as megatron_random

    _replace_in_experts()
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _replace_in_experts() -> None:
    """Replace what a mixture of experts takes of CUDA and of Transformer Engine.

    The dispatcher copies the sizes of its messages to the host on a stream of its own (transformer/moe/
    token_dispatcher.py, `cuda_dtoh_stream`), and only CUDA tensors, so gloo would get tensors for lists. 0.16.1 lacks
    the name of Transformer Engine's product where that is absent (transformer/moe/moe_utils.py, `te_general_gemm`).
    gloo gathers and scatters equal parts only, but the ranks that share an expert's matrices have different numbers of
    tokens for it (tensor_parallel/mappings.py).
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    mappings._gather_along_first_dim = _with_sizes(mappings._gather_along_first_dim, _gathered)
    mappings._reduce_scatter_along_first_dim = _with_sizes(mappings._reduce_scatter_along_first_dim, _scattered)

    moe_utils.te_general_gemm = None
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _Stream()
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_Collective = Callable[[Tensor, Any, list[int]], Tensor]  # of a tensor, a group and the size of each rank's part


def _with_sizes(equal: Callable[..., Tensor], unequal: _Collective) -> Callable[..., Tensor]:
    """Megatron's function `equal`, except where sizes are given."""

    def collective(tensor: Tensor, group: Any, sizes: list[int] | None = None, *others: Any, **named: Any) -> Tensor:
        given = named.pop("input_split_sizes", named.pop("output_split_sizes", sizes))
        if given is None or group.size() == 1:
            return equal(tensor, group, None, *others, **named)
        return unequal(tensor, group, given)

    return collective


def _gathered(tensor: Tensor, group: Any, sizes: list[int]) -> Tensor:
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _scattered(tensor: Tensor, group: Any, sizes: list[int]) -> Tensor:
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()


class _Stream:
    """A CUDA stream or event on which everything is complete when it is called."""

    def wait_stream(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Stream:
        return self


class _Replacement:
    """A replacement for a function of torch.cuda. Its type shows that it was installed."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)


_CUDA_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "current_device": lambda: "cpu",
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    "current_stream": lambda *_: None,
    "stream": lambda *_: contextlib.nullcontext(),
}


class _TorchOnCpu(ModuleType):
    """torch for Megatron's modules: what they create on the device "cuda" is on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        vars(self).update(vars(torch))
        vars(self).update((name, _on_cpu(getattr(torch, name))) for name in _FACTORIES)

    def __getattr__(self, name: str) -> Any:  # torch imports some of its modules when they are first used
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


_torch_type = torch.Tensor.type


def _type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type`, but the name of a tensor's type is CUDA's, which Megatron's optimizers check."""
    if not args and not kwargs and self.dtype in _CUDA_TYPE_NAMES:
        return _CUDA_TYPE_NAMES[self.dtype]
    return _torch_type(self, *args, **kwargs)
