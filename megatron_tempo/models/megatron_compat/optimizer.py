"""Megatron-Core's distributed optimizer: its parts, its Adam state, and workarounds for faults in its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

STATES = ("main", "exp_avg", "exp_avg_sq")  # of a parameter: its fp32 main weight and Adam's two moments


@dataclass(frozen=True, slots=True)
class OptimizerSlice:
    """What this rank's optimizer has of a parameter: the numbers [start, stop) of the parameter, flat.

    `tensors`: by the names in STATES, fp32 [stop - start], the ones that the optimizer updates. An fp32 parameter is
    its own main weight.
    """

    parameter: nn.Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor]


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The parts of Megatron's optimizer, each with its own torch optimizer.

    Megatron-Core 0.16.1 (optimizer/__init__.py, `get_megatron_optimizer`) returns one optimizer or, for several sets of
    gradient buffers, a `ChainedOptimizer`. It concatenates `param_groups`, but not states.
    """
    return getattr(optimizer, "chained_optimizers", [optimizer])


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The inner optimizers that are torch's: all of them, unless Transformer Engine or Apex provides a fused one."""
    inner = [part.optimizer for part in optimizer_parts(optimizer)]
    return [one for one in inner if isinstance(one, torch.optim.Adam | torch.optim.AdamW)]


def note_param_order(optimizer: MegatronOptimizer) -> None:
    """Record each parameter's actual index in its group: fp32 parameters, such as a value head's, come before bf16.

    Megatron-Core 0.16.1 (optimizer/distrib_optimizer.py, `model_param_group_index_map`) records the model's order
    instead. Without this, a checkpoint stores one parameter's state under another's name.
    """
    for part in optimizer_parts(optimizer):
        pairs = zip(part.model_fp32_groups, part.model_float16_groups, strict=True)
        for group, (wide, narrow) in enumerate(pairs):
            for index, parameter in enumerate([*wide, *narrow]):
                part.model_param_group_index_map[parameter] = (group, index)


def optimizer_slices(optimizer: MegatronOptimizer) -> Iterator[OptimizerSlice]:
    """This rank's part of the optimizer's state, parameter by parameter.

    Megatron-Core 0.16.1 (optimizer/distrib_optimizer.py, `gbuf_ranges`): each rank of the data-parallel group, with
    context parallelism, owns an equal range of each gradient bucket, which need not begin or end with a parameter. The
    public `sharded_state_dict` either gathers the state on every rank, or depends on the number of ranks.
    """
    for part in optimizer_parts(optimizer):
        buckets = (bucket for ranges in part.gbuf_ranges for of_type in ranges.values() for bucket in of_type)
        for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
            group, index = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][index]
            state = part.optimizer.state[main]
            tensors = {"main": main, **{name: state[name] for name in STATES[1:]}}
            yield OptimizerSlice(parameter, ranges["param"].start, ranges["param"].end, tensors)


def adam_step(optimizer: MegatronOptimizer) -> int | None:
    """The steps that Adam counts. None if this rank has no part of any parameter.

    Megatron-Core 0.16.1: torch's Adam counts them for each parameter, a fused one for each group.
    """
    counted, steps = torch_optimizers(optimizer), set[int]()
    for inner in (part.optimizer for part in optimizer_parts(optimizer)):
        for group in (group for group in inner.param_groups if group["params"]):
            own = [inner.state[one]["step"] for one in group["params"]] if inner in counted else [group.get("step", 0)]
            steps.update(int(step) for step in own)
    assert len(steps) <= 1, f"all parameters make the same steps: {steps}"
    return next(iter(steps), None)


def set_adam_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Let Adam continue from this number of steps."""
    counted = torch_optimizers(optimizer)
    for inner in (part.optimizer for part in optimizer_parts(optimizer)):
        if inner in counted:
            for state in inner.state.values():
                state["step"].fill_(float(step))
        else:
            for group in inner.param_groups:
                group["step"] = step


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load a state that `optimizer.sharded_state_dict` described and a checkpoint of an earlier version filled.

    Megatron-Core 0.16.1 (optimizer/distrib_optimizer.py, `load_parameter_state_from_fully_reshardable`) with torch's
    Adam fails on the step counters while it loads the moments. It also gives all parameters the same counter object,
    which each of them would then increase. So the counters are removed while the moments are loaded.
    """
    if not torch_optimizers(optimizer):
        optimizer.load_state_dict(state)
        complete_groups(optimizer)
        return
    moments = state.pop("param_state")
    optimizer.load_state_dict(state)
    (part,) = optimizer_parts(optimizer)
    states = list(part.optimizer.state.values())
    counters = [one.pop("step").clone() for one in states]
    part.load_parameter_state_from_fully_reshardable(moments)
    for one, counter in zip(states, counters, strict=True):
        one["step"] = counter


def complete_groups(optimizer: MegatronOptimizer) -> None:
    """Add to a fused Adam's groups the settings that a checkpoint of torch's Adam lacks. Make its step count an int.

    Megatron-Core 0.16.1 with Transformer Engine's or Apex's FusedAdam, which counts steps in the group
    (optimizer/distrib_optimizer.py, `load_state_dict`). Without this, a checkpoint that torch's Adam wrote lacks
    settings that a fused Adam reads from its groups.
    """
    for inner in (part.optimizer for part in optimizer_parts(optimizer)):
        for group in inner.param_groups:
            group.update({name: value for name, value in inner.defaults.items() if name not in group})
            if "step" in group:
                group["step"] = int(group["step"])


def init_adam_state(optimizer: MegatronOptimizer) -> None:
    """Create Adam's moments, which are zero, before the first step.

    Megatron-Core 0.16.1 (optimizer/distrib_optimizer.py, `sharded_state_dict`) requires them in a checkpoint. Without
    this, no checkpoint can be saved or loaded before the first step.
    """
    counted = torch_optimizers(optimizer)
    for inner in (part.optimizer for part in optimizer_parts(optimizer)):
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            inner.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            if inner in counted:
                inner.state[parameter]["step"] = torch.tensor(0.0)


@contextmanager
def without_bucket_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside the block, parameter offsets in gradient buffers do not count the padding between buckets.

    Megatron-Core 0.16.1 (optimizer/distrib_optimizer.py, `numel_unpadded`) gathers a buffer for a checkpoint without
    the padding after each bucket, and then splits it at offsets that count the padding. Without this, every parameter
    after a padded bucket is written shifted. Under pipeline parallelism, a tied embedding has such a bucket.
    """
    buffers = [buffer for part in optimizer_parts(optimizer) for buffer in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        gaps = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        before = [sum(gaps[:i]) for i in range(len(gaps))]
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map
