"""What a server reads of a model: config and tokenizer, not its weights, which come from the trainer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from megatron_tempo.config.schema import EnginePrecision

# The form of Hugging Face's FP8 folders (Qwen3-8B-FP8, DeepSeek-V3); `weights/precision.py` makes the tensors.
FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
_LEFT_OUT = ("generation_config.json", ".safetensors.index.json")


def served_folder(model: Path, folder: Path, precision: EnginePrecision, *, flat_rope: bool) -> Path:
    """Config and tokenizer of a Hugging Face folder, for an engine.

    Without generation_config.json: each request says how it is to be sampled, and what ends it. With `flat_rope` the
    rotary base stands where transformers 4 had it: transformers 5 keeps it in `rope_parameters`, and SGLang looks for
    `rope_theta` and silently takes 10,000 where it finds none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(_LEFT_OUT):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((model / "config.json").read_text())
    if flat_rope and (rope := config.pop("rope_parameters", None)) is not None:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if precision is EnginePrecision.fp8:
        config["quantization_config"] = FP8_CONFIG
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def private_file(path: Path, text: str) -> Path:
    """Write a file that this user alone can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    return path
