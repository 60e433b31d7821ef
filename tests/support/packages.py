"""Programs of the system that tests need: installed by apt-get where they are not there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence


def install(programs: Sequence[str], packages: Sequence[str]) -> str:
    """Install Debian's `packages` if one of `programs` is missing. Returns why that is not possible; empty if it is."""
    missing = [name for name in programs if shutil.which(name) is None]
    if not missing:
        return ""
    if shutil.which("apt-get") is None:
        return f"{', '.join(missing)} not found, and there is no apt-get to install {' '.join(packages)}"
    if os.geteuid() != 0:
        return f"{', '.join(missing)} not found, and only root may install {' '.join(packages)}"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(words, env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{' '.join(words)} failed: {done.stderr.strip()[-500:]}"
    missing = [name for name in programs if shutil.which(name) is None]
    return f"{' '.join(packages)} installed, but {', '.join(missing)} not found" if missing else ""
