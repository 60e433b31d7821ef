"""One of two ranks of the part `ranks`: python -m gpu_parts.rank_steps SETTING WAY NAME=PORT...

For each layout NAME it takes a step of actor and critic, streams the actor's weights, and writes what it has seen to
FOLDER/ranks-NAME-RANK.pt. WAY: "direct" (NCCL, or gloo on a CPU), or "staged" (see `two`).
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from gpu_parts.made import MIDDLE, SMALL, Sizes, rollouts
from gpu_parts.setting import Setting, is_null_gpu
from gpu_parts.training import Pair, Seen, config_of, narrow, opened
from gpu_parts.two import through_host_memory
from megatron_tempo.config.schema import Config
from megatron_tempo.types import Batch
from megatron_tempo.weights.export import weights_of

PROBE = "probe"
# The settings of `parallel` by the layout's name.
LAYOUTS: dict[str, dict[str, int | bool]] = {
    "TP2 + SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "DP2": {},
    "CP2": {"context": 2},
}


def sizes_of(setting: Setting) -> Sizes:
    return SMALL if setting.small else MIDDLE


def batch_of(setting: Setting) -> Batch:
    rows, longest = (8, 40) if setting.small else (32, 400)
    return rollouts(sizes_of(setting).vocab, [(5 + row % 7, 2 + row * longest // rows) for row in range(rows)])


def configured(setting: Setting, name: str | None) -> Config:
    """Of a layout; None: of one process."""
    config = config_of(setting, setting.folder / "ranks-model", narrow(setting))
    config.run.hang_minutes = 1.0
    for field, value in LAYOUTS[name].items() if name else ():
        setattr(config.parallel, field, value)
    return config


def result(setting: Setting, name: str, rank: int) -> Path:
    return setting.folder / f"ranks-{name}-{rank}.pt"


def of_layout(config: Config, batch: Batch) -> tuple[Seen, dict[str, int]]:
    """What the ranks see of one step, and of the stream before it: its tensors, and those that differ."""
    seen = Seen()
    with opened(config) as pair:
        stream = streamed(pair, Path(config.model.path))
        pair.look(seen, 0, batch)
        pair.step(seen, 1, batch)
        pair.look(seen, 1, batch)
    return seen, stream


def streamed(pair: Pair, model: Path) -> dict[str, int]:
    """Both ways in which weights leave the model, against the folder. Collective."""
    wanted = load_file(model / "model.safetensors")
    weights = weights_of(pair.actor.model, pair.context.config, dtype=torch.bfloat16)
    found: dict[str, int] = {}
    for way, buckets in (("everywhere", weights.everywhere()), ("from stages", weights.from_stages())):
        tensors = differ = 0
        for bucket in buckets:
            for name, tensor in bucket:
                tensors += 1
                differ += not torch.equal(tensor.cpu(), wanted[name])
        found |= {f"{way}, tensors": tensors, f"{way}, that differ": differ}
    return found


def probe() -> None:
    """A sum over both ranks on the GPU that they share: NCCL may refuse it."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=30))
    one = torch.ones(4, device=device)
    dist.all_reduce(one)
    torch.cuda.synchronize()
    assert is_null_gpu() or one.tolist() == [2.0] * 4
    dist.destroy_process_group()


def main(written: str, way: str, *cases: str) -> None:
    setting, rank = Setting.read(written), int(os.environ["RANK"])
    if is_null_gpu():
        from gpu_parts import null

        null.prepare(trains=True)
    for case in cases:
        name, _, port = case.rpartition("=")
        os.environ["MASTER_PORT"] = port
        if name == PROBE:
            probe()
            found = None
        else:
            with through_host_memory() if way == "staged" else nullcontext():
                found = of_layout(configured(setting, name), batch_of(setting))
        torch.save(found, result(setting, name, rank))


if __name__ == "__main__":
    main(*sys.argv[1:])
