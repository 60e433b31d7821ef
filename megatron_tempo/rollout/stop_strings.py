"""Stop strings: a response ends with the token that completes one of them in its text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from megatron_tempo.data.tokenizer import load_tokenizer


class StopStrings:
    """The stop strings of a sampling, and the tokenizer of the model in `folder`."""

    def __init__(self, folder: Path, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.tokenizer: Any = load_tokenizer(folder).backend_tokenizer

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[StopText]:
        """One for each response, by the response's prompt."""
        return [StopText(self, prompt) for prompt in prompts]


class StopText:
    """The end of a response's text, decoded token by token behind its prompt, as vLLM does."""

    def __init__(self, stops: StopStrings, prompt: Sequence[int]) -> None:
        self._stops = stops
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=False)
        self._kept = max(map(len, stops.strings)) - 1  # characters that may begin a stop string
        self._end = ""

    def ends_with(self, token: int) -> bool:
        """Append a token. Whether the text now has a stop string; it had none before."""
        new = self._stream.step(self._stops.tokenizer, token)  # None while a character is incomplete
        if new is None:
            return False
        text = self._end + new
        self._end = text[-self._kept :] if self._kept else ""
        return any(string in text for string in self._stops.strings)
