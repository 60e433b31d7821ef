"""Data files into prompts: with answers for the labelled set, without for the unlabelled one.

The unlabelled loader asks its file for prompt and id only, and what it makes has no field for an answer.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jinja2

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.extensions import Extension, call_failed, load_template, wrong_result
from megatron_tempo.config.schema import DatasetConfig
from megatron_tempo.data.rows import BadRow, DataError, Row, answer_text, read_rows
from megatron_tempo.errors import InputError
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")


class Prompt(Protocol):
    @property
    def id(self) -> str: ...


P = TypeVar("P", bound=Prompt)


@dataclass(frozen=True, slots=True)
class _Question:
    id: str
    key: str


def load_labelled(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[LabelledPrompt]:
    """The prompts of a file and their answers.

    A prompt's `text` is what the model reads, chat markup and suffix included; an answer that is a number in the file
    becomes its text. DataError names every bad row; ValueError where the config does not describe a labelled set.
    """
    if config.answer_field is None or (config.verifier is None and config.verifier_field is None):
        raise InputError(f"{config.path}: a labelled set needs `answer_field` and `verifier`; set both")
    answer_field = config.answer_field
    names = [name for name in (config.prompt_field, answer_field, config.verifier_field) if name is not None]
    encode = _Encoder(config, tokenizer, max_prompt_tokens)

    def build(row: Row) -> LabelledPrompt:
        text, token_ids = encode(row.fields[config.prompt_field])
        answer = _answer(answer_field, row.fields[answer_field])
        return LabelledPrompt(_row_id(config, row), text, token_ids, answer, _verifier(config, row))

    return _load(config, names, build)


def load_unlabelled(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> list[UnlabelledPrompt]:
    """The prompts of a file alone; other fields of the file, answers too, are not looked at.

    Errors as those of `load_labelled`; ValueError where the config names an answer field.
    """
    if config.answer_field is not None:
        raise InputError(f"{config.path}: `answer_field` is {config.answer_field!r} on an unlabelled set; remove it")
    encode = _Encoder(config, tokenizer, max_prompt_tokens)

    def build(row: Row) -> UnlabelledPrompt:
        text, token_ids = encode(row.fields[config.prompt_field])
        return UnlabelledPrompt(_row_id(config, row), text, token_ids)

    return _load(config, [config.prompt_field], build)


def question_keys(config: DatasetConfig) -> dict[str, str]:
    """What each question of a file is known by, by its id: 32 hexadecimal digits of a hash of its text.

    Of the text as it stands in the file, runs of blanks counted as one: suffix, system message, chat template and
    tokenizer, which may differ between the places where a question is asked, play no part. Of messages it is the texts
    of all but the system's. DataError as that of `load_labelled`.
    """

    def build(row: Row) -> _Question:
        return _Question(_row_id(config, row), _key(config.prompt_field, row.fields[config.prompt_field]))

    return {question.id: question.key for question in _load(config, [config.prompt_field], build)}


def overlap(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str]]:
    """The pairs (id in a, id in b) of the same questions, in the order of `b`. Both are keys by id."""
    known: dict[str, list[str]] = defaultdict(list)
    for name, key in a.items():
        known[key].append(name)
    return [(id_a, id_b) for id_b, key in b.items() for id_a in known.get(key, ())]


def _load(config: DatasetConfig, names: Sequence[str], build: Callable[[Row], P]) -> list[P]:
    path = Path(config.path)
    if config.id_field is not None:
        names = [*names, config.id_field]
    prompts: list[P] = []
    problems: list[str] = []
    places: dict[str, str] = {}
    for row in islice(read_rows(path, tuple(dict.fromkeys(names)), config.reader), config.limit):
        progress_marker.mark()
        try:
            if row.problem is not None:
                raise BadRow(row.problem)
            prompt = build(row)
            if prompt.id in places:
                raise BadRow(f"field {config.id_field!r} is {prompt.id!r}, as at {places[prompt.id]}; make ids unique")
        except BadRow as error:
            problems.append(f"{row.place}: {error}")
        else:
            places[prompt.id] = row.place
            prompts.append(prompt)
    if not prompts and not problems:
        problems.append("there are no rows in it")
    if problems:
        raise DataError(path, problems)
    return prompts


def _row_id(config: DatasetConfig, row: Row) -> str:
    if config.id_field is None:
        return f"{Path(config.path).stem}:{row.number}"
    value = row.fields[config.id_field]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow(f"field {config.id_field!r} is {_shown(value)}; an id is text or a whole number")
    return str(value)


def _key(name: str, value: object) -> str:
    if isinstance(value, list):
        texts = [message["content"] for message in _messages(name, value) if message["role"] != "system"]
    elif isinstance(value, str):
        texts = [value]
    else:
        raise BadRow(f"field {name!r} is {_shown(value)}; a prompt is text or a list of messages")
    text = "\n".join(" ".join(text.split()) for text in texts)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _answer(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"field {name!r} is {_shown(value)}; an answer is text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {name!r} is {value}; an answer is a finite number or text")
    if isinstance(value, str) and not value.strip():
        raise BadRow(f"field {name!r} is empty; give the answer or remove the row")
    return answer_text(value)


def _verifier(config: DatasetConfig, row: Row) -> str:
    name = None if config.verifier_field is None else row.fields[config.verifier_field]
    if name is None and config.verifier is not None:
        return config.verifier.name
    if not isinstance(name, str) or name not in Verifier.__members__:
        raise BadRow(f"field {config.verifier_field!r} is {_shown(name)}; known are {', '.join(Verifier.__members__)}")
    return name


class _Encoder:
    """The prompt field of a row into text and token ids. BadRow where it is no usable prompt."""

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

    def __call__(self, value: object) -> tuple[str, tuple[int, ...]]:
        text, templated = self._text(value)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"the prompt has half a surrogate pair at character {error.start}; write it whole") from error
        # A template writes the special tokens itself.
        token_ids = tuple(self._tokenizer(text, add_special_tokens=not templated).input_ids)
        if not token_ids:
            raise BadRow("the prompt has no tokens")
        if len(token_ids) > self._max_prompt_tokens:
            raise BadRow(
                f"the prompt has {len(token_ids)} tokens, rollout.max_prompt_tokens is {self._max_prompt_tokens}; "
                "raise it or remove the row"
            )
        return text, token_ids

    def _text(self, value: object) -> tuple[str, bool]:
        """What the model reads, and whether a template wrote it."""
        config = self._config
        if isinstance(value, str):
            if not value.strip():
                raise BadRow(f"field {config.prompt_field!r} is empty")
            if not config.chat_template:
                return value + config.suffix, False
            return self._render([{"role": "user", "content": value + config.suffix}]), True
        if isinstance(value, list):
            if self._template is None and self._tokenizer.chat_template is None:
                raise BadRow("the prompt is chat messages, and the tokenizer has no chat template; give text")
            return self._render(_messages(config.prompt_field, value)), True
        raise BadRow(f"field {config.prompt_field!r} is {_shown(value)}; a prompt is text or a list of messages")

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._config.system is not None:
            if messages[0]["role"] == "system":
                raise BadRow("the messages have a system message of their own, and `system` is set; unset it")
            messages = [{"role": "system", "content": self._config.system}, *messages]
        if self._template is not None:
            return self._render_own(self._template, messages)
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise BadRow(f"the tokenizer's chat template refuses the messages: {error}") from error

    def _render_own(self, template: Callable[..., object], messages: list[dict[str, str]]) -> str:
        """By the user's template. Its ValueError rejects the row."""
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


def _messages(name: str, value: list[Any]) -> list[dict[str, str]]:
    if not value:
        raise BadRow(f"field {name!r} is an empty list of messages")
    messages: list[dict[str, str]] = []
    for position, message in enumerate(value):
        where = f"message {position} of field {name!r}"
        if not isinstance(message, dict):
            raise BadRow(f"{where} is {_shown(message)}; write {{role, content}}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRow(f"{where} has the role {_shown(role)}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"{where} has the content {_shown(content)}; it must be text")
        if not content.strip():
            raise BadRow(f"{where} is empty")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "user":
        raise BadRow(f"the last message of field {name!r} is of the {messages[-1]['role']}; end with the user's")
    return messages


def _shown(value: object) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"
