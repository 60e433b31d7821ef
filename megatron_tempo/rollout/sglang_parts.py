"""Runs inside a SGLang server: takes tensors in parts, so that no bucket is larger than the trainer's `bucket_mb`.

SGLang 0.5.23 loads whole tensors only. This file is copied into a server's folder as a plugin of SGLang's
(`srt/plugins`: an entry point of the group `sglang.srt.plugins`), found by its module name in SGLang's environment, so
it imports nothing of this package. With `transport=shared` it is the server's `--custom-weight-loader`; with
`transport=group` there is no such option, so the plugin wraps the one function that loads what a group received.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

# Rows START to STOP of the ROWS rows of a tensor. A server without this plugin fails with such a name: its models look
# up what contains q_proj among their parameters. They skip other unknown names, and report success.
_PART = re.compile(r"q_proj:(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+):(?P<rows>\d+)\]")
_LOADS = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.load_weights_from_distributed"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

Named = Iterable[tuple[str, Tensor]]

# Tensors other than vocabularies of which some parts have arrived.
_begun: dict[str, Tensor] = {}


def register() -> None:
    """What SGLang calls in each of its processes."""
    HookRegistry.register(_LOADS, _load_from_group, HookType.AROUND)
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        _keep_experts_in_plain_memory()


def _keep_experts_in_plain_memory() -> None:
    """SGLang registers the memory of the experts that it returns with CUDA, also where there is none."""
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: Any, dtype: Any, device: str, pin_memory: bool, allocator: Any) -> Any:
        return allocator.allocate(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def load(model: Any, named: Named) -> None:
    """Load tensors and parts of tensors. The parts of a tensor come in the order of its rows."""
    model.load_weights(list(_whole(model, named)))


def _load_from_group(original: Callable[..., Any], updater: Any, named_tensors: Named) -> Any:
    """SGLang reports an error of its loaders to the sender, so an error of ours has to be one of those."""
    try:
        whole = list(_whole(updater.get_model(), named_tensors))
    except (ValueError, KeyError, RuntimeError) as error:
        return False, f"Failed to load a part of a tensor: {error}"
    return original(updater, whole)


@torch.no_grad()
def _whole(model: Any, named: Named) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors, and those that are whole with a part. Parts of a vocabulary are copied into place."""
    for name, tensor in named:
        part = _PART.fullmatch(name)
        if part is None:
            yield name, tensor
            continue
        start, rows = int(part["start"]), int(part["rows"])
        if layers := _vocabularies(model, part["name"]):
            for layer in layers:
                place_rows(layer, tensor, start, rows)
        elif (whole := joined(_begun, part["name"], tensor, start, rows)) is not None:
            yield part["name"], whole


def _vocabularies(model: Any, name: str) -> list[Any]:
    """The layers that hold a vocabulary matrix. A tied head may hold the embedding once more."""
    tied = getattr(model.config, "tie_word_embeddings", False) and name == _EMBEDDING
    names = {name, _HEAD} if tied else {name}
    layers = model.named_modules()
    return [layer for one, layer in layers if isinstance(layer, VocabParallelEmbedding) and f"{one}.weight" in names]


def place_rows(layer: Any, tensor: Tensor, start: int, rows: int) -> None:
    """Copy rows of a vocabulary matrix, which has `rows`, into the rows that this tensor rank holds, from row `start`.

    The rows of padding become 0, as in SGLang's `weight_loader`. Raises ValueError for another vocabulary's rows.
    """
    if rows != layer.org_vocab_size:
        raise ValueError(f"the vocabulary has {layer.org_vocab_size} rows, not {rows}")
    first, last = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    begin, end = max(start, first), min(start + len(tensor), last)
    if begin < end:
        layer.weight.data[begin - first : end - first].copy_(tensor[begin - start : end - start])
    layer.weight.data[last - first :].fill_(0)


def joined(begun: dict[str, Tensor], name: str, part: Tensor, start: int, rows: int) -> Tensor | None:
    """The tensor, if it is whole with this part. Others wait in `begun`; the first part begins a tensor anew."""
    if start == 0:
        begun[name] = part.new_empty(rows, *part.shape[1:])
    begun[name][start : start + len(part)].copy_(part)
    return begun.pop(name) if start + len(part) == rows else None
