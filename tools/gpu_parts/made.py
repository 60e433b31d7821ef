"""Models and rollouts that the parts make themselves: nothing is downloaded."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_tempo.types import Batch


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a Qwen3."""

    layers: int
    hidden: int
    heads: int
    groups: int  # heads of keys and values
    head_dim: int
    ffn: int
    vocab: int


SMALL = Sizes(layers=2, hidden=64, heads=4, groups=2, head_dim=16, ffn=128, vocab=503)
MIDDLE = Sizes(layers=4, hidden=512, heads=4, groups=2, head_dim=128, ffn=1536, vocab=8003)
FOUR_OF_8B = Sizes(layers=4, hidden=4096, heads=32, groups=8, head_dim=128, ffn=12_288, vocab=151_936)


def write_model(folder: Path, sizes: Sizes, *, empty: bool = False) -> Path:
    """Write config.json and weights in bf16: random ones, or, if `empty`, zeros that take no space on a disk."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.ffn,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path, shapes = folder / "model.safetensors", tensor_shapes(sizes)
    if empty:
        write_hole(path, shapes)
        return folder
    generator = torch.Generator().manual_seed(0)
    save_file({name: random_tensor(name, shape, generator) for name, shape in shapes.items()}, path)
    return folder


def tensor_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The tensors of an untied Qwen3 by their Hugging Face names."""
    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab, hidden)}
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (sizes.head_dim,),
        "self_attn.k_norm": (sizes.head_dim,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (sizes.ffn, hidden),
        "mlp.up_proj": (sizes.ffn, hidden),
        "mlp.down_proj": (hidden, sizes.ffn),
    }
    for layer in range(sizes.layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (sizes.vocab, hidden)}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.rand(shape, generator=generator).add_(0.5).bfloat16()
    return torch.randn(shape, generator=generator).mul_(0.5 * shape[-1] ** -0.5).bfloat16()


def write_hole(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file whose header is written and whose data is a hole, which reads as zeros."""
    bytes_of = [2 * torch.Size(shape).numel() for shape in shapes.values()]
    ends = list(accumulate(bytes_of))
    entries = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [end - size, end]}
        for (name, shape), size, end in zip(shapes.items(), bytes_of, ends, strict=True)
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + ends[-1])


def rollouts(vocab: int, lengths: list[tuple[int, int]], *, per_prompt: int = 2) -> Batch:
    """Random tokens. `lengths`: of each row's prompt and response; half of the responses count as correct."""
    generator = torch.Generator().manual_seed(1)
    prompts, responses = (torch.tensor(column) for column in zip(*lengths, strict=True))
    rows, total = len(lengths), int(responses.sum())
    group = torch.arange(rows) // per_prompt
    return Batch(
        prompt_ids=tuple(f"p{i}" for i in group.tolist()),
        group=group,
        prompt_tokens=torch.randint(0, vocab, (int(prompts.sum()),), generator=generator).int(),
        prompt_lengths=prompts,
        response_tokens=torch.randint(0, vocab, (total,), generator=generator).int(),
        response_lengths=responses,
        engine_logprobs=-torch.rand(total, generator=generator),
        stopped=torch.ones(rows, dtype=torch.bool),
        versions=torch.stack([torch.arange(rows), torch.zeros(rows, dtype=torch.int64), responses], dim=1),
        correct=(torch.arange(rows) % 2).float(),
    )
