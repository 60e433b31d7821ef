"""The model's folder, which `make real-model` makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.conftest import engines_imported

FOLDER = Path(__file__).parents[2] / "build" / "real-model" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def model() -> Path:
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is not there: make real-model fetches it")
    return FOLDER


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with engines_imported(tmp_path_factory.mktemp("warm")):
        yield
