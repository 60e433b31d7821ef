"""Measure a checkpoint's pause and host memory on a CPU: python tools/bench_checkpoint.py --gb 1

Trains nothing: it builds an actor of random weights in bf16, whose share of a checkpoint is `--gb` GB on each rank, and
saves it several times. Under `torchrun --nproc-per-node N` the N ranks are data-parallel, and the share is a rank's.

    pause     until `Checkpoints.save` returns, and training continues; the processor time of the calling thread too
    memcpy    the same number of bytes, from one tensor to another, between memory that is resident already
    memory    what the saves add to the resident memory of the process at its peak, until all is on the disk

Pause and memcpy are measured in turn, and the least of each is reported: other processes on the machine disturb both.
The first pause is reported too. Files are written below `--folder` and removed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import transformers

from megatron_tempo.checkpoint.checkpoints import Checkpoints
from megatron_tempo.config.choices import Device, Precision
from megatron_tempo.config.schema import Config
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor

BYTES = 14  # a parameter's in a checkpoint: a weight in bf16, its fp32 main weight and two moments
LAYER = 4 * 1024 * 1024 + 3 * 1024 * 3072  # parameters of a layer of Qwen3-0.6B with as many key heads as query heads


def write_model(folder: Path, parameters: int) -> None:
    config = transformers.Qwen3Config(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=max(1, (parameters - 8192 * 1024) // LAYER),
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        tie_word_embeddings=True,
    )
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this thread on a processor."""
    wall, processor = time.perf_counter(), time.thread_time()
    act()
    return time.perf_counter() - wall, time.thread_time() - processor


def peak_memory() -> int:
    """The largest resident memory since `restart_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


def restart_peak() -> int:
    """Restart the search for the peak. Returns the resident memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def measure(checkpoints: Checkpoints, model: TrainedModel, rounds: int) -> None:
    share = sum(BYTES * p.numel() for p in model.net.parameters()) // model.layout.data
    before = restart_peak()
    checkpoints.reserve({"actor": model})  # as a run does at its start
    pauses = [timed(lambda: checkpoints.save(1, {"actor": model}, {}))]
    checkpoints.wait()
    held = peak_memory() - before
    source, target = torch.ones(share // 4), torch.zeros(share // 4)
    copies = []
    for step in range(2, rounds + 2):
        copies.append(timed(lambda: target.copy_(source)))
        pauses.append(timed(lambda step=step: checkpoints.save(step, {"actor": model}, {})))  # type: ignore[misc]
        checkpoints.wait()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, each with {share / 1e9:.2f} GB of a checkpoint")
        for unit, name in enumerate(("clock", "processor time of the thread")):
            copy = min(pair[unit] for pair in copies)
            pause = min(pair[unit] for pair in pauses[1:])
            print(f"{name}: memcpy {copy:.3f} s, pause {pause:.3f} s, ratio {pause / copy:.2f}", end="; ")
            print(f"first pause {pauses[0][unit] / copy:.2f}")
        print(f"host memory at its peak: {held / share:.2f} of the share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="of a rank's share")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to write to; default: the temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        config = Config()
        config.run.device = Device.cpu
        with open_context(config) as context:
            path = [str(Path(folder) / "model")]
            dist.broadcast_object_list(path)
            if context.is_writer:
                write_model(Path(path[0]), int(given.gb * 1e9 / BYTES) * dist.get_world_size())
            dist.barrier()
            config.model.path, config.run.precision = path[0], Precision.bf16  # not on a CPU by the rules
            model = build_actor(context).model
            assert isinstance(model, TrainedModel)
            checkpoints = Checkpoints(Path(path[0]).parent / "checkpoints", 1, context.layouts.actor)
            measure(checkpoints, model, given.rounds)
            dist.barrier()


if __name__ == "__main__":
    main()
