"""Verifies responses while others are still being generated: verdicts on labelled prompts, classes of the others."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_tempo.rewards.responses import Responses
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.verifying_nodes import Lane, Result, VerifyingNodes, serve
from megatron_tempo.types import Completion, LabelledPrompt, UnlabelledPrompt

Prompt = LabelledPrompt | UnlabelledPrompt

PROMPT_END = 16  # tokens at the end of a prompt that may begin a thought
JUDGE = "judge"


@dataclass(frozen=True, slots=True)
class _Job:
    """The responses to one prompt. Their text exists only while they are verified."""

    i: int
    prompt: Prompt
    completions: Sequence[Completion]
    verifier: str

    def responses(self, end_tokens: frozenset[int] | None) -> Responses:
        return responses_of(self.prompt, self.completions, self.verifier, end_tokens)


_Jobs = queue.SimpleQueue[_Job | None]


class Verification:
    """Verifies the responses of one collection. A context manager.

    `classes_by`: the verifier that decides which answers to an unlabelled prompt are equal; None: do not compare them.
    `nodes`: given if only the first rank has responses. Then the first ranks of all nodes verify them, and a node takes
    the next prompt when it has finished one. Every rank must make one, in the same order, and close it. The judge's
    items stay on the first rank: it waits for them, and knows the verdicts that it has got before.
    """

    def __init__(
        self,
        verifiers: Verifiers,
        tokenizer: PreTrainedTokenizerBase,
        classes_by: str | None,
        nodes: VerifyingNodes | None = None,
    ) -> None:
        self._verifiers, self._tokenizer, self._classes_by, self._nodes = verifiers, tokenizer, classes_by, nodes
        self._jobs, self._for_judge = _Jobs(), _Jobs()
        self._submitted: set[int] = set()
        self._threads: list[tuple[threading.Thread, _Jobs]] = []
        self._changed = threading.Condition()
        self._under_way: set[int] = set()
        self._failure: BaseException | None = None
        self._verdicts: dict[int, list[float]] = {}
        self._classes: dict[int, list[int | None]] = {}
        self._is_over = False
        self._session = self._serve()

    def submit(self, i: int, prompt: Prompt, completions: Sequence[Completion]) -> None:
        """Begin to verify the responses to prompt `i`, unless that has begun. Returns at once. From any thread."""
        verifier = prompt.verifier if isinstance(prompt, LabelledPrompt) else self._classes_by
        if verifier is None:
            return
        with self._changed:
            if i in self._submitted:
                return
            self._submitted.add(i)
            self._under_way.add(i)
            if not self._threads:
                self._start()
        jobs = self._for_judge if verifier == JUDGE else self._jobs
        jobs.put(_Job(i, prompt, completions, verifier))

    def results(
        self, prompts: Collection[int] | None = None
    ) -> tuple[dict[int, list[float]], dict[int, list[int | None]]]:
        """The verdicts on each labelled prompt's responses and the classes of each unlabelled one's, by prompt.

        Waits for all that was submitted on this rank, or for `prompts` alone, which are then forgotten here. Raises
        EngineError if a judge fails or a node is lost, InputError if a user's own verifier fails.
        """
        with self._changed:
            wanted = self._submitted if prompts is None else set(prompts)
            self._changed.wait_for(lambda: self._failure is not None or self._under_way.isdisjoint(wanted))
            if self._failure is not None:
                raise self._failure
            if prompts is None:
                return self._verdicts, self._classes
            self._submitted -= wanted
            verdicts = {i: self._verdicts.pop(i) for i in prompts if i in self._verdicts}
            return verdicts, {i: self._classes.pop(i) for i in prompts if i in self._classes}

    def forget(self, prompts: Collection[int]) -> None:
        """The results of these are not wanted any more."""
        with self._changed:
            self._submitted.difference_update(prompts)
            for i in prompts:
                self._verdicts.pop(i, None)
                self._classes.pop(i, None)

    def _serve(self) -> int:
        """On the first rank of another node: begin to take orders. Returns the number of this session."""
        nodes = self._nodes
        if nodes is None:
            return 0
        nodes.sessions += 1
        if nodes.own is not None:
            for lane in range(self._verifiers.threads):
                arguments = (nodes, nodes.sessions, lane, self._verify_packed)
                threading.Thread(target=serve, args=arguments, name="verification-serve", daemon=True).start()
        return nodes.sessions

    def __enter__(self) -> Verification:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being verified; what is not begun is dropped."""
        self._is_over = True
        if self._nodes is not None and self._nodes.store is not None and not self._threads:
            self._start()  # the other nodes wait for the end of their lanes
        for _, jobs in self._threads:
            jobs.put(None)
        for thread, _ in self._threads:
            thread.join()

    def _start(self) -> None:
        verifiers, nodes = self._verifiers, self._nodes
        runs: list[tuple[Callable[[_Jobs], None], _Jobs]] = [(self._work, self._jobs)] * verifiers.threads
        runs += [(self._work, self._for_judge)] * verifiers.judge_threads
        if nodes is not None and nodes.store is not None:
            for lane in range(verifiers.threads):
                for place in range(len(nodes.others)):
                    lanes = Lane(nodes, self._session, place, lane)
                    runs.append((lambda jobs, lane=lanes: self._send(jobs, lane), self._jobs))  # type: ignore[misc]
        for run, jobs in runs:
            thread = threading.Thread(target=run, args=(jobs,), name="verification", daemon=True)
            self._threads.append((thread, jobs))
            thread.start()

    def _work(self, jobs: _Jobs) -> None:
        """Verify in this process."""
        while (job := jobs.get()) is not None:
            self._finish(job, lambda job=job: self._verify(job))  # type: ignore[misc]

    def _send(self, jobs: _Jobs, lane: Lane) -> None:
        """Let another node verify."""
        try:
            while (job := jobs.get()) is not None:
                self._finish(job, lambda job=job: lane.verify(self._responses(job).pack(), self._ended))  # type: ignore[misc]
        finally:
            lane.end()

    def _finish(self, job: _Job, verify: Callable[[], Result | None]) -> None:
        if self._ended():
            return
        failure: BaseException | None = None
        result: Result | None = None
        try:
            result = verify()
        except BaseException as error:  # noqa: BLE001 - raised by `results`
            failure = error
        with self._changed:
            self._under_way.discard(job.i)
            self._failure = self._failure or failure
            if result is not None and job.i in self._submitted:
                kept = self._verdicts if isinstance(job.prompt, LabelledPrompt) else self._classes
                kept[job.i] = result  # type: ignore[assignment]
            self._changed.notify_all()

    def _ended(self) -> bool:
        return self._is_over or self._failure is not None

    def _verify(self, job: _Job) -> Result:
        return self._verifiers.verify(self._responses(job), self._tokenizer)

    def _responses(self, job: _Job) -> Responses:
        return job.responses(self._verifiers.end_tokens)

    def _verify_packed(self, order: bytes) -> Result:
        return self._verifiers.verify(Responses.unpack(order), self._tokenizer)


def responses_of(
    prompt: Prompt, completions: Sequence[Completion], verifier: str, end_tokens: frozenset[int] | None = None
) -> Responses:
    """What a verifier needs. The reference answer is that of a labelled prompt alone.

    `end_tokens`: a response that stops with another token ends with a stop string, all of which is text. None: there
    are no stop strings.
    """
    rows = [completion.token_ids.numpy() for completion in completions]
    stops = [completion.finish_reason == "stop" for completion in completions]
    if end_tokens is not None:
        stops = [stops and int(row[-1]) in end_tokens for stops, row in zip(stops, rows, strict=True)]
    return Responses(
        verifier,
        prompt.text,
        prompt.answer if isinstance(prompt, LabelledPrompt) else None,
        tuple(prompt.token_ids[-PROMPT_END:]),
        tuple(len(row) for row in rows),
        tuple(stops),
        np.concatenate(rows) if rows else np.zeros(0, np.int32),
    )
