"""Exports actor and critic as Hugging Face folders."""

from __future__ import annotations

import itertools
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.resume import fingerprint
from megatron_tempo.config.rules.model_files import check_files
from megatron_tempo.config.schema import Config
from megatron_tempo.config.trained_with import ENTRY, trained_with
from megatron_tempo.config.updates import CriticTargets
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.chunks import ModelChunks
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.gpt import PackedGPT, ValueModel
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.trained import Model
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.weights import folder, tables
from megatron_tempo.weights.param_mapping import ParamMapping
from megatron_tempo.weights.pieces import EVEN
from megatron_tempo.weights.stream import WeightStream

log = logging.getLogger(__name__)

# Entry of an exported critic's config.json: the targets it was trained on. They define the scale of its values.
TARGETS = "tempo_critic_targets"


def targets_of(critic: Path) -> CriticTargets:
    """The targets of the critic in a Hugging Face folder; 0 and 1 if its config.json does not name them."""
    name = read_json(critic / "config.json", dict).get(TARGETS, CriticTargets.zero_one.name)
    if name not in CriticTargets.__members__:
        known = ", ".join(CriticTargets.__members__)
        raise InputError(f"{critic}/config.json: {TARGETS}={name} is unknown; known are {known}")
    return CriticTargets[name]


def weights_of(model: Model, config: Config, dtype: torch.dtype | None = None, multiple: int = EVEN) -> WeightStream:
    """A stream of a model's current weights by their Hugging Face names. `dtype`: None for the model's type.

    `multiple`: the rows of a part of a tensor are a multiple of it.
    """
    net, layout, bucket_bytes = model.net, model.layout, config.parallel.bucket_mb << 20
    return WeightStream(net, layout, mappings_of(net, layout), bucket_bytes, dtype, model.load_weights, multiple)


def origin_of(config: Config, step: int, checkpoint: str | None) -> dict[str, Any]:
    """What an export comes from. `checkpoint`: the SHA-256 of its checkpoint's manifest, None if it has none.

    The hash of the configuration is of what all starts of a run have in common (`config.resume`).
    """
    return {
        "run": str(Path(config.run.dir).absolute()),
        "step": step,
        "config_sha256": fingerprint(config),
        "checkpoint": f"step_{step:08d}",
        "checkpoint_sha256": checkpoint,
    }


def export_hf(
    config: Config,
    actor: Actor,
    critic: Critic | None,
    out: Path,
    seen: Path | None = None,
    origin: dict[str, Any] | None = None,
    *,
    seen_summary: dict[str, Any] | None = None,
) -> None:
    """Write the Hugging Face folders `out`/actor and, if there is a critic, `out`/critic. Collective.

    `seen`: the file that lists the questions they were trained on; it is copied into both folders, and its summary goes
    into both config.json. `origin`: what they
    come from (`origin_of`). A folder that exists, comes from the same step of the same run and still has all its files
    stays as it is. Any other folder of that name is renamed.
    Raises UnwrittenError if a folder cannot be written.
    """
    model = config.model
    about = {ENTRY: trained_with(config) | ({} if seen_summary is None else {"seen": seen_summary})}
    models: list[tuple[str, Model, str, dict[str, Any]]] = [("actor", actor.model, model.path, about)]
    if critic is not None:
        changes = critic_changes(critic.model.net.shape, last_targets(config)) | about
        models.append(("critic", critic.model, model.critic_path or model.path, changes))
    for name, trained, like, changes in models:
        is_writer = dist.get_rank() == 0
        exists = [raise_on_all_ranks(partial(_is_exported, out / name, origin) if is_writer else lambda: False)]
        dist.broadcast_object_list(exists, src=0)
        if not exists[0]:
            dtype = str(trained.net.config.params_dtype).removeprefix("torch.")
            buckets = weights_of(trained, config).everywhere(parts=True)
            changed = {**changes, "dtype": dtype}
            raise_on_all_ranks(
                partial(folder.save, buckets, out / name, Path(like), trained.layout, changed, seen, origin)
            )


def _is_exported(path: Path, origin: dict[str, Any] | None) -> bool:
    """Whether the folder is there and comes from `origin`. One that does not is renamed."""
    if not path.exists():
        return False
    if origin is None:
        return True
    written = folder.read_origin(path)
    if written is None or any(written.get(key) != value for key, value in origin.items() if key != "run"):
        wrong = f"does not come from this run's step {origin['step']}"
    elif (absent := _absent(path)) is None:
        return True
    else:
        wrong = f"is not whole ({absent})"
    names = (path.with_name(f"{path.name}.other-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    os.replace(path, aside)
    log.warning("%s %s: renamed to %s, and exported anew", path, wrong, aside.name)
    return False


def _absent(path: Path) -> str | None:
    """What is wrong with the files of an export: one that is gone, or one that is cut short. None if nothing is."""
    try:
        files = {"config.json", *read_json(path / folder.INDEX, dict)["weight_map"].values()}
    except (InputError, KeyError, TypeError, AttributeError) as error:
        return f"{folder.INDEX}: {error}"
    if gone := sorted(name for name in files if not (path / str(name)).is_file()):
        return f"{gone[0]} is gone"
    return next((problem.wrong for problem in check_files("model.path", path, tokenizer=True)), None)


def critic_changes(shape: ModelShape, targets: CriticTargets | None) -> dict[str, Any]:
    """The entries of a critic's config.json that differ from its model's: a token classifier with one label, the value.

    `targets`: None if they are unknown, or if the config.json has them already.
    """
    changes: dict[str, Any] = {"architectures": [shape.family.token_classifier], "tie_word_embeddings": False}
    changes |= {"id2label": {"0": "value"}, "label2id": {"value": 0}}
    return changes if targets is None else changes | {TARGETS: targets.name}


def last_targets(config: Config) -> CriticTargets:
    """The targets that a run's critic is trained on in its last stage."""
    return config.critic_targets(list(config.stages())[-1])


def mappings_of(net: PackedGPT | ModelChunks, layout: Layout) -> list[ParamMapping]:
    """The table of a network's parameters and their Hugging Face tensors."""
    critic = isinstance(net.chunks[0], ValueModel)
    return tables.mappings(net.shape, layout.pipeline_layers, critic=critic, expert_ranks=layout.expert)
