"""Hugging Face folders: loads them into a Megatron model's shards, and writes them from a weight stream."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.errors import InputError
from megatron_tempo.files import partial_of, publish_folder, read_json, readable, why_unreadable
from megatron_tempo.models.chunks import ModelChunks
from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.parallel import Layout
from megatron_tempo.runtime import progress_marker
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.types import Bucket, PartName, Share, whole_name
from megatron_tempo.weights import tables
from megatron_tempo.weights.param_mapping import ParamMapping, is_held, tensor_part
from megatron_tempo.weights.pieces import EVEN, JoinedParts, PlannedBucket, dealt, planned_buckets
from megatron_tempo.weights.shared_memory import flat_buffer, in_shared_memory

INDEX = "model.safetensors.index.json"
ORIGIN = "tempo_origin.json"  # in an exported folder: the run, step, configuration and checkpoint it comes from
CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of them, as transformers writes it
FLOATS = {"F64", "F32", "F16", "BF16"}  # types of weights, by safetensors' names; others are scaled, or are no weights
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor. Raises InputError that names what is missing or cannot be read."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        files = _indexed(index)
    elif single.exists():
        files = dict.fromkeys(_names(single), single)
    else:
        raise InputError(f"{folder} has neither model.safetensors nor {INDEX}")
    absent = sorted({str(path) for path in files.values() if why_unreadable(path) == "does not exist"})
    if absent:
        raise InputError(f"{index}: lists files that do not exist: {', '.join(absent)}")
    held = {path: set(_names(path)) for path in set(files.values())}
    wrong = [f"{name} in {path.name}" for name, path in files.items() if name not in held[path]]
    if wrong:
        raise InputError(f"{index}: lists tensors that their files do not contain: {', '.join(wrong[:5])}")
    return files


def _indexed(index: Path) -> dict[str, Path]:
    named = read_json(index, dict).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise InputError(f"{index} does not map tensors to files: download it again")
    return {name: index.parent / file for name, file in named.items()}


def _names(path: Path) -> list[str]:
    try:
        with safe_open(readable(path), "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file ({error}): download it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


class FolderWeights:
    """A stream of a folder's tensors in the buckets of a `WeightStream`. Feeds an engine without a Megatron model.

    Published folders may store a tied matrix under a second name. It is left out.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        bucket_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
        multiple: int = EVEN,
    ) -> None:
        """Buckets are on `device`, this rank's: NCCL sends nothing else. `multiple`: as in `WeightStream`.

        Collective. Raises InputError as `load` does; for values that are not finite, when they are read.
        """
        self._folder, self._device, self._dtype = folder, device, dtype
        self._files, mappings = raise_on_all_ranks(partial(_checked_actor, folder, layout))
        self._buckets = {
            parts: planned_buckets(mappings, bucket_bytes, dtype.itemsize, parts=parts, multiple=multiple)
            for parts in (False, True)
        }
        self.copies, self.copy = layout.copies, layout.copy
        self.sends = layout.is_first_stage and layout.tensor_rank == 0

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        yield from self._filled(self._buckets[parts], shared=False)

    def _filled(self, buckets: Sequence[PlannedBucket], *, shared: bool) -> Iterator[Bucket]:
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, "pt")) for path in set(self._files.values())}
            for planned in buckets:
                progress_marker.mark()
                flat = flat_buffer(planned.numel, self._dtype, self._device, shared=shared)
                bucket = planned.filled(flat)
                for name, tensor in bucket:
                    self._read(opened, name, tensor)
                _refuse_nonfinite([whole_name(name) for name, tensor in bucket if not is_finite(tensor)], self._folder)
                yield bucket

    def _read(self, opened: dict[Path, Any], name: str, out: Tensor) -> None:
        """Fill `out` with a tensor, or with the rows of it that `name` says."""
        stored = opened[self._files[whole_name(name)]].get_slice(whole_name(name))
        first = name.start if isinstance(name, PartName) else 0
        for start in range(0, len(out), _ROWS):
            stop = min(start + _ROWS, len(out))
            out[start:stop].copy_(stored[first + start : first + stop])

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        """As of a `WeightStream` of one stage: every copy of the model would read the same folder, so each rank that
        `sends` reads what its copy sends. With `shared`, each bucket has its own memory, which other processes can
        open: on a CPU by its file's name, on a GPU by a CUDA handle."""
        share = share or Share(taken=(0,) if self.copy == 0 else ())
        numbers = dealt(self._buckets[parts], share.count)
        mine = [one for one, number in zip(self._buckets[parts], numbers, strict=True) if number in share.taken]
        if self.sends and mine:
            buckets = self._filled(mine, shared=shared)
            yield from map(in_shared_memory, buckets) if shared and self._device.type == "cpu" else buckets


