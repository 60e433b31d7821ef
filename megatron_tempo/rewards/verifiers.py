"""Computes rewards of responses, by the verifier that each item names."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.schema import CodeConfig
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.code import CodeScorer
from megatron_tempo.rewards.imported import ImportedScorer
from megatron_tempo.rewards.math import MathScorer
from megatron_tempo.rewards.quick import quick_verifiers
from megatron_tempo.rewards.responses import Decodes, Responses, View, seen
from megatron_tempo.rewards.scorer import Item, Scorer
from megatron_tempo.rewards.text_process import TextProcess
from megatron_tempo.runtime import progress_marker

if TYPE_CHECKING:
    from megatron_tempo.rewards.judge import JudgeScorer
    from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt

REPORTED = 10
TOKENS_HERE = (
    2**14
)  # of the responses to a prompt: fewer are decoded in 2 ms, so another process is not started for them


class _NoJudge:
    """Takes the judge's place if none is configured."""

    def check(self, prompt: str, answer: str) -> None:
        raise InputError("verifier 'judge' needs rewards.judge.url and rewards.judge.model: set both")

    def score(self, items: Sequence[Item]) -> list[float]:
        raise AssertionError("an item is checked before it is scored")

    def classes(self, prompt: str, responses: Sequence[str]) -> list[int | None]:
        self.check(prompt, "")
        return []

    def close(self) -> None:
        pass


