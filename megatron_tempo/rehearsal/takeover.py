"""What a rehearsal takes over from the trainer. All else is the program itself, unchanged.

1. Process group: this process is one rank of a world whose other ranks do not exist. CUDA tensors go to NCCL, whose
   library does nothing; CPU tensors to torch's "fake" backend in place of gloo.
2. Object collectives: every rank says what this one says.
3. Pipeline: a neighbour's messages about shapes are answered with the shapes of this rank's micro-batches.
4. Numbers that no kernel has computed: sums over ranks on the CPU, and what a model reads, are zero, the gradient norm
   is 1, weights count as finite. So a step is neither skipped nor clipped, and a model not refused, for what the memory
   happens to hold.
5. Attention: cuDNN asks the real driver. torch's is turned off, so torch takes its flash attention; Transformer
   Engine's returns tensors of its shapes.
6. Rollouts, engine and evaluation: `rollouts.MadeUpRequests` and `rollouts.WeightSink` (an embedded engine is real, and
   generates nothing); nothing is evaluated.
7. Mixtures of experts: every expert gets equally many rows, since the routers that would choose compute nothing.
8. Host memory: the weights that are read from the model's folder, and a checkpoint's copy, are not filled
   (`UnfilledHostMemory`). A checkpoint is not written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_tempo.models import trained
from megatron_tempo.models.megatron_compat import rehearsed
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.parallel import Layout
from megatron_tempo.weights import folder

# torch's threads that watch NCCL would ask the store for other ranks' states.
_WITHOUT_MONITORS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
_LARGE = 1 << 18  # elements of a CPU tensor whose contents a rehearsal does not compute


def take_over(rank: int, world: int) -> Callable[[str, timedelta], None]:
    """Prepare this process to be rank `rank` of `world`. Returns how it joins the others (`parallel_groups`)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    os.environ.update(_WITHOUT_MONITORS)
    rehearsed.echo_objects()
    _answer_for_neighbours()
    trained.sum_over_ranks = _zeros
    trained.share_reported = _no_results
    rehearsed.replace_grad_norm(1.0)
    folder.is_finite = _is_finite
    torch.backends.cuda.enable_cudnn_sdp(False)
    rehearsed.replace_te_attention()
    rehearsed.replace_expert_loads()

    def join(backend: str, timeout: timedelta) -> None:
        rehearsed.join_alone(rank, world, timeout)

    return join


def _zeros(tensor: Tensor) -> Tensor:
    """Stands for `sum_over_ranks`."""
    return tensor.zero_()


def _no_results(tensor: Tensor, layout: Layout) -> Tensor:
    """Stands for `share_reported`."""
    return tensor.zero_()


def _is_finite(tensor: Tensor) -> bool:
    """Stands for `weights.folder.is_finite`. The weights are zeros in the file."""
    return True


def _answer_for_neighbours() -> None:
    """Tell the pipeline's stand-in the shapes of each pass, from the micro-batches that Megatron's schedule gets."""
    shapes = rehearsed.NeighbourShapes()
    shapes.install()
    schedule_of = trained.get_forward_backward_func

    def wrapped(*sizes: int | None) -> Callable[..., Any]:
        run = schedule_of(*sizes)

        def scheduled(*, data_iterator: Any, model: Sequence[Any], **given: Any) -> Any:
            interleaved = isinstance(data_iterator, list)
            parts = list(data_iterator[0] if interleaved else data_iterator)
            states = [_states(part, model[0].config) for part in parts]
            shapes.expect(states, given["pg_collection"].pp, model[0].config if interleaved else None)
            iterators = [iter(parts) for _ in model]
            return run(data_iterator=iterators if interleaved else iterators[0], model=model, **given)

        return scheduled

    trained.get_forward_backward_func = wrapped


def _states(micro: MicroBatch, config: Any) -> tuple[int, int, int]:
    """The shape of the hidden states that pass between pipeline stages."""
    shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return micro.tokens.numel() // shared, 1, config.hidden_size


class UnfilledHostMemory(TorchFunctionMode):
    """Inside, the contents of large CPU tensors are neither computed nor copied: their pages take no memory or time.

    Copies to and from the GPU are made as ever, of tensors that nobody filled.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.zeros and str(given.get("device", "")) == "cpu":
            return torch.empty(*args, **given)
        if func is torch.cat and all(isinstance(part, Tensor) for part in args[0]) and any(map(_is_large, args[0])):
            return _joined(args[0], given.get("dim", args[1] if len(args) > 1 else 0))
        if func is Tensor.copy_ and _is_large(args[1]):
            target, source = args[0], args[1]
            return target if _is_large(target) else func(target, _unfilled(source), *args[2:], **given)
        return func(*args, **given)


def _is_large(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.numel() > _LARGE


def _unfilled(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device)
