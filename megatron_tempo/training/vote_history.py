"""The votes on unlabelled questions over a run: how often the majority's answer to a question changes (Flip Rate).

TTRL-Guard (arXiv 2605.19444): with y_i^s the majority's answer to question i at visit s,

    FR_i^t = (1 / W) sum over s = t - W + 1 ... t of [y_i^s != y_i^(s - 1)]

of a question, and as a metric the share of an iteration's questions with y_i^t != y_i^(t - 1), among those that were
visited before. Answers of two visits are compared by the verifier that compares those of one. No answer is an answer of
its own. Only groups that are trained on count: neither those that a refill throws away nor those that are all masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Visits, majorities
from megatron_tempo.rewards.responses import seen
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.batches import Watch
from megatron_tempo.rollout.verification import Prompt, responses_of
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.types import Batch, Completion


@dataclass(slots=True)
class VoteHistory:
    """The visits of each question, by its id, on every rank. The first rank has the answers, and compares them."""

    verifiers: Verifiers
    tokenizer: PreTrainedTokenizerBase
    read_unfinished_thoughts: bool = False
    visits: dict[str, Visits] = field(default_factory=dict)
    answers: dict[str, str | None] = field(
        default_factory=dict
    )  # a response with the majority's answer at the last visit
    flipped: list[bool] = field(default_factory=list)  # of this iteration's questions that were visited before

    def watch(self, found: Sequence[Ballot], columns: Batch) -> Watch | None:
        """What takes the tokens of a response of each majority, on the first rank, as they pass in `receive`.

        `columns`: those of the batch that is received.
        """
        if dist.get_rank() != 0 or not found:
            return None
        wanted = {one.row: one for one in found if one.row is not None}

        def take(rows: range, tokens: Tensor, _: Tensor) -> None:
            own = [row for row in rows if row in wanted]
            if not own:
                return
            sizes = columns.response_lengths[rows.start : rows.stop].tolist()
            parts = dict(zip(rows, tokens.split(sizes), strict=True))
            for row in own:
                wanted[row].text = self._text(wanted[row], parts[row])

        return take

    def add(self, found: Sequence[Ballot], prompts: Sequence[Prompt], verifier: str) -> list[Visits]:
        """Add an iteration's votes. Returns the visits of each prompt. Collective."""
        differs = raise_on_all_ranks(lambda: self._compared(found, verifier) if dist.get_rank() == 0 else [])
        flips = torch.tensor(differs or [False] * len(found), dtype=torch.int64)
        dist.all_reduce(flips)
        self.flipped = []
        for one, flip in zip(found, flips.tolist(), strict=True):
            before = self.visits.get(one.prompt.id, Visits())
            if before.shares:
                self.flipped.append(bool(flip))
            later = (bool(flip),) if before.shares else ()
            self.visits[one.prompt.id] = Visits((*before.shares, one.share), (*before.flips, *later))
        return [self.visits.get(prompt.id, Visits()) for prompt in prompts]

    def metrics(self) -> dict[str, float]:
        """The Flip Rate of this iteration's questions; nothing if none was visited before."""
        flipped, self.flipped = self.flipped, []
        return {"vote/flip_rate": sum(flipped) / len(flipped), "vote/revisited": float(len(flipped))} if flipped else {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON data. Of the first rank."""
        return {
            name: {"shares": of.shares, "flips": of.flips, "answer": self.answers.get(name)}
            for name, of in self.visits.items()
        }

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Continue with the visits of a checkpoint; one of an earlier version has none."""
        for name, of in (saved or {}).items():
            self.visits[name] = Visits(tuple(of["shares"]), tuple(of["flips"]))
            self.answers[name] = of["answer"]

    def _compared(self, found: Sequence[Ballot], verifier: str) -> list[bool]:
        """Whether each majority's answer differs from that of the question's last visit."""
        pairs: list[tuple[str, str | None, str | None]] = []
        for one in found:
            pairs.append((one.prompt.text, self.answers.get(one.prompt.id), one.text))
            self.answers[one.prompt.id] = one.text

        def differ(pair: tuple[str, str | None, str | None]) -> bool:
            question, before, now = pair
            if before is None or now is None or before == now:
                return before != now
            first, second = self.verifiers.classes(verifier, question, [before, now])
            return first is None or first != second

        with ThreadPoolExecutor(self.verifiers.threads) as pool:
            return list(pool.map(differ, pairs))

    def _text(self, one: Ballot, tokens: Tensor) -> str:
        """What a verifier sees of a response."""
        completion = Completion(tokens, torch.zeros(0), "stop" if one.stopped else "length", ())
        view = self.verifiers.view(one.verifier)
        responses = responses_of(one.prompt, [completion], one.verifier, self.verifiers.end_tokens)
        (text,) = responses.texts(self.tokenizer, view)
        return seen(text, view, read_unfinished_thoughts=self.read_unfinished_thoughts)


@dataclass(slots=True)
class Ballot:
    """The vote on one prompt."""

    prompt: Prompt
    verifier: str  # compares answers
    share: float  # of the majority's answer
    row: int | None  # of a response with that answer; None: no response has an answer
    stopped: bool  # whether that response ends with an end token or a stop string
    text: str | None = None  # of that response, as a verifier sees it; on the first rank


def ballots(prompts: Sequence[Prompt], columns: Batch, stage: StageConfig, verifier: str) -> list[Ballot]:
    """The votes on these prompts, in their order. A prompt whose responses are all masked has none."""
    return [
        Ballot(prompts[number], verifier, share, row, stopped=row is not None and bool(columns.stopped[row]))
        for number, (row, share) in sorted(majorities(columns, stage).items())
    ]
