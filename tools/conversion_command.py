"""The common part of the two conversion commands."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path


def gibibytes(text: str) -> int:
    """A number of GiB, in bytes."""
    size = int(float(text) * 2**30)
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of GiB")
    return size


def run(convert: Callable[[], int], out: Path) -> int:
    """Convert, and print size, time and peak memory. A user's error is printed in one line. Returns the exit code."""
    from megatron_tempo.errors import InputError

    start = time.monotonic()
    try:
        size = convert()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: rerun the same command to resume from here", file=sys.stderr)
        return 130
    seconds = time.monotonic() - start
    print(f"{out}: {size} bytes in {seconds:.1f} s, peak memory {peak_bytes() / 2**20:.0f} MiB", flush=True)
    return 0


def peak_bytes() -> int:
    """Peak resident memory of this process, including mapped files."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss includes the peak of the process that started this one
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) << 10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
