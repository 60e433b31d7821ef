"""Tokens at which an engine ends responses besides the run's end tokens.

All engines end a response at the same tokens: those of `data.tokenizer.end_tokens`, which each request names. vLLM and
the embedded engine look at no others. SGLang 0.5.23 has no request without its own (`srt/managers/schedule_batch.py`,
`_check_token_based_finish`), so a server that a run starts reads a config.json with the run's (`folder.py`).
"""

from __future__ import annotations

from pathlib import Path

import transformers

from megatron_tempo.data.tokenizer import end_tokens, load_tokenizer, named

# SGLang takes these for end tokens wherever a tokenizer has them (`srt/utils/hf_transformers/common.py`).
_OF_SGLANG = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")


def other_ends_of_sglang(model: Path, *, found: bool) -> str | None:
    """A warning if SGLang ends responses where the other engines do not; None if it does not.

    `found`: the servers were started by somebody else, and read the model's own config.json.
    """
    tokenizer, ends = load_tokenizer(model), end_tokens(model)
    added = tokenizer.get_added_vocab()
    others = {added[text] for text in _OF_SGLANG if text in added} - set(ends)
    if others:
        return (
            f"SGLang ends responses also at {named(tokenizer, sorted(others))}, other engines do not: add "
            f"{_numbers(others)} to eos_token_id in {model}/generation_config.json, and all of them do"
        )
    configured = getattr(transformers.AutoConfig.from_pretrained(model), "eos_token_id", None) if found else None
    others = set([configured] if isinstance(configured, int) else configured or []) - set(ends)
    if others:
        return (
            f"SGLang servers that read {model}/config.json end responses also at its "
            f"{named(tokenizer, sorted(others))}, which generation_config.json and the tokenizer do not name; other "
            f"engines do not: let the servers read a config.json with eos_token_id=[{_numbers(ends)}]"
        )
    return None


def _numbers(tokens: set[int] | list[int]) -> str:
    return ", ".join(map(str, tokens))
