"""Loads and checks the tokenizer of a model's folder, finds its end tokens, and reports texts that it changes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import transformers

from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json, readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_FILES = (*_JSON, "tokenizer.model", "merges.txt", "chat_template.jinja", "chat_template.json")
_CUTTING = ("normalizer", "pre_tokenizer", "decoder")  # the parts of a tokenizer.json by which texts become pieces


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises InputError, with the file's name, if it cannot be loaded.

    It also raises InputError if the model has no embedding of some tokens.
    """
    present = [folder / name for name in _FILES if (folder / name).exists() or (folder / name).is_symlink()]
    for path in present:
        readable(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises its own kind, transformers any
        for path in present:
            if path.name in _JSON:
                read_json(path, dict)
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded ({_first_line(error)}): fetch tokenizer.json and "
            "tokenizer_config.json again"
        ) from error
    if _is_cut_otherwise(tokenizer, folder):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    _check_vocabulary(tokenizer, folder)
    return tokenizer


def _is_cut_otherwise(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a tokenizer cuts texts in another way than the folder's tokenizer.json says.

    transformers 5 makes tokenizers of some classes, such as GPT2Tokenizer, from the vocabulary and the merges, with the
    class's own normalizer, pre-tokenizer and decoder. SmolLM2 names this class, and its tokenizer.json splits digits:
    prompts would be other tokens than in the model's training, without a message.
    """
    file = folder / "tokenizer.json"
    if not tokenizer.is_fast or not file.exists():
        return False
    stated = read_json(file, dict)
    # Read by the library, so that entries that older files lack get their defaults.
    bare = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    published = tokenizers.Tokenizer.from_str(json.dumps(bare | {part: stated.get(part) for part in _CUTTING}))
    backend: Any = tokenizer.backend_tokenizer
    return any(_state(getattr(backend, part)) != _state(getattr(published, part)) for part in _CUTTING)


def _state(part: Any) -> Any:
    """What a normalizer, pre-tokenizer or decoder does, without what has no effect on tokens."""
    return None if part is None else _plain(json.loads(part.__getstate__()))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if name != "trim_offsets"}
    return value


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    size = read_json(folder / "config.json", dict).get("vocab_size") if (folder / "config.json").exists() else None
    if type(size) is not int:
        return
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= size}
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        raise InputError(
            f"{folder}: the tokenizer has {len(beyond)} tokens without an embedding, first {token!r} with id {number}; "
            f"config.json says vocab_size={size}. Resize the model's embeddings, or remove the tokens"
        )


def end_tokens(folder: Path) -> list[int]:
    """The tokens that end a response: those of generation_config.json and the tokenizer's.

    Without a generation_config.json, those of config.json are taken, as in transformers. Raises InputError if
    there are none.
    """
    return _ends(load_tokenizer(folder), folder)


def _ends(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    tokens = list(dict.fromkeys([*_configured_ends(folder), *_tokenizer_end(tokenizer)]))
    if not tokens:
        raise InputError(
            f"{folder}: no eos_token_id in generation_config.json or the tokenizer; responses would not end"
        )
    return tokens


def _configured_ends(folder: Path) -> list[int]:
    paths = [folder / name for name in ("generation_config.json", "config.json") if (folder / name).exists()]
    for path in paths[:1]:
        end = read_json(path, dict).get("eos_token_id")
        ends = [] if end is None else end if isinstance(end, list) else [end]
        if any(type(token) is not int or token < 0 for token in ends):
            raise InputError(f"{path}: eos_token_id={end} is no token id, nor a list of them; correct it")
        return ends
    return []


def _tokenizer_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def check_stop_strings(tokenizer: PreTrainedTokenizerBase, folder: Path, strings: Sequence[str], field: str) -> None:
    """Raises InputError for a stop string that the tokenizer cannot write, or a tokenizer without tokenizer.json."""
    if strings and not tokenizer.is_fast:
        raise InputError(
            f"{field}: the tokenizer of {folder} has no tokenizer.json, which stop strings need; {field}=[]"
        )
    for string in strings:
        try:
            back = str(tokenizer.decode(tokenizer(string, add_special_tokens=False).input_ids))
        except Exception as error:  # tokenizers raises plain Exception for an unknown word
            raise InputError(
                f"{field}={string!r}: the tokenizer of {folder} cannot write it ({error}), so no response would end "
                "there; give a string that it can write"
            ) from error
        if string not in back:
            raise InputError(
                f"{field}={string!r}: the tokenizer of {folder} writes it as {back!r}, so no response would end there; "
                "give a string that it can write"
            )


def findings(tokenizer: PreTrainedTokenizerBase, folder: Path, texts: Sequence[str]) -> list[str]:
    """Findings on a tokenizer, one per line. `texts`: prompts as the model reads them.

    Raises InputError if the tokenizer loses all spaces of a text, or if no token ends a response.
    """
    lines = []
    _ends(tokenizer, folder)
    configured, own = _configured_ends(folder), _tokenizer_end(tokenizer)
    if configured and own and not set(own) <= set(configured):
        lines.append(
            f"warning: {folder}: the model's configuration ends responses with {named(tokenizer, configured)}, the "
            f"tokenizer with {named(tokenizer, own)}: each of them ends one here"
        )
    if (changed := _changed(tokenizer, folder, texts)) is not None:
        lines.append(changed)
    return lines


def named(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> str:
    """Tokens as a message shows them."""
    return " or ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in tokens)


def _changed(tokenizer: PreTrainedTokenizerBase, folder: Path, texts: Sequence[str]) -> str | None:
    """A warning if a text cannot be decoded from its tokens. Small changes of spaces and Unicode forms are allowed."""
    for text in texts:
        back = str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids))
        words, words_back = (unicodedata.normalize("NFKC", one).split() for one in (text, back))
        shown = f"{text[:60]!r} comes back as {back[:60]!r}"
        if len(words) > 1 and len(words_back) == 1 and "".join(words) == words_back[0]:
            raise InputError(
                f"{folder}: the tokenizer loses the spaces of a text: {shown}. tokenizer_config.json names a "
                f"tokenizer_class that does not fit tokenizer.json: write PreTrainedTokenizerFast there (transformers "
                f"{transformers.__version__})"
            )
        if "".join(words) != "".join(words_back) or len(words_back) < len(words):
            return f"warning: {folder}: the tokenizer changes texts: {shown}"
    return None


def _first_line(error: Exception) -> str:
    lines: list[Any] = str(error).splitlines() or [type(error).__name__]
    return str(lines[0])
