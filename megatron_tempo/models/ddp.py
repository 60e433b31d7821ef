"""Data parallelism whose communication runs behind computation: gradients are reduced during the backward pass, and
updated weights are gathered during the next forward pass.

Megatron's distributed optimizer divides a model's gradients into buckets, in the order of the backward pass. Each
replica updates its own share of every bucket. Without overlap, one reduction follows the backward pass, and one gather
the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.megatron_compat.buckets import in_forward_order, mark_gathered, start_gather, wait_for_gather
from megatron_tempo.models.parallel import Layout


def ddp_config(parallel: ParallelConfig, layout: Layout) -> DistributedDataParallelConfig:
    """Megatron's settings. A single replica has nothing to reduce or to gather, so it overlaps nothing."""
    overlaps = parallel.overlap_grad_reduce and layout.data * layout.context > 1
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps and parallel.overlap_param_gather,
        align_param_gather=True,  # a layer waits for its own weights only; `WeightGather` starts all gathers
        bucket_size=parallel.ddp_bucket_size,
    )


@contextmanager
def reduces_at_last_micro_batch(ddps: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside the block, Megatron's schedule reduces a bucket of gradients in the last micro-batch's backward pass.

    Replicas may have different numbers of micro-batches: a bucket's reduction waits for the slowest. `ddps`: a rank's
    chunks of the model; with several, Megatron's schedule takes a function for each.
    """
    config, overlaps = ddps[0].config, ddps[0].ddp_config.overlap_grad_reduce
    functions = [ddp.no_sync for ddp in ddps]
    # Set only during the pass, as the other functions of the config: see `TrainedModel._step`.
    config.no_sync_func = None if not overlaps else functions if len(functions) > 1 else functions[0]
    try:
        yield
    finally:
        config.no_sync_func = None


class WeightGather:
    """The gathers of updated weights, which run during the next forward pass.

    A layer's forward pass waits for the layer's own weights: Megatron's hooks do that. Whoever reads weights in another
    way calls `wait` first. Only `start` is collective.
    """

    def __init__(self, ddps: Sequence[DistributedDataParallel], chunks: Sequence[PackedGPT]) -> None:
        """`ddps`: the wrapped `chunks` of the model on this rank."""
        self._groups = [group for ddp in ddps for group in in_forward_order(ddp)]
        self.skip()
        # The head multiplies by the output layer's weight, but does not call that layer.
        chunks[-1].decoder.register_forward_hook(self._after_decoder)

    def start(self) -> None:
        """Start all gathers, first those of the layers that the forward pass needs first. Collective."""
        for group in self._groups:
            start_gather(group)

    def skip(self) -> None:
        """The weights are what they were: no layer needs to gather."""
        for group in self._groups:
            mark_gathered(group)

    def wait(self) -> None:
        """Wait for the gathers that were started. On a GPU, work that is queued afterwards waits."""
        for group in self._groups:
            wait_for_gather(group)

    def _after_decoder(self, *_: Any) -> None:
        self.wait()
