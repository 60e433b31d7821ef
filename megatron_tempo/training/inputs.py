"""Fingerprints of a run's inputs other than its training prompts. A resumed run must find them unchanged.

The streams of the training prompts have their own fingerprints. If an evaluation set were replaced between two starts,
one curve would show two sets of questions. Other weights would change the reference of the KL term.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_tempo.config import schedule
from megatron_tempo.config.schema import Config
from megatron_tempo.data.stream import fingerprint
from megatron_tempo.errors import InputError
from megatron_tempo.runtime import progress_marker
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.types import LabelledPrompt
from megatron_tempo.weights.folder import tensor_files

_READ_BYTES = 1 << 22
_SET = "evaluation.sets."
_WEIGHTS = "model.path: weights"
REFERENCE = "run.dir/reference: weights"
_CONFIGS = ("config.json", "generation_config.json")
_IGNORED = ("transformers_version", "_name_or_path")  # entries that do not describe the model


def fingerprints(config: Config, sets: Mapping[str, list[LabelledPrompt]]) -> dict[str, str]:
    """Fingerprints: every evaluation set, config.json and, if a KL term holds to them, the weights. Collective."""
    model = Path(config.model.path)
    fingerprints = {f"{_SET}{name}": fingerprint(prompts) for name, prompts in sets.items()}
    fingerprints |= {f"model.path: {name}": _of_json(model / name) for name in _CONFIGS if (model / name).is_file()}
    if schedule.model_is_reference(config):
        fingerprints[_WEIGHTS] = _of_weights(model)
    return fingerprints


def kept_reference(config: Config) -> Path:
    """The folder of the policy with which stage 2 started, if the run keeps it (`schedule.keeps_start`)."""
    return Path(config.run.dir) / "reference" / "actor"


def of_reference(config: Config) -> dict[str, str]:
    """The fingerprint of that policy's weights; empty if the run does not keep it. Collective."""
    if not schedule.keeps_start(config):
        return {}
    folder = kept_reference(config)
    there = [folder.is_dir()]
    dist.broadcast_object_list(there, src=0)
    return {REFERENCE: _of_weights(folder) if there[0] else "not there"}


def check(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises InputError if an input of both starts has changed. Sets may be added or removed."""
    changed = [name for name in saved if name in now and now[name] != saved[name]]
    if not changed:
        return
    sets = [name for name in changed if name.startswith(_SET)]
    lines = [f"{name}: the file, its fields, the tokenizer or the chat template changed" for name in sets]
    held = "the KL term holds the policy to them"
    why = {_WEIGHTS: held, REFERENCE: f"or are gone; {held}", **{f"model.path: {name}": "" for name in _CONFIGS}}
    lines += [f"{name} changed{f' ({why[name]})' if why.get(name) else ''}" for name in changed if name not in sets]
    fix = "bring the old ones back, or start a new run with another run.dir"
    if sets:
        fix += "; a new evaluation set may be added under another name"
    raise InputError("\n  ".join(["these are not those of the checkpoint:", *lines, f"fix: {fix}"]))


def _of_json(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): fetch the model again") from error
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in _IGNORED}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _of_weights(folder: Path) -> str:
    """Of the weight files, which are divided among the ranks."""
    files = sorted(set(tensor_files(folder).values()))
    mine = raise_on_all_ranks(
        lambda: {path.name: _sha256(path) for path in files[dist.get_rank() :: dist.get_world_size()]}
    )
    shares: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, mine)
    digests = {name: digest for share in shares for name, digest in share.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            progress_marker.mark()
            digest.update(piece)
    return digest.hexdigest()
