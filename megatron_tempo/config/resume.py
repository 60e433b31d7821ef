"""What may differ when a run is resumed in its folder. This list is the only definition; docs/checkpoints.md shows it.

A run's records, checkpoints and exports are of one configuration. A start with another one in the same folder would
mislabel them, so a difference in any field that is not in `MAY_CHANGE` is rejected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.tree import leaves, read, without_default_settings
from megatron_tempo.errors import InputError
from megatron_tempo.files import why_unreadable

# Patterns of fields, `*` for any text, and why the experiment stays the same if they differ.
MAY_CHANGE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("run.dir", "run.resume"), "the folder itself; it may be moved"),
    (
        ("run.device", "run.deterministic", "run.hang_minutes", "run.max_consecutive_nonfinite_steps"),
        "where the run computes, and when it gives up",
    ),
    (
        ("parallel", "parallel.*", "model.layers", "model.fusions", "model.logits"),
        "the layout: checkpoints load in any",
    ),
    (
        ("stage1.iterations", "stage2.iterations"),
        "lengths of what is still to come; the iterations that are done must stay in their stage",
    ),
    (
        ("data.labelled.path", "data.unlabelled.path"),
        "names of files; the checkpoint knows the questions themselves, and other ones are refused",
    ),
    (
        (
            *("rollout.engine", "rollout.placement", "rollout.batch_rows", "rollout.dump"),
            *(f"rollout.{name}" for name in ("parity_tolerance", "parity_every", "on_drift")),
            *(f"rollout.servers.{name}" for name in ("python", "replicas", "each_node", "addresses", "key_file")),
            *(f"rollout.servers.{name}" for name in ("host", "devices", "tensor", "arguments", "transport")),
            *(f"rollout.servers.{name}" for name in ("dispatch", "concurrency", "checksums_every", "restarts")),
            "rollout.servers.*_seconds",
        ),
        "the engine and its servers; the parity check compares them with the actor at each start",
    ),
    (
        tuple(f"rewards.judge.{n}" for n in ("url", "key_file", "concurrency", "retries", "timeout_seconds", "cache")),
        "how the judge is reached",
    ),
    (("rewards.math.workers",), "processes that compare answers"),
    (("rewards.code.sandbox", "rewards.code.workers"), "where programs run, and how many at a time"),
    (("evaluation.every",), "when it is evaluated; on what and how stays"),
    (("checkpoint.*",), "what is kept"),
    (("metrics.*", "profile.*"), "logging"),
    (("cluster", "cluster.*"), "the machines, for `plan` and `submit`"),
)
_PATHS = ("model.path", "model.critic_path", "evaluation.sets.*.path")  # equal if they resolve to the same path
_CHECKPOINT = re.compile(r"step_\d{8}")
_SHOWN = 8


def may_change(field: str) -> bool:
    """Whether a field may differ from the run's earlier start."""
    return any(fnmatchcase(field, pattern) for patterns, _ in MAY_CHANGE for pattern in patterns)


def table() -> str:
    """`MAY_CHANGE` as docs/checkpoints.md shows it."""
    lines = ["| may change | why |", "|---|---|"]
    for patterns, why in MAY_CHANGE:
        lines.append(f"| {', '.join(f'`{pattern}`' for pattern in patterns)} | {why} |")
    return "\n".join(lines) + "\n"


def kept_settings(config: Config) -> dict[str, Any]:
    """The fields that must stay, by their paths."""
    return {field: value for field, value in leaves(to_plain(config)) if not may_change(field)}


def fingerprint(config: Config) -> str:
    """SHA-256 of the fields that must stay: equal for all starts of one run."""
    return hashlib.sha256(json.dumps(kept_settings(config), sort_keys=True).encode()).hexdigest()


def refused_changes(old: Config, new: Config) -> list[str]:
    """The fields that must stay and differ, as `path: old -> new`."""
    before, after = kept_settings(old), kept_settings(new)
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {_text(before, name)} -> {_text(after, name)}"
        for name in names
        if not _equal(name, before.get(name), after.get(name))
    ]


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders that are checkpoints by their names, oldest first. Raises OSError if the folder cannot be read."""
    return step_folders(run / "checkpoints")


def step_folders(folder: Path) -> list[Path]:
    """The folders in `folder` named `step_` and eight digits, in order; empty if it does not exist. Raises OSError."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if folder.is_symlink():  # a link to what is not mounted
            raise
        return []
    return [folder / name for name in sorted(names) if _CHECKPOINT.fullmatch(name) and (folder / name).is_dir()]


def check_run_folder(config: Config) -> None:
    """Raises InputError for what `problem` finds."""
    if refusal := problem(config):
        raise InputError(str(refusal))


def problem(config: Config) -> Problem | None:
    """Why this configuration cannot resume the run in `run.dir`, None if it can. Reads only.

    A run without an iteration and without a checkpoint has nothing that could be mislabelled.
    """
    run, given = Path(config.run.dir), config.run.dir
    path = run / "config.json"
    try:
        if not has_trained(run):
            return None
        path, plain = _recorded(run)
    except OSError as error:
        wrong = f"{error.filename or path} cannot be read ({error.strerror or error})"
        return Problem("run.dir", given, wrong, "mount it or mend it, or give another run.dir")
    except InputError as error:
        return Problem("run.dir", given, str(error), _REMOVE.format(path=path))
    if plain is None:
        return None  # there are no checkpoints either; the search for one rejects that
    if not isinstance(plain, dict):
        return Problem("run.dir", given, f"{path} is not the configuration of a run", _REMOVE.format(path=path))
    old, unknown = read(without_default_settings(plain))
    if unknown:
        fields = ", ".join(problem.field for problem in unknown[:_SHOWN])
        wrong = f"{path} is of another version of this program, which has other fields: {fields}"
        return Problem("run.dir", given, wrong, "resume with that version, or give another run.dir")
    if changes := refused_changes(old, config):
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        wrong = f"its run has another configuration: {', '.join(changes[:_SHOWN])}{more}"
        fix = "give another run.dir, or the earlier values (docs/checkpoints.md lists what may change)"
        return Problem("run.dir", given, wrong, fix)
    return None


def _recorded(run: Path) -> tuple[Path, Any]:
    """The configuration of the last start, as plain data, and its file. Without one, the newest checkpoint's."""
    path = run / "config.json"
    if path.exists():
        return path, _json_of(path)
    for folder in reversed(checkpoint_folders(run)):
        path = folder / "run.json"
        if path.exists():
            state = _json_of(path)
            return path, state.get("config") if isinstance(state, dict) else state
    return path, None


def _json_of(path: Path) -> Any:
    """The value in a file. Raises OSError, and InputError for a pipe, which would block, or if it is not JSON."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path} {why_unreadable(path)}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is cut short or not JSON ({error})") from error


def has_trained(run: Path) -> bool:
    """Whether a run's folder holds an iteration, a checkpoint or an export."""
    metrics = run / "metrics.jsonl"
    return (
        (metrics.exists() and metrics.stat().st_size > 0) or bool(checkpoint_folders(run)) or any(run.glob("hf_step_*"))
    )


_REMOVE = "move {path} away, and the checkpoint's own copy is used; or give another run.dir"


def _text(settings: dict[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "none"


def _equal(name: str, old: Any, new: Any) -> bool:
    if old == new:
        return True
    is_path = any(fnmatchcase(name, pattern) for pattern in _PATHS)
    return is_path and isinstance(old, str) and isinstance(new, str) and os.path.realpath(old) == os.path.realpath(new)
