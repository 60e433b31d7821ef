"""Runs inside a vLLM server with `vllm_worker.py`: reads back the parameters that a worker computes with.

A worker holds parts of tensors: the rows or columns of its tensor rank, joined with others in one parameter, and on a
CPU only as its kernel has packed them. This file knows which part of which of Hugging Face's tensors is where. It does
not ask vLLM's loaders, which are what the read-back tests. It imports nothing of this package. Written for vLLM 0.32
and 0.33.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Layers that hold several of Hugging Face's, one below the other.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Kernels that compute with experts as they were loaded, and the order in which one parameter has two of the tensors.
# The others reorder them further (`fused_moe/oracle/unquantized.py`, `convert_to_unquantized_kernel_format`).
_GATE_FIRST = ("gate_proj", "up_proj")
_EXPERT_KERNELS = {"TRITON": _GATE_FIRST, "BATCHED_TRITON": _GATE_FIRST, "FLASHINFER_CUTLASS": _GATE_FIRST[::-1]}
_FP8_BLOCK = 128
_NOWHERE = (0, 0, 0, 0)
_CHUNK = 1 << 19  # elements per step: bounds the memory that is needed in addition to the parameter


@dataclass(frozen=True)
class InstalledPart:
    """Rows of a parameter that are a part of a tensor: from `row` and `column` of that, which has rows of `width`."""

    tensor: str  # its name in Hugging Face's folder
    holder: str  # the parameter's name here
    rows: Tensor  # [rows, columns]
    row: int
    column: int
    width: int

    @property
    def place(self) -> str:
        """The same for copies on several workers."""
        return f"{self.row},{self.column},{len(self.rows)}"


def places(model: torch.nn.Module, *, tied: bool) -> dict[str, list[int]]:
    """Of each tensor that this worker holds as one block: the block's first row, rows, first column and columns.

    All of the other tensors are needed. Those of quantised layers are among them: vLLM may compute with all of a tensor
    when it loads it. Of an expert that is on another worker the block is empty.
    """
    found: dict[str, set[tuple[int, int, int, int]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, VocabParallelEmbedding):
            tensor, first, count = _tokens(name, layer, tied=tied)
            found.setdefault(tensor, set()).add((first, count, 0, layer.embedding_dim))
        elif isinstance(layer, LinearBase) and _is_plain(layer):
            inputs, column = _columns(layer)
            for part, count, row in _parts(name, layer):
                found.setdefault(f"{part}.weight", set()).add((row, count, column, inputs))
        elif isinstance(layer, RoutedExperts):
            for tensor, block in _expert_blocks(name, layer):
                found.setdefault(tensor, set()).add(block)
    return {name: list(*blocks) for name, blocks in found.items() if len(blocks) == 1}


def elsewhere(model: torch.nn.Module) -> set[str]:
    """The tensors of the experts that are on other workers, with vLLM's expert parallelism."""
    names = set()
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedExperts):
            absent = (expert for expert, slot in enumerate(_slots(layer)) if slot < 0)
            names |= {tensor for expert in absent for tensor in _expert_names(name, layer, expert)}
    return names


def read_back(model: torch.nn.Module, index: int, of: int, *, tied: bool) -> dict[str, Any]:
    """Checksums of what this worker holds of the tensors of a selection (`read_back.Selection`).

    "tensors": (tensor, holder, place, checksum) for each part; a tensor's checksum is the sum of those of its places.
    "unread": tensors that the kernels hold in a form that has other bits than what was sent.
    """
    found, totals, unread = [], [], set()
    for piece in _pieces(model, tied=tied):
        name = piece if isinstance(piece, str) else piece.tensor
        if zlib.crc32(name.encode()) % of != index:
            continue
        if isinstance(piece, str):
            unread.add(piece)
        else:
            found.append((piece.tensor, piece.holder, piece.place))
            totals.append(block_checksum(piece.rows, piece.row, piece.column, piece.width))
    sums = torch.stack(totals).tolist() if totals else []
    tensors = [(*names, f"{total % 2**64:016x}") for names, total in zip(found, sums, strict=True)]
    return {"tensors": tensors, "unread": sorted(unread)}


