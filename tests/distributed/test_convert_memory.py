"""Conversions of a model of more than 4 GiB, in memory that is measured from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.weights import tables
from megatron_tempo.weights.files import Entry, write_safetensors
from megatron_tempo.weights.folder import describe, tensor_files
from megatron_tempo.weights.pieces import plan
from tests.support.tools import TOOLS

SHARD = 1 << 30
ROW_PIECE = 32 << 20  # bytes that are made at a time
# What a conversion may take, with its imports: two chunks of at most 256 MiB of a vocabulary's matrix. The import of a
# build of torch for CUDA takes 400 MiB more.
BOUND = (1280 if torch.version.cuda is None else 1680) << 20


def write_large(folder: Path, layers: int = 32, vocab: int = 151936) -> dict[str, int]:
    """A Qwen3-1.7B with more layers and heads of its own, of random bits in bfloat16. Returns a checksum a tensor."""
    config = transformers.Qwen3Config(
        vocab_size=vocab,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    checksums: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)

    def pieces(entry: Entry) -> Iterator[Tensor]:
        name, _, (rows, *width) = entry
        step = max(1, ROW_PIECE // (2 * torch.Size(width).numel()))
        for start in range(0, rows, step):
            size = (min(step, rows - start), *width)
            piece = torch.randint(-(2**15), 2**15, size, dtype=torch.int16, generator=generator)
            checksums[name] = zlib.crc32(piece.numpy().data, checksums.get(name, 0))
            yield piece.view(torch.bfloat16)

    weight_map: dict[str, str] = {}
    for number, group in enumerate(plan(tables.mappings(read_model_shape(folder), critic=False), SHARD, 2)):
        entries = [
            (name, torch.bfloat16, shape)
            for mapping in group
            for name, shape in zip(mapping.names, mapping.shapes, strict=True)
        ]
        file = f"model-{number:05d}.safetensors"
        with (folder / file).open("wb") as opened:
            write_safetensors(opened, entries, (piece for entry in entries for piece in pieces(entry)))
        weight_map |= dict.fromkeys((entry[0] for entry in entries), file)
    describe(folder, weight_map, sum(path.stat().st_size for path in folder.glob("*.safetensors")), folder, {})
    return checksums


def checksums_of(folder: Path) -> dict[str, int]:
    checksums = {}
    for name, path in tensor_files(folder).items():
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
        assert tensor.dtype is torch.bfloat16
        checksums[name] = zlib.crc32(tensor.view(torch.int16).numpy().data)
    return checksums


def convert(name: str, *words: object) -> tuple[str, int]:
    """Run a converter: what it told at its end, and the most bytes that it had resident, as the system says."""
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent), "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, words)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, lines
    return lines[-1], usage.ru_maxrss << 10


@pytest.mark.release
@pytest.mark.timeout(1800)
def test_a_model_larger_than_the_memory_that_it_takes(tmp_path: Path) -> None:
    folder, checkpoint, back = tmp_path / "folder", tmp_path / "megatron", tmp_path / "back"
    checksums = write_large(folder)
    files = set(tensor_files(folder).values())
    assert len(files) > 3
    assert sum(path.stat().st_size for path in files) > 4 << 30
    lines, peak = convert("convert_hf_to_megatron", folder, checkpoint)
    print(f"{lines}; by the system {peak / 2**20:.0f} MiB")
    assert peak < BOUND
    assert 4 <= len([path for path in checkpoint.glob("*.distcp") if path.stat().st_size > 1 << 20]) <= 6
    for path in files:
        path.unlink()
    lines, peak = convert("convert_megatron_to_hf", checkpoint, back, "--like", folder, "--shard-gb", "2")
    print(f"{lines}; by the system {peak / 2**20:.0f} MiB")
    assert peak < BOUND
    assert checksums_of(back) == checksums
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    for path in (*checkpoint.glob("*.distcp"), *back.glob("*.safetensors")):  # pytest keeps the folders of three runs
        path.unlink()


def test_the_bits_of_a_large_folder_are_its_checksums(tmp_path: Path) -> None:
    """What the test above rests on, on a small one."""
    checksums = write_large(tmp_path / "folder", layers=1, vocab=64)
    assert checksums == checksums_of(tmp_path / "folder")
