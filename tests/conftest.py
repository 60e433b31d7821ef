"""Prints at the start of a test session how long it takes and what it leaves out."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest

from megatron_tempo.errors import InputError
from megatron_tempo.nullgpu.guard import refuse_null_gpu

# By the Makefile's target: minutes on two cores, on a fast and on a slow machine, and what is left out.
ABOUT = {
    "test-quick": ("1.5", "what needs several processes or more than two seconds (make test)"),
    "test": ("10 to 20", "slow tests, engines, SLURM, GPUs and rehearsals (make test-slow, test-engines, ...)"),
    "test-slow": ("4 to 7", "all but the slow tests"),
    "test-engines": ("5 to 14", "all but the tests against real inference servers"),
    "test-slurm": ("3 to 5", "all but the tests on a real SLURM"),
    "test-release": ("20", "all but the combinations that .ci/run leaves out, and long measurements"),
    "test-rehearsal": ("4", "all but the tests on the null GPU"),
}


# A busy machine may take longer than its 200 ms for an example.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


def pytest_report_header() -> list[str]:
    target = os.environ.get("MAKE_TARGET", "")
    if target not in ABOUT:
        return []
    minutes, left_out = ABOUT[target]
    return [f"make {target}: about {minutes} minutes on two cores; left out: {left_out}"]


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the cores: one thread each.

    A shell's background job ignores Ctrl-C, and so would all processes that tests start. On the null GPU no test says
    anything: those of tests/nullgpu give it to processes of their own.
    """
    try:
        refuse_null_gpu("pytest")
    except InputError as error:
        raise pytest.UsageError(str(error)) from error
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
