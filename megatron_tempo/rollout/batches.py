"""From prompts to batches: the engine answers, responses are verified meanwhile, and every rank gets all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.engine import AnswersOnFirstRank, Engine, Request, Sampling
from megatron_tempo.rollout.verification import Prompt, Verification
from megatron_tempo.rollout.verifying_nodes import VerifyingNodes
from megatron_tempo.types import Batch, Completion, seed_of


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts that an engine is answering. Every rank must read `answers` to its end.

    `nodes`: those that share the verification, if only the first rank gets answers and there are several.
    """

    prompts: Sequence[Prompt]
    answers: Iterator[tuple[int, list[Completion]]]
    nodes: VerifyingNodes | None = None


class Collected(NamedTuple):
    """What was collected: one entry per prompt, the same on every rank."""

    completions: list[list[Completion]]
    verdicts: list[list[float]]  # of a labelled prompt's responses; empty for unlabelled prompts
    classes: list[list[int | None]]  # of an unlabelled prompt's responses, if they were requested


def ask(engine: Engine, prompts: Sequence[Prompt], samples: int, sampling: Sampling, *seed: object) -> Asked:
    """Request `samples` completions of each prompt. Collective.

    The seed of a completion depends on `seed` and on the prompt's position, not on the number of ranks.
    """
    requests = [Request(prompt.token_ids, samples, seed_of(*seed, i)) for i, prompt in enumerate(prompts)]
    nodes = engine.nodes if isinstance(engine, AnswersOnFirstRank) else None
    return Asked(prompts, engine.start(requests, sampling), nodes)


def collect(
    asked: Asked, verifiers: Verifiers, tokenizer: PreTrainedTokenizerBase, classes_by: str | None = None
) -> Collected:
    """The completions of each prompt, the verdicts on each labelled one's, and the classes of each unlabelled one's.

    `classes_by`: the verifier that decides which answers to an unlabelled prompt are equal; None: do not compare them.
    Responses are verified while others are still being generated, on the rank that has them or on all nodes. A verifier
    sees the text of a response without the token at which the engine ended it (`Verification`). Collective. Raises
    EngineError on every rank if the engine or a verifier fails on one.
    """
    mine: dict[int, list[Completion]] = {}
    verdicts: dict[int, Any] = {}
    classes: dict[int, Any] = {}
    failure = None
    with Verification(verifiers, tokenizer, classes_by, asked.nodes) as verification:
        try:
            for i, completions in asked.answers:
                mine[i] = completions
                verification.submit(i, asked.prompts[i], completions)
            verdicts, classes = verification.results()
        except (EngineError, InputError) as error:  # of this rank's engine or judge; of a user's own verifier
            failure = str(error)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (mine, verdicts, classes, failure))
    if failures := [share[3] for share in shares if share[3] is not None]:
        raise EngineError(failures[0])
    of_all, verdicts, classes = (_joined([share[kind] for share in shares]) for kind in range(3))
    places = range(len(asked.prompts))
    return Collected(
        [of_all[i] for i in places], [verdicts.get(i, []) for i in places], [classes.get(i, []) for i in places]
    )


def summed_counts(verifiers: Verifiers) -> dict[str, int]:
    """What the verifiers of all ranks counted since the last call (`Verifiers.take_counts`). Collective."""
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, verifiers.take_counts())
    names = dict.fromkeys(name for share in shares for name in share)  # a rank without such items has none
    return {name: sum(share.get(name, 0) for share in shares) for name in names}


def _joined(shares: list[dict[int, Any]]) -> dict[int, Any]:
    return {i: part for share in shares for i, part in share.items()}


def batch_of(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    verdicts: Sequence[Sequence[float]] | None,
    classes: Sequence[Sequence[int | None]] | None = None,
) -> Batch:
    """The completions as a batch of rows, prompt after prompt."""
    rows = [(i, prompt, answer) for i, prompt in enumerate(prompts) for answer in completions[i]]
    prompt_tokens = [torch.tensor(prompt.token_ids, dtype=torch.int64) for prompt in prompts]
    return Batch(
        prompt_ids=tuple(prompt.id for _, prompt, _ in rows),
        group=torch.tensor([i for i, _, _ in rows], dtype=torch.int64),
        prompt_tokens=_flat([prompt_tokens[i] for i, _, _ in rows], torch.int64),
        prompt_lengths=torch.tensor([len(prompt.token_ids) for _, prompt, _ in rows], dtype=torch.int64),
        response_tokens=_flat([answer.token_ids for _, _, answer in rows], torch.int64),
        response_lengths=torch.tensor([len(answer.token_ids) for _, _, answer in rows], dtype=torch.int64),
        engine_logprobs=_flat([answer.logprobs for _, _, answer in rows], torch.float32),
        stopped=torch.tensor([answer.finish_reason == "stop" for _, _, answer in rows], dtype=torch.bool),
        versions=_by_token([span for _, _, answer in rows for span in answer.versions]),
        correct=None if verdicts is None else torch.tensor([v for row in verdicts for v in row]),
        answer_class=None
        if classes is None
        else torch.tensor([-1 if c is None else c for row in classes for c in row], dtype=torch.int64),
    )


def _flat(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The parts, one behind the other."""
    return torch.cat(list(parts)).to(dtype) if parts else torch.zeros(0, dtype=dtype)


def _by_token(spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The version of each token: int32 [sum of the spans' tokens]."""
    versions, tokens = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return torch.repeat_interleave(versions, tokens).to(torch.int32)
