"""Makes a Hugging Face folder of the GGUF file, as the model's authors publish it, and compares it with their facts."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_tempo.errors import InputError
from megatron_tempo.files import atomic_folder

# The published model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
PARAMETERS = 134_515_008
FACTS = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
ROPE_THETA = 100_000.0
ENDS = {"<|im_end|>": 2, "<|endoftext|>": 0}  # of an answer, and of a document


def make_folder(gguf: Path, readers: Path, licence: Path, folder: Path) -> None:
    """Write the folder: weights in float32, as GGUF's numbers come to, since bf16 would round them.

    Raises InputError if the result is not the published model.
    """
    sys.path.append(str(readers))  # last, so that no package of the environment is replaced
    import transformers

    from_gguf = {"gguf_file": gguf.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **from_gguf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _split_digits(tokenizer)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.copyfile(licence, partial / "LICENSE")
        _change(partial / "config.json", {"rms_norm_eps": FACTS["rms_norm_eps"]}, {"_model_name_or_path"})
        ends = {"bos_token_id": 1, "eos_token_id": list(ENDS.values()), "pad_token_id": 2}
        (partial / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": FACTS["max_position_embeddings"]}
        _change(partial / "tokenizer_config.json", own, {"is_local", "local_files_only", "backend"})
        check_facts(partial, sum(parameter.numel() for parameter in model.parameters()))


def _split_digits(tokenizer: Any) -> None:
    """GGUF names the way a text is cut before the merges ("smollm"), which transformers does not read.

    The published tokenizer.json makes each digit a token of its own; two blanks before a digit stay one token.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)


def _change(path: Path, entries: dict[str, Any], without: set[str]) -> None:
    old = json.loads(path.read_text(encoding="utf-8"))
    new = {name: value for name, value in (old | entries).items() if name not in without}
    path.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")


def check_facts(folder: Path, parameters: int) -> None:
    """Raises InputError that lists where a folder is not the published model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    expected: dict[str, Any] = FACTS | {"parameters": PARAMETERS, "rope_theta": ROPE_THETA, "end tokens": ENDS}
    expected |= {"tokens": FACTS["vocab_size"]}
    measured = {name: config.get(name) for name in FACTS} | {"parameters": parameters}
    measured["rope_theta"] = (config.get("rope_parameters") or config).get("rope_theta")
    measured |= {"end tokens": {name: ids.get(name) for name in ENDS}}
    measured |= {"tokens": len(set(tokenizer["model"]["vocab"].values()) | set(ids.values()))}
    wrong = [
        f"{name} is {measured[name]}, published {expected[name]}"
        for name in expected
        if measured[name] != expected[name]
    ]
    if wrong:
        raise InputError(f"{folder} is not the published model: {'; '.join(wrong)}")
