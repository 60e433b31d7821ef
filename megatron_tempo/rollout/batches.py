"""From prompts to batches: an engine answers, responses are verified meanwhile, and every rank gets everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_tempo.rewards.verifiers import Item, Verifiers
from megatron_tempo.rollout.engine import Engine, Request, Sampling, seed_of
from megatron_tempo.types import Batch, Completion, LabelledPrompt, UnlabelledPrompt

Prompt = LabelledPrompt | UnlabelledPrompt


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts that an engine is answering. `answers` is to be read to its end on every rank."""

    prompts: Sequence[Prompt]
    answers: Iterator[tuple[int, list[Completion]]]


def ask(engine: Engine, prompts: Sequence[Prompt], samples: int, sampling: Sampling, *seed: object) -> Asked:
    """Begin `samples` completions of each prompt. Collective.

    The seed of a completion depends on `seed` and on the prompt's place, not on the number of ranks.
    """
    requests = [Request(prompt.token_ids, samples, seed_of(*seed, i)) for i, prompt in enumerate(prompts)]
    return Asked(prompts, engine.start(requests, sampling))


def collect(
    asked: Asked, verifiers: Verifiers, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[Completion]], list[list[float]]]:
    """The completions of each prompt, and the verdicts of each labelled one's (none of the others'), on every rank.

    Responses are verified while others are still being generated, on the rank that has them. The verifier sees all the
    text of a response, special tokens included. Collective.
    """
    mine: dict[int, list[Completion]] = {}
    judged: dict[int, Future[list[float]]] = {}
    with ThreadPoolExecutor(1) as verifying:
        for i, completions in asked.answers:
            mine[i] = completions
            prompt = asked.prompts[i]
            if isinstance(prompt, LabelledPrompt):
                texts = [tokenizer.decode(completion.token_ids) for completion in completions]
                items = [Item(prompt.verifier, prompt.text, text, prompt.answer) for text in texts]
                judged[i] = verifying.submit(verifiers.score, items)
        verdicts = {i: future.result() for i, future in judged.items()}
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (mine, verdicts))
    of_all = {i: completions for share, _ in shares for i, completions in share.items()}
    verdicts = {i: scores for _, share in shares for i, scores in share.items()}
    return [of_all[i] for i in range(len(asked.prompts))], [verdicts.get(i, []) for i in range(len(asked.prompts))]


def batch_of(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], verdicts: Sequence[Sequence[float]] | None
) -> Batch:
    """The completions as a batch of rows, prompt after prompt."""
    rows = [(i, prompt, answer) for i, prompt in enumerate(prompts) for answer in completions[i]]

    def flat(lists: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor([token for tokens in lists for token in tokens], dtype=torch.int64)

    return Batch(
        prompt_ids=tuple(prompt.id for _, prompt, _ in rows),
        group=torch.tensor([i for i, _, _ in rows], dtype=torch.int64),
        prompt_tokens=flat([prompt.token_ids for _, prompt, _ in rows]),
        prompt_lengths=torch.tensor([len(prompt.token_ids) for _, prompt, _ in rows], dtype=torch.int64),
        response_tokens=flat([answer.token_ids for _, _, answer in rows]),
        response_lengths=torch.tensor([len(answer.token_ids) for _, _, answer in rows], dtype=torch.int64),
        engine_logprobs=torch.tensor([logprob for _, _, answer in rows for logprob in answer.logprobs]),
        stopped=torch.tensor([answer.finish_reason == "stop" for _, _, answer in rows], dtype=torch.bool),
        versions=_by_token([span for _, _, answer in rows for span in answer.versions]),
        correct=None if verdicts is None else torch.tensor([v for row in verdicts for v in row]),
    )


def _by_token(spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The version of each token: int32 [sum of the spans' tokens]."""
    versions, tokens = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return torch.repeat_interleave(versions, tokens).to(torch.int32)
