"""Loads prompts from data files: with answers for the labelled set, without for the unlabelled one.

The unlabelled loader reads only prompt and id from its file, and its prompts have no field for an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_tempo.config.extensions import Extension, call_failed, load_template, wrong_result
from megatron_tempo.config.schema import DatasetConfig
from megatron_tempo.data.question_keys import exact_key
from megatron_tempo.data.question_rows import (
    Message,
    answer_and_verifier,
    load_rows,
    prompt_of,
    question_texts,
    row_id,
)
from megatron_tempo.data.rows import BadRow, Row
from megatron_tempo.data.template_date import with_fixed_date
from megatron_tempo.errors import InputError
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_labelled(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[LabelledPrompt]:
    """The prompts of a file and their answers.

    A prompt's `text` is what the model reads, including chat markup and suffix. An answer that is a number in the file
    becomes text. DataError names every bad row; ValueError if the config does not describe a labelled set.
    """
    if config.answer_field is None or (config.verifier is None and config.verifier_field is None):
        raise InputError(f"{config.path}: a labelled set needs `answer_field` and `verifier`; set both")
    answer_field = config.answer_field
    names = [name for name in (config.prompt_field, answer_field, config.verifier_field) if name is not None]
    encode = _Encoder(config, tokenizer, max_prompt_tokens)

    def build(row: Row) -> LabelledPrompt:
        text, token_ids = encode(row.fields[config.prompt_field])
        return LabelledPrompt(row_id(config, row), text, token_ids, *answer_and_verifier(config, answer_field, row))

    return load_rows(config, names, build)


def load_unlabelled(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[UnlabelledPrompt]:
    """Only the prompts of a file. Other fields, including answers, are not read.

    Errors as in `load_labelled`; ValueError if the config names an answer field.
    """
    if config.answer_field is not None:
        raise InputError(f"{config.path}: `answer_field` is {config.answer_field!r} on an unlabelled set; remove it")
    encode = _Encoder(config, tokenizer, max_prompt_tokens)

    def build(row: Row) -> UnlabelledPrompt:
        text, token_ids = encode(row.fields[config.prompt_field])
        return UnlabelledPrompt(row_id(config, row), text, token_ids)

    return load_rows(config, [config.prompt_field], build)


def question_keys(config: DatasetConfig) -> dict[str, str]:
    """The key of each question of a file, by its id: 32 hexadecimal digits of a hash of its text.

    Runs of blanks count as one (`question_keys.exact_key`). DataError as in `load_labelled`.
    """
    return {name: exact_key(texts) for name, texts in question_texts(config).items()}


class _Encoder:
    """Encodes the prompt field of a row as text and token ids. Raises BadRow if it is not a usable prompt."""

    def __init__(self, config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> None:
        own = config.chat_template
        self._template = load_template(own) if isinstance(own, Extension) else None
        if own and self._template is None and tokenizer.chat_template is None:
            raise InputError(
                f"{config.path}: `chat_template` is true, and the tokenizer {tokenizer.name_or_path!r} has none; "
                "set chat_template=false to send prompts as plain text"
            )
        if config.system is not None and not config.chat_template:
            raise InputError(f"{config.path}: `system` is set, and `chat_template` is false; unset one of them")
        self._config = config
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._behind: int | None = None

    def __call__(self, value: object) -> tuple[str, tuple[int, ...]]:
        text, templated = self._text(value)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"the prompt has half a surrogate pair at character {error.start}; write it whole") from error
        token_ids = self._token_ids(text, templated)
        if not token_ids:
            raise BadRow("the prompt has no tokens")
        if len(token_ids) > self._max_prompt_tokens:
            raise BadRow(
                f"the prompt has {len(token_ids)} tokens, rollout.max_prompt_tokens is {self._max_prompt_tokens}; "
                "raise it or remove the row"
            )
        return text, token_ids

    def _token_ids(self, text: str, templated: bool) -> tuple[int, ...]:
        try:
            # A template writes the special tokens itself.
            token_ids = list(self._tokenizer(text, add_special_tokens=not templated).input_ids)
            if not templated:
                token_ids = token_ids[: len(token_ids) - self._tokens_behind(text, token_ids)]
        except Exception as error:  # tokenizers raises plain Exception for a word that is not in the vocabulary
            raise BadRow(f"the tokenizer refuses the prompt: {error}; reword it, or remove the row") from error
        return tuple(token_ids)

    def _tokens_behind(self, text: str, token_ids: list[int]) -> int:
        """How many tokens the tokenizer appends to a plain text, such as an end token, where the response begins."""
        if self._behind is None:
            bare = self._tokenizer(text, add_special_tokens=False).input_ids
            starts = range(len(token_ids) - len(bare), -1, -1)
            start = next((i for i in starts if token_ids[i : i + len(bare)] == bare), None)
            self._behind = 0 if start is None else len(token_ids) - start - len(bare)
        return self._behind

    def _text(self, value: object) -> tuple[str, bool]:
        """What the model reads, and whether a template wrote it."""
        config = self._config
        prompt = prompt_of(config.prompt_field, value)
        if isinstance(prompt, str):
            if not config.chat_template:
                return prompt + config.suffix, False
            return self._render([{"role": "user", "content": prompt + config.suffix}]), True
        if self._template is None and self._tokenizer.chat_template is None:
            raise BadRow("the prompt is chat messages, and the tokenizer has no chat template; give text")
        return self._render(_with_suffix(prompt, config.suffix)), True

    def _render(self, messages: list[Message]) -> str:
        if self._config.system is not None:
            if messages[0]["role"] == "system":
                raise BadRow("the messages have a system message of their own, and `system` is set; unset it")
            messages = [{"role": "system", "content": self._config.system}, *messages]
        if self._template is not None:
            return self._render_own(self._template, messages)
        try:
            template = with_fixed_date(self._tokenizer.get_chat_template())
            return self._tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program
            raise BadRow(f"the tokenizer's chat template refuses the messages: {error}") from error

    def _render_own(self, template: Callable[..., object], messages: list[Message]) -> str:
        """Render by the user's template. Its ValueError rejects the row."""
        extension = Extension(self._config.chat_template)
        try:
            text = template(messages, self._tokenizer)
        except ValueError as error:
            raise BadRow(f"{extension} rejects the messages: {error}") from error
        except Exception as error:
            raise call_failed(extension, error) from error
        if not isinstance(text, str):
            raise wrong_result(extension, text, "the text that the model reads (str)")
        return text


def _with_suffix(messages: list[Message], suffix: str) -> list[Message]:
    """The messages with the suffix appended to the last one, which is the user's, unless it already ends with it."""
    last = messages[-1]
    if not suffix.strip() or suffix.strip() in last["content"]:
        return messages
    return [*messages[:-1], {**last, "content": last["content"] + suffix}]
