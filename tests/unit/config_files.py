"""Small files for the tests of the configuration: a Hugging Face folder that looks whole, sets of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from megatron_tempo.config import Config
from megatron_tempo.config.schema import to_plain
from megatron_tempo.config.tree import read, without_default_settings

QWEN3 = {
    "model_type": "qwen3",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "max_position_embeddings": 32768,
    "vocab_size": 100,
    "hidden_size": 64,
    "head_dim": 16,
}

MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

# What a run with `rollout.max_staleness` needs.
CORRECTED = ["stage1.actor.correction={level: token, high: 2}", "stage2.actor.correction={level: token, high: 2}"]


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(QWEN3 | changes))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    save_file({"model.norm.weight": np.ones(4, dtype=np.float32)}, str(folder / "model.safetensors"))
    return folder


def write_rows(path: Path) -> Path:
    path.write_text('{"prompt": "1+1", "answer": "2"}\n')
    return path


def write_all(folder: Path) -> None:
    """model, critic, labelled.jsonl, unlabelled.jsonl and heldout.jsonl in `folder`."""
    write_model(folder / "model")
    write_model(folder / "critic")
    for name in ("labelled", "unlabelled", "heldout"):
        write_rows(folder / f"{name}.jsonl")


def good_overrides(folder: Path) -> list[str]:
    """A configuration of both stages on the files of `write_all` that breaks no rule."""
    return [
        f"run.dir={folder}/run",
        f"model.path={folder}/model",
        f"data.labelled.path={folder}/labelled.jsonl",
        "data.labelled.answer_field=answer",
        "data.labelled.verifier=math",
        f"data.unlabelled.path={folder}/unlabelled.jsonl",
        "stage1.iterations=1",
        "stage2.iterations=1",
        f"evaluation.sets.heldout.path={folder}/heldout.jsonl",
        "evaluation.sets.heldout.answer_field=answer",
        "evaluation.sets.heldout.verifier=math",
    ]


def configure(overrides: list[str]) -> Config:
    """The tree with KEY=VALUE changes, values in YAML; without Hydra, which takes longer."""
    base = OmegaConf.create(without_default_settings(to_plain(Config())))
    changed = OmegaConf.merge(base, OmegaConf.from_dotlist(overrides))
    plain: Any = OmegaConf.to_container(changed)
    config, problems = read(plain)
    assert problems == []
    return config