def block_checksum(block: Tensor, row: int, column: int, width: int) -> Tensor:
    """What a block [rows, columns] adds to the checksum (`vllm_worker.checksum`) of a matrix with rows of `width`.

    `row` and `column`: the block's first ones in the matrix. int64 [].
    """
    size = block.element_size()
    whole = len(block) == 1 and width == block.shape[1]  # one row may end within a word
    assert whole or not (column * size % 4 or width * size % 4 or block.shape[1] * size % 4), "parts of a word"
    total = torch.zeros((), dtype=torch.int64, device=block.device)
    step = max(1, _CHUNK // max(block.shape[1], 1))
    for first in range(0, len(block), step):
        data = block[first : first + step].detach().contiguous().view(torch.uint8)
        words = torch.nn.functional.pad(data, (0, -data.shape[1] % 4)).view(torch.int32).long()
        places = torch.arange(words.shape[1], device=block.device)
        starts = torch.arange(row + first, row + first + len(words), device=block.device) * (width * size // 4)
        starts += column * size // 4
        total += ((2 * starts + 1) * words.sum(1)).sum() + 2 * (places * words.sum(0)).sum()
    return total


def _pieces(model: torch.nn.Module, *, tied: bool) -> Iterator[InstalledPart | str]:
    """What this worker holds; of a tensor that cannot be read, the name."""
    for name, layer in model.named_modules():
        if isinstance(layer, VocabParallelEmbedding):
            yield from _vocabulary(name, layer, tied=tied)
        elif isinstance(layer, LinearBase):
            yield from _linear(name, layer)
        elif isinstance(layer, RoutedExperts):
            yield from _experts(name, layer)
        else:
            for own, parameter in layer.named_parameters(name, recurse=False):
                rows = parameter.detach().reshape(len(parameter) if parameter.ndim > 1 else 1, -1)
                yield InstalledPart(own, own, rows, 0, 0, rows.shape[1])


def _experts(name: str, layer: Any) -> Iterator[InstalledPart | str]:
    """A layer's experts: two tensors of each are in one parameter of all experts, the third one in another.

    Of kernels that have them in another order, and of quantised ones, the names.
    """
    backend = getattr(getattr(layer.quant_method, "unquantized_backend", None), "name", None)
    order = _EXPERT_KERNELS.get(str(backend))
    blocks = dict(_expert_blocks(name, layer))
    above, first, second = name.removesuffix(".routed_experts"), f"{name}.w13_weight", f"{name}.w2_weight"
    for expert, slot in enumerate(_slots(layer)):
        if order is None or not blocks or not _is_plain(layer):
            yield from _expert_names(name, layer, expert)
            continue
        if slot < 0:
            continue
        gates, down = layer.w13_weight.detach()[slot], layer.w2_weight.detach()[slot]
        half, width = len(gates) // 2, layer.moe_config.moe_parallel_config.tp_size
        for place, part in enumerate(order):
            row, rows, _, columns = blocks[tensor := f"{above}.{expert}.{part}.weight"]
            own = gates[place * half : place * half + rows, :columns]
            yield _in_words(InstalledPart(tensor, first, own, row, 0, columns))
        _, rows, column, columns = blocks[tensor := f"{above}.{expert}.down_proj.weight"]
        yield _in_words(InstalledPart(tensor, second, down[:rows, :columns], 0, column, columns * width))


def _in_words(part: InstalledPart) -> InstalledPart | str:
    """The part, or the tensor's name if the part does not begin and end at four bytes, of which checksums are."""
    size = part.rows.element_size()
    uneven = any(number * size % 4 for number in (part.column, part.rows.shape[1], part.width))
    return part.tensor if uneven else part


def _slots(layer: Any) -> list[int]:
    """Where this worker has each expert; -1 for one that it does not have."""
    numbers = layer.expert_map_manager.expert_map
    return list(range(layer.global_num_experts)) if numbers is None else numbers.tolist()[: layer.global_num_experts]


def _expert_names(name: str, layer: Any, expert: int) -> Iterator[str]:
    above = name.removesuffix(".routed_experts")
    for part in ("gate_proj", "up_proj", "down_proj"):
        yield f"{above}.{expert}.{part}.weight"
        if not _is_plain(layer):
            yield f"{above}.{expert}.{part}.weight_scale_inv"


def _expert_blocks(name: str, layer: Any) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Of each tensor of a layer's experts, its block that is here: rows or columns of each expert, or whole experts.

    None at all where another rule decides: copies of experts that vLLM moves, shards that are padded, and parts of
    quantised tensors, whose loaders have not been tested with them.
    """
    config, parallel = layer.moe_config, layer.moe_config.moe_parallel_config
    if parallel.enable_eplb or config.tp_shard_with_padding or not (_is_plain(layer) or parallel.tp_size == 1):
        return
    own, hidden = config.intermediate_size_per_partition_unpadded, config.hidden_dim_unpadded
    above, first = name.removesuffix(".routed_experts"), parallel.tp_rank * own
    blocks = {"gate_proj": (first, own, 0, hidden), "down_proj": (0, hidden, first, own)}
    blocks["up_proj"] = blocks["gate_proj"]
    for expert, slot in enumerate(_slots(layer)):
        for part, (row, rows, column, columns) in blocks.items():
            tensor = f"{above}.{expert}.{part}.weight"
            yield tensor, (row, rows, column, columns) if slot >= 0 else _NOWHERE
            if not _is_plain(layer):  # a scale for each block of the weight
                scales = (0, -(-rows // _FP8_BLOCK), 0, -(-columns // _FP8_BLOCK))
                yield f"{tensor}_scale_inv", scales if slot >= 0 else _NOWHERE


def _vocabulary(name: str, layer: Any, *, tied: bool) -> Iterator[InstalledPart | str]:
    """The tokens of this rank. Rows of padding are left out. A tied head holds the embedding once more."""
    tensor, first, count = _tokens(name, layer, tied=tied)
    weight = _computed(layer, layer.embedding_dim) if isinstance(layer, ParallelLMHead) else layer.weight.detach()
    yield InstalledPart(tensor, f"{name}.weight", weight[:count], first, 0, layer.embedding_dim)


def _tokens(name: str, layer: Any, *, tied: bool) -> tuple[str, int, int]:
    """The tensor that a vocabulary's layer holds, the first of its rows that are here, and how many are."""
    tensor = _EMBEDDING if tied and isinstance(layer, ParallelLMHead) else f"{name}.weight"
    return tensor, layer.shard_indices.org_vocab_start_index, layer.shard_indices.num_org_elements


def _linear(name: str, layer: Any) -> Iterator[InstalledPart | str]:
    parts = list(_parts(name, layer))
    yield from _biases(name, layer, parts)
    if not _is_plain(layer):
        for part, _, _ in parts:
            yield f"{part}.weight"
            yield f"{part}.weight_scale_inv"
        return
    inputs, column = _columns(layer)
    weight, start, width = _computed(layer, inputs), 0, layer.input_size
    for part, count, row in parts:
        yield InstalledPart(f"{part}.weight", f"{name}.weight", weight[start : start + count], row, column, width)
        start += count


def _biases(name: str, layer: Any, parts: list[tuple[str, int, int]]) -> Iterator[InstalledPart]:
    """Biases, each as one row. They are not quantised with the weight."""
    if getattr(layer, "bias", None) is None:
        return
    bias, start = layer.bias.detach(), 0
    for (part, count, first), width in zip(parts, _widths(layer), strict=True):
        rows = bias[start : start + count].reshape(1, -1)
        yield InstalledPart(f"{part}.bias", f"{name}.bias", rows, 0, first, width)
        start += count


def _widths(layer: Any) -> list[int]:
    """Outputs on all ranks of each of Hugging Face's layers in this one."""
    if isinstance(layer, QKVParallelLinear):
        queries = layer.total_num_heads * layer.head_size
        return [queries, layer.total_num_kv_heads * layer.head_size, layer.total_num_kv_heads * layer.v_head_size]
    return list(layer.output_sizes) if isinstance(layer, MergedColumnParallelLinear) else [layer.output_size]


def _is_plain(layer: Any) -> bool:
    return "Unquantized" in type(layer.quant_method).__name__


def _columns(layer: Any) -> tuple[int, int]:
    """How many columns are here, and which is the first."""
    if isinstance(layer, RowParallelLinear):
        return layer.input_size_per_partition, layer.tp_rank * layer.input_size_per_partition
    return layer.input_size, 0


def _parts(name: str, layer: Any) -> Iterator[tuple[str, int, int]]:
    """Of each of Hugging Face's layers in this one: its name, how many rows are here, and which is the first."""
    above, _, own = name.rpartition(".")
    names = [f"{above}.{part}" if above else part for part in _FUSED.get(own, (own,))]
    rank = layer.tp_rank
    if isinstance(layer, QKVParallelLinear):
        of_keys = rank // layer.num_kv_head_replicas
        sizes = [(layer.num_heads, layer.head_size, rank), (layer.num_kv_heads, layer.head_size, of_keys)]
        sizes.append((layer.num_kv_heads, layer.v_head_size, of_keys))
        for part, (heads, size, place) in zip(names, sizes, strict=True):
            yield part, heads * size, place * heads * size
    elif isinstance(layer, MergedColumnParallelLinear):
        for part, size in zip(names, layer.output_sizes, strict=True):
            yield part, size // layer.tp_size, rank * (size // layer.tp_size)
    elif isinstance(layer, ColumnParallelLinear):
        yield name, layer.output_size_per_partition, rank * layer.output_size_per_partition
    else:  # by columns, or the same on every rank
        yield name, layer.output_size, 0


def _computed(layer: Any, inputs: int) -> Tensor:
    """The weight [outputs, inputs] that the layer multiplies by.

    On a CPU the kernel has a packed copy, and the parameter is empty. What it makes of unit vectors is the weight, bit
    for bit: each sum has one term that is not 0. (Of -0 it makes 0.)
    """
    packed = getattr(layer, "cpu_linear", None)
    if packed is None:
        return layer.weight.detach()
    columns = []
    step = max(1, (_CHUNK << 4) // inputs)
    for first in range(0, inputs, step):
        units = torch.zeros(min(step, inputs - first), inputs, dtype=layer.weight.dtype)
        units[torch.arange(len(units)), first + torch.arange(len(units))] = 1
        columns.append(packed(units, layer.weight, None))
    return torch.cat(columns).t().contiguous()
