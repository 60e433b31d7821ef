"""Checks the user's own presets, the files below `--config-dir`, before Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_tempo.config.problem import ConfigErrors, Problem
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_text

_SECTIONS = tuple(field.name for field in fields(Config))
_HEADER = re.compile(r"#\s*@")
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")


def check_presets(folder: Path, groups: Sequence[str], overrides: Sequence[str]) -> None:
    """Raises ConfigErrors for a preset below `folder` that cannot be read: Hydra would wait for a pipe, and show a
    traceback.

    Also for one of `overrides` whose fields Hydra would put where no field is: it would not name the file.
    """
    problems = []
    for group in groups:
        values = [text.partition("=")[2] for text in overrides if text.lstrip("+").startswith(f"{group}=")]
        chosen = {name.removesuffix(".yaml") for value in values for name in re.findall(r"[^][,'\" ]+", value)}
        for path in sorted((folder / group).glob("*.yaml")):
            try:
                package = _package(read_text(path), group)
            except InputError as error:
                problems.append(Problem("--config-dir", str(folder), str(error), f"mend {path} or move it away"))
                continue
            if path.stem in chosen and package.partition(".")[0] not in ("_global_", *_SECTIONS):
                wrong = f"{path} puts its fields into {package}, which is no section of a configuration"
                fix = "begin the file with the line `# @package _global_`"
                problems.append(Problem("--config-dir", str(folder), wrong, fix))
    if problems:
        raise ConfigErrors(problems)


def _package(text: str, group: str) -> str:
    """Where Hydra puts the fields of a preset: what its header says, by default the group's name.

    Hydra reads the header down to the first line that is neither empty nor of the form `# @KEY VALUE`.
    """
    for line in filter(None, map(str.strip, text.splitlines())):
        if not _HEADER.match(line):
            break
        if package := _PACKAGE.fullmatch(line):
            return package[1]
    return group
