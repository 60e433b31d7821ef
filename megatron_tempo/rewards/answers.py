r"""What a response states as its answer, found in linear time in text that may be hostile.

A statement is, in this order: the last \boxed{...} or the last line `Answer: ...`, whichever ends later; else what
follows `the answer is`, up to the end of its sentence; else the last line. Only the end of a response is looked at.
"""

from __future__ import annotations

import re

from megatron_tempo.rewards.math import RESPONSE_CHARS

_SPECIAL = re.compile(r"<(?:\|\w+\||/s|eos|pad|end_of_turn)>\Z")
_BRACES = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)
_LINE = re.compile(r"[ \t>*_#-]*(?:the )?(?:correct |final |best )*(?:answer|答案)[ \t*_]*[:：](.*)", re.IGNORECASE)
_SENTENCE = re.compile(
    r"\banswer(?: is| are| must be| should be| would be|:)(?!\w)|答案应?[是为选]|[应故]选", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？；]")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mathtt|operatorname|boxed)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\(?:[,;:!> ]|q?quad\b)|~")
_MARKUP = re.compile(r"\*\*|__|`|\$|\\[()\[\]]|\\(?:left|right|displaystyle)\b")
_ESCAPED = re.compile(r"\\([&%_#{}])")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}, or None. Linear in the length of `text`.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}} \boxed{")
    '\\frac{1}{2}'
    """
    box = _last_box(text)
    return None if box is None else text[slice(*box)]


def tail(response: str) -> str:
    """The end of a response, which is what is looked at, without the tokens that end it.

    >>> tail("Answer: B<|im_end|>")
    'Answer: B'
    """
    text = response[-RESPONSE_CHARS:].rstrip()
    while special := _SPECIAL.search(text, max(0, len(text) - 64)):
        text = text[: special.start()].rstrip()
    return text


def statements(response: str) -> list[str]:
    r"""What may be the response's answer, the likeliest first. A box, or a line that says Answer, is alone.

    >>> statements("The answer is A. No: the answer is B.\nThat is all.")
    ['B', 'A', 'That is all.']
    """
    text = tail(response)
    box, line = _last_box(text), _last_line(text)
    if line is not None and (box is None or line[0] > box[1]):
        return [line[1]]
    if box is not None:
        return [text[slice(*box)]]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pieces = [piece for i, line in enumerate(lines) for piece in _sentences(line, lines[i + 1 : i + 2])]
    return pieces[::-1] + lines[-1:]


def plain(text: str) -> str:
    r"""`text` without LaTeX and Markdown around its words.

    >>> plain(r"**$\text{(B)}$**")
    '(B)'
    """
    for _ in range(3):
        text = _WRAPPER.sub(r"\1", text)
    return _ESCAPED.sub(r"\1", _SPACE.sub(" ", _MARKUP.sub("", text))).strip()


def _last_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last complete box starts and ends."""
    box = None
    opened: list[int | None] = []  # for each open brace, where a box's content starts
    for token in _BRACES.finditer(text):
        if token[1]:
            opened.append(token.end())
        elif token[2] == "{":
            opened.append(None)
        elif token[2] == "}" and opened:
            start = opened.pop()
            if start is not None:
                box = (start, token.start())
    return box


def _last_line(text: str) -> tuple[int, str] | None:
    """Where the last `Answer: ...` starts, and what it says, in the line after it if there is nothing in its own."""
    place, following, answer = len(text), "", None
    for line in reversed(text.splitlines(keepends=True)):
        place -= len(line)
        match = _LINE.match(line)
        if match:
            answer = (place, match[1].strip(" \t*_") or following)
            break
        following = line.strip() or following
    return answer


def _sentences(line: str, following: list[str]) -> list[str]:
    pieces = [piece.lstrip(":： ") for piece in _SENTENCE.split(line)[1:]]
    if pieces and not pieces[-1]:
        pieces[-1] = following[0] if following else ""
    return [piece for piece in (_SENTENCE_END.split(piece, maxsplit=1)[0].strip() for piece in pieces) if piece]
