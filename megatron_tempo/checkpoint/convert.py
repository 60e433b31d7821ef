"""Converts Hugging Face folders to Megatron distributed checkpoints and back. Memory does not grow with the model.

In both directions the inputs alone determine the list of output files, which are written one after another
(`resumable_folder`). If a conversion is killed, rerun it with the same arguments to continue after the last complete
file.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from megatron_tempo.checkpoint import manifest
from megatron_tempo.checkpoint.resumable_folder import ResumableFolder
from megatron_tempo.config.model_shape import ModelShape, read_model_shape
from megatron_tempo.config.schema import Config
from megatron_tempo.config.trained_with import ENTRY, trained_with
from megatron_tempo.config.tree import read as read_config
from megatron_tempo.config.updates import CriticTargets
from megatron_tempo.data import seen
from megatron_tempo.errors import InputError
from megatron_tempo.files import atomic_write
from megatron_tempo.weights import distributed, folder, tables
from megatron_tempo.weights.export import critic_changes, last_targets, origin_of
from megatron_tempo.weights.files import nbytes, write_safetensors
from megatron_tempo.weights.param_mapping import ParamMapping
from megatron_tempo.weights.pieces import plan

log = logging.getLogger(__name__)

MODELS = ("actor", "critic")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of an export, by their names on the command line


def to_megatron(source: Path, out: Path, model: str, part_bytes: int) -> int:
    """Write the Hugging Face folder `source` as the distributed checkpoint `out`, in files of about `part_bytes`.

    `model`: actor or critic. A critic from a folder without a value head gets a head of zeros. Returns the bytes.
    Raises InputError, before it writes, for what cannot be converted; OSError if reading or writing fails.
    """
    _, mappings = _read(source, model)
    files = folder.tensor_files(source)
    folder.check(files, mappings, source)
    parts = distributed.parts(mappings, files, part_bytes)
    made_of = _stamps({path.name: path for path in {*files.values(), source / "config.json"}})
    inputs = {"to": "megatron", "source": str(source.resolve()), "files": made_of, "model": model, "part": part_bytes}
    work = ResumableFolder(out, inputs)
    sizes = [sum(chunk.nbytes for chunk in part) for part in parts]
    work.begin(sum(sizes))
    progress = _Progress("part", sizes)
    written, places = {}, {}
    for number, part in enumerate(parts):
        name = f"__{number}_0.distcp"
        note = work.note(name)
        if note is None:
            work.mark(name, places=distributed.write_part(work.whole / name, part, files))
        progress.log(number, name, new=note is None)
        written[name], places[name] = part, (work.note(name) or {})["places"]
    distributed.write_metadata(work.whole, written, places, objects=f"__{len(parts)}_0.distcp")
    return work.finish()


def to_hugging_face(
    source: Path, out: Path, model: str, like: Path | None, dtype: torch.dtype | None, shard_bytes: int
) -> int:
    """Write a model of a checkpoint as the Hugging Face folder `out`, in files of at most `shard_bytes`.

    `source`: a step of a run (RUN/checkpoints/step_N), checked against its manifest first, or a distributed checkpoint.
    `like`: the folder with the config and the tokenizer; None: the one that the run was started from. `dtype`: None: as
    stored. Returns the bytes. Raises InputError, before it writes, for what cannot be converted or is damaged; OSError
    if reading or writing fails.
    """
    saved = _saved(source, model)
    like = like or saved.like
    shape, mappings = _read(like, model)
    stored = distributed.StoredWeights(saved.weights, mappings)
    inputs = {
        "to": "hugging face",
        "source": str(saved.weights.resolve()),
        "files": _stamps({name: saved.weights / name for name in (".metadata", *sorted(stored.files))}),
        "like": str(like.resolve()),
        "like files": _stamps({name: like / name for name in ("config.json", *folder.carried(like))}),
        "model": model,
        "dtype": str(dtype),
        "shard": shard_bytes,
    }
    work = ResumableFolder(out, inputs)
    if saved.step is not None and not work.resumes:  # else it was checked before and has not changed
        log.info("checking %s against its %s", saved.step, manifest.MANIFEST)
        if problem := manifest.damage(saved.step, model):
            raise InputError(f"{saved.step} is damaged: {problem}")
    weight_map = _write_shards(work, stored, mappings, dtype, shard_bytes)
    changes = critic_changes(shape, saved.targets) if model == "critic" else {}
    seen_summary = None if saved.step is None else seen.carry(saved.step, work.whole)
    if saved.config is not None:
        changes[ENTRY] = trained_with(saved.config) | ({} if seen_summary is None else {"seen": seen_summary})
    changes["dtype"] = str(stored.entries(mappings[0], dtype)[0][1]).removeprefix("torch.")
    size = sum(nbytes(entry) for mapping in mappings for entry in stored.entries(mapping, dtype))
    folder.describe(work.whole, weight_map, size, like, changes)
    if saved.step is not None and saved.config is not None:
        origin = origin_of(saved.config, saved.number, manifest.sha256(saved.step))
        folder.write_origin(work.whole, origin | {"run": str(saved.step.resolve().parents[1])})
    return work.finish()


def _write_shards(
    work: ResumableFolder,
    stored: distributed.StoredWeights,
    mappings: list[ParamMapping],
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> dict[str, str]:
    """The safetensors files of a folder. Returns which tensor is in which."""
    entries = {mapping: stored.entries(mapping, dtype) for mapping in mappings}
    widest = max(entry[1].itemsize for of_mapping in entries.values() for entry in of_mapping)
    # Tensors of larger types come first in a file, so that each begins at a multiple of its type's size.
    shards = [
        sorted(group, key=lambda mapping: -entries[mapping][0][1].itemsize)
        for group in plan(mappings, shard_bytes, widest)
    ]
    sizes = [sum(nbytes(entry) for mapping in shard for entry in entries[mapping]) for shard in shards]
    work.begin(sum(sizes))
    progress = _Progress("shard", sizes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        held = [entry for mapping in shard for entry in entries[mapping]]
        note = work.note(name)
        if note is None:
            with atomic_write(work.whole / name, fsync=True) as file:
                write_safetensors(file, held, chain.from_iterable(stored.read(mapping, dtype) for mapping in shard))
            work.mark(name)
        progress.log(number, name, new=note is None)
        weight_map |= dict.fromkeys((entry[0] for entry in held), name)
    return weight_map


def _read(hugging_face: Path, model: str) -> tuple[ModelShape, list[ParamMapping]]:
    """The shape of the model in a Hugging Face folder, and its table without pipeline parallelism."""
    if not (hugging_face / "config.json").is_file():
        raise InputError(f"{hugging_face} is not a Hugging Face folder: it has no config.json; give a folder with one")
    shape = read_model_shape(hugging_face)
    return shape, tables.mappings(shape, critic=model == "critic")


@dataclass(frozen=True, slots=True)
class _Saved:
    """A model in a checkpoint. `step`, its `number` and `config` are of the run that saved it, if one did."""

    weights: Path  # a distributed checkpoint
    step: Path | None
    config: Config | None
    model: str
    number: int = 0

    @property
    def targets(self) -> CriticTargets | None:
        """What the run's critic is trained on."""
        return None if self.config is None else last_targets(self.config)

    @property
    def like(self) -> Path:
        """The folder that the model was started from. Raises InputError if it is unknown or missing."""
        if self.config is None:
            raise InputError(f"{self.weights} does not record its model: give its Hugging Face folder with --like")
        model = self.config.model
        path = Path((self.model == "critic" and model.critic_path) or model.path)
        if not (path / "config.json").is_file():
            raise InputError(f"the run was started from {path}, which does not exist here: give the folder with --like")
        return path


