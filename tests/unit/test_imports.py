"""The import rules of the design, read from the sources: imports run one way, and heavy packages stay in their places.

A file of megatron_tempo belongs to the layer of its first name below the package: megatron_tempo/models/actor.py to
models, megatron_tempo/cli.py to cli. Every layer has a row in `ALLOWED`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_tempo"

# What each layer may import of megatron_tempo besides itself: whole layers, or single modules of one.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "files": {"errors"},
    "types": set(),
    "config": {"errors", "files"},
    "observability": {"config", "errors", "files", "types"},
    "nullgpu": {"errors", "files"},
    "runtime": {"config", "errors", "files", "observability"},
    "kernels": {"config"},
    "algorithm": {"config", "kernels"},
    "models": {"algorithm", "config", "errors", "files", "kernels", "nullgpu.guard", "runtime", "types"},
    "weights": {"config", "errors", "files", "models", "runtime", "types"},
    "methods": {"algorithm", "config", "kernels", "models", "types"},
    "rewards": {"config", "errors", "files", "runtime", "types"},
    "data": {"config", "errors", "files", "observability", "rewards", "runtime", "types"},
    "rollout": {
        *("config", "data.tokenizer", "errors", "files", "models.megatron_compat.torch_private", "rewards"),
        *("kernels.truncation", "nullgpu.guard", "runtime", "types"),
    },
    "evaluation": {"config", "rewards", "rollout", "types"},
    "checkpoint": {"config", "data", "errors", "files", "models", "observability", "runtime", "weights"},
    "report": {"config", "errors", "files", "evaluation", "observability"},
    "plan": {"config", "errors", "files", "report"},
    "submit": {"config", "errors", "files", "plan"},
    "training": {
        *(
            "checkpoint",
            "config",
            "data",
            "errors",
            "files",
            "evaluation",
            "kernels",
            "methods",
            "models",
            "observability",
        ),
        *("plan", "report", "rewards", "rollout", "runtime", "types", "weights"),
    },
    "rehearsal": {
        *(
            "checkpoint",
            "config",
            "data",
            "errors",
            "files",
            "methods",
            "models",
            "nullgpu",
            "observability",
            "plan",
            "rewards",
        ),
        *("rollout", "training", "types", "weights"),
    },
    "commands": {
        "checkpoint",
        "config",
        "data",
        "errors",
        "files",
        "models.megatron_compat.transformer_engine",
        "nullgpu.guard",
        "observability",
        "rehearsal",
        "rewards",
        "runtime",
        "submit",
    },
    "cli": {
        "commands",
        "config",
        "data",
        "errors",
        "models.megatron_compat.transformer_engine",
        "nullgpu.guard",
        "observability",
        "plan",
        "rehearsal",
        "report",
        "rollout",
        "runtime.launcher",
        "submit",
        "training",
    },
}
# Only these layers, or files, import these packages.
HOMES = {
    "megatron": {"models", "weights", "checkpoint"},
    "hydra": {"config/compose.py"},
    "omegaconf": {"config/compose.py"},
}
# These layers do not import torch: commands such as check, plan and status start without it.
WITHOUT_TORCH = {
    "__init__",
    "__main__",
    "cli",
    "commands",
    "config",
    "errors",
    "files",
    "observability",
    "plan",
    "report",
    "submit",
}
WITH_TORCH = {"observability/profiler.py"}  # files of theirs that do


def violations(package: Path) -> list[str]:
    """Every import below `package` that breaks a rule, as "file:line layer imports name"."""
    broken = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        for line, name in imports(path, package):
            if not permitted(file, name, package.name):
                broken.append(f"{package.name}/{file}:{line} {Path(Path(file).parts[0]).stem} imports {name}")
    return broken


def permitted(file: str, name: str, package: str) -> bool:
    """Whether a file, by its path below the package, may import `name`."""
    layer = Path(Path(file).parts[0]).stem
    top, *below = name.split(".")
    if top == package:
        return not below or below[0] == layer or bool({below[0], ".".join(below)} & ALLOWED[layer])
    if top == "torch":
        return layer not in WITHOUT_TORCH or file in WITH_TORCH
    return top not in HOMES or layer in HOMES[top] or file in HOMES[top]


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported anywhere in a file, type-checking imports included."""
    inside = (package.name, *path.relative_to(package).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            # "from package import layer" names the layer in the alias
            names = [f"{module}.{alias.name}" for alias in node.names] if module == package.name else [module]
            yield from ((node.lineno, name) for name in names)


def test_imports_run_one_way() -> None:
    assert violations(PACKAGE) == []


def test_every_layer_has_a_row_and_rows_have_no_cycle() -> None:
    layers = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(ALLOWED) == layers
    graph = {layer: {name.partition(".")[0] for name in names} for layer, names in ALLOWED.items()}
    assert set(TopologicalSorter(graph).static_order()) == layers  # raises CycleError where there is one


PLANTED = [
    ("types.py", "from megatron_tempo.config import Config", "megatron_tempo.config"),
    ("config/rules/run.py", "from megatron_tempo.types import Batch", "megatron_tempo.types"),
    ("config/schema.py", "import torch.nn as nn", "torch.nn"),
    ("config/schema.py", "from ..models import actor", "megatron_tempo.models"),
    ("config/rules/run.py", "def f():\n    from ...training.jobs import train", "megatron_tempo.training.jobs"),
    ("kernels/loss.py", "from megatron_tempo import algorithm", "megatron_tempo.algorithm"),
    ("algorithm/losses.py", "import megatron_tempo.models.actor", "megatron_tempo.models.actor"),
    ("algorithm/losses.py", "import megatron.core", "megatron.core"),
    ("models/actor.py", "from megatron_tempo.weights import tables", "megatron_tempo.weights"),
    ("models/actor.py", "from megatron_tempo.methods.tempo import Tempo", "megatron_tempo.methods.tempo"),
    ("rollout/engine.py", "from megatron.core import mpu", "megatron.core"),
    ("rollout/engine.py", "from megatron_tempo.models import actor", "megatron_tempo.models"),
    ("rewards/math.py", "from megatron_tempo.data import stream", "megatron_tempo.data"),
    ("data/stream.py", "try:\n    import megatron\nexcept ImportError:\n    pass", "megatron"),
    ("rollout/engine.py", "from megatron_tempo.evaluation import scores", "megatron_tempo.evaluation"),
    ("evaluation/scores.py", "from megatron_tempo.models import actor", "megatron_tempo.models"),
    ("methods/tempo.py", "from megatron_tempo.training.jobs import train", "megatron_tempo.training.jobs"),
    ("methods/tempo.py", "from megatron.core import mpu", "megatron.core"),
    ("observability/metrics.py", "from megatron_tempo.training.jobs import train", "megatron_tempo.training.jobs"),
    ("runtime/watchdog.py", "from megatron_tempo.training import trainer", "megatron_tempo.training"),
    ("observability/heartbeat.py", "import torch", "torch"),
    ("weights/export.py", "from megatron_tempo.training.context import RunContext", "megatron_tempo.training.context"),
    ("config/schema.py", "import hydra", "hydra"),
    ("training/jobs.py", "from megatron_tempo.cli import main", "megatron_tempo.cli"),
    ("training/jobs.py", "from omegaconf import OmegaConf", "omegaconf"),
    ("cli.py", "from omegaconf import OmegaConf", "omegaconf"),
    ("cli.py", "from megatron_tempo.models import actor", "megatron_tempo.models"),
    ("cli.py", "import torch", "torch"),
]


@pytest.mark.parametrize(("file", "code", "name"), PLANTED, ids=[f"{file} {name}" for file, _, name in PLANTED])
def test_a_planted_violation_is_found(tmp_path: Path, file: str, code: str, name: str) -> None:
    path = tmp_path / "megatron_tempo" / file
    path.parent.mkdir(parents=True)
    path.write_text(f'"""A file."""\n{code}\n')
    (violation,) = violations(tmp_path / "megatron_tempo")
    line = 2 + code[: code.index("import" if "\n" not in code else "    ")].count("\n")
    assert (
        violation
        == f"megatron_tempo/{file}:{line} {path.relative_to(tmp_path).parts[1].removesuffix('.py')} imports {name}"
    )


def test_what_is_allowed_is_let_through(tmp_path: Path) -> None:
    files = {
        "models/actor.py": "from megatron.core import mpu\nfrom megatron_tempo.algorithm import losses\nimport torch",
        "weights/load.py": "from megatron_tempo.models import actor\nfrom . import names\nimport megatron.core",
        "checkpoint/saving.py": "from megatron.core import dist_checkpointing\nfrom megatron_tempo.models import actor",
        "training/jobs.py": "from megatron_tempo.methods import ppo\nfrom megatron_tempo import report, weights",
        "config/compose.py": "import hydra",
        "observability/profiler.py": "import torch",
        "cli.py": "from megatron_tempo.training.jobs import train\nfrom megatron_tempo.config.rules import check",
        "config/rules/run.py": "from ..schema import Config\nfrom . import data\nimport json",
    }
    for file, code in files.items():
        path = tmp_path / "megatron_tempo" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    assert violations(tmp_path / "megatron_tempo") == []


def test_a_class_name_means_one_class() -> None:
    names = Counter(
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_the_configuration_loads_without_torch() -> None:
    code = "import sys, megatron_tempo.config, megatron_tempo.cli; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
