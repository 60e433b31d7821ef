"""Which part of a response its answer is read from: what is behind the last thought, without the tokens at its end."""

from __future__ import annotations

import re

# How tokenizers write the tokens that end a turn or a text, and padding. The first alternative takes DeepSeek's bars
# and blanks (U+FF5C, U+2581) too.
_END = re.compile(
    r"(?:<[|｜][\w▁]{1,40}[|｜]>|</?(?:s|eos|pad|bos|eot|seed:eos|end_of_turn|end_of_utterance|endoftext|end_of_text)>"
    r"|<EOT>|<turn\|>|\[(?:EOS|PAD|SEP|eos)\]|\[e~\[|<\|hy_eos\|>)\Z",
    re.IGNORECASE,
)
_END_CHARS = 64  # no end token is longer

# What begins a thought, and what ends it.
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
    """`text` without the end tokens, of any model family, that it ends with, and without blanks there.

    >>> without_end("The answer is 1/2<|im_end|>")
    'The answer is 1/2'
    """
    end = len(text.rstrip())
    while found := _END.search(text, max(0, end - _END_CHARS), end):
        end = found.start()
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end]


def behind_thoughts(text: str, *, read_unfinished: bool = False) -> str:
    """The text behind the last thought that ended; all of it where there is no thought.

    A thought that began and did not end has no answer, so nothing is left of the text: "". With `read_unfinished` such
    a text is read as it is. Linear in the length of `text`.

    >>> behind_thoughts("<think>Maybe 4? No, 5.</think>The answer is 5.")
    'The answer is 5.'
    """
    ended = max(text.rfind(close) + len(close) if close in text else 0 for _, close in THOUGHTS)
    begun = max(text.rfind(begin) for begin, _ in THOUGHTS)
    return "" if begun >= ended and begun >= 0 and not read_unfinished else text[ended:]


def begun_thought(prompt: str) -> str:
    """The tag of a thought that a rendered prompt begins at its end, as some chat templates do; "" where there is none.

    >>> begun_thought("<|im_start|>assistant\\n<think>\\n")
    '<think>'
    """
    end = prompt.rstrip()
    return next((begin for begin, _ in THOUGHTS if end.endswith(begin)), "")
