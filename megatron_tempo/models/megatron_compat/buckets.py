"""Megatron-Core's buckets of gradients and weights, and the gathers of their weights."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel


def in_forward_order(ddp: DistributedDataParallel) -> list[Any]:
    """The bucket groups of a model, by when its forward pass first needs one of their parameters.

    Megatron-Core 0.16.1 (distributed/distributed_data_parallel.py, `start_param_sync`) gathers in the order of the
    backward pass. Without this, the first layer would wait for all others.
    """
    groups = (ddp.param_to_bucket_group[one] for one in ddp.module.parameters() if one in ddp.param_to_bucket_group)
    return list(dict.fromkeys(groups))


def start_gather(group: Any) -> None:
    """Start the gather of a group's weights, in the background."""
    assert group.param_gather_handle is None, "the weights of the last step are still on their way"
    group.start_param_sync()


def mark_gathered(group: Any) -> None:
    """Let no layer gather a group's weights.

    Megatron-Core 0.16.1 (distributed/param_and_grad_buffer.py, `finish_param_sync`, which a hook calls before a layer's
    forward pass) gathers what was not gathered since the last reduction of gradients. Without this, the first forward
    pass and the one after a skipped step would gather what every replica has.
    """
    group.param_gather_dispatched = True


def wait_for_gather(group: Any) -> None:
    """Wait for a gather of a group's weights, if one was started."""
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)