def _saved(source: Path, model: str) -> _Saved:
    if (source / "metadata.json").exists():
        return _Saved(source, None, None, model)
    if not (source / manifest.STATE).exists():
        raise InputError(f"{source} is neither a step of a run (RUN/checkpoints/step_N) nor a distributed checkpoint")
    if not (source / model).exists():
        raise InputError(f"{source} has no {model}: the run did not train one")
    try:
        state = manifest.read_state(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{source / manifest.STATE} cannot be read ({error})") from error
    config = (
        read_config(state["config"])[0] if "config" in state else None
    )  # fields unknown to this version are ignored
    return _Saved(source / model, source, config, model, state["step"])


def _stamps(files: dict[str, Path]) -> dict[str, list[int]]:
    """Size and modification time of the files that exist, to detect changes."""
    stamps = {name: path.stat() for name, path in files.items() if path.exists()}
    return {name: [stamp.st_size, stamp.st_mtime_ns] for name, stamp in sorted(stamps.items())}


class _Progress:
    """Logs a line for each completed file."""

    def __init__(self, what: str, sizes: list[int]) -> None:
        self._what, self._sizes = what, sizes
        self._new, self._start = 0, time.monotonic()

    def log(self, number: int, name: str, *, new: bool) -> None:
        self._new += self._sizes[number] if new else 0
        done, total = sum(self._sizes[: number + 1]) / 2**30, sum(self._sizes) / 2**30
        speed = self._new / 2**20 / max(time.monotonic() - self._start, 1e-9)
        how = f"{speed:.0f} MiB/s" if new else "already done"
        log.info(
            "%s %d of %d: %s, %.2f of %.2f GiB, %s",
            *(self._what, number + 1, len(self._sizes), name),
            *(done, total, how),
        )
