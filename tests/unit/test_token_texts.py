"""Characters that a byte-level tokenizer cuts into tokens are shown whole, and every token still has its place."""

from __future__ import annotations

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megatron_tempo.evaluation.token_texts import token_texts


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Every byte is a token, but for two that merge the first two and the last two bytes of an emoji."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\U0001f600")[0][0]
    merges = [(spelled[0], spelled[1]), (spelled[2], spelled[3])]
    names = [*alphabet, *("".join(merge) for merge in merges)]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ab", ["a", "b"]),
        ("\U0001f600", ["", "\U0001f600"]),
        ("a\U0001f389b", ["a", "", "", "\U0001f389", "b"]),
        ("\u6570\u5b66", ["", "", "\u6570", "", "", "\u5b66"]),
        ("\u00e9<end>", ["", "\u00e9", "<end>"]),
        ("\U0001f600\U0001f600", ["", "\U0001f600"] * 2),
    ],
)
def test_whole_characters(tokenizer: transformers.PreTrainedTokenizerBase, text: str, shown: list[str]) -> None:
    tokens = tokenizer.encode(text)
    assert token_texts(tokenizer, tokens) == shown
    assert len(tokens) == len(shown)


def test_bytes_of_no_character_stay_apart(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """A response that is cut off inside of a character, and one that a model makes of loose bytes."""
    cut = tokenizer.encode("a\u6570")[:-1]
    assert token_texts(tokenizer, cut) == ["a", "\ufffd", "\ufffd"]
    loose = [tokenizer.encode("\u6570")[1]] * 6 + tokenizer.encode("b\u00e9")
    assert token_texts(tokenizer, loose) == ["\ufffd"] * 6 + ["b", "", "\u00e9"]
    assert token_texts(tokenizer, []) == []
