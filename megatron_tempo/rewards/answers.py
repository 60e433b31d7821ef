r"""Finds what a response states as its answer, in linear time, in text that may be hostile.

The statement is the one that ends latest of: the last \boxed{...}, the last `<answer>...</answer>`, the last line
`Answer: ...`, and the very last line if it is `#### ...`. Otherwise it is what follows `the answer is`, up to the end
of the sentence; otherwise the last line. Only the end of a response is read.
"""

from __future__ import annotations

import re

from megatron_tempo.rewards.endings import without_end
from megatron_tempo.rewards.math import RESPONSE_CHARS
from megatron_tempo.rewards.spelling import narrow

_BRACES = re.compile(  # TeX takes `\boxed 7` too
    r"(\\f?boxed\s*\{|\\fbox\s*\{)|\\boxed\s*(-?\d+(?:\.\d+)?(?![\d.]?\d)|(?<=\s)[A-Za-z](?![A-Za-z]))|\\.|([{}])",
    re.DOTALL,
)
_LINE = re.compile(
    r"[ \t>*_#-]*(?:(?:the )?(?:correct |final |best )*answer[ \t*_]*[:：]"
    r"|(?:最终|最后|正确|参考|所以|因此|综上|故|的|，|,)*答案?[ \t*_]*[:：]|【(?:参考|最终)?答案】[:：]?)(.*)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"\banswers?(?: is| are| must be| should be| would be|:)(?!\w)|(?:答案|选项)应?[是为选]"
    r"|\b(?:correct|right|best) (?:option|choice)s?(?: is| are|:)(?!\w)|\bI(?: would|'d)? (?:choose|pick|select)(?!\w)"
    r"|(?:应|故|所以|因此|本题)选择?|选择?(?=\s*\(?[A-Z](?![A-Za-z]))",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASHES = re.compile(r"[ \t]*####[ \t]*(?=[^\s#])(.+)")
_SENTENCE_END = re.compile(  # the full stop of `St. Louis` and of `U.S. Senate` is none
    r"(?<!\bSt)(?<!\bMt)(?<!\bFt)(?<!\bDr)(?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bProf)(?<!\b[A-Z]\.[A-Z])[.](?=\s)"
    r"|[.](?=$)|[!?](?=\s|$)|[。！？；]"
)
# Boxes with only this between them are parts of one answer.
_BETWEEN = re.compile(
    r"(?:[\s,;、，；$~]|\\[,;:! ()\[\]]|\\q?quad(?![A-Za-z])"
    r"|(?:\\text\s*\{\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|[和或及]))*"
)
_BETWEEN_CHARS = 60
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mathtt|operatorname|boxed)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\(?:[,;:!> ]|q?quad\b)|~")
_MARKUP = re.compile(r"\*\*|__|`|\$|\\[()\[\]]|\\(?:left|right|displaystyle)\b")
_ESCAPED = re.compile(r"\\([&%_#{}])")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}, or None. Linear in the length of `text`.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}} \boxed{")
    '\\frac{1}{2}'
    """
    spans = boxes(text)
    return text[slice(*spans[-1])] if spans else None


def tail(response: str) -> str:
    """The end of a response, which is the part that is read, without its end tokens.

    >>> tail("Answer: B<|im_end|>")
    'Answer: B'
    """
    return without_end(response[-RESPONSE_CHARS:])


def statements(response: str) -> list[str]:
    r"""Candidates for the response's answer, the likeliest first. A box or a line `Answer: ...` is the only candidate.

    >>> statements("The answer is A. No: the answer is B.\nThat is all.")
    ['B', 'A', 'That is all.']
    """
    text = narrow(tail(response))
    mark, spans = last_mark(text), boxes(text)
    if mark is not None and (not spans or mark[0] > spans[-1][1]):
        return [mark[1]]
    if spans:
        return [", ".join(dict.fromkeys(text[slice(*place)].strip() for place in row(text, spans)))]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return sentences(text) + lines[-1:]


def last_mark(text: str) -> tuple[int, str] | None:
    """Where the last tag, `####` or line that marks an answer starts, and what it marks.

    >>> last_mark("It is so.\\n#### 12")
    (10, '12')
    """
    marks = [mark for mark in (_last_line(text), last_sign(text)) if mark is not None]
    return max(marks, default=None)


def last_sign(text: str) -> tuple[int, str] | None:
    """As `last_mark`, but only of tags and `####`."""
    marks = [mark for mark in (_last_hashes(text), _last_tag(text)) if mark is not None]
    return max(marks, default=None)


def sentences(text: str) -> list[str]:
    r"""What follows each `the answer is`, the last first.

    >>> sentences("The answer is A. No: the answer is B.\nThat is all.")
    ['B', 'A']
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [piece for i, line in enumerate(lines) for piece in _sentences(line, lines[i + 1 : i + 2])][::-1]


def plain(text: str) -> str:
    r"""`text` without LaTeX and Markdown around its words.

    >>> plain(r"**$\text{(B)}$**")
    '(B)'
    """
    for _ in range(3):
        text = _WRAPPER.sub(r"\1", text)
    return _ESCAPED.sub(r"\1", _SPACE.sub(" ", _MARKUP.sub("", text))).strip()


def boxes(text: str) -> list[tuple[int, int]]:
    """Where the content of each complete box starts and ends, in order. Boxes within a box are left out."""
    spans: list[tuple[int, int]] = []
    opened: list[int | None] = []  # for each open brace, the start of a box's content
    for token in _BRACES.finditer(text):
        if token[1]:
            opened.append(token.end())
        elif token[2] and not opened:
            spans.append(token.span(2))
        elif token[3] == "{":
            opened.append(None)
        elif token[3] == "}" and opened:
            start = opened.pop()
            if start is not None:
                while spans and spans[-1][0] > start:
                    spans.pop()
                spans.append((start, token.start()))
    return spans


def row(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The last of the boxes `spans`, and those before it that are separated only by commas, `and` and the like."""
    row = [spans[-1]]
    for place in reversed(spans[:-1]):
        between = text[place[1] + 1 : row[0][0]]
        between = re.sub(r"\\(?:f?boxed|fbox)\s*\{\Z", "", between)
        if len(between) > _BETWEEN_CHARS or "\n\n" in between or not _BETWEEN.fullmatch(between):
            break
        row.insert(0, place)
    return row


def _last_tag(text: str) -> tuple[int, str] | None:
    opened, last = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag
        elif opened is not None:
            last, opened = (opened.start(), text[opened.end() : tag.start()].strip()), None
    return last


def _last_hashes(text: str) -> tuple[int, str] | None:
    """The last line if it has the form of GSM8K's answers. In other lines `####` begins a heading."""
    start = text.rstrip().rfind("\n") + 1
    line = _HASHES.fullmatch(text.rstrip()[start:])
    return (start, line[1].strip()) if line else None


def _last_line(text: str) -> tuple[int, str] | None:
    """Where the last `Answer: ...` starts, and its content, which may be on the next line."""
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
