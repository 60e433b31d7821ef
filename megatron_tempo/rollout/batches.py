"""From prompts to batches: the ranks share the generation, the verdicts are added, and every rank gets everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_tempo.rewards.verifiers import Item, Verifiers
from megatron_tempo.rollout.engine import Engine, Request, Sampling, seed_of
from megatron_tempo.types import Batch, Completion, LabelledPrompt, UnlabelledPrompt

Prompt = LabelledPrompt | UnlabelledPrompt


def completions_of(
    engine: Engine, prompts: Sequence[Prompt], samples: int, sampling: Sampling, *seed: object
) -> list[list[Completion]]:
    """`samples` completions of each prompt, on every rank. Each rank generates its share. Collective.

    The seed of a completion depends on `seed` and on the prompt's place, not on the number of ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    requests = [Request(prompt.token_ids, samples, seed_of(*seed, i)) for i, prompt in enumerate(prompts)]
    mine = engine.generate(requests[rank::world], sampling)
    shares: list[list[list[Completion]]] = [[] for _ in range(world)]
    dist.all_gather_object(shares, mine)
    return [shares[i % world][i // world] for i in range(len(prompts))]


def verdicts_of(
    verifiers: Verifiers,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[LabelledPrompt],
    completions: Sequence[Sequence[Completion]],
) -> list[list[float]]:
    """1.0 or 0.0 for each completion, on every rank. Each rank verifies its share. Collective.

    The verifier sees all the text of a response, special tokens included.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    items = [
        Item(prompt.verifier, prompt.text, tokenizer.decode(completion.token_ids), prompt.answer)
        for prompt, answers in zip(prompts[rank::world], completions[rank::world], strict=True)
        for completion in answers
    ]
    shares: list[list[float]] = [[] for _ in range(world)]
    dist.all_gather_object(shares, verifiers.score(items))
    iterators = [iter(share) for share in shares]
    return [[next(iterators[i % world]) for _ in answers] for i, answers in enumerate(completions)]


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
        correct=None if verdicts is None else torch.tensor([v for row in verdicts for v in row]),
    )
