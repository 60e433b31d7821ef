"""The soak's judge: it finds a small leak of each kind, and nothing where there is none."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from tests.support.growth import ALLOWED, EVERY, Trace, growth

N = 300


def steady() -> dict[str, list[float]]:
    """The series of 300 iterations that leak nothing, with the noise of a machine that is shared."""
    draw = random.Random(1)
    few = range(N // EVERY)
    return {
        "files": [78.0 + (i % 10 == 0) for i in range(N)],
        "threads": [59.0] * N,
        "children": [0.0] * N,
        "tensors": [284.0] * len(few),
        "objects": [537_000.0 + 300 * (i < 3) + i for i in few],
        "rss_mb": [610.0 + min(i, 4) * 5 + draw.uniform(-0.5, 0.5) for i in few],
        "cpu_seconds": [0.1 * draw.uniform(0.9, 1.4) + (i % 10 == 9) * 0.2 for i in range(N)],
    }


# What each iteration leaves behind.
LEAKS = {
    "files": 0.1,  # one a checkpoint
    "threads": 0.1,
    "children": 0.1,
    "tensors": 0.1,
    "objects": 1.0,
    "rss_mb": 0.025,
    "cpu_seconds": 0.0004,  # of 0.1: two fifths more after 100 iterations
}


def test_what_does_not_grow() -> None:
    assert growth(steady()) == []
    assert LEAKS.keys() == ALLOWED.keys()


@pytest.mark.parametrize("name", LEAKS)
def test_what_grows_is_named(name: str) -> None:
    series = steady()
    each = LEAKS[name] * N / len(series[name])
    series[name] = [number + int(i * each * 1e6) / 1e6 for i, number in enumerate(series[name])]
    if name in ("files", "threads", "children"):
        series[name] = [float(int(number)) for number in series[name]]
    (growing,) = growth(series)
    assert growing.startswith(f"{name}: ")


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def waiter(done: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()
    return thread


def test_leaks_in_this_process() -> None:
    """One thing of each kind is kept between two counts."""
    gc.collect()  # of earlier tests, which may hold files
    trace, kept, done = Trace(), [], threading.Event()
    leaks: dict[str, Callable[[], Any]] = {
        "files": lambda: os.open(os.devnull, os.O_RDONLY),
        "threads": lambda: waiter(done),
        "children": sleeper,
        "tensors": lambda: torch.zeros(1),
        "objects": lambda: [[] for _ in range(2000)],
        "rss_mb": lambda: b"x" * (8 << 20),
    }
    try:
        for _ in range(EVERY):
            trace.sample()
        kept = [leak() for leak in leaks.values()]
        for _ in range(EVERY):
            trace.sample()
        grown = {name: trace.series[name][-1] - trace.series[name][EVERY - 1 if len(trace.series[name]) > 2 else 0]
                 for name in leaks}  # fmt: skip
    finally:
        done.set()
        with suppress(IndexError):
            os.close(kept[0])
            kept[2].communicate()
    assert grown["files"] == 2  # the child's pipe
    assert grown["threads"] == grown["children"] == grown["tensors"] == 1
    assert grown["objects"] >= 2000
    assert grown["rss_mb"] > 7
    assert all(seconds >= 0 for seconds in trace.series["cpu_seconds"])
