"""Files that run inside vLLM, imported without vLLM."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from megatron_tempo.rollout import tensor_sums


class Anything:
    """Stands for each of vLLM's classes and functions."""

    def __class_getitem__(cls, item: object) -> type:
        return cls

    @staticmethod
    def register_engine(*arguments: object) -> None: ...


@contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """The module of a file, with stand-ins for what it imports of vLLM and of our other files in it."""
    tree = ast.parse(path.read_text())
    stubs: dict[str, ModuleType] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
            words = str(node.module).split(".")
            for i in range(len(words)):
                name = ".".join(words[: i + 1])
                stubs.setdefault(name, ModuleType(name))
            for alias in node.names:
                setattr(stubs[str(node.module)], alias.name, type(alias.name, (Anything,), {}))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, stub in {**stubs, path.stem: module, "tensor_sums": tensor_sums}.items():
            monkeypatch.setitem(sys.modules, name, stub)
        spec.loader.exec_module(module)
        yield module
