"""Verifies responses while others are still being generated: verdicts on labelled prompts, classes of the others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from transformers import PreTrainedTokenizerBase

from megatron_tempo.rewards.endings import begun_thought
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers, View
from megatron_tempo.types import Completion, LabelledPrompt, UnlabelledPrompt

Prompt = LabelledPrompt | UnlabelledPrompt

PROMPT_END = 16  # tokens at the end of a prompt that may begin a thought


class Verification:
    """Verifies the responses of one collection, on the rank that has them. A context manager.

    `classes_by`: the verifier that decides which answers to an unlabelled prompt are equal; None: do not compare them.
    A verifier sees the text of a response without the token at which the engine ended it (`texts_of`).
    """

    def __init__(self, verifiers: Verifiers, tokenizer: PreTrainedTokenizerBase, classes_by: str | None) -> None:
        self._verifiers, self._tokenizer, self._classes_by = verifiers, tokenizer, classes_by
        self._verifying = ThreadPoolExecutor(verifiers.threads)
        self._judged: dict[int, Future[list[float]]] = {}
        self._classed: dict[int, Future[list[int | None]]] = {}

    def submit(self, i: int, prompt: Prompt, completions: Sequence[Completion]) -> None:
        """Begin to verify the responses to prompt `i`. Returns at once."""
        verifiers, tokenizer, by = self._verifiers, self._tokenizer, self._classes_by
        if isinstance(prompt, LabelledPrompt):
            texts = texts_of(prompt, completions, tokenizer, verifiers.view(prompt.verifier))
            items = [Item(prompt.verifier, prompt.text, text, prompt.answer) for text in texts]
            self._judged[i] = self._verifying.submit(verifiers.score, items)
        elif by is not None:
            texts = texts_of(prompt, completions, tokenizer, verifiers.view(by))
            self._classed[i] = self._verifying.submit(verifiers.classes, by, prompt.text, texts)

    def results(self) -> tuple[dict[int, list[float]], dict[int, list[int | None]]]:
        """The verdicts on each labelled prompt's responses and the classes of each unlabelled one's, by prompt.

        Waits for all that was submitted on this rank. Raises EngineError if a judge fails, InputError if a user's own
        verifier does.
        """
        verdicts = {i: future.result() for i, future in self._judged.items()}
        return verdicts, {i: future.result() for i, future in self._classed.items()}

    def __enter__(self) -> Verification:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._verifying.shutdown()


def texts_of(
    prompt: Prompt, completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, view: View
) -> list[str]:
    """Responses as a verifier sees them, except for what depends on their text (`Verifiers`).

    The end token is removed by its position, whatever its text is. A thought that the prompt began gets its tag.
    """
    if view is View.everything:
        return [tokenizer.decode(completion.token_ids.tolist()) for completion in completions]
    thought = begun_thought(tokenizer.decode(prompt.token_ids[-PROMPT_END:])) if view is View.answer else ""
    return [
        thought + tokenizer.decode(answer.token_ids[: -1 if answer.finish_reason == "stop" else None].tolist())
        for answer in completions
    ]
