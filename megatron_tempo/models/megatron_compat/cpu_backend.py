"""Runs Megatron-Core on a machine without CUDA, by redirecting its CUDA calls to the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def install_cpu_backend() -> None:
    """Redirect Megatron-Core's CUDA calls in this process to the CPU. A second call does nothing.

    Megatron-Core 0.16.1 uses the device "cuda" in many calls (tensor_parallel/random.py,
    distributed/param_and_grad_buffer.py), and its optimizers accept only CUDA's tensor types
    (optimizer/distrib_optimizer.py, `model_param.type()`). Without this, no model can be built without a GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend of Megatron-Core must not be installed where CUDA is available")
    if isinstance(getattr(torch.cuda, "current_device", None), _Replacement):
        return
    for name, answer in _CUDA_REPLACEMENTS.items():
        setattr(torch.cuda, name, _Replacement(answer))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _CudaNamesOnCpu().__enter__()


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


class _CudaNamesOnCpu(TorchFunctionMode):
    """Rewrites device="cuda" to the CPU, and gives tensor types CUDA's names, which Megatron's optimizers check."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs and "cuda" in str(kwargs.get("device", "")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is Tensor.type and len(args) == 1 and not kwargs and args[0].dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[args[0].dtype]
        if func is Tensor.to and len(args) > 1 and "cuda" in str(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **(kwargs or {}))
