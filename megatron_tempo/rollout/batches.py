"""From prompts to batches: the engine answers, responses are verified meanwhile, and each rank gets the rows it needs.

All ranks first learn the columns, some numbers a row. When it is decided which rank holds which rows, the tokens move,
in windows of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.engine import AnswersOnFirstRank, Engine, Request, Sampling
from megatron_tempo.rollout.experts import ExpertRows, ExpertWatch, form_of, received
from megatron_tempo.rollout.verification import Prompt, Verification
from megatron_tempo.rollout.verifying_nodes import VerifyingNodes
from megatron_tempo.runtime.row_windows import WINDOW, row_windows
from megatron_tempo.types import Batch, Completion, UnlabelledPrompt, seed_of

# Gets some rows of a batch, and their tokens (int32) and log-probabilities (float32), one row after another.
Watch = Callable[[range, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts that an engine is answering. Every rank must read `answers` to its end.

    `nodes`: those that share the verification, if only the first rank gets answers and there are several.
    """

    prompts: Sequence[Prompt]
    answers: Iterator[tuple[int, list[Completion]]]
    nodes: VerifyingNodes | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """What this rank has of the answers to prompts, by the number of the prompt."""

    completions: Mapping[int, Sequence[Completion]]
    verdicts: Mapping[int, Sequence[float]]  # on the responses to labelled prompts
    classes: Mapping[int, Sequence[int | None]]  # of the responses to unlabelled prompts, if they were requested


@dataclass(frozen=True, slots=True)
class Collected:
    """Answers whose tokens are where they arrived. `columns`: the batch, the same on every rank; it holds no rows.

    `correct` and `answer_class` of a row without a verdict or class are 0 and -1.
    """

    prompts: Sequence[Prompt]
    columns: Batch
    sources: Tensor  # int64 [n]: the rank that has the tokens of each row
    completions: dict[int, Completion]  # of the rows that this rank has; `receive` takes them out
    experts: ExpertRows | None = None  # of the experts that the engine's routers chose; None: of no row

    def take(self, first: int, last: int, *, verdicts: bool = False, classes: bool = False) -> Collected:
        """The rows of prompts `first` to `last` - 1, moved out of this. Without `verdicts`: of unlabelled prompts."""
        whole = self.columns
        rows = ((whole.group >= first) & (whole.group < last)).nonzero().flatten()
        chosen = whole.select(rows)
        columns = replace(
            chosen,
            group=chosen.group - first,
            correct=chosen.correct if verdicts else None,
            answer_class=chosen.answer_class if classes else None,
        )
        start = int(rows[0]) if len(rows) else 0
        own = [row for row in self.completions if start <= row < start + len(rows)]
        completions = {row - start: self.completions.pop(row) for row in own}
        return Collected(self.prompts[first:last], columns, self.sources[rows], completions, self.experts)


def ask(engine: Engine, prompts: Sequence[Prompt], samples: int, sampling: Sampling, *seed: object) -> Asked:
    """Request `samples` completions of each prompt. Collective.

    The seed of a completion depends on `seed` and on the prompt's position, not on the number of ranks.
    """
    requests = [Request(prompt.token_ids, samples, seed_of(*seed, i)) for i, prompt in enumerate(prompts)]
    nodes = engine.nodes if isinstance(engine, AnswersOnFirstRank) else None
    return Asked(prompts, engine.start(requests, sampling), nodes)


def collect(
    asked: Asked,
    verifiers: Verifiers,
    tokenizer: PreTrainedTokenizerBase,
    classes_by: str | None = None,
    *,
    labelled_too: bool = False,
) -> Collected:
    """The completions of each prompt, the verdicts on each labelled one's, and the classes of each unlabelled one's.

    `classes_by`: the verifier that decides which answers to an unlabelled prompt are equal; None: do not compare them.
    `labelled_too`: it also compares those to labelled prompts, without their reference answers.
    Responses are verified while others are still being generated, on the rank that has them or on all nodes. A verifier
    sees the text of a response without the token at which the engine ended it (`Verification`). Collective. Raises
    EngineError on every rank if the engine or a verifier fails on one.
    """
    mine: dict[int, list[Completion]] = {}
    verdicts: dict[int, list[float]] = {}
    classes: dict[int, list[int | None]] = {}
    with failing_together(), Verification(verifiers, tokenizer, classes_by, asked.nodes) as verification:
        for i, completions in asked.answers:
            mine[i] = completions
            verification.submit(i, asked.prompts[i], completions)
            if labelled_too:  # under numbers that no prompt has
                verification.submit(len(asked.prompts) + i, without_answer(asked.prompts[i]), completions)
        verdicts, classes = verification.results()
        classes = {i % len(asked.prompts): of for i, of in classes.items()}
    return share_columns(asked.prompts, Answers(mine, verdicts, classes))


