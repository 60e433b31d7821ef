"""Runs inside a vLLM server: its workers load the trainer's weights, and its API rejects requests without the key.

This file, `vllm_read_back.py` and `tensor_sums.py` are copied into a server's folder and found by name, in vLLM's
environment
(`--worker-extension-cls vllm_worker.WorkerExtension`, `--weight-transfer-config '{"backend": "megatron_tempo"}'`,
`--middleware vllm_worker.KeyMiddleware`), so it imports nothing of this package. Written for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import base64
import math
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensor_sums import tensor_sums
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _abort_process_group, _new_process_group_helper, _world
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm_read_back import block_checksum, elsewhere, places, read_back

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The bytes of what was not sent to this worker: NaN in fp32, bf16 and fp8, so that a loader that takes it is found.
_NOT_SENT = 255

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]


@dataclass
class InitInfo(WeightTransferInitInfo):
    """A group to join: the sender is its rank 0, the workers follow in the order of their tensor ranks."""

    group: str
    host: str  # of the sender's store
    port: int
    world: int  # the sender and all workers
    backend: str  # "gloo" or "nccl"
    seconds: float  # time limit for each collective


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A bucket: the tensors' bytes, one tensor after another without gaps.

    They come as one uint8 broadcast in `group`, or lie in `shared` memory (its manager's handle, its own handle,
    bytes), or in a GPU's memory, of which `cuda` has a handle for each worker. `parts` has the first row and the number
    of rows of each tensor of which the bucket has only some rows.

    With `slices`, the broadcast has only the tensors that have no block there, and is left out if all have one. Each
    worker is then sent the bytes of its own blocks, if it has any. `slices` has for each worker the first row, rows,
    first column and columns of its block of each tensor of the bucket.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group: str | None = None
    shared: tuple[str, str, int] | None = None
    cuda: list[list[Any]] | None = None
    checksums: bool = False
    parts: list[list[int] | None] | None = None
    slices: list[list[list[int] | None]] | None = None

    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [math.prod(shape) * _dtype(name).itemsize for name, shape in zip(self.dtypes, self.shapes, strict=True)]


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Weights of one worker. A session is start_weight_update, any number of update_weights, finish_weight_update."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._parameters = {name for name, _ in self.model.named_parameters()}
        self._received: dict[str, tuple[str, str]] = {}
        self._blocks: list[tuple[str, str, str, str]] = []  # those that arrived, as `checksums` reports them
        self._missing = self._parameters
        self._elsewhere = elsewhere(self.model)
        self._begun: dict[str, Tensor] = {}  # tensors of which some parts have arrived

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join a group. A group of the same name from an earlier trainer is abandoned."""
        self._leave(init_info.group)
        timeout = timedelta(seconds=init_info.seconds)
        store = dist.TCPStore(init_info.host, init_info.port, is_master=False, timeout=timeout)
        group, _ = _new_process_group_helper(
            init_info.world,
            1 + self.parallel_config.rank,
            [],
            dist.Backend(init_info.backend),
            dist.PrefixStore(init_info.group, store),
            group_name=GroupName(init_info.group),
            timeout=timeout,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(init_info.world)}
        self._groups[init_info.group] = group

    def start_weight_update(self) -> None:
        self._drop_unfinished()
        self._received, self._blocks = {}, []
        self._missing = self._parameters
        self._begun = {}
        if self.device.type == "cpu":
            pack_experts_anew(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        flat = self._bytes(update_info)
        in_bucket, sliced = _tensors(flat, update_info), set[str]()
        if update_info.slices is not None:
            own = update_info.slices[self.parallel_config.rank]
            self._receive_slices(in_bucket, own, self._group(update_info))
            sliced = {name for name, block in zip(in_bucket, own, strict=True) if block is not None}
            if update_info.checksums:
                self._blocks += block_sums(in_bucket, own, update_info.parts)
        tensors = joined(in_bucket, update_info, self._begun)
        if update_info.checksums:
            whole = [name for name in tensors if name not in sliced]
            sums = tensor_sums([tensors[name] for name in whole], [0] * len(whole))
            self._received |= {name: (total, str(size)) for name, (total, size) in zip(whole, sums, strict=True)}
        if self.model_config.hf_config.tie_word_embeddings and _EMBEDDING in tensors:
            # A reload unties the two, and on a CPU the head has its own copy.
            tensors[_HEAD] = tensors[_EMBEDDING]
        # vLLM would keep the experts of other workers until it has all of the layer.
        of_worker = [(name, tensor) for name, tensor in tensors.items() if name not in self._elsewhere]
        self._missing = self._missing - self.model.load_weights(of_worker)
        self._copy_waiting(flat)

    def finish_weight_update(self) -> None:
        self._missing = self._missing | self._incomplete()
        self._begun = {}
        finalize_layerwise_reload(self.model, self.model_config)

    def checksums(self) -> dict[str, Any]:
        return {"tensors": self._received, "blocks": self._blocks, "missing": sorted(self._missing)}

    def places(self) -> dict[str, list[int]]:
        return places(self.model, tied=self.model_config.hf_config.tie_word_embeddings)

    def read_back(self, index: int, of: int) -> dict[str, Any]:
        return read_back(self.model, index, of, tied=self.model_config.hf_config.tie_word_embeddings)

    def shutdown(self) -> None:
        for name in list(self._groups):
            self._leave(name)

    def _leave(self, name: str) -> None:
        if group := self._groups.pop(name, None):
            _abort_process_group(group)

    def _bytes(self, update_info: UpdateInfo) -> Tensor:
        """The bucket's bytes. They may be overwritten once the update is answered."""
        if update_info.shared is not None:
            manager, handle, nbytes = update_info.shared
            memory = torch.UntypedStorage._new_shared_filename_cpu(manager.encode(), handle.encode(), nbytes)
            return bytes_on(memory, torch.device("cpu"))
        if update_info.cuda is not None:
            return bytes_on(opened(update_info.cuda[self.parallel_config.rank]), self.device)
        group = self._group(update_info)
        flat = torch.empty(sum(update_info.sizes()), dtype=torch.uint8, device=self.device)
        if update_info.slices is not None:
            return flat.fill_(_NOT_SENT)
        dist.broadcast(flat, src=0, group=group)
        return flat

    def _group(self, update_info: UpdateInfo) -> dist.ProcessGroup:
        if update_info.group not in self._groups:
            raise ValueError(f"{update_info.group} is not a group that was joined")
        return self._groups[update_info.group]

    def _receive_slices(
        self, tensors: dict[str, Tensor], own: list[list[int] | None], group: dist.ProcessGroup
    ) -> None:
        """Receive this worker's blocks, and the tensors without any, into their places in the bucket's tensors."""
        pairs = list(zip(tensors.values(), own, strict=True))
        if common := [tensor for tensor, block in pairs if block is None]:
            flat = torch.empty(sum(tensor.nbytes for tensor in common), dtype=torch.uint8, device=self.device)
            dist.broadcast(flat, src=0, group=group)
            _place(flat, common)
        if blocks := [view for tensor, block in pairs if block is not None and (view := _block(tensor, block)).numel()]:
            flat = torch.empty(sum(block.nbytes for block in blocks), dtype=torch.uint8, device=self.device)
            dist.recv(flat, group=group, group_src=0)
            _place(flat, blocks)

    def _copy_waiting(self, flat: Tensor) -> None:
        """Copy the tensors of the bucket that the reload still holds until the other parts of their layer arrive."""
        bucket = flat.untyped_storage().data_ptr()
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == bucket:
                        call.arguments[name] = value.clone()

    def _incomplete(self) -> set[str]:
        """Parameters of layers that received only a part of their tensors. A vocabulary's may have padding rows."""
        names = set()
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            if 0 < info.load_numel < (info.load_numel_total or 0) and not isinstance(layer, VocabParallelEmbedding):
                names |= {f"{name}.{parameter}" for parameter, _ in layer.named_parameters(recurse=False)}
        return names

    def _drop_unfinished(self) -> None:
        """Restore the older tensors after an interrupted session: the next session would mix them with its own."""
        unfinished = [info for info in map(get_layerwise_info, self.model.modules()) if info.can_load()]
        for info in unfinished:
            info.loaded_weights.clear()
            info.load_numel = 0
        if unfinished:
            finalize_layerwise_reload(self.model, self.model_config)


class WorkerExtension:
    """Added to vLLM's worker class: what collective_rpc can call."""

    weight_transfer_engine: WeightReceiver

    def checksums(self) -> dict[str, Any]:
        """What arrived in the last session.

        "tensors": checksum and root mean square (as text, for JSON has no NaN) of each tensor that arrived whole and
        whose bucket requested checksums; "blocks": tensor, place, checksum, and share of the tensor's mean square of
        what arrived of others; "missing": parameters that were not loaded, or only in part.
        """
        return self.weight_transfer_engine.checksums()

    def places(self) -> dict[str, list[int]]:
        """The blocks of tensors that this worker needs (`vllm_read_back.places`)."""
        return self.weight_transfer_engine.places()

    def read_back(self, index: int, of: int) -> dict[str, Any]:
        """Checksums of a selection of the parameters that the model computes with (`vllm_read_back.read_back`)."""
        return self.weight_transfer_engine.read_back(index, of)

    def abandon(self) -> None:
        """Forget a session that an earlier trainer left open."""
        self._weight_update_active = False


class KeyMiddleware:
    """Rejects every request without the key, which is in the file that MEGATRON_TEMPO_KEY names.

    vLLM's own --api-key protects only paths that begin with /v1 or /inference, not those that change weights.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._wanted = b"Bearer " + Path(os.environ["MEGATRON_TEMPO_KEY"]).read_bytes().strip()

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] == "lifespan" or self._knows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body"})
        else:
            await send({"type": "websocket.close", "code": 1008})  # policy violation

    def _knows(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._wanted)


def pack_experts_anew(model: torch.nn.Module) -> None:
    """Let vLLM pack experts for its kernel when they are loaded again, as it does only when it makes the kernel.

    vLLM 0.32 (`fused_moe/unquantized_fused_moe_method.py`, `_setup_kernel`): without this, a CPU's kernel computes with
    experts of another order, or fails where the experts' width is padded. Kernels for GPUs reorder in another place.
    """
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel = None


def _tensors(flat: Tensor, update_info: UpdateInfo) -> dict[str, Tensor]:
    """Views of the bucket's bytes; a tensor that is not aligned for its type is copied."""
    tensors, end = {}, 0
    for name, dtype, shape, size in zip(
        update_info.names, update_info.dtypes, update_info.shapes, update_info.sizes(), strict=True
    ):
        part, end = flat[end : end + size], end + size
        aligned = part.clone() if part.storage_offset() % _dtype(dtype).itemsize else part
        tensors[name] = aligned.view(_dtype(dtype)).view(shape)
    return tensors


def _block(tensor: Tensor, block: list[int]) -> Tensor:
    row, rows, column, columns = block
    return tensor[row : row + rows, column : column + columns]


def _place(flat: Tensor, targets: list[Tensor]) -> None:
    """Copy bytes, one tensor's after another's, to their tensors."""
    for target, part in zip(targets, flat.split([target.nbytes for target in targets]), strict=True):
        aligned = part.clone() if part.storage_offset() % target.element_size() else part
        target.copy_(aligned.view(target.dtype).view(target.shape))


def block_sums(
    tensors: dict[str, Tensor], own: list[list[int] | None], parts: list[list[int] | None] | None
) -> list[tuple[str, str, str, str]]:
    """Tensor, place, checksum, and share of the tensor's mean square of each block that is not empty.

    A place is the same for copies on several workers. The checksums of a tensor's places add up to the tensor's.
    """
    names, places, totals, squares = [], [], [], []
    for (name, tensor), block, part in zip(tensors.items(), own, parts or [None] * len(tensors), strict=True):
        if block is None or not block[1]:
            continue
        (row, rows, column, columns), (before, of) = block, part or (0, len(tensor))
        values, width = _block(tensor, block), tensor.shape[1]
        names.append(name)
        places.append(f"{before + row},{column},{rows},{columns}")
        totals.append(block_checksum(values, before + row, column, width))
        squares.append(values.float().square().sum(dtype=torch.float64) / (of * width))
    if not names:
        return []
    words = [f"{total % 2**64:016x}" for total in torch.stack(totals).tolist()]
    return list(zip(names, places, words, map(str, torch.stack(squares).tolist()), strict=True))


def joined(tensors: dict[str, Tensor], update_info: UpdateInfo, begun: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are whole with this bucket. vLLM's loaders take whole tensors: parts wait in `begun`.

    A sender sends the parts of a tensor one after another.
    """
    whole = {}
    for (name, tensor), part in zip(tensors.items(), update_info.parts or [None] * len(tensors), strict=True):
        if part is None:
            whole[name] = tensor
            continue
        first, rows = part
        if first == 0:
            begun[name] = tensor.new_empty(rows, *tensor.shape[1:])
        begun[name][first : first + len(tensor)].copy_(tensor)
        if first + len(tensor) == rows:
            whole[name] = begun.pop(name)
    return whole


def opened(handle: list[Any]) -> torch.UntypedStorage:
    """Memory of a GPU, by its UUID and the other arguments of `UntypedStorage._new_shared_cuda`, bytes as base64."""
    torch.cuda.init()
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if handle[0] not in uuids:
        raise ValueError(f"GPU {handle[0]}, which has the weights, is not among this server's CUDA_VISIBLE_DEVICES")
    rest = (base64.b64decode(part) if isinstance(part, str) else part for part in handle[1:])
    return torch.UntypedStorage._new_shared_cuda(uuids.index(handle[0]), *rest)


def bytes_on(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    """A storage's bytes, uint8 [bytes], on `device`: a view if they are there already, else a copy.

    The trainer's memory is on the GPU of the rank that sends, which need not be this worker's.
    """
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).to(device)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


WeightTransferEngineFactory.register_engine("megatron_tempo", WeightReceiver)
