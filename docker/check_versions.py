"""Stops the build of an image whose versions are not compatible (docs/install.md). Needs no GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# Prints the version of the NCCL that is loaded. torch.cuda.nccl.version() returns the one that torch was compiled with.
NCCL_OF = """\
import ctypes, torch
version = ctypes.c_int()
if ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version)):
    raise SystemExit("ncclGetVersion failed")
print(version.value)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", help="the release that the image must have")
    parser.add_argument("--transformer-engine", help="the release that the image must have")
    parser.add_argument("--engine", metavar="PYTHON", help="an engine's Python; its NCCL must equal the trainer's")
    args = parser.parse_args()
    problems = []
    if args.torch:
        problems += release_problems("torch", installed("torch"), args.torch)
    if args.transformer_engine:
        version = installed("transformer-engine")
        problems += release_problems("transformer-engine", version, args.transformer_engine)
        if version:
            problems += range_problems("transformer-engine", version, requires("megatron-core") or [])
        print("apex:", installed("apex") or "not installed; not needed with Transformer Engine")
    if args.engine:
        problems += nccl_problems(nccl(sys.executable), nccl(args.engine))
    if problems:
        raise SystemExit("\n".join(problems))


def release_problems(project: str, version: str | None, wanted: str) -> list[str]:
    """Problems unless `found` is release `wanted`, or a build or pre-release of it: 2.10.0a0+nv26.01 is 2.10.0."""
    if version and SpecifierSet(f"=={wanted}.*").contains(version, prereleases=True):
        return []
    return [f"{project} is {version or 'not installed'}, not {wanted}: use another TRAINER_IMAGE, or give its versions"]


def range_problems(project: str, version: str, requirements: list[str]) -> list[str]:
    """Problems unless `found` is in each range that another project requires of `project`, including its extras."""
    ranges = [r.specifier for r in map(Requirement, requirements) if r.name == project]
    if not ranges:
        return [f"megatron-core does not require {project}, so its versions cannot be checked"]
    return [
        f"{project} is {version}, but megatron-core requires {specifier}"
        for specifier in ranges
        if not specifier.contains(version, prereleases=True)
    ]


def nccl_problems(trainer: str, engine: str) -> list[str]:
    return [] if trainer == engine else [f"NCCL is {trainer} in the trainer, {engine} in the engine"]


def nccl(python: str) -> str:
    # A run starts a server without the image's PYTHONPATH.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", NCCL_OF], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout.split()[-1]


def installed(project: str) -> str | None:
    try:
        return version(project)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
