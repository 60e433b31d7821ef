"""An environment on a machine without a network: the packages that are there, and those of a folder of wheels."""

from __future__ import annotations

import site
import subprocess
import sys
import venv
from pathlib import Path


class WheelError(Exception):
    """The folder has no wheels, or they cannot be installed."""


def make_environment(wheels: Path, folder: Path) -> str:
    """Install all wheels of a folder into a new environment. Returns its interpreter. Raises WheelError.

    It sees the packages of the interpreter that runs this, also where that belongs to a virtual environment itself:
    `--system-site-packages` alone would show those of the interpreter below. Dependencies are not resolved, because the
    folder is meant to hold what is missing and the rest may be of another version than pip would choose.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise WheelError(f"--wheels {wheels}: no .whl file there; docs/gpu.md tells how to make the folder")
    venv.create(folder, system_site_packages=True, clear=True, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python*/site-packages"))
    if sys.prefix != sys.base_prefix:
        (packages / "above.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    # Else pip leaves out what is installed elsewhere, of this version or another.
    command += ["--ignore-installed", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WheelError(f"--wheels {wheels}: pip cannot install them:\n{done.stdout}{done.stderr}".rstrip())
    return str(python)