class Verifiers:
    """All verifiers by name. Worker processes start on first use; `close` ends them.

    `workers`: number of math processes. `seconds`: time limit of one item there. `code`: how programs run. `judge`: the
    language model that judges, if any. `imported`: the user's own. `threads`: how many threads may usefully call
    `verify` at a time (None: one more than `workers`), and `judge_threads` for the judge's items. Threads take turns at
    the user's own verifiers.

    A verifier sees the text after the last thought of a response, without its end tokens (`endings`). If the thought
    does not end, it sees nothing, or with `read_unfinished_thoughts` the whole response. The user's own verifiers also
    see thoughts. Countdown also sees the end token, which is part of its answers (`View`). `end_tokens` is given if
    responses may also end with a stop string, whose tokens are part of the text.
    """

    def __init__(
        self,
        workers: int = 2,
        seconds: float = 5.0,
        judge: JudgeScorer | None = None,
        imported: Iterable[Extension] = (),
        *,
        read_unfinished_thoughts: bool = False,
        end_tokens: frozenset[int] | None = None,
        code: CodeConfig | None = None,
        threads: int | None = None,
    ) -> None:
        self._judge = judge
        self.end_tokens = end_tokens
        self._read_unfinished_thoughts = read_unfinished_thoughts
        self._one_at_a_time = threading.Lock()
        self.threads = workers + 1 if threads is None else threads  # one of them decodes while the workers compare
        self.judge_threads = 0 if judge is None else judge.concurrency
        self._texts = TextProcess()
        self._quick = quick_verifiers()
        self._math = MathScorer(workers, seconds)
        self._code = CodeScorer(CodeConfig() if code is None else code)
        self._scorers: dict[str, Scorer] = {
            "math": self._math,
            **self._quick,
            "code": self._code,
            "judge": _NoJudge() if judge is None else judge,
            **{extension.name: ImportedScorer(extension) for extension in imported},
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._scorers)

    def check(self, prompts: Iterable[LabelledPrompt]) -> None:
        """ValueError that names the prompts (the first ten) whose verifier is unknown or cannot use their answer."""

        def check(prompt: LabelledPrompt) -> None:
            self._check(prompt.verifier, prompt.text, prompt.answer)

        _report(prompts, check)

    def check_questions(self, verifier: str, prompts: Iterable[UnlabelledPrompt]) -> None:
        """Raises ValueError that names the prompts (the first ten) whose answers `verifier` cannot read."""

        def check(prompt: UnlabelledPrompt) -> None:
            self.classes(verifier, prompt.text, [])

        _report(prompts, check)

    def check_sandbox(self) -> None:
        """Raises InputError if no sandbox for programs works here."""
        self._code.start()

    def verify(self, responses: Responses, tokenizer: Decodes) -> list[float] | list[int | None]:
        """The verdicts on responses to a labelled prompt (`score`), or the classes of others (`classes`).

        Short responses are decoded in this process, long ones by another, which also runs the quick verifiers.
        """
        name, prompt, view = responses.verifier, responses.prompt, self.view(responses.verifier)
        texts: Sequence[str] | None = None
        if responses.tokens.size >= TOKENS_HERE:
            reply = self._texts.ask(
                responses,
                tokenizer,
                view,
                quick=name in self._quick,
                read_unfinished_thoughts=self._read_unfinished_thoughts,
            )
            if reply is not None and "error" in reply:
                raise InputError(reply["error"])
            if reply is not None and "result" in reply:
                result: list[float] | list[int | None] = reply["result"]
                return result
            texts = None if reply is None else reply["texts"]
        if texts is None:
            texts = [self._part(name, text) for text in responses.texts(tokenizer, view)]
        if responses.answer is None:
            return self.classes(name, prompt, texts)
        return self.score([Item(name, prompt, text, responses.answer) for text in texts])

    def score(self, items: Sequence[Item]) -> list[float]:
        """The verdict on each item: 1.0 or 0.0; for a graded verifier also between.

        Raises ValueError, before any item is judged, as in `check`.
        """
        places: dict[str, list[int]] = defaultdict(list)
        for place, item in enumerate(items):
            self._check(item.verifier, item.prompt, item.answer)
            places[item.verifier].append(place)
        verdicts = [0.0] * len(items)
        for name, group in places.items():
            with self._turn(name):
                scores = self._scorers[name].score([self._part_of(items[place]) for place in group])
            progress_marker.mark()
            for place, score in zip(group, scores, strict=True):
                verdicts[place] = score
        return verdicts

    def classes(self, verifier: str, prompt: str, responses: Sequence[str]) -> list[int | None]:
        """Which responses to a question have equal answers, as in `Scorer.classes`. No reference answer is read."""
        scorer = self._scorer(verifier)
        with self._turn(verifier):
            classes = scorer.classes(prompt, [self._part(verifier, response) for response in responses])
        progress_marker.mark()
        return classes

    def view(self, verifier: str) -> View:
        """The part of a response that a verifier sees."""
        if isinstance(self._scorers.get(verifier), ImportedScorer):
            return View.response
        return View.everything if verifier == "countdown" else View.answer

    def has_value(self, verifier: str, answers: Sequence[str]) -> list[bool]:
        """Whether `verifier` may accept other spellings of each answer."""
        return self._math.has_value(answers) if verifier == "math" else [True] * len(answers)

    def take_counts(self) -> dict[str, int]:
        """Counts since the last call, by name: `math/` and `code/` (their `take_counts`), and `judge/` with a judge."""
        counts = self._math.take_counts() | self._code.take_counts()
        return counts | ({} if self._judge is None else self._judge.take_counts())

    def close(self) -> None:
        self._texts.close()
        for scorer in self._scorers.values():
            scorer.close()

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _part_of(self, item: Item) -> Item:
        return replace(item, response=self._part(item.verifier, item.response))

    def _part(self, verifier: str, response: str) -> str:
        return seen(response, self.view(verifier), read_unfinished_thoughts=self._read_unfinished_thoughts)

    def _turn(self, verifier: str) -> AbstractContextManager[Any]:
        """What threads take turns at: the user's own verifiers need not allow several threads."""
        return self._one_at_a_time if isinstance(self._scorers[verifier], ImportedScorer) else nullcontext()

    def _check(self, verifier: str, prompt: str, answer: object) -> None:
        scorer = self._scorer(verifier)
        if not isinstance(answer, str):
            raise InputError(f"the answer {answer!r} is {type(answer).__name__}; give it as text")
        if not answer.strip():
            raise InputError("the answer is empty; give one or remove the prompt")
        scorer.check(prompt, answer)

    def _scorer(self, verifier: str) -> Scorer:
        scorer = self._scorers.get(verifier)
        if scorer is None:
            raise InputError(f"verifier {verifier!r} is unknown; known are {', '.join(self._scorers)}")
        return scorer


class _Named(Protocol):
    @property
    def id(self) -> str: ...


_P = TypeVar("_P", bound=_Named)


def _report(prompts: Iterable[_P], check: Callable[[_P], None]) -> None:
    """Raises InputError that names the prompts that `check` rejects."""
    problems: list[str] = []
    for prompt in prompts:
        progress_marker.mark()
        try:
            check(prompt)
        except ValueError as error:
            problems.append(f"prompt {prompt.id!r}: {error}")
    if problems:
        rest = [f"... and {len(problems) - REPORTED} more"] if len(problems) > REPORTED else []
        raise InputError("\n".join([*problems[:REPORTED], *rest]))
