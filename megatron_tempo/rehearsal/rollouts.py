"""Made-up rollouts, and an engine that takes weights and generates nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import Rollouts, iteration_seed
from megatron_tempo.rehearsal.lengths import Lengths
from megatron_tempo.rollout.engine import EngineWork, Request, Sampling, TrainerGpus
from megatron_tempo.training.row_owners import RowOwners
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
    owners: RowOwners
    verifiers: Any = None

    def generate(self, stage_name: str, stage: StageConfig, iteration: int, recorder: None = None) -> Rollouts:
        """Rollouts of the stage's numbers of prompts and responses. This rank has the tokens of the rows it holds."""
        needed = stage.prompts_at(iteration)
        counts = {Prompts.labelled: stage.labelled_prompts, Prompts.unlabelled: stage.unlabelled_prompts}
        made = {kind: self._columns(kind, counts[kind], stage) for kind in needed}
        columns = Rollouts(made.get(Prompts.labelled), made.get(Prompts.unlabelled))
        seed = iteration_seed(self.config.run.seed, stage_name, iteration)
        owned = self.owners.of_iteration(columns, stage, iteration, seed)
        return Rollouts(self._with_tokens(owned.labelled), self._with_tokens(owned.unlabelled))

    def _columns(self, kind: Prompts, prompts: int, stage: StageConfig) -> Batch:
        rows, rollout = prompts * stage.samples, self.config.rollout
        responses = self.lengths.draw(rows, rollout.max_response_tokens, seed_of(_SEED, kind.name))
        parity = torch.arange(rows) % 2
        classed = kind is Prompts.unlabelled and stage.needs.classes
        return Batch(
            prompt_ids=tuple(f"{kind.name}:{row // stage.samples}" for row in range(rows)),
            group=torch.arange(rows) // stage.samples,
            prompt_tokens=torch.empty(0, dtype=torch.int32),
            prompt_lengths=torch.full((rows,), rollout.max_prompt_tokens),
            response_tokens=torch.empty(0, dtype=torch.int32),
            response_lengths=torch.tensor(responses),
            engine_logprobs=torch.empty(0),
            stopped=torch.ones(rows, dtype=torch.bool),
            versions=torch.tensor([[row, 0, tokens] for row, tokens in enumerate(responses)]).view(-1, 3),
            correct=parity.float() if kind is Prompts.labelled else None,
            answer_class=parity if classed else None,
            held=torch.empty(0, dtype=torch.int64),
        )

    def _with_tokens(self, columns: Batch | None) -> Batch | None:
        if columns is None:
            return None
        held = self.owners.held(columns)
        prompts, responses = int(columns.prompt_lengths[held].sum()), int(columns.response_lengths[held].sum())
        return replace(
            columns,
            prompt_tokens=torch.arange(prompts, dtype=torch.int32) % self.vocab,
            response_tokens=torch.arange(responses, dtype=torch.int32) % self.vocab,
            engine_logprobs=torch.zeros(responses),
            held=held,
        )

    def dropped(self, half: Prompts) -> tuple[str, ...]:
        """None: answers fall into two classes."""
        return ()

    def discard_oldest(self) -> None:
        """Nothing is pending."""

    def metrics(self) -> dict[str, float]:
        """Nothing is asked ahead."""
        return {}


@dataclass(slots=True)
class WeightSink:
    """An engine that takes the weight stream, counts its bytes, and answers nothing."""

    shared: bool  # as a colocated server would take it: in memory that other processes can open
    parts: bool  # as SGLang and vLLM take it: tensors that are larger than a bucket, in parts
    counted: TokenCount = field(default_factory=TokenCount)
    work: EngineWork = field(default_factory=EngineWork)
    gpus: TrainerGpus | None = None  # of servers on the trainer's GPUs; it is asleep then, as they are
    replicas: int = 1
    bytes_taken: int = 0
    asleep: bool = False

    def sleep(self) -> None:
        if self.gpus is not None and not self.asleep:
            self.asleep = True
            self.gpus.take_back()

    def load_weights(self, weights: Weights, version: int) -> None:
        if self.gpus is not None:
            self.asleep = False
            self.gpus.lend()
        self._take(weights)
        if self.gpus is not None:
            self.gpus.lend()

    def _take(self, weights: Weights) -> None:
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
