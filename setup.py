"""What pyproject.toml cannot say: a wheel carries configs/, launch/ and the quickstart as megatron_tempo/shipped.

A checkout has these folders next to megatron_tempo, where people read and edit them; megatron_tempo/config/shipped.py
finds them in both.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SHIPPED = ("configs", "launch", "examples/quickstart")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            out = Path(self.build_lib) / "megatron_tempo" / "shipped"
            shutil.rmtree(out, ignore_errors=True)  # of an earlier build
            for name in SHIPPED:
                shutil.copytree(HERE / name, out / name, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildPy})
