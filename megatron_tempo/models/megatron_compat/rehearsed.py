"""Replaces what of torch and Megatron-Core needs other ranks or numbers that a kernel computed, for a rehearsal.

`megatron_tempo.rehearsal.takeover` says when and why.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.distributed import distributed_c10d

Shape = tuple[int, ...]
_NCCL_ID = b"\x07" * 128  # ncclUniqueId: 128 bytes


class SilentStore(dist.Store):
    """A store in which every other rank has already said what a rank waits for: the id of an NCCL communicator."""

    def get(self, key: str) -> bytes:
        return _NCCL_ID

    def set(self, key: str, value: Any) -> None:
        """Nobody reads it."""

    def wait(self, keys: Sequence[str], timeout: Any = None) -> None:
        """Everything is there."""

    def add(self, key: str, amount: int) -> int:
        return amount

    def check(self, keys: Sequence[str]) -> bool:
        return True

    def num_keys(self) -> int:
        return 0

    def delete_key(self, key: str) -> bool:
        return True

    def set_timeout(self, timeout: Any) -> None:
        """It never waits."""


_STORE = SilentStore()  # for as long as the process lives: torch calls its methods through the Python object


def join_alone(rank: int, world: int, timeout: Any) -> None:
    """Be rank `rank` of `world` in a process group whose other members do not exist.

    torch 2.10 to 2.13 (testing/_internal/distributed/fake_pg.py): the backend "fake" returns at once, with whatever the
    tensors hold. CPU tensors take it, in place of gloo; CUDA tensors take NCCL, whose library does nothing here.
    """

    dist.init_process_group("cpu:fake,cuda:nccl", store=_STORE, rank=rank, world_size=world, timeout=timeout)


def echo_objects() -> None:
    """Object collectives in which every rank says what this one says."""

    def all_gather_object(found: list[Any], mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    def gather_object(mine: Any, found: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if found is not None:
            found[:] = [mine] * len(found)

    def broadcast_object_list(*_: Any, **__: Any) -> None:
        pass

    for module in (dist, distributed_c10d):
        vars(module).update(
            all_gather_object=all_gather_object,
            gather_object=gather_object,
            broadcast_object_list=broadcast_object_list,
        )


class NeighbourShapes:
    """Answers a pipeline stage that asks its neighbours for the shapes of what they will send.

    Megatron-Core 0.16.1 (pipeline_parallel/p2p_communication.py, `P2PCommunicator._communicate_shapes`) sends them as
    CUDA tensors. Micro-batches pass in order in both directions: the shapes are those of the micro-batches at hand.
    With virtual pipeline stages, the order is that of Megatron's table (pipeline_parallel/schedules.py,
    `get_schedule_table`). The first stage then also receives, except for its first chunk, and the last stage gradients,
    except for its last chunk.
    """

    def __init__(self) -> None:
        self._forward: deque[Shape] = deque()
        self._backward: deque[Shape] = deque()
        self._original: Callable[..., Any] = P2PCommunicator._communicate_shapes

    def expect(self, shapes: Sequence[Shape], stages: dist.ProcessGroup, interleaved: Any = None) -> None:
        """The hidden states of the micro-batches of the pass that begins now. `stages`: the pipeline's ranks.
        `interleaved`: the model's config, if it has virtual pipeline stages."""
        self._forward, self._backward = deque(shapes), deque(shapes)
        if interleaved is not None:
            chunks, group = (
                interleaved.virtual_pipeline_model_parallel_size,
                interleaved.microbatch_group_size_per_vp_stage,
            )
            rank, last = stages.rank(), stages.size() - 1
            table = get_schedule_table(len(shapes), chunks, group)
            # Backward passes have the same order of micro-batches, with the chunks reversed.
            self._forward = deque(shapes[micro] for micro, chunk in table if rank > 0 or chunk > 0)
            self._backward = deque(shapes[micro] for micro, chunk in table if rank < last or chunk > 0)

    def install(self) -> None:
        def answered(
            communicator: P2PCommunicator, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
        ) -> tuple[list[int], list[int]]:
            self._original(communicator, send_next, send_prev, recv_prev, recv_next)  # its memory and messages
            before = list(self._forward.popleft()) if recv_prev else [0, 0, 0]
            after = list(self._backward.popleft()) if recv_next else [0, 0, 0]
            return before, after

        P2PCommunicator._communicate_shapes = answered


def replace_grad_norm(norm: float) -> None:
    """Compute the gradient norm as Megatron does, and report `norm`."""
    for kind in (MegatronOptimizer, ChainedOptimizer):
        kind.get_grad_norm = _reporting(kind.get_grad_norm, norm)


def _reporting(compute: Callable[[Any], Any], norm: float) -> Callable[[Any], float]:
    def reported(optimizer: Any) -> float:
        compute(optimizer)
        return norm

    return reported


def replace_te_attention() -> None:
    """Let Transformer Engine's cuDNN attention return tensors of its shapes.

    Transformer Engine 2.11 (pytorch/cpp_extensions/fused_attn.py) calls `fused_attn_fwd` and `fused_attn_bwd` of its
    C++ part by position: query, key and value are the arguments 13 to 15 of both.
    """
    try:
        tex = importlib.import_module("transformer_engine_torch")
    except ImportError:
        return

    def forward(*given: Any) -> list[torch.Tensor]:
        query = given[13]
        statistics = torch.empty(*query.shape[:2], 1, device=query.device, dtype=torch.float32)
        return [torch.empty_like(query), statistics, torch.empty(2, dtype=torch.int64, device=query.device)]

    def backward(*given: Any) -> list[torch.Tensor]:
        return [torch.empty_like(tensor) for tensor in given[13:16]]

    vars(tex).update(fused_attn_fwd=forward, fused_attn_bwd=backward)


def replace_expert_loads() -> None:
    """Let every rank send equally many tokens to each expert, in a mixture of experts.

    Megatron-Core 0.16.1 and 0.19.2 (transformer/moe/token_dispatcher.py, `MoEAlltoAllTokenDispatcher.preprocess`) count
    the tokens of each expert on the GPU and copy the sizes of messages and products to the host.
    """
    original = MoEAlltoAllTokenDispatcher.preprocess

    def preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        original(self, routing_map)  # its memory and messages
        choices, first = len(routing_map) * self.config.moe_router_topk, self.local_expert_indices[0]
        loads = torch.full((self.num_experts,), choices // self.num_experts)
        loads[: choices % self.num_experts] += 1
        own = loads[first : first + self.num_local_experts]
        if self.ep_size * self.tp_size > 1:
            self.input_splits = loads.view(self.ep_size, -1).sum(1).numpy()
            self.output_splits = own.sum().repeat(self.ep_size).numpy()
            self.output_splits_tp = (own.sum() * self.ep_size).repeat(self.tp_size).numpy()
        if self.num_local_experts > 1 and not self.config.moe_permute_fusion:
            self.num_global_tokens_per_local_expert = own.repeat(self.ep_size * self.tp_size, 1)
        return own * (self.ep_size * self.tp_size)

    MoEAlltoAllTokenDispatcher.preprocess = preprocess
