"""The text of each token of a response, with characters whole that several tokens make up."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character
_LONGEST = 4  # bytes of a character in UTF-8, and so tokens that it can be cut into


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """One text per token. A character that is cut into several tokens is at the last of them; the others are empty.

    Byte-level tokenizers cut rare characters, such as emoji, into their bytes. A token whose bytes make no character
    with those around it keeps the replacement character.
    """
    texts: list[str] = []
    while len(texts) < len(tokens):
        start = len(texts)
        text, size = tokenizer.decode([tokens[start]]), 1
        if _BROKEN in text:
            text, size = _whole(tokenizer, tokens[start : start + _LONGEST]) or (text, 1)
        texts += [*[""] * (size - 1), text]
    return texts


def _whole(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> tuple[str, int] | None:
    """The text of the fewest first tokens that make whole characters, and their number; None if there is none."""
    for size in range(2, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:size]))
        if _BROKEN not in text:
            return text, size
    return None
