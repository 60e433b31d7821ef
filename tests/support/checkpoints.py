"""What is in a run's checkpoint, read without the package's own reader."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor

# PARAMETER|tp RANK of RANKS|START:STOP|STATE
_NAME = re.compile(r"([\w.]+)\|tp (\d+) of (\d+)\|(\d+):(\d+)\|(main|exp_avg|exp_avg_sq)")


def saved_tensors(step: Path) -> dict[str, Tensor]:
    """All tensors of actor and critic in a step's folder: weights by Megatron's name, the optimizer's by
    MODEL/STATE/PARAMETER/tensor rank, flat. In a process group of this process only."""
    tensors: dict[str, Tensor] = {}
    for model in ("actor", "critic"):
        weights = dist_checkpointing.load_plain_tensors(str(step / model))
        tensors |= {f"{model}/{name}": one for name, one in weights.items() if isinstance(one, Tensor)}
        tensors |= {f"{model}/{name}": one for name, one in saved_states(step / model / "optimizer").items()}
    return tensors


def saved_states(folder: Path) -> dict[str, Tensor]:
    """The numbers of each shard of an optimizer's state, by STATE/PARAMETER/tensor rank, joined from all ranks' files.

    Asserts that the pieces cover each shard once.
    """
    pieces: dict[str, list[tuple[int, int, Tensor]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            match = _NAME.fullmatch(name)
            assert match is not None, name
            parameter, rank, _, start, stop, state = match.groups()
            assert tensor.dtype is torch.float32
            assert tensor.shape == (int(stop) - int(start),)
            pieces.setdefault(f"{state}/{parameter}/{rank}", []).append((int(start), int(stop), tensor))
    joined = {}
    for key, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        ends = [0, *(stop for _, stop, _ in parts)]
        assert [start for start, _, _ in parts] == ends[:-1], f"{key}: {parts}"
        joined[key] = torch.cat([tensor for _, _, tensor in parts])
    return joined


def adam_steps(folder: Path) -> int:
    steps: int = json.loads((folder / "index.json").read_text())["step"]
    return steps


def different(one: Path, other: Path) -> list[str]:
    """The tensors whose bits differ between two steps."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        actual, expected = saved_tensors(one), saved_tensors(other)
    finally:
        dist.destroy_process_group()
    assert actual.keys() == expected.keys()
    assert any("exp_avg_sq" in name for name in actual)
    return [name for name in actual if not torch.equal(actual[name], expected[name])]
