"""Rules on the Hugging Face folders of actor and critic."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_tempo.config.model_shape import FAMILIES, ModelShape, shape_or_problem
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.files import wrong_with_folder
from megatron_tempo.config.rules.model_files import check_files
from megatron_tempo.config.schema import Config
from megatron_tempo.config.shipped import made_by
from megatron_tempo.config.tree import MISSING, walk
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json, why_unreadable

_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
_AS_SAVED = f"give a model of the family {', '.join(FAMILIES)}, as transformers' save_pretrained writes it"


def read_models(config: Config) -> tuple[dict[str, ModelShape], list[Problem]]:
    """The shapes of the folders that can be read, by field, and the problems of the folders."""
    shapes: dict[str, ModelShape] = {}
    problems: list[Problem] = []
    for field, value in (("model.path", config.model.path), ("model.critic_path", config.model.critic_path)):
        if value is None or value == MISSING:
            continue
        folder = Path(value)
        if wrong_folder := wrong_with_folder(folder):
            problems.append(Problem(field, value, wrong_folder, _AS_SAVED + made_by(folder)))
            continue
        if within := _model_within(folder, "actor" if field == "model.path" else "critic"):
            problems.append(Problem(field, value, "is not a model, but holds one", f"{field}={within}"))
            continue
        problems += _weights(field, folder)
        of_files = list(check_files(field, folder, tokenizer=field == "model.path"))
        problems += of_files
        if field == "model.path":
            problems += _tokenizer(config, folder)
        shape, wrong = shape_or_problem(folder)
        if wrong and wrong.partition("; ")[0] not in [problem.wrong for problem in of_files]:
            problems.append(Problem(field, value, wrong, _AS_SAVED))
        if shape is not None:
            shapes[field] = shape
    problems += _same_vocabulary(config, shapes)
    return shapes, problems


def _model_within(folder: Path, name: str) -> Path | None:
    """The model in the folder of an export, or in the latest export of a run's folder."""
    if any(folder.glob("*.safetensors")):
        return None
    places = [folder / name, *sorted(folder.glob(f"hf_step_*/{name}"), reverse=True)]
    return next((place for place in places if any(place.glob("*.safetensors"))), None)


def _weights(field: str, folder: Path) -> list[Problem]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        is_present = any(folder.glob("*.safetensors"))
        return [] if is_present else [Problem(field, str(folder), "has no safetensors files", _AS_SAVED)]
    try:
        shards = set(read_json(index, dict)["weight_map"].values())
    except (InputError, KeyError, TypeError, AttributeError):
        return [Problem(field, str(folder), f"{index.name} has no readable weight_map", _AS_SAVED)]
    absent = sorted(str(name) for name in shards if why_unreadable(folder / str(name)) is not None)
    if not absent:
        return []
    named = ", ".join(name[:100] for name in absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    return [Problem(field, str(folder), f"{index.name} names absent files: {named}", "copy them there too")]


def _tokenizer(config: Config, folder: Path) -> list[Problem]:
    if not any(all(os.path.lexists(folder / name) for name in names) for names in _TOKENIZERS):
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
        return os.path.lexists(file) and "chat_template" in read_json(file, dict)
    except InputError:  # reported separately
        return True


def _same_vocabulary(config: Config, shapes: dict[str, ModelShape]) -> list[Problem]:
    if len({shape.vocab for shape in shapes.values()}) < 2:
        return []
    sizes = " and ".join(f"{field} {shape.vocab}" for field, shape in shapes.items())
    wrong = f"its vocabulary differs from the actor's ({sizes})"
    return [Problem("model.critic_path", config.model.critic_path, wrong, "give a critic of the same tokenizer")]
