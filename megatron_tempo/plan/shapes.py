"""The shape of a model: from its config.json, or as published."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tempo.config.choices import Published
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.model import LARGEST, ModelShape
from megatron_tempo.config.schema import Config
from megatron_tempo.config.sizes import Sizes
from megatron_tempo.config.tree import MISSING
from megatron_tempo.input_files import read_json, unreadable


@dataclass(frozen=True, slots=True)
class PlannedShape(Sizes):
    """The sizes, and what else determines memory and time.

    >>> PUBLISHED[Published.qwen3_8b].groups
    8
    """

    whole_norm: bool = False  # the norm of queries and keys is over the whole projection, not over a head
    window: int | None = None  # tokens that a windowed layer attends to
    windowed: int = 0  # layers of that kind

    def of_rules(self) -> ModelShape:
        """The sizes that the layout rules need."""
        return ModelShape(
            self.heads, self.groups, self.ffn, self.layers, self.max_positions, self.vocab, self.hidden, self.head_dim
        )


# From the models' own config.json; tests/unit/test_plan_parameters.py builds the transformers models from them.
PUBLISHED = {
    Published.qwen3_8b: PlannedShape(36, 4096, 32, 8, 128, 12288, 151936, 40960),
    Published.qwen3_14b: PlannedShape(40, 5120, 40, 8, 128, 17408, 151936, 40960),
    Published.olmo3_7b: PlannedShape(
        32, 4096, 32, 32, 128, 11008, 100278, 65536, whole_norm=True, window=4096, windowed=24
    ),
}  # fmt: skip


def shape_of(config: Config) -> tuple[PlannedShape | None, list[Problem]]:
    """The actor's shape, from `model.path` if it is set, else from `model.shape`; and the problems if there is none.

    A critic of `model.critic_path` is assumed to have the actor's decoder.
    """
    path = config.model.path
    if path != MISSING:
        return _read(Path(path))
    if config.model.shape is None:
        fix = f"model.path=FOLDER, or model.shape=one of {', '.join(Published.__members__)}"
        return None, [Problem("model.path", path, "it is not set, so the model to plan for is unknown", fix)]
    return PUBLISHED[config.model.shape], []


def _read(folder: Path) -> tuple[PlannedShape | None, list[Problem]]:
    file = folder / "config.json"
    fix = "give a folder with the config.json of a Qwen3 or OLMo3 model, or set model.shape instead of model.path"
    if unreadable(file) == "does not exist":
        return None, [Problem("model.path", str(folder), "has no config.json", fix)]
    try:
        return _shape(read_json(file, dict)), []
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
        return None, [Problem("model.path", str(folder), f"config.json cannot be read ({error!r})", fix)]


def _shape(plain: dict[str, Any]) -> PlannedShape:
    """Raises ValueError, KeyError and others for what is no model's."""
    hidden, heads = int(plain["hidden_size"]), int(plain["num_attention_heads"])
    layers = int(plain["num_hidden_layers"])
    windowed = sum(kind == "sliding_attention" for kind in plain.get("layer_types") or ())
    shape = PlannedShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=int(plain["num_key_value_heads"]),
        head_dim=int(plain.get("head_dim") or hidden // heads),
        ffn=int(plain["intermediate_size"]),
        vocab=int(plain["vocab_size"]),
        max_positions=int(plain["max_position_embeddings"]),
        tied=bool(plain.get("tie_word_embeddings", False)),
        whole_norm=str(plain.get("model_type", "")).startswith("olmo"),
        window=int(plain["sliding_window"]) if windowed else None,
        windowed=windowed,
    )
    if not all(1 <= size <= LARGEST for size in asdict(shape.of_rules()).values()):
        raise ValueError(f"its sizes are not all from 1 to {LARGEST:,}")
    return shape
