"""The training settings of an exported model, written into its config.json. `eval` uses them as its defaults.

A model that was trained with one prompt form and one verifier may score 0 with another prompt form or verifier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tempo.config.schema import Config, DatasetConfig, to_plain
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json

ENTRY = "tempo_trained_with"  # of config.json
_ASKED = ("verifier", "verifier_field", "chat_template", "system", "suffix")
_READ = ("prompt_field", "answer_field", "id_field", *_ASKED)  # of a set of the run itself, whose columns are known


def trained_with(config: Config) -> dict[str, Any]:
    """The entry of a model that a run with this config has trained."""
    training = config.data.labelled or config.data.unlabelled
    sets = {name: {"path": _real(dataset.path)} | _fields(dataset, _READ) for name, dataset in _sets(config).items()}
    return {
        "asked": {} if training is None else _fields(training, _ASKED),
        "sets": sets,
        "max_prompt_tokens": config.rollout.max_prompt_tokens,
        "max_response_tokens": config.rollout.max_response_tokens,
        "stop": list(config.rollout.stop),
    }


def read_trained_with(model: Path) -> dict[str, Any]:
    """The entry of the model in a Hugging Face folder; empty if the folder has none or cannot be read."""
    try:
        entry = read_json(model / "config.json", dict).get(ENTRY)
    except InputError:
        return {}
    return entry if isinstance(entry, dict) else {}


def defaults_for(entry: dict[str, Any], path: str) -> dict[str, Any]:
    """Fields of an evaluation set in the file `path`: those of the run's set in that file, else those of training."""
    sets = entry.get("sets")
    for fields in sets.values() if isinstance(sets, dict) else ():
        if isinstance(fields, dict) and fields.get("path") == _real(path):
            return _known(fields, _READ)
    asked = entry.get("asked")
    return _known(asked, _ASKED) if isinstance(asked, dict) else {}


def endings(entry: dict[str, Any]) -> dict[str, Any]:
    """Fields of `rollout`: the lengths and the stop strings that the model was trained with."""
    given = {name: entry.get(name) for name in ("max_prompt_tokens", "max_response_tokens")}
    fields: dict[str, Any] = {name: value for name, value in given.items() if isinstance(value, int) and value > 0}
    stop = entry.get("stop")
    if isinstance(stop, list) and stop and all(isinstance(string, str) for string in stop):
        fields["stop"] = stop
    return fields


def _sets(config: Config) -> dict[str, DatasetConfig]:
    labelled = {} if config.data.labelled is None else {"data.labelled": config.data.labelled}
    return {**labelled, **config.evaluation.sets}


def _fields(dataset: DatasetConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: to_plain(getattr(dataset, name)) for name in names}


def _known(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Without those that are None, which are the defaults of an evaluation set anyway."""
    return {name: fields[name] for name in names if fields.get(name) is not None}


def _real(path: str) -> str:
    return str(Path(path).resolve())
