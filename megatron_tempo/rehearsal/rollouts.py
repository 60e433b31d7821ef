"""Made-up rollouts, and an engine that takes weights and generates nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import Prompts, StageConfig
from megatron_tempo.methods.learner import Rollouts
from megatron_tempo.rehearsal.lengths import Lengths
from megatron_tempo.rollout.engine import EngineWork, Request, Sampling
from megatron_tempo.types import Batch, Completion, EngineHealth, TokenCount, Weights, seed_of

_SEED = 0


@dataclass(slots=True)
class MadeUpRequests:
    """Stands for `training.rollout_requests.RolloutRequests`: no data, no tokenizer, no engine.

    Every prompt has the longest length. Every second response is right, and answers fall into two classes, so that no
    method drops a prompt group.
    """

    config: Config
    vocab: int
    lengths: Lengths
    verifiers: Any = None

    def generate(self, stage_name: str, stage: StageConfig, iteration: int) -> Rollouts:
        """Rollouts of the stage's numbers of prompts and responses."""
        needed = stage.prompts_at(iteration)
        counts = {Prompts.labelled: stage.labelled_prompts, Prompts.unlabelled: stage.unlabelled_prompts}
        made = {kind: self._batch(kind, counts[kind], stage) for kind in needed}
        return Rollouts(made.get(Prompts.labelled), made.get(Prompts.unlabelled))

    def _batch(self, kind: Prompts, prompts: int, stage: StageConfig) -> Batch:
        rows, rollout = prompts * stage.samples, self.config.rollout
        responses = self.lengths.draw(rows, rollout.max_response_tokens, seed_of(_SEED, kind.name))
        total = sum(responses)
        parity = torch.arange(rows) % 2
        classed = kind is Prompts.unlabelled and stage.needs.classes
        return Batch(
            prompt_ids=tuple(f"{kind.name}:{row // stage.samples}" for row in range(rows)),
            group=torch.arange(rows) // stage.samples,
            prompt_tokens=torch.arange(rows * rollout.max_prompt_tokens) % self.vocab,
            prompt_lengths=torch.full((rows,), rollout.max_prompt_tokens),
            response_tokens=torch.arange(total) % self.vocab,
            response_lengths=torch.tensor(responses),
            engine_logprobs=torch.zeros(total),
            stopped=torch.ones(rows, dtype=torch.bool),
            versions=torch.zeros(total, dtype=torch.int32),
            correct=parity.float() if kind is Prompts.labelled else None,
            answer_class=parity if classed else None,
        )

    def discard_oldest(self) -> None:
        """Nothing is pending."""


@dataclass(slots=True)
class WeightSink:
    """An engine that takes the weight stream, counts its bytes, and answers nothing."""

    shared: bool  # as a colocated server would take it: in memory that other processes can open
    parts: bool  # as vLLM takes it: tensors that are larger than a bucket, in parts
    counted: TokenCount = field(default_factory=TokenCount)
    work: EngineWork = field(default_factory=EngineWork)
    replicas: int = 1
    bytes_taken: int = 0

    def load_weights(self, weights: Weights, version: int) -> None:
        for bucket in weights.from_stages(shared=self.shared, parts=self.parts):
            self.bytes_taken += sum(tensor.nbytes for _, tensor in bucket)
            del bucket  # before the next one is made, as rollout/transfer.py does

    def start(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        raise AssertionError("a rehearsal generates nothing")

    def differences(self, weights: Weights) -> list[tuple[str, float]] | None:
        return None

    def health(self) -> list[EngineHealth]:
        return []

    def close(self) -> None:
        """Nothing is open."""
