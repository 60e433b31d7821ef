"""`megatron-tempo presets`: every preset with a one-line description."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.benchmarks import BENCHMARKS, Benchmark
from megatron_tempo.config.compose import GROUPS
from megatron_tempo.config.problem import did_you_mean
from megatron_tempo.config.shipped import REPOSITORY
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_text
from megatron_tempo.observability.terminal import width

_WHAT = {
    "experiment": "a whole run",
    "model": "checkpoint, precision, layout",
    "data": "labelled, unlabelled and evaluation sets",
    "benchmark": "an evaluation set of that name, or several: benchmark=[NAME,NAME]",
    "engine": "who generates, and on which GPUs",
    "algorithm": "what stage 2 does",
    "cluster": "the machines that plan and submit are for",
}


def listing(group: str | None, config_dir: str | None) -> str:
    """The presets of a group, or of all. Raises InputError for an unknown group or a folder that does not exist."""
    if group is not None and group not in GROUPS:
        raise InputError(f"{group} is not a group of presets; {did_you_mean(group, list(_WHAT))}")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise InputError(f"--config-dir={config_dir} is not a folder: give the folder of your presets")
    parts = []
    for name in _WHAT if group is None else [group]:
        lines = list(_presets(name, config_dir))
        room = max(len(preset) for preset, _ in lines)
        parts.append("\n".join([f"{name}=NAME: {_WHAT[name]}", *(_line(*line, room) for line in lines)]))
    return "\n\n".join(parts)


def _presets(group: str, config_dir: str | None) -> Iterator[tuple[str, str]]:
    """Names and descriptions."""
    if group == "benchmark":
        yield from ((name, _of_benchmark(set_)) for name, set_ in BENCHMARKS.items() if not set_.training)
    folders = [REPOSITORY / "configs", *([] if config_dir is None else [Path(config_dir)])]
    files = {path.stem: path for folder in reversed(folders) for path in (folder / group).glob("*.yaml")}
    for name in sorted(files, key=natural):
        yield name, description(read_text(files[name]))


def description(text: str) -> str:
    """The first sentence of the comment at the top of a preset."""
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("# "))
    return re.split(r"(?<=\.)\s(?=[A-Z])", " ".join(comment))[0].rstrip(".")


def _of_benchmark(benchmark: Benchmark) -> str:
    count = "" if benchmark.questions is None else f"{benchmark.questions} questions, "
    verifier = "a verifier for each row" if benchmark.verifier is None else f"verifier {benchmark.verifier.name}"
    return f"{count}{verifier}; from {benchmark.source}"


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers by their value: h100x8 before h100x16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _line(name: str, text: str, room: int) -> str:
    indent = " " * (room + 4)
    return textwrap.fill(text, width(), initial_indent=f"  {name:<{room}}  ", subsequent_indent=indent) or f"  {name}"
