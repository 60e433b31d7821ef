"""Starts and ends a process that serves this one over its standard input and output."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import megatron_tempo

END_SECONDS = 2.0  # for an idle process to end by itself


def start(
    module: str, *arguments: str, environment: Mapping[str, str], buffer_bytes: int = -1
) -> subprocess.Popen[bytes]:
    """Run a module of this package. `environment`: more variables for it. `buffer_bytes`: `bufsize` of Popen."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=buffer_bytes,
        cwd=Path(megatron_tempo.__file__).parents[1],  # so that `-m` finds this package
        env={**os.environ, **environment},
        start_new_session=True,  # Ctrl-C is for the trainer; when it ends, the process's input is closed
    )


def end(process: subprocess.Popen[bytes], before_kill: Callable[[], None] = lambda: None) -> None:
    """Close the process's input and wait until it ends; kill it if it does not, after `before_kill`."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # unread input is not needed any more
        process.stdin.close()
    try:
        process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        before_kill()
        process.kill()
        process.wait()
    process.stdout.close()