def without_answer(prompt: Prompt) -> UnlabelledPrompt:
    """The question alone."""
    return UnlabelledPrompt(prompt.id, prompt.text, prompt.token_ids)


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise the first failing rank's EngineError or InputError as EngineError on every rank. Collective at its end.

    They are errors of a rank's engine or judge, and of a user's own verifier.
    """
    failure = None
    try:
        yield
    except (EngineError, InputError) as error:
        failure = str(error)
    world = dist.get_world_size()
    first = torch.tensor(world if failure is None else dist.get_rank())
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if int(first) < world:
        words = [failure]
        dist.broadcast_object_list(words, int(first))
        raise EngineError(words[0])


def share_columns(prompts: Sequence[Prompt], answers: Answers) -> Collected:
    """Let all ranks know the columns of all rows. Each prompt is answered on one rank. Collective.

    A column has a number a row, and another one for each run of versions. The ranks that have nothing of a row add
    zeros. So neither the calls nor their sizes depend on the number of ranks.
    """
    counts = torch.zeros(len(prompts), 3, dtype=torch.int64)  # ranks that answered, responses, the rank
    for i, completions in answers.completions.items():
        counts[i] = torch.tensor([1, len(completions), dist.get_rank()])
    answered, samples, ranks = _summed(counts).unbind(1)
    assert bool((answered == 1).all()), "each prompt is answered on one rank"
    starts = (samples.cumsum(0) - samples).tolist()
    own = {starts[i] + j: one for i, of in answers.completions.items() for j, one in enumerate(of)}
    columns, runs = _gathered(int(samples.sum()), own, starts, answers)
    group = torch.repeat_interleave(torch.arange(len(prompts)), samples)
    of_row = group.tolist()
    prompt_lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts], dtype=torch.int64)
    batch = Batch(
        prompt_ids=tuple(prompts[i].id for i in of_row),
        group=group,
        prompt_tokens=torch.empty(0, dtype=torch.int32),
        prompt_lengths=prompt_lengths[group],
        response_tokens=torch.empty(0, dtype=torch.int32),
        response_lengths=columns[:, 0].clone(),
        engine_logprobs=torch.empty(0),
        stopped=columns[:, 1].bool(),
        versions=runs,
        correct=columns[:, 2].int().view(torch.float32),
        answer_class=columns[:, 3] - 1,
        held=torch.empty(0, dtype=torch.int64),
    )
    form = columns[:, 5:].amax(0).tolist() if len(columns) else [0]  # all rows that have experts have the same
    return Collected(prompts, batch, ranks[group], own, ExpertRows(*form) if any(form) else None)


def _gathered(
    rows: int, completions: Mapping[int, Completion], starts: Sequence[int], answers: Answers
) -> tuple[Tensor, Tensor]:
    """The columns [n, 8], and the runs [runs, 3].

    Of each row its length, end, verdict (the bits of a float32), class + 1, number of runs, and its experts' form.
    """
    columns = torch.zeros(rows, 8, dtype=torch.int64)
    own = sorted(completions)
    ones = [completions[row] for row in own]
    at = torch.tensor(own, dtype=torch.int64)
    columns[at, 0] = torch.tensor([len(one.token_ids) for one in ones], dtype=torch.int64)
    columns[at, 1] = torch.tensor([one.finish_reason == "stop" for one in ones], dtype=torch.int64)
    versions = [[run for run in one.versions if run[1]] for one in ones]  # runs without tokens say nothing
    columns[at, 4] = torch.tensor([len(of) for of in versions], dtype=torch.int64)
    columns[at, 5:] = torch.tensor([form_of(one) for one in ones], dtype=torch.int64).view(-1, 3)
    for i, verdicts in answers.verdicts.items():
        bits = torch.tensor(verdicts, dtype=torch.float32).view(torch.int32)
        columns[starts[i] : starts[i] + len(verdicts), 2] = bits.long()
    for i, classes in answers.classes.items():
        numbers = [0 if of is None else of + 1 for of in classes]
        columns[starts[i] : starts[i] + len(classes), 3] = torch.tensor(numbers, dtype=torch.int64)
    columns = _summed(columns)
    counts = columns[:, 4]
    firsts = (counts.cumsum(0) - counts).tolist()
    runs = torch.zeros(int(counts.sum()), 2, dtype=torch.int64)
    for row, of in zip(own, versions, strict=True):
        runs[firsts[row] : firsts[row] + len(of)] = torch.tensor(of, dtype=torch.int64).view(-1, 2)
    of_row = torch.repeat_interleave(torch.arange(rows), counts)
    return columns, torch.cat([of_row[:, None], _summed(runs)], dim=1)


def _summed(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def receive(
    collected: Collected,
    held: Tensor,
    watch: Watch | None = None,
    window: int = WINDOW,
    *,
    layers: Tensor | None = None,
    watch_experts: ExpertWatch | None = None,
) -> Batch:
    """The batch with the tokens of the rows `held` (int64, ascending), which each rank chooses for itself. Collective.

    `watch`: is called with the tokens of all rows, in order, on the ranks that give one; `watch_experts` before, with
    their experts, if these are recorded. `window`: tokens that move at once. `layers`: int64, the layers whose experts
    this rank needs; None: all. `collected` loses its completions as they are sent.
    """
    columns, completions = collected.columns, collected.completions
    experts = None
    if collected.experts is not None:
        of_rows = columns.lengths, collected.sources, completions
        experts = received(collected.experts, *of_rows, held, layers, window, watch_experts)
    lengths = columns.response_lengths
    own_lengths = lengths[held]
    tokens = torch.empty(int(own_lengths.sum()), dtype=torch.int32)
    logprobs = torch.empty(len(tokens))
    places = {row: place for place, row in enumerate(held.tolist())}
    parts = tuple(zip(tokens.split(own_lengths.tolist()), logprobs.split(own_lengths.tolist()), strict=True))

    def fill(row: int) -> tuple[Tensor, Tensor] | None:
        one = completions.pop(row, None)
        return None if one is None else (one.token_ids, one.logprobs)

    for rows, moved in row_windows(lengths, fill, 2, collected.sources, window):
        ids, floats = moved[0], moved[1].view(torch.float32)
        sizes = lengths[rows.start : rows.stop].tolist()
        for row, own_ids, own_floats in zip(rows, ids.split(sizes), floats.split(sizes), strict=True):
            if (place := places.get(row)) is not None:
                parts[place][0].copy_(own_ids)
                parts[place][1].copy_(own_floats)
        if watch is not None:
            watch(rows, ids, floats)
    return replace(
        columns,
        prompt_tokens=_prompt_tokens(collected.prompts, columns.group[held].tolist()),
        response_tokens=tokens,
        engine_logprobs=logprobs,
        held=held,
        experts=experts,
    )


def _prompt_tokens(prompts: Sequence[Prompt], chosen: Sequence[int]) -> Tensor:
    """The tokens of the chosen prompts, one after another: int32."""
    tokens = {i: torch.tensor(prompts[i].token_ids, dtype=torch.int32) for i in dict.fromkeys(chosen)}
    return torch.cat([torch.empty(0, dtype=torch.int32), *(tokens[i] for i in chosen)])


def summed_counts(verifiers: Verifiers) -> dict[str, int]:
    """What the verifiers of all ranks counted since the last call (`Verifiers.take_counts`). Collective."""
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, verifiers.take_counts())
    names = dict.fromkeys(name for share in shares for name in share)  # a rank without such items has none
    return {name: sum(share.get(name, 0) for share in shares) for name in names}
