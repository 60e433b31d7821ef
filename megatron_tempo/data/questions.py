r"""Converts rows of public data sets to our questions: fields and form of each benchmark of `config.benchmarks`.

If copies of a set use several names for a field, the first that a row has is taken. The names are those of the sources
in `config.benchmarks` and of the copies that TTRL, lm-evaluation-harness and open-r1 use.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from megatron_tempo.config.choices import Verifier
from megatron_tempo.data import code_questions
from megatron_tempo.data.public import PublicRow
from megatron_tempo.data.question_rows import MESSAGE_FIELDS, Message, messages_in, messages_of
from megatron_tempo.data.rows import BadRow, answer_text
from megatron_tempo.errors import InputError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MASKS = {"", "___", "____"}  # the text of each cell if ZebraLogic is published without its solutions

_IMAGE = re.compile(r"!\[[^\]]*\]\(|<img\b|<image(?:_\d+)?>", re.IGNORECASE)
_DAPO_HEAD = re.compile(r"Solve the following math problem step by step\. The last line of your response[^\n]*\n\n")
_DAPO_TAIL = re.compile(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*$")


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
_NO_MESSAGES = "its messages do not have a known role and a text each, or do not end with the user's"
_NOT_MESSAGES = (
    "its column of messages holds text that is no list of chat messages in JSON; if it is the question itself, give "
    "the column another name"
)
NOT_FINITE = "its answer is not a finite number"
_NOT_FINITE = {f"{sign}{word}" for sign in ("", "+", "-") for word in ("inf", "Inf", "INF", "Infinity")}


class Unusable(ValueError):
    """Why a row is dropped."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """Names of columns, each with alternatives: the first that exists is used. `a.b` is field b inside column a.

    Without names for answers, none are read.
    """

    prompt: Sequence[str]
    answer: Sequence[str]
    id: Sequence[str] = ("id", "unique_id", "ID", "problem_idx", "custom_id", "extra_info.index", "Record ID")


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer, None if the row has none. `verifier`: set if the rows of a set have different ones."""

    id: str | None
    prompt: str | list[Message]
    answer: str | None
    verifier: Verifier | None = None
    response: str | None = None  # that must be right: the published solution of a question whose answer is tests


# The last line of a solution in the form of GSM8K; the lines before it are steps.
_MARKED = re.compile(r"^[ \t]*####[ \t]*([^\s#][^\n]*?)\s*\Z", re.MULTILINE)

Convert = Callable[[PublicRow, Mapping, int], Question]  # of a row, its columns, and the seed of shuffled options


def simple(row: PublicRow, names: Mapping, seed: int) -> Question:
    """A column with the question, text or chat messages, and one with the answer."""
    asked, prompt = _id(row, names), _prompt(row, names)
    answer = _answer(column(row, names.answer))
    marked = None if answer is None else _MARKED.search(answer)
    return Question(asked, prompt, marked[1] if marked else answer)


def bbh(row: PublicRow, names: Mapping, seed: int) -> Question:
    """BIG-Bench Hard: `(A)` is the letter of an option, any other answer a word, a number or a list of them."""
    answer = _answer(column(row, names.answer))
    letter = answer is not None and re.fullmatch(r"\([A-Z]\)", answer) is not None
    return Question(None, _prompt(row, names), answer, Verifier.choice if letter else Verifier.text)


def agieval(row: PublicRow, names: Mapping, seed: int) -> Question:
    """AGIEval: an optional passage; a question; options with the letters of the right ones, or an answer to compute."""
    passage, options = row.fields.get("passage"), row.fields.get("options")
    if passage is not None and not isinstance(passage, str):
        raise Unusable("has a passage that is no text")
    texts = [part.strip() for part in (passage, _text_prompt(row, names)) if part]
    if not options:
        return Question(None, "\n\n".join(texts), _blanks(_answer(column(row, names.answer))), Verifier.math)
    choices = [re.sub(r"^\s*\(?[A-Z][).:]\s*", "", _answer(option) or "") for option in options]
    label = row.fields.get("label")
    answer = ", ".join(label) if isinstance(label, list) else _answer(label)
    _distinct(choices, answer or "")
    return Question(None, "\n\n".join([*texts, listed(choices)]), answer or None, Verifier.choice)


