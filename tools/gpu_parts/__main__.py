"""The process of one part: python -m gpu_parts NAME SETTING. Its output is the part's log."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

from gpu_parts.catalog import Part, named
from gpu_parts.records import Records
from gpu_parts.setting import Setting, is_null_gpu

MISSING, NO_GPU = 3, 4  # exit statuses: a package is not installed, which the log's last line names; no GPU is found


def missing(part: Part, setting: Setting) -> list[str]:
    """The modules of the part that are not installed."""
    needs = [*part.needs, *(part.cuda_needs if setting.device == "cuda" else ())]
    return [name for name in needs if not is_installed(name)]


def lacks_gpu(part: Part, setting: Setting) -> bool:
    """Whether the part runs on a GPU, and torch finds none."""
    if setting.device != "cuda" or "torch" not in part.needs:
        return False
    import torch

    return not torch.cuda.is_available()


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def main(name: str, written: str) -> int:
    (part,), setting = named([name]), Setting.read(written)
    if absent := missing(part, setting):
        print("missing: " + ", ".join(absent))
        return MISSING
    if lacks_gpu(part, setting):
        print("torch finds no GPU: check the driver and CUDA_VISIBLE_DEVICES, or give --device cpu")
        return NO_GPU
    if is_null := is_null_gpu():
        importlib.import_module("gpu_parts.null").prepare(trains="megatron.core" in part.needs)
    with (setting.folder / f"{name}.records").open("w", encoding="utf-8") as file:
        records = Records(file, has_numbers=not is_null)
        importlib.import_module(f"gpu_parts.{name}").run(setting, records)
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is on record: an interpreter that cannot shut down must not cost the rest of the time limit