def load(net: PackedGPT | ModelChunks, layout: Layout, mappings: list[ParamMapping], folder: Path) -> None:
    """Fill this rank's shards from a folder. Reads only what the rank holds.

    Tensors that no mapping names are refused, except a head that this model does not have. An actor's folder can start
    a critic, whose own head is then not changed. A tied folder may store its output matrix again.

    Collective. Raises InputError on every rank. It lists every missing or unexpected tensor, every wrong shape, every
    type that is not a float, and tensors with values that are not finite.
    """
    raise_on_all_ranks(partial(_load, net, layout, mappings, folder))


def _load(net: PackedGPT | ModelChunks, layout: Layout, mappings: list[ParamMapping], folder: Path) -> None:
    files = tensor_files(folder)
    check(files, mappings, folder)
    if layout.is_writer:
        _check_tied_head(files, mappings, folder)
    parameters = net.weights()
    bad: list[str] = []
    with ExitStack() as stack, torch.no_grad():
        opened: dict[Path, Any] = {}
        for mapping in mappings:
            progress_marker.mark()
            if not is_held(mapping, layout) or mapping.names[0] not in files:
                continue
            sources = []
            for name in mapping.names:
                path = files[name]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, "pt"))
                sources.append(opened[path].get_slice(name))
            parameter = parameters[mapping.megatron]
            parameter.copy_(mapping.sharding.shard(sources, *tensor_part(mapping, layout)))
            bad += [] if is_finite(parameter) else mapping.names
        _load_tied_copy(net, layout, mappings, opened, files, stack)
    _refuse_nonfinite(bad, folder)


def _checked_actor(folder: Path, layout: Layout) -> tuple[dict[str, Path], list[ParamMapping]]:
    """The files of an actor's tensors, without the second name of a tied matrix, and its mappings."""
    shape, files = read_model_shape(folder), tensor_files(folder)
    mappings = tables.mappings(shape, critic=False)
    check(files, mappings, folder)
    if layout.is_writer:
        _check_tied_head(files, mappings, folder)
    wanted = {name for mapping in mappings for name in mapping.names}
    return {name: path for name, path in files.items() if name in wanted}, mappings


def is_finite(tensor: Tensor) -> bool:
    """Without a copy of the tensor's size: extremes are NaN where a value is."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _refuse_nonfinite(names: list[str], folder: Path) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise InputError(
            f"{folder}: values that are NaN or infinite in {', '.join(names[:5])}{more}: the files are damaged, or the "
            "training that wrote them diverged; fetch them again, or take an earlier checkpoint"
        )


def _check_tied_head(files: dict[str, Path], mappings: list[ParamMapping], folder: Path) -> None:
    """InputError where a tied folder repeats the embedding as an output matrix that differs from it."""
    wanted = {name for mapping in mappings for name in mapping.names}
    if HEAD not in files or HEAD in wanted or "score.weight" in wanted:
        return
    with safe_open(files[HEAD], "pt") as of_head, safe_open(files[EMBEDDING], "pt") as of_embedding:
        head, embedding = of_head.get_slice(HEAD), of_embedding.get_slice(EMBEDDING)
        rows = embedding.get_shape()[0]
        same = head.get_shape() == embedding.get_shape() and all(
            torch.equal(head[i : i + _ROWS].float(), embedding[i : i + _ROWS].float()) for i in range(0, rows, _ROWS)
        )
    if not same:
        raise InputError(
            f"{folder}: {HEAD} differs from {EMBEDDING}, and config.json says tie_word_embeddings=true: set it to "
            f"false to use {HEAD}, or remove the tensor"
        )


_ROWS = 1 << 14  # of a vocabulary matrix that are compared at a time
_HEADS = ("lm_head.weight", "score.weight", "score.bias")
_COMPUTED = ".rotary_emb.inv_freq"  # old folders have this; config.json says the same


def check(files: dict[str, Path], mappings: list[ParamMapping], folder: Path) -> None:
    """Raises InputError that lists every tensor of a folder that is missing, unexpected or of the wrong shape.

    The folder may contain a head that the table does not have, and what is computed from config.json. A critic's head
    may be absent.
    """
    _check_types(files, folder)
    expected = {name: shape for mapping in mappings for name, shape in zip(mapping.names, mapping.shapes, strict=True)}
    critic = "score.weight" in expected
    optional = {"score.weight", "score.bias"} if critic and "score.weight" not in files else set()
    problems = [f"missing: {name}" for name in expected if name not in files and name not in optional]
    problems += [f"unexpected: {name}" for name in files if name not in expected and not _may_be_left(name)]
    with ExitStack() as stack:
        handles = {path: stack.enter_context(safe_open(path, "pt")) for path in set(files.values())}
        for name, shape in expected.items():
            if name in files:
                stored = tuple(handles[files[name]].get_slice(name).get_shape())
                if stored != shape:
                    problems.append(f"wrong shape: {name} is {list(stored)}, the config.json says {list(shape)}")
    if problems:
        shown = "\n  ".join(problems)
        raise InputError(f"{folder} does not match its config.json ({len(problems)} problems):\n  {shown}")


def _may_be_left(name: str) -> bool:
    """Whether a folder may have a tensor of this name that the model does not have."""
    return name in _HEADS or name.endswith(_COMPUTED)


def _check_types(files: dict[str, Path], folder: Path) -> None:
    """InputError where weights are quantised, or are no floating-point numbers for another reason."""
    path = folder / "config.json"
    quantised = read_json(path, dict).get("quantization_config") if path.exists() else None
    bad: list[str] = []
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name in files]  # noqa: SIM118, no dict
            types = {name: opened.get_slice(name).get_dtype() for name in names}
            bad += [f"{name} is {kind}" for name, kind in types.items() if kind not in FLOATS]
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(f"{path}: the weights are quantised (quantization_config: {method}); {_UNQUANTISED}")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InputError(
            f"{folder}: {', '.join(bad[:5])}{more}: weights are {', '.join(sorted(FLOATS))}; {_UNQUANTISED}"
        )


_UNQUANTISED = "give the folder of the model before quantisation, or dequantise it with transformers"


def _load_tied_copy(
    net: PackedGPT | ModelChunks,
    layout: Layout,
    mappings: list[ParamMapping],
    opened: dict[Path, Any],
    files: dict[str, Path],
    stack: ExitStack,
) -> None:
    """Load the last stage's copy of a tied embedding, which it has if first and last stage are on different ranks."""
    last = net.chunks[-1]
    if not last.share_embeddings_and_output_weights or last.pre_process or not last.post_process:
        return
    mapping = mappings[0]
    path = files[mapping.names[0]]
    source = opened.get(path) or stack.enter_context(safe_open(path, "pt"))
    shard = mapping.sharding.shard([source.get_slice(mapping.names[0])], layout.tensor_rank, layout.tensor)
    last.shared_embedding_or_output_weight().copy_(shard)


