"""The part of a response from which its answer is read: the text after the last thought, without end tokens."""

from __future__ import annotations

import re

# The text of tokens that end a turn or a text, and of padding. The first alternative also matches DeepSeek's bars and
# blanks (U+FF5C, U+2581).
_END = re.compile(
    r"(?:<[|｜][\w▁]{1,40}[|｜]>|</?(?:s|eos|pad|bos|eot|seed:eos|end_of_turn|end_of_utterance|endoftext|end_of_text)>"
    r"|<EOT>|<turn\|>|\[(?:EOS|PAD|SEP|eos)\]|\[e~\[|<\|hy_eos\|>)\Z",
    re.IGNORECASE,
)
_END_CHARS = 64  # no end token is longer

# The marks that begin and end a thought.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


def without_end(text: str) -> str:
    """`text` without trailing end tokens, of any model family, and trailing blanks.

    >>> without_end("The answer is 1/2<|im_end|>")
    'The answer is 1/2'
    """
    end = len(text.rstrip())
    while match := _END.search(text, max(0, end - _END_CHARS), end):
        end = match.start()
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end]


def behind_thoughts(text: str, *, read_unfinished: bool = False) -> str:
    """The text after the last thought that ended; all of it if there is no thought.

    A thought that does not end has no answer: the result is "". With `read_unfinished` the result is then the whole
    text. Linear in the length of `text`.

    >>> behind_thoughts("<think>Maybe 4? No, 5.</think>The answer is 5.")
    'The answer is 5.'
    """
    ended = max(text.rfind(close) + len(close) if close in text else 0 for _, close in THOUGHTS)
    begun = max(text.rfind(begin) for begin, _ in THOUGHTS)
    return "" if begun >= ended and begun >= 0 and not read_unfinished else text[ended:]


def begun_thought(prompt: str) -> str:
    """The tag of the thought that a rendered prompt begins at its end, as some chat templates do; "" if there is none.

    >>> begun_thought("<|im_start|>assistant\\n<think>\\n")
    '<think>'
    """
    end = prompt.rstrip()
    return next((begin for begin, _ in THOUGHTS if end.endswith(begin)), "")
