"""The responses to one prompt as token ids, and the part of their text that a verifier sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_tempo.rewards.endings import begun_thought, behind_thoughts, without_end
from megatron_tempo.rewards.math import RESPONSE_CHARS


class View(Enum):
    """The part of a response that a verifier sees."""

    answer = "behind its last thought, without end tokens"
    response = "without end tokens"
    everything = "all its tokens"


class Decodes(Protocol):
    """The part of a tokenizer that is used."""

    def decode(self, token_ids: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """What it takes to verify the responses to one prompt, in any process that has the tokenizer.

    >>> two = Responses("math", "What is 1+1?", "2", (7, 8), (3, 1), (True, False), np.array([4, 5, 6, 4], np.int32))
    """

    verifier: str
    prompt: str
    answer: str | None  # None: the responses are compared with one another
    prompt_end: tuple[int, ...]  # the last tokens of the prompt, which may begin a thought
    lengths: tuple[int, ...]
    stopped: tuple[bool, ...]  # whether the response's last token is an end token, which is none of its text
    tokens: npt.NDArray[np.int32]  # [sum of the lengths]

    def texts(self, tokenizer: Decodes, view: View) -> Iterator[str]:
        """The responses, one by one, as a verifier sees them, except for what depends on their text (`seen`).

        The end token is removed by its position, whatever its text is. A thought that the prompt began gets its tag.
        """
        rows = np.split(self.tokens, np.cumsum(self.lengths)[:-1]) if self.lengths else []
        thought = begun_thought(tokenizer.decode(list(self.prompt_end))) if view is View.answer else ""
        for row, stopped in zip(rows, self.stopped, strict=True):
            yield thought + tokenizer.decode(row[:-1] if stopped and view is not View.everything else row)

    def pack(self) -> bytes:
        """One line of JSON, then the tokens, 4 bytes each."""
        head = [self.verifier, self.prompt, self.answer, self.prompt_end, self.lengths, self.stopped]
        return json.dumps(head).encode() + b"\n" + self.tokens.astype("<i4", copy=False).tobytes()

    @staticmethod
    def unpack(packed: bytes) -> Responses:
        head, _, tokens = packed.partition(b"\n")
        verifier, prompt, answer, end, lengths, stopped = json.loads(head)
        row = np.frombuffer(tokens, "<i4")
        return Responses(verifier, prompt, answer, tuple(end), tuple(lengths), tuple(stopped), row)


def seen(text: str, view: View, *, read_unfinished_thoughts: bool) -> str:
    """The part of a response's text that a verifier sees. Seen again, it stays as it is. Linear in the text.

    Of an answer no verifier reads more than the last `RESPONSE_CHARS` characters, so the rest is left out.
    """
    if view is View.everything:
        return text
    if view is View.response:
        return without_end(text)
    return without_end(behind_thoughts(text, read_unfinished=read_unfinished_thoughts))[-RESPONSE_CHARS:]