def save(
    buckets: Iterator[Bucket],
    folder: Path,
    like: Path,
    layout: Layout,
    config_changes: dict[str, Any],
    extra_file: Path | None = None,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write a stream as a Hugging Face folder that transformers opens, with the config and tokenizer of `like`.

    Collective, because the stream is. The first rank writes one file per bucket. It joins the parts of a tensor in its
    own memory. The folder gets its name when it is complete. `extra_file` is copied into it if it exists. `origin`: the
    content of `ORIGIN`.

    Raises on the first rank: FileExistsError if the folder exists; OSError if it cannot be written. The OSError comes
    at the end of the stream, and the partial folder is deleted.
    """
    if layout.is_writer and folder.exists():
        raise FileExistsError(f"{folder} exists: move it away, or choose another run.dir")
    partial = partial_of(folder)
    weight_map: dict[str, str] = {}
    size = 0
    writes = layout.is_writer
    try:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        number, joined = 0, JoinedParts(torch.device("cpu"))
        for bucket in buckets:
            # The bucket's tensors share one storage, which safetensors refuses: each is copied for the write.
            tensors = {name: tensor.cpu().clone() for name, tensor in joined.add(bucket)} if writes else {}
            if not tensors:
                continue
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(tensors, partial / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if writes:
            describe(partial, weight_map, size, like, config_changes)
            if extra_file is not None and extra_file.exists():
                shutil.copyfile(extra_file, partial / extra_file.name)
            if origin is not None:
                write_origin(partial, origin)
            publish_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        for _ in buckets:  # the other ranks still take part in the stream
            pass
        raise OSError(getattr(error, "errno", None) or errno.EIO, str(error), str(partial)) from error


def write_origin(folder: Path, origin: dict[str, Any]) -> None:
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> dict[str, Any] | None:
    """What an exported folder says that it comes from; None where it does not say, or not as this program does."""
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return origin if isinstance(origin, dict) else None


def describe(folder: Path, weight_map: dict[str, str], size: int, like: Path, config_changes: dict[str, Any]) -> None:
    """Write a folder's index, and the config and tokenizer of `like`. `size`: bytes of its tensors.

    If the config.json also has the type under its older name, torch_dtype, both get the same value.
    """
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = read_json(like / "config.json", dict)
    if "torch_dtype" in config and "dtype" in config_changes:
        config["torch_dtype"] = config_changes["dtype"]
    (folder / "config.json").write_text(json.dumps(config | config_changes, indent=2) + "\n")
    for name in carried(like):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(like / name, folder / name)


def carried(like: Path) -> list[str]:
    """The names of the files in `like` that a folder made like it gets too."""
    templates = sorted(f"{TEMPLATES}/{path.name}" for path in (like / TEMPLATES).glob("*.jinja"))
    return [name for name in (*CARRIED, *templates) if (like / name).is_file()]
