"""The model folder that a server reads: config and tokenizer. The weights come from the trainer."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import transformers

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.data.tokenizer import end_tokens
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json

# As in Hugging Face's FP8 folders (Qwen3-8B-FP8, DeepSeek-V3). `weights/precision.py` makes the tensors.
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
_LEFT_OUT = ("generation_config.json", ".safetensors.index.json")


def served_folder(model: Path, folder: Path, precision: EnginePrecision, *, flat_rope: bool) -> Path:
    """Config and tokenizer of a Hugging Face folder, for an engine.

    generation_config.json is left out: each request has its own sampling settings and end tokens. config.json gets the
    same end tokens (`end_tokens`): SGLang ends a response at those of its config too. With `flat_rope` the rotary
    embedding is written in the form of transformers 4, which SGLang reads. Transformers 5 keeps it in
    `rope_parameters`; SGLang looks for `rope_theta` and silently uses 10,000 if there is none. Raises InputError if
    that form cannot express it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(_LEFT_OUT):
            shutil.copyfile(file, folder / file.name)
    config = read_json(model / "config.json", dict)
    if flat_rope:
        kept = {name: value for name, value in config.items() if name not in ("rope_parameters", "rope_scaling")}
        config = kept | _flat_rope(model)
    config["eos_token_id"] = end_tokens(model)
    if precision is EnginePrecision.fp8:
        config["quantization_config"] = FP8_CONFIG | _unquantised(model)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _unquantised(model: Path) -> dict[str, list[str]]:
    """The routers of a mixture of experts, which no FP8 checkpoint quantises, by their names for both engines."""
    shape = read_model_shape(model)
    if shape.experts is None:
        return {}
    return {"modules_to_not_convert": [f"model.layers.{layer}.mlp.gate" for layer in range(shape.layers)]}


def _flat_rope(model: Path) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as SGLang reads them, from the form that transformers reads.

    An OLMo3 has an embedding for each kind of layer. SGLang supports one base and scales only full attention.
    """
    rope = transformers.AutoConfig.from_pretrained(model).rope_parameters
    plain = rope.get("sliding_attention") or rope
    rope = rope.get("full_attention") or rope
    if plain is not rope and (plain["rope_type"], plain["rope_theta"]) != ("default", rope["rope_theta"]):
        raise InputError(
            f"{model}/config.json: SGLang knows no other rotary embedding of sliding layers than the default one with "
            f"the rope_theta of full attention: use rollout.engine=vllm or embedded"
        )
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if scaling.get("attention_factor") and scaling.get("factor"):
        # SGLang ignores it and multiplies the default factor by another.
        scaling["attn_factor"] = scaling["attention_factor"] / (0.1 * math.log(scaling["factor"]) + 1)
    return {"rope_theta": rope["rope_theta"]} | (
        {"rope_scaling": scaling} if rope.get("rope_type", "default") != "default" else {}
    )


def private_folder(folder: Path) -> Path:
    """Make a folder that only this user can read. An existing one gets these permissions."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def private_file(path: Path, text: str) -> Path:
    """Write a file that only this user can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    return path
