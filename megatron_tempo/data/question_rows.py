"""The rows of a dataset: ids, messages and answers, each checked, and the texts of its questions. Without torch."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.schema import DatasetConfig
from megatron_tempo.data.rows import BadRow, DataError, Row, answer_text, read_rows
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.code_tests import read_tests
from megatron_tempo.runtime import progress_marker

# How a list of chat messages begins, or a single one. Without quotes it is no JSON, and no question either.
_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["']?(?:role|content|from|value)["']?\s*[:=]""")
_ROLE = re.compile(r"""["']?(?:role|from)["']?\s*[:=]\s*["']?(?:system|user|assistant|human|gpt)\b""")
# Names of fields for chat messages. Text in them that is no list of messages is damaged, not a question.
MESSAGE_FIELDS = ("messages", "conversation", "conversations")
ROLES = ("system", "user", "assistant")
Message = dict[str, str]


class Identified(Protocol):
    @property
    def id(self) -> str: ...


P = TypeVar("P", bound=Identified)


@dataclass(frozen=True, slots=True)
class _Question:
    id: str
    texts: tuple[str, ...]


def load_rows(config: DatasetConfig, names: Sequence[str], build: Callable[[Row], P]) -> list[P]:
    """The results of `build` for each row, which has the fields `names` and the id. DataError names every bad row."""
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


def question_texts(config: DatasetConfig, *, answers: bool = False) -> dict[str, tuple[str, ...]]:
    """The texts of each question of a file, by its id: one, or those of all chat messages except the system's.

    The texts are as in the file, without suffix, system message and chat template, which may differ between the uses of
    a question. `answers`: check the fields of answers and verifiers as well. DataError names every bad row.
    """
    answer_field = config.answer_field if answers else None
    fields = (config.prompt_field, answer_field, config.verifier_field if answer_field is not None else None)

    def build(row: Row) -> _Question:
        if answer_field is not None:
            answer_and_verifier(config, answer_field, row)
        return _Question(row_id(config, row), texts_of(config.prompt_field, row.fields[config.prompt_field]))

    questions = load_rows(config, [name for name in fields if name is not None], build)
    return {question.id: question.texts for question in questions}


def check_rows(sets: Iterable[DatasetConfig]) -> None:
    """Read all rows of these sets as far as that is possible without a tokenizer. Each file is read to its end.

    Sets with a user's reader are left out. Raises one InputError that names every bad row of all sets.
    """
    problems = []
    for dataset in sets:
        if dataset.reader is None:
            try:
                question_texts(dataset, answers=True)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


def row_id(config: DatasetConfig, row: Row) -> str:
    """The id of a row. Raises BadRow."""
    if config.id_field is None:
        return f"{Path(config.path).stem}:{row.number}"
    value = row.fields[config.id_field]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow(f"field {config.id_field!r} is {shown(value)}; an id is text or a whole number")
    return str(value)


def prompt_of(name: str, value: object) -> str | list[Message]:
    """A prompt as text, or as chat messages, which the file may contain as a list in text form. Raises BadRow."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"field {name!r} is empty")
        written = messages_in(value)
        if written is None and name.rpartition(".")[2] in MESSAGE_FIELDS:
            fix = "write a list of {role, content}, or give the question's field another name"
            raise BadRow(f"field {name!r} is {shown(value)}, no list of chat messages in JSON; {fix}")
        return value if written is None else messages_of(name, written)
    if isinstance(value, list):
        return messages_of(name, value)
    raise BadRow(f"field {name!r} is {shown(value)}; a prompt is text or a list of messages")


def texts_of(name: str, value: object) -> tuple[str, ...]:
    """The texts that make a question: see `question_texts`. Raises BadRow."""
    prompt = prompt_of(name, value)
    if isinstance(prompt, str):
        return (prompt,)
    return tuple(message["content"] for message in prompt if message["role"] != "system")


def answer_and_verifier(config: DatasetConfig, name: str, row: Row) -> tuple[str, str]:
    """The answer of a row, from its field `name`, and the name of its verifier. Raises BadRow.

    Tests of programs are read here, because that needs no model and no tokenizer.
    """
    answer, verifier = answer_of(name, row.fields[name]), verifier_of(config, row)
    if verifier == Verifier.code.name:
        try:
            read_tests(answer)
        except InputError as error:
            fix = "write the tests as in docs/code.md, or remove the row"
            raise BadRow(f"field {name!r} holds no tests of a program: {error}; {fix}") from error
    return answer, verifier


def answer_of(name: str, value: object) -> str:
    """An answer as text. Raises BadRow."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise BadRow(f"field {name!r} is {shown(value)}; an answer is text or a number")
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise BadRow(f"field {name!r} is {value}; an answer is a finite number or text")
    if isinstance(value, str) and not value.strip():
        raise BadRow(f"field {name!r} is empty; give the answer or remove the row")
    return answer_text(value)


def verifier_of(config: DatasetConfig, row: Row) -> str:
    """The name of the verifier of a row. Raises BadRow."""
    name = None if config.verifier_field is None else row.fields[config.verifier_field]
    if name is None and config.verifier is not None:
        return config.verifier.name
    if not isinstance(name, str) or name not in Verifier.__members__:
        raise BadRow(f"field {config.verifier_field!r} is {shown(name)}; known are {', '.join(Verifier.__members__)}")
    return name


def messages_in(text: str) -> list[Any] | None:
    """The chat messages in a text that is a list of them, in JSON or as Python prints it; None for any other text.

    A column of messages becomes such a text through CSV or `str`. Raises BadRow if it looks like a list but cannot be
    read.
    """
    if not _MESSAGES.match(text) or not _ROLE.search(text):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        messages = [value] if isinstance(value, dict) else value
        return messages if isinstance(messages, list) else None
    raise BadRow(
        "the prompt looks like a list of chat messages in a text, and cannot be read as JSON; write it as JSON"
    )


def messages_of(name: str, value: list[Any]) -> list[Message]:
    """Chat messages, checked. Raises BadRow."""
    if not value:
        raise BadRow(f"field {name!r} is an empty list of messages")
    messages: list[Message] = []
    for position, message in enumerate(value):
        where = f"message {position} of field {name!r}"
        if not isinstance(message, dict):
            raise BadRow(f"{where} is {shown(message)}; write {{role, content}}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRow(f"{where} has the role {shown(role)}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"{where} has the content {shown(content)}; it must be text")
        if not content.strip():
            raise BadRow(f"{where} is empty")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "user":
        raise BadRow(f"the last message of field {name!r} is of the {messages[-1]['role']}; end with the user's")
    return messages


def shown(value: object) -> str:
    """A value as messages quote it."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"
