"""The engines are imported once a session (`warm.py`); the imports begin with the first test that needs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engines.servers import ENGINES, MODULES, WARM, interpreter_of
from tests.engines.warm import WarmEngine


@pytest.fixture(scope="session", autouse=True)
def warm_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with engines_imported(tmp_path_factory.mktemp("warm")):
        yield


@contextmanager
def engines_imported(folder: Path) -> Iterator[None]:
    """The folder of the warm engines is in the environment, for the ranks that tests start."""
    engines = [WarmEngine(interpreter_of(kind), folder / kind.name, MODULES[kind]) for kind in ENGINES]
    os.environ[WARM] = str(folder)
    yield
    del os.environ[WARM]
    for engine in engines:
        engine.close()
