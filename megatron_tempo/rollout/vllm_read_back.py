"""Runs inside a vLLM server with `vllm_worker.py`: reads back the parameters that a worker computes with.

A worker holds parts of tensors: the rows or columns of its tensor rank, joined with others in one parameter, and on a
CPU only as its kernel has packed them. This file knows which part of which of Hugging Face's tensors is where. It does
not ask vLLM's loaders, which are what the read-back tests. It imports nothing of this package. Written for vLLM 0.32.
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
    when it loads it.
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
    return {name: list(*blocks) for name, blocks in found.items() if len(blocks) == 1}


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


def _experts(name: str, layer: Any) -> Iterator[str]:
    """The names of a layer's experts' tensors. They are one parameter, whose order each kernel chooses."""
    above = name.removesuffix(".routed_experts")
    for expert in range(layer.global_num_experts):
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield f"{above}.{expert}.{part}.weight"
            if "Unquantized" not in type(layer.quant_method).__name__:
                yield f"{above}.{expert}.{part}.weight_scale_inv"


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
