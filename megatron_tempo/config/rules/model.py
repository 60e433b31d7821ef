"""Rules on the Hugging Face folders of actor and critic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.files import wrong_with_folder
from megatron_tempo.config.rules.model_files import check_files
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import MISSING, walk
from megatron_tempo.errors import InputError
from megatron_tempo.input_files import read_json, unreadable

FAMILIES = ("olmo3", "qwen3")  # model_type of the families that megatron_tempo/models knows
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
LARGEST = 2**31 - 1  # of the sizes in a config.json
_AS_SAVED = "give a folder as transformers' save_pretrained writes it"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the rules of the layout need to know of a config.json."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    vocab_size: int
    hidden_size: int
    head_dim: int


def read_models(config: Config) -> tuple[dict[str, ModelShape], list[Problem]]:
    """The shapes of the folders that can be read, by field, and what is wrong with the folders."""
    shapes: dict[str, ModelShape] = {}
    problems: list[Problem] = []
    for field, value in (("model.path", config.model.path), ("model.critic_path", config.model.critic_path)):
        if value is None or value == MISSING:
            continue
        folder = Path(value)
        if wrong_folder := wrong_with_folder(folder):
            problems.append(Problem(field, value, wrong_folder, _AS_SAVED))
            continue
        problems += _weights(field, folder)
        problems += check_files(field, folder, tokenizer=field == "model.path")
        if field == "model.path":
            problems += _tokenizer(config, folder)
        shape, wrong = _shape(folder)
        if shape is None and wrong:
            problems.append(Problem(field, value, wrong, _AS_SAVED))
        elif wrong:
            problems.append(Problem(field, value, wrong, f"give a model of the family {', '.join(FAMILIES)}"))
        if shape is not None and not wrong:
            shapes[field] = shape
    problems += _same_vocabulary(config, shapes)
    return shapes, problems


def _shape(folder: Path) -> tuple[ModelShape | None, str]:
    """The shape in config.json, and what is wrong with the file ("" if nothing is)."""
    file = folder / "config.json"
    if not file.exists() and not file.is_symlink():
        return None, "has no config.json"
    try:
        plain = read_json(file, dict)
    except InputError:
        return None, ""  # reported by check_files
    family = plain.get("model_type")
    plain = _with_head_dim(plain)
    names = ModelShape.__dataclass_fields__
    bad = [name for name in names if type(plain.get(name)) is not int or not 1 <= plain[name] <= LARGEST]
    if family in FAMILIES and bad:
        return None, f"config.json has no whole number from 1 to {LARGEST:,} under {', '.join(bad)}"
    shape = ModelShape(**{name: 1 if name in bad else plain[name] for name in names})
    return shape, "" if family in FAMILIES else f"model_type {family} is not supported"


def _with_head_dim(plain: dict[str, Any]) -> dict[str, Any]:
    """Where a config.json leaves it out, heads share the hidden size, as in transformers."""
    hidden, heads = plain.get("hidden_size"), plain.get("num_attention_heads")
    if plain.get("head_dim") is not None or type(hidden) is not int or type(heads) is not int or heads < 1:
        return plain
    return plain | {"head_dim": hidden // heads}


def _weights(field: str, folder: Path) -> list[Problem]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        is_present = any(folder.glob("*.safetensors"))
        return [] if is_present else [Problem(field, str(folder), "has no safetensors files", _AS_SAVED)]
    try:
        shards = set(read_json(index, dict)["weight_map"].values())
    except (InputError, KeyError, TypeError, AttributeError):
        return [Problem(field, str(folder), f"{index.name} has no readable weight_map", _AS_SAVED)]
    absent = sorted(str(name) for name in shards if unreadable(folder / str(name)) is not None)
    if not absent:
        return []
    named = ", ".join(name[:100] for name in absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    return [Problem(field, str(folder), f"{index.name} names absent files: {named}", "copy them there too")]


def _tokenizer(config: Config, folder: Path) -> list[Problem]:
    if not any(all((folder / name).exists() for name in names) for names in _TOKENIZERS):
        wanted = " or ".join("+".join(names) for names in _TOKENIZERS)
        return [Problem("model.path", str(folder), f"has no tokenizer ({wanted})", "copy the tokenizer's files there")]
    if _has_chat_template(folder):
        return []
    wrong = f"the tokenizer in {folder} has no chat template"
    return [
        Problem(f"{path}.chat_template", True, wrong, f"{path}.chat_template=false, or a tokenizer that has one")
        for path, node in walk(config)
        if getattr(node, "chat_template", False) is True
    ]


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    file = folder / "tokenizer_config.json"
    try:
        return file.exists() and "chat_template" in read_json(file, dict)
    except InputError:  # reported on its own
        return True


def _same_vocabulary(config: Config, shapes: dict[str, ModelShape]) -> list[Problem]:
    if len({shape.vocab_size for shape in shapes.values()}) < 2:
        return []
    sizes = " and ".join(f"{field} {shape.vocab_size}" for field, shape in shapes.items())
    wrong = f"its vocabulary differs from the actor's ({sizes})"
    return [Problem("model.critic_path", config.model.critic_path, wrong, "give a critic of the same tokenizer")]
