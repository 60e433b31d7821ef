"""The package as a wheel in an environment of its own: what a user gets who installs it and has no checkout at hand."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("megatron_tempo", "configs", "launch", "examples")


def build_wheel(folder: Path) -> Path:
    """Builds the wheel in a copy of the checkout below `folder`, without network. Returns its path."""
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True, text=True)
    shutil.rmtree(source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment that has the wheel, and a folder from which its commands are run."""

    wheel: Path
    environment: Path
    work: Path

    @classmethod
    def make(cls, folder: Path) -> Installed:
        """The dependencies come from the environment of the tests, whose own megatron_tempo is not on the path."""
        wheel, environment, work = build_wheel(folder), folder / "environment", folder / "work"
        venv.create(environment, with_pip=False)
        python = environment / "bin/python"
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--force-reinstall",  # a checkout on PYTHONPATH looks like an installation
            "--no-deps",
            "--no-index",
        ]
        subprocess.run([*command, str(wheel)], check=True, capture_output=True, text=True)
        own = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
        paths = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()])
        (Path(own) / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
        work.mkdir()
        return cls(wheel, environment, work)

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`megatron-tempo WORDS`, run in `work` without anything of the checkout in the environment."""
        left_out = ("PYTHONPATH", "PYTHONWARNINGS", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
        command = [str(self.environment / "bin/megatron-tempo"), *words]
        return subprocess.run(
            command, cwd=self.work, env=inherited | variables, capture_output=True, text=True, check=False, timeout=300
        )
