"""FusedAdam by torch's operations: the step is counted in the group, from the first step on, as TE does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode
        assert not capturable, "its step is a tensor"
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int), "a kernel of TE takes it"
            assert group["bias_correction"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert set(state) == {"exp_avg", "exp_avg_sq"}, "TE's takes no others for its own"
        assert all(value.dtype == torch.float32 for value in state.values())
        assert grad is not None
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        first = 1 - beta1 ** group["step"]
        second = math.sqrt(1 - beta2 ** group["step"])
        change = (state["exp_avg"] / first) / (state["exp_avg_sq"].sqrt() / second + group["eps"])
        parameter.add_(change + group["weight_decay"] * parameter, alpha=-group["lr"])


class FusedSGD:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("the optimizer is Adam")


def multi_tensor_applier(op: Any, noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(_: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    assert not per_tensor
    return torch.stack([x.norm() for x in lists[0]]).norm().view(1), None


def multi_tensor_scale(_: int, flag: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