def gpqa(row: PublicRow, names: Mapping, seed: int) -> Question:
    """GPQA: one right and three wrong answers, in an order that follows from the seed and the question."""
    columns = ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    texts = [(_answer(column(row, [name])) or "").strip() for name in columns]
    if not all(texts):
        raise Unusable("an option is missing")
    question = _text_prompt(row, names).strip()
    order = sorted(range(4), key=lambda i: hashlib.sha256(json.dumps([seed, question, texts[i], i]).encode()).digest())
    answer = LETTERS[order.index(0)]
    choices = [texts[i] for i in order]
    _distinct(choices, answer)
    return Question(_id(row, names), f"{question}\n\n{listed(choices)}", answer)


def zebralogic(row: PublicRow, names: Mapping, seed: int) -> Question:
    """ZebraLogic: the puzzle, an empty grid to fill in, and the grid of its solution."""
    solution = column(row, ["solution"])
    header, rows = (solution or {}).get("header"), (solution or {}).get("rows")
    if not header or not rows or header[0] != "House":
        raise Unusable("the solution is no table that starts with the houses")
    if any(len(cells) != len(header) for cells in rows):
        raise Unusable("the solution is no table that starts with the houses")
    filled = {f"House {n}": dict(zip(header[1:], cells[1:], strict=True)) for n, cells in enumerate(rows, start=1)}
    empty = {house: dict.fromkeys(cells, "...") for house, cells in filled.items()}
    masked = any(str(cell).strip() in MASKS for cells in filled.values() for cell in cells.values())
    prompt = f"{_text_prompt(row, names).strip()}\n\nThe grid:\n\n{json.dumps(empty, ensure_ascii=False)}"
    return Question(_id(row, names), prompt, None if masked else json.dumps(filled, ensure_ascii=False))


def dapo(row: PublicRow, names: Mapping, seed: int) -> Question:
    """DAPO-Math-17K: the problem without the instructions around it, which request another answer form than ours."""
    return _reworded(
        simple(row, names, seed), lambda text: _DAPO_TAIL.sub("", _DAPO_HEAD.sub("", text, count=1)).strip()
    )


def dolci(row: PublicRow, names: Mapping, seed: int) -> Question:
    """Dolci-RL-Zero-General: a question after `user:`, and a reference response, which needs a judge."""
    return _reworded(simple(row, names, seed), lambda text: text.strip().removeprefix("user:").strip())


def programming(form: code_questions.Form) -> Convert:
    """Questions about code. Their tests are in columns of several kinds, which cannot be named on the command line."""

    def convert(row: PublicRow, names: Mapping, seed: int) -> Question:
        try:
            prompt = form.prompt(row)
            if not names.answer:
                return Question(_id(row, names), prompt, None)
            answer, program = code_questions.checked(form.tests(row)), form.solution(row)
        except code_questions.BadTests as error:
            raise Unusable(str(error)) from error
        response = None if program is None else f"```python\n{program}\n```"
        return Question(_id(row, names), prompt, answer, response=response)

    return convert


def _reworded(question: Question, change: Callable[[str], str]) -> Question:
    prompt = question.prompt
    return replace(question, prompt=change(prompt) if isinstance(prompt, str) else prompt)


_PROBLEM = Mapping(("problem", "question", "Problem", "Question", "prompt"), ("answer", "Answer"))
_PROGRAMMING = Mapping((), ("tests",), ("task_id", "question_id"))
CONVERT: dict[str, tuple[Convert, Mapping]] = {
    "bbh": (bbh, Mapping(("input",), ("target",))),
    "agieval": (agieval, Mapping(("question",), ("answer",))),
    "zebralogic": (zebralogic, Mapping(("puzzle",), ("solution",))),
    "gpqa_diamond": (gpqa, Mapping(("Question",), ("Correct Answer",))),
    "humaneval": (programming(code_questions.HUMANEVAL), _PROGRAMMING),
    "mbpp": (programming(code_questions.MBPP), _PROGRAMMING),
    "mbpp_sanitized": (programming(code_questions.MBPP), _PROGRAMMING),
    "livecodebench": (programming(code_questions.LIVECODEBENCH), _PROGRAMMING),
    "dapo_math_17k": (dapo, Mapping(("prompt",), ("reward_model.ground_truth", "solution", "answer"))),
    "dolci_general": (dolci, Mapping(("prompt", "messages"), ("ground_truth",))),
}


def conversion(name: str) -> tuple[Convert, Mapping]:
    """The function that reads the rows of a benchmark. By default they have a question and an answer."""
    return CONVERT.get(name, (simple, _PROBLEM))


