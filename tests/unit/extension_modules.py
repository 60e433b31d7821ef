"""Modules of a user's own, and what is wrong with a configuration that names them."""

from __future__ import annotations

from pathlib import Path

from megatron_tempo.config import Problem, Purpose, check
from tests.unit.config_files import configure, good_overrides


def problems(files: Path, *changes: str, purpose: Purpose = Purpose.train) -> list[Problem]:
    return check(configure([*good_overrides(files), *changes]), world_size=None, purpose=purpose)


def write(folder: Path, text: str, name: str = "mine") -> None:
    (folder / f"{name}.py").write_text(text)


def assert_refused(files: Path, modules: Path, case: tuple[str, str, str], field: str) -> None:
    """That `x` of the module, for each set of questions, is a problem. `case`: the module, what is wrong, the fix."""
    text, wrong, fix = case
    write(modules, text)
    for group in ("data.labelled", "data.unlabelled", "evaluation.sets.heldout"):
        (problem,) = problems(files, f"{group}.{field}=import:mine:x")
        assert (problem.field, problem.value) == (f"{group}.{field}", "import:mine:x")
        assert wrong in problem.wrong
        assert fix in problem.fix
