"""Rollouts on disk: written for people and for replay, one JSONL file an iteration, one line a response.

The experts that the engine's routers chose are in a file of their own: in JSON they would take several times as much. A
line names the place of its own: {"offset": first byte, "shape": [tokens, layers, k], "dtype": "uint8" or "int16"}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.errors import InputError
from megatron_tempo.files import atomic_write, read_text
from megatron_tempo.rollout.arrays import logprob_tensor, token_tensor
from megatron_tempo.rollout.batches import Answers, Watch
from megatron_tempo.rollout.experts import ExpertWatch, doubts
from megatron_tempo.rollout.verification import Prompt
from megatron_tempo.types import Batch, Completion, LabelledPrompt, UnlabelledPrompt


def path_of(folder: Path, stage: str, iteration: int) -> Path:
    return folder / f"{stage}-{iteration:06d}.jsonl"


def experts_path(path: Path) -> Path:
    """The file of the experts of a file of rollouts."""
    return path.with_suffix(".experts")


class Recorder:
    """Writes an iteration's rollouts while they pass: a batch after another, rows in order. A context manager.

    The text is for people; replay reads the tokens. Answers are not written. The ranks wait for one another meanwhile,
    so a file that cannot be written raises OSError only at the end of the block. It has its name then, or is not there.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._path, self._tokenizer = path, tokenizer
        self._open = ExitStack()
        self._file: BinaryIO | None = None
        self._experts: BinaryIO | None = None
        self._places: dict[int, dict[str, Any]] = {}  # of the experts of each row of the batch under way
        self._failure: OSError | None = None

    def __enter__(self) -> Recorder:
        self._attempt(self._begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._failure is None:
            self._open.__exit__(kind, error, trace)
        elif error is None:
            raise self._failure

    def of(self, prompts: Sequence[Prompt], columns: Batch) -> Watch:
        """What `receive` calls with the rows of the batch that has these columns, in answer to these prompts."""
        versions = columns.versions[:, 1:].split(
            torch.bincount(columns.versions[:, 0], minlength=len(columns)).tolist()
        )

        def write(rows: range, tokens: Tensor, logprobs: Tensor) -> None:
            sizes = columns.response_lengths[rows.start : rows.stop].tolist()
            for row, ids, floats in zip(rows, tokens.split(sizes), logprobs.split(sizes), strict=True):
                prompt = prompts[int(columns.group[row])]
                line = _line(columns, row, prompt, ids.tolist(), floats.tolist(), versions[row].tolist())
                line["response"] = self._tokenizer.decode(line["response_tokens"])
                if (place := self._places.pop(row, None)) is not None:
                    line["experts"] = place
                assert self._file is not None
                self._file.write(_encoded(line, floats))

        return lambda *given: self._attempt(lambda: write(*given))

    @property
    def experts(self) -> ExpertWatch:
        """What `receive` calls with the experts of the batch's rows, before `of`'s with their tokens."""
        return lambda *given: self._attempt(lambda: self._write_experts(*given))

    def _write_experts(self, rows: range, experts: Sequence[Tensor]) -> None:
        if self._experts is None:
            self._experts = self._open.enter_context(atomic_write(experts_path(self._path), fsync=True))
        for row, one in zip(rows, experts, strict=True):
            dtype = str(one.dtype).removeprefix("torch.")
            self._places[row] = {"offset": self._experts.tell(), "shape": list(one.shape), "dtype": dtype}
            self._experts.write(one.contiguous().numpy().tobytes())

    def _begin(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open.enter_context(atomic_write(self._path, fsync=True))

    def _attempt(self, act: Callable[[], None]) -> None:
        """Do it, unless something has failed before. After a failure the unfinished file is removed."""
        if self._failure is not None:
            return
        try:
            act()
        except OSError as error:
            self._failure = error
            with suppress(OSError):
                self._open.__exit__(type(error), error, error.__traceback__)


def _encoded(line: dict[str, Any], logprobs: Tensor) -> bytes:
    """The line as JSON. msgspec is 14 times as fast as json (16,384 tokens), but writes a non-finite number as null."""
    text = msgspec.json.encode(line) if bool(logprobs.isfinite().all()) else json.dumps(line).encode()
    return text + b"\n"


def _line(
    columns: Batch, row: int, prompt: Prompt, tokens: list[int], logprobs: list[float], versions: list[list[int]]
) -> dict[str, Any]:
    """A row as the fields of a line."""
    return {
        "prompt_id": columns.prompt_ids[row],
        "prompt_tokens": list(prompt.token_ids),
        "response": "",  # set by the caller, which has the tokenizer
        "response_tokens": tokens,
        "logprobs": logprobs,
        "versions": versions,
        "stopped": bool(columns.stopped[row]),
        "correct": None if columns.correct is None else float(columns.correct[row]),
        **({} if columns.answer_class is None else {"answer_class": int(columns.answer_class[row])}),
    }


def read(
    path: Path,
    labelled: Sequence[LabelledPrompt],
    unlabelled: Sequence[UnlabelledPrompt],
    samples: int,
    *,
    classes: bool = False,
    routing: RoutingFormat | None = None,
) -> Answers:
    """The answers that were recorded to these prompts, labelled ones first. `classes`: of unlabelled answers too.

    `routing`: of the experts that are read too. Raises InputError with file and line if the file does not have
    `samples` responses to each of these prompts.
    """
    if not path.exists():
        raise InputError(f"rollout.replay: {path} is not there; the run it was written by did not come so far")
    lines = read_text(path).removesuffix("\n").split("\n")  # not at other separators, which responses may hold
    prompts: list[LabelledPrompt | UnlabelledPrompt] = [*labelled, *unlabelled]
    if len(lines) != len(prompts) * samples:
        raise InputError(f"rollout.replay: {path} has {len(lines)} responses, this run needs {len(prompts) * samples}")
    rows = [_response(f"{path}, line {i + 1}", line, prompts[i // samples]) for i, line in enumerate(lines)]
    if routing is not None:
        rows = [(_with_experts(path, i + 1, lines[i], row[0], routing), row[1]) for i, row in enumerate(rows)]

    def of(prompt: int) -> range:
        return range(prompt * samples, (prompt + 1) * samples)

    n, every = len(labelled), range(len(prompts))
    return Answers(
        {i: [rows[row][0] for row in of(i)] for i in every},
        {i: [rows[row][1] for row in of(i)] for i in every[:n]},
        {i: [_class(f"{path}, line {row + 1}", lines[row]) for row in of(i)] for i in every[n:]} if classes else {},
    )


def _class(where: str, text: str) -> int | None:
    """The class of an unlabelled response's answer."""
    answer_class = json.loads(text).get("answer_class")
    if type(answer_class) is not int or answer_class < -1:
        raise InputError(
            f"rollout.replay: {where} has the answer_class {answer_class!r}; this stage's method compares answers, and "
            "replays what such a method recorded"
        )
    return None if answer_class == -1 else answer_class


def _with_experts(path: Path, number: int, text: str, completion: Completion, routing: RoutingFormat) -> Completion:
    """The completion with the experts that line `number` names."""
    where, file, fix = f"{path}, line {number}", experts_path(path), "set model.router_replay=off to run without them"
    given = json.loads(text)
    place, tokens = given.get("experts"), len(given["prompt_tokens"]) + len(completion.token_ids)
    if place is None:
        raise InputError(f"rollout.replay: {where} has no experts, which the recorded run did not keep; {fix}")
    wanted = {
        "shape": [tokens, routing.layers, routing.per_token],
        "dtype": "uint8" if routing.itemsize == 1 else "int16",
    }
    offset = place.get("offset") if isinstance(place, dict) else None
    if type(offset) is not int or offset < 0 or {name: place.get(name) for name in wanted} != wanted:
        raise InputError(f"rollout.replay: {where} has the experts {place}, not {wanted} at an offset; {fix}")
    try:
        raw = np.fromfile(file, wanted["dtype"], tokens * routing.layers * routing.per_token, offset=offset)
        experts = torch.from_numpy(raw.reshape(wanted["shape"]))
    except (OSError, ValueError) as error:
        raise InputError(f"rollout.replay: {file} does not have the experts of {where} ({error}); {fix}") from error
    if wrong := doubts(experts, routing):
        raise InputError(f"rollout.replay: the experts of {where} in {file}: {wrong[0]}; {fix}")
    return replace(completion, experts=experts)


def _response(where: str, text: str, prompt: LabelledPrompt | UnlabelledPrompt) -> tuple[Completion, float]:
    """One line as a completion and its verdict. The verdict of an unlabelled prompt is ignored."""
    try:
        line = json.loads(text)
        recorded, asked = line["prompt_id"], tuple(line["prompt_tokens"])
        tokens, logprobs = line["response_tokens"], line["logprobs"]
        reason, correct = "stop" if line["stopped"] else "length", line["correct"]
        versions = tuple((int(version), int(count)) for version, count in line.get("versions", [[-1, len(tokens)]]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"rollout.replay: {where} is not a recorded response ({error!r})") from error
    completion = _completion(where, tokens, logprobs, reason, versions)
    if asked != prompt.token_ids:
        raise InputError(
            f"rollout.replay: {where} answers {recorded!r}, this run asks {prompt.id!r}: the data, run.seed, the "
            "stage's counts or the order of the prompts (rollout.max_staleness) differ from the recorded run's"
        )
    if not len(tokens) or len(tokens) != len(logprobs):
        raise InputError(f"rollout.replay: {where} has {len(tokens)} response tokens and {len(logprobs)} logprobs")
    if sum(count for _, count in versions) != len(tokens):
        raise InputError(f"rollout.replay: {where} has {len(tokens)} response tokens, its versions others: {versions}")
    if isinstance(prompt, UnlabelledPrompt):
        return completion, 0.0
    if not isinstance(correct, int | float) or not 0 <= correct <= 1:
        raise InputError(f"rollout.replay: {where} has the verdict {correct!r}; a labelled prompt's is from 0.0 to 1.0")
    return completion, float(correct)


def _completion(
    where: str, tokens: object, logprobs: object, reason: str, versions: tuple[tuple[int, int], ...]
) -> Completion:
    try:
        token_ids = token_tensor(tokens)
    except ValueError as error:
        raise InputError(f"rollout.replay: {where} has response_tokens that are no token ids ({error})") from error
    if len(token_ids) and int(token_ids.min()) < 0:
        raise InputError(f"rollout.replay: {where} has response_tokens that are no token ids")
    try:
        return Completion(token_ids, logprob_tensor(logprobs), reason, versions)
    except ValueError as error:
        raise InputError(f"rollout.replay: {where} has logprobs that are no numbers ({error})") from error