def column(row: PublicRow, names: Sequence[str]) -> Any:
    """The first of the columns `names` that the row has; None if no names are given.

    Raises InputError, with the existing columns, if the row has none of them.
    """
    if not names:
        return None
    for name in names:
        if (value := _cell(row, name)) is not _ABSENT:
            return value
    there = ", ".join(map(str, row.fields))
    fix = "name one with --prompt-field or --answer-field"
    raise InputError(f"{row.place}: there is no column {' or '.join(names)} among {there}; {fix}")


def _cell(row: PublicRow, name: str) -> Any:
    value: Any = row.fields
    for part in name.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value


def _name_of(row: PublicRow, names: Sequence[str]) -> str | None:
    """The name of the column that `column` takes, without the columns that it is in."""
    there = (name for name in names if _cell(row, name) is not _ABSENT)
    return next((name.rpartition(".")[2] for name in there), None)


_ABSENT = object()


def listed(choices: Sequence[str]) -> str:
    """Options with their letters, one per line."""
    return "\n".join(f"({letter}) {' '.join(text.split())}" for letter, text in zip(LETTERS, choices, strict=False))


def _id(row: PublicRow, names: Mapping) -> str | None:
    try:
        value = column(row, names.id)
    except InputError:
        return None
    return None if value is None or isinstance(value, dict | list | bool) else str(value)


def _prompt(row: PublicRow, names: Mapping) -> str | list[Message]:
    value = column(row, names.prompt)
    holds_messages = _name_of(row, names.prompt) in MESSAGE_FIELDS
    if any(row.fields.get(name) for name in ("image", "images", "image_1")) or _IMAGE.search(
        json.dumps(value, default=str)
    ):
        raise Unusable("asks about an image")
    messages = _messages(value)
    if messages is None and holds_messages and isinstance(value, str) and value.strip():
        raise Unusable(_NOT_MESSAGES)
    if messages is not None:
        value = messages[0]["content"] if [message["role"] for message in messages] == ["user"] else messages
    if not value or not isinstance(value, str | list) or (isinstance(value, str) and not value.strip()):
        raise Unusable("has no question")
    return value


def _text_prompt(row: PublicRow, names: Mapping) -> str:
    prompt = _prompt(row, names)
    if not isinstance(prompt, str):
        raise Unusable("has several chat messages where the set has one text")
    return prompt


def _messages(value: Any) -> list[Message] | None:
    """Chat messages, in the forms that public sets use; None for other values.

    A list of them or a single one, also as JSON or Python text; with `from` and `value` instead of `role` and
    `content`; with contents that are lists of text parts.
    """
    try:
        if isinstance(value, str):
            value = messages_in(value)
        if isinstance(value, dict) and value.keys() & {"role", "from"}:
            value = [value]
        if not isinstance(value, list) or not value:
            return None
        return messages_of("prompt", [_message(message) for message in value])
    except BadRow:
        raise Unusable(_NO_MESSAGES) from None


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if any(part.get("type", "text") != "text" for part in content):
            raise Unusable("asks about an image")
        content = "\n".join(str(part.get("text", "")) for part in content)
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _answer(value: Any) -> str | None:
    """An answer as text. A list with one element counts as that element."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise Unusable("has several answers")
    if isinstance(value, dict):
        raise Unusable("has a group of fields for an answer")
    if value is None or (isinstance(value, str) and (not value.strip() or value.strip().casefold() == "nan")):
        return None  # nan: pandas writes it for a missing value
    if isinstance(value, str):
        if value.strip() in _NOT_FINITE:
            raise Unusable(NOT_FINITE)
        return value
    if isinstance(value, bool):
        raise Unusable("has true or false for an answer, which is no text and no number")
    if not isinstance(value, int | float | Decimal):
        raise Unusable(f"has an answer of the type {type(value).__name__}, which is no text and no number")
    if not isinstance(value, int) and not math.isfinite(value):
        raise Unusable(NOT_FINITE)
    return answer_text(value)


def _blanks(answer: str | None) -> str | None:
    """Answers to several blanks, `$5$;$10$`, as a tuple, for which math-verify respects the order."""
    parts = [] if answer is None else [part.strip().strip("$").strip() for part in answer.split(";")]
    return f"({', '.join(parts)})" if len(parts) > 1 else answer


def _distinct(choices: Sequence[str], answer: str) -> None:
    """Raises Unusable if a right option has the same text as another one."""
    texts = [" ".join(choice.split()).casefold() for choice in choices]
    if any(letter in answer and texts.count(text) > 1 for letter, text in zip(LETTERS, texts, strict=False)):
        raise Unusable("the right option is there twice")
