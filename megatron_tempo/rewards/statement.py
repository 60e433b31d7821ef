r"""Finds what a response states as its mathematical answer.

In this order: its last box, with other boxes of the same row, or what `<answer>...</answer>` or a last line `#### 12`
marks after it; the last line `Answer: ...` or `答案：...`; what follows `the answer is`; otherwise its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tempo.rewards.answers import boxes, last_mark, last_sign, row, sentences, tail
from megatron_tempo.rewards.math import ANSWER_CHARS

# Regular expressions of math-verify take quadratic time on a response without an answer.
TAIL_CHARS = 4000


@dataclass(frozen=True)
class Statement:
    """`text` is the answer if the statement is `whole`. Otherwise it may be the answer: search `context`.

    `marked`: the response marks it as its answer, so it is one even if it cannot be parsed.
    """

    text: str
    whole: bool
    context: str = ""
    marked: bool = True


def stated(response: str) -> Statement | None:
    r"""The statement of a response; None if it states nothing, or a box is empty or too long.

    >>> stated(r"So \boxed{4} and \boxed{9}.")
    Statement(text='4, 9', whole=True, context='', marked=True)
    """
    text = tail(response)
    spans, sign = boxes(text), last_sign(text)
    if spans and (sign is None or sign[0] < spans[-1][1]):
        return _boxed(text, spans)
    end = text[-TAIL_CHARS:]
    mark = sign or last_mark(text)
    if mark is not None:
        bare = mark[1].strip().strip("*_ ")
        context = bare if sign else text[mark[0] :]
        return Statement(bare, whole=False, context=context[:TAIL_CHARS]) if bare else None
    for piece in sentences(text):
        # `The answer is not 13` states nothing: read as a whole it has no value.
        return Statement(piece, whole=piece.casefold().startswith("not "), context=end)
    last = end.strip().splitlines()[-1:]
    return Statement(last[0].strip(), whole=False, context=end, marked=False) if last else None


def _boxed(text: str, spans: list[tuple[int, int]]) -> Statement | None:
    """The statement of the last box, or of the row of boxes that it ends."""
    parts = [text[slice(*place)].strip() for place in row(text, spans)]
    joined = parts[0] if len(set(parts)) == 1 else ", ".join(filter(None, parts))
    return Statement(joined, whole=True) if parts[-1] and len(joined) <= ANSWER_CHARS else None
