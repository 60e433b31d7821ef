"""Fixtures of several test files."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_tempo.config import extensions
from megatron_tempo.config.stages import load_method
from megatron_tempo.observability import logs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/extensions"


@pytest.fixture
def single() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path for modules of a test, and that of the examples."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    kinds = (extensions.load_verifier, extensions.load_reader, extensions.load_template, extensions.load_engine)
    for cached in (extensions.load, load_method, *kinds):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """The package's log as in a run of one process, and in caplog too. What a test changes of it is undone."""
    logger, factory = logging.getLogger(logs.PACKAGE), logging.getLogRecordFactory()
    logs.configure(rank=0)
    logger.propagate = True
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    logging.setLogRecordFactory(factory)
