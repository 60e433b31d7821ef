"""Rules on the files of a Hugging Face folder: readable, complete, consistent. Without torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_tempo.config.problem import Problem
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json, readable

# Types of weights, by safetensors' names. Others are quantised or not weights.
FLOATS = {"F64", "F32", "F16", "BF16"}
_TEXTS = ("merges.txt", "tokenizer.model", "chat_template.jinja")
_JSON = ("special_tokens_map.json", "generation_config.json", "chat_template.json")
_AGAIN = "fetch the file again"
_HEADER_BYTES = 100_000_000  # safetensors' own limit
_ID = re.compile(r"[0-9]{1,18}")


def check_files(field: str, folder: Path, *, tokenizer: bool) -> Iterator[Problem]:
    """Check the files that a folder has. `tokenizer`: including the files of the tokenizer."""
    checks: list[tuple[str, Callable[[Path], None]]] = [("config.json", _config)]
    checks += [(name, _weights) for name in sorted(path.name for path in folder.glob("*.safetensors"))]
    if tokenizer:
        checks += [(name, _object) for name in _JSON]
        checks += [(name, _text) for name in _TEXTS]
        checks += [(name, _tokens) for name in ("tokenizer.json", "vocab.json", "added_tokens.json")]
        checks += [("tokenizer_config.json", _added)]
    for name, check in checks:
        path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            check(path)
        except InputError as error:
            wrong, _, fix = str(error).removeprefix(f"{folder}/").partition("; ")
            yield Problem(field, str(folder), wrong, fix or _AGAIN)


def _config(path: Path) -> None:
    """config.json must not describe quantised weights."""
    if (quantised := read_json(path, dict).get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"{path}: the weights are quantised (quantization_config: {method}); give the folder of the model before "
            "quantisation"
        )


def _text(path: Path) -> None:
    readable(path)


def _object(path: Path) -> None:
    value = read_json(path, dict)
    end = value.get("eos_token_id") if path.name == "generation_config.json" else None
    ends = [] if end is None else end if isinstance(end, list) else [end]
    if any(type(token) is not int or token < 0 for token in ends):
        raise InputError(f"{path}: eos_token_id={end} is no token id, nor a list of them; correct it")


def _tokens(path: Path) -> None:
    _check_ids(path, _ids(path, read_json(path, dict)))


def _added(path: Path) -> None:
    """The tokens that a tokenizer's settings add, by their ids."""
    added = read_json(path, dict).get("added_tokens_decoder")
    entries = added.items() if isinstance(added, dict) else ()
    _check_ids(path, [(str(_content(token)), int(number)) for number, token in entries if _ID.fullmatch(number)])


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _check_ids(path: Path, ids: Iterable[tuple[str, Any]]) -> None:
    """The tokens of a tokenizer must have embeddings in the model."""
    try:
        size = read_json(path.parent / "config.json", dict).get("vocab_size")
    except InputError:  # reported separately
        return
    if type(size) is not int:
        return
    beyond = {token: number for token, number in ids if type(number) is int and number >= size}
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise InputError(
            f"{path}: {len(beyond)} tokens have no embedding, first {token!r} with id {number}: config.json says "
            f"vocab_size={size}; resize the model's embeddings, or remove the tokens"
        )


def _ids(path: Path, value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if path.name != "tokenizer.json":
        yield from value.items()
        return
    model, added = value.get("model"), value.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            yield str(token.get("content")), token.get("id")


def _weights(path: Path) -> None:
    """A safetensors file must be complete, by its header, and contain floating-point numbers."""
    with readable(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= _HEADER_BYTES else b""
    size = path.stat().st_size
    try:
        header = json.loads(text) if length <= _HEADER_BYTES and len(text) == length else None
    except (ValueError, RecursionError):
        header = None
    tensors = {name: at for name, at in header.items() if name != "__metadata__"} if isinstance(header, dict) else None
    if tensors is None or not all(_is_tensor(at) for at in tensors.values()):
        raise InputError(f"{path} is not a whole safetensors file")
    end = 8 + length + max((at["data_offsets"][1] for at in tensors.values()), default=0)
    if size < end:
        raise InputError(f"{path} is cut short: it has {size:,} bytes of {end:,}")
    if bad := [f"{name} is {at['dtype']}" for name, at in tensors.items() if at["dtype"] not in FLOATS]:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise InputError(
            f"{path}: {', '.join(bad[:3])}{more}: weights are {', '.join(sorted(FLOATS))}; give the folder of the "
            "model before quantisation"
        )


def _is_tensor(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    is_placed = isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
    return is_placed and isinstance(entry.get("dtype"), str)
