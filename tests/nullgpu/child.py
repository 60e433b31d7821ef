"""Runs Python on the null GPU, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from megatron_tempo.nullgpu.environment import environment

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD = """\
import json, os, sys
import torch
from megatron_tempo.nullgpu import counters, guard
from megatron_tempo.nullgpu.environment import without_cudnn
without_cudnn()
def tell(value): print("TOLD " + json.dumps(value))
def end():
    sys.stdout.flush()
    os._exit(0)  # at once: a backward pass leaves a thread that torch may find in the interpreter's way as it ends
def raised(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None
"""


def on_null_gpu(code: str, *, variables: dict[str, str] | None = None, **device: Any) -> Any:
    """What `code` gives to `tell`. The process must end with status 0. `device`: arguments of `environment`."""
    done = run(f"{HEAD}{textwrap.dedent(code)}\nend()", environment(**device) | (variables or {}))
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    told = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(told) == 1, done.stdout
    return json.loads(told[0])


def run(code: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A Python process with these variables, which finds the package."""
    variables = variables | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=300, check=False
    )
