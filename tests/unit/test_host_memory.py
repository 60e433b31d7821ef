"""Freed memory is reused, counted by page faults of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BLOCK = 64 << 20
FAULTS = f"""
import resource
from megatron_tempo.runtime.host_memory import keep_freed_memory
keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * {BLOCK}
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**variables: str) -> list[int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC"))}
    command = [sys.executable, "-c", FAULTS]
    out = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stdout
    return [int(line) for line in out.split()]


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="not glibc")
def test_a_block_that_was_freed_needs_no_new_pages() -> None:
    first, second = faults()
    assert second < first / 10


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="not glibc")
@pytest.mark.parametrize(
    "setting", [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}]
)
def test_the_users_own_settings_stay(setting: dict[str, str]) -> None:
    """Here: such a block has pages of its own each time."""
    first, second = faults(**setting)
    assert second > first / 2
