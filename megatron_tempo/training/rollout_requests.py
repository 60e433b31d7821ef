"""The rollouts of a run: draws prompts, asks the engine for responses, and collects and verifies them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import Prompts, StageConfig
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.methods.learner import Rollouts, iteration_seed
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout import dump
from megatron_tempo.rollout.batches import Answers, Asked, Collected, ask, collect, receive, share_columns
from megatron_tempo.rollout.engine import Engine, Sampling
from megatron_tempo.rollout.verification import Prompt, Verification
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.training.row_owners import RowOwners
from megatron_tempo.types import Batch, LabelledPrompt, UnlabelledPrompt

# Prompts for each replica of an engine, and tokens for each response, when the engine is checked.
PARITY_PROMPTS, PARITY_TOKENS = 4, 256

_NOTHING = Answers({}, {}, {})

_P = TypeVar("_P", LabelledPrompt, UnlabelledPrompt)


@dataclass(frozen=True, slots=True)
class _Pending:
    """The prompts of an unfinished iteration. The engine is answering them or has answered them."""

    labelled: list[LabelledPrompt]
    unlabelled: list[UnlabelledPrompt]
    asked: Asked
    streams_before: dict[str, Any]  # the streams' states before these prompts were drawn


@dataclass(slots=True)
class RolloutRequests:
    """The requests of a run to its engine.

    `pending` holds the prompts of the current iteration and, with `rollout.max_staleness`, of the next one.
    """

    config: Config
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    verifiers: Verifiers
    labelled: PromptStream[LabelledPrompt] | None
    unlabelled: PromptStream[UnlabelledPrompt] | None
    owners: RowOwners
    pending: list[_Pending] = field(default_factory=list)

    def generate(
        self, stage_name: str, stage: StageConfig, iteration: int, recorder: dump.Recorder | None = None
    ) -> Rollouts:
        """Rollouts of this iteration's prompts, labelled and unlabelled in one pass; labelled ones are verified.

        `recorder`: of the rank that writes them to disk, if they are to be written.
        With `rollout.max_staleness` this also asks for the next iteration's rollouts, within a stage. The engine
        generates them while the run trains on this iteration's. Collective.
        """
        if not self.pending:
            self.request(stage_name, stage, iteration)
        current = self.pending[0]
        collected = collect(current.asked, self.verifiers, self.tokenizer, self._classes_by(stage))
        self.engine.work.end_with_slowest()
        if self.config.rollout.max_staleness and iteration + 1 < stage.iterations:
            self.request(stage_name, stage, iteration + 1)
        return self._received(collected, len(current.labelled), stage_name, stage, iteration, recorder)

    def request(self, stage_name: str, stage: StageConfig, iteration: int) -> None:
        """Draw an iteration's prompts and let the engine start on them. Collective.

        With `rollout.max_staleness`, servers' answers are verified as they arrive, while the run trains.
        """
        config, before = self.config.rollout, self._stream_states()
        labelled, unlabelled = self._draw(stage, iteration)
        sampling = Sampling(config.temperature, config.max_response_tokens)
        seed = (self.config.run.seed, stage_name, iteration, "rollout")
        verify = partial(Verification, self.verifiers, self.tokenizer, self._classes_by(stage))
        prompts: list[Prompt] = [*labelled, *unlabelled]
        early = verify if config.max_staleness else None
        asked = ask(self.engine, prompts, stage.samples, sampling, *seed, verify=early)
        self.pending.append(_Pending(labelled, unlabelled, asked, before))

    def replay(self, stage_name: str, stage: StageConfig, iteration: int) -> Rollouts:
        """This iteration's rollouts from the folder `rollout.replay`, without the engine: the first rank reads them."""
        folder = self.config.rollout.replay
        assert folder is not None
        labelled, unlabelled = self._draw(stage, iteration)
        path = dump.path_of(Path(folder), stage_name, iteration + 1)
        classed, is_first = self._classes_by(stage) is not None, dist.get_rank() == 0

        def read() -> Answers:
            return dump.read(path, labelled, unlabelled, stage.samples, classes=classed) if is_first else _NOTHING

        collected = share_columns([*labelled, *unlabelled], raise_on_all_ranks(read))
        return self._received(collected, len(labelled), stage_name, stage, iteration, None)

    def recorder(self, stage_name: str, iteration: int) -> dump.Recorder:
        """What writes an iteration's rollouts to the run's folder."""
        path = dump.path_of(Path(self.config.run.dir) / "rollouts", stage_name, iteration + 1)
        return dump.Recorder(path, self.tokenizer)

    def discard_oldest(self) -> None:
        """Forget the prompts of a completed iteration: a resumed run does not request them again."""
        self.pending = self.pending[1:]

    def sample_for_parity(self, step: int) -> Batch:
        """A few responses, to compare the engine's log-probabilities with the actor's. Collective."""
        config, stream = self.config.rollout, self.labelled or self.unlabelled
        assert stream is not None
        prompts = stream.first(PARITY_PROMPTS * self.engine.replicas)
        sampling = Sampling(config.temperature, min(config.max_response_tokens, PARITY_TOKENS))
        asked = ask(self.engine, prompts, 1, sampling, self.config.run.seed, "parity", step)
        collected = collect(asked, self.verifiers, self.tokenizer).take(0, len(prompts))
        owned = self.owners.of_batch(collected.columns)
        return receive(replace(collected, columns=owned), self.owners.held(owned))

    def close(self) -> None:
        """End the verification of answers that are not collected any more."""
        for pending in self.pending:
            if pending.asked.verification is not None:
                pending.asked.verification.close()

    def resume_point(self) -> dict[str, Any]:
        """The streams' states for a checkpoint. A resumed run draws and requests the pending prompts again."""
        return self.pending[0].streams_before if self.pending else self._stream_states()

    def _received(
        self,
        collected: Collected,
        labelled: int,
        stage_name: str,
        stage: StageConfig,
        iteration: int,
        recorder: dump.Recorder | None,
    ) -> Rollouts:
        """The rollouts with the rows that this rank holds. `labelled`: how many of the prompts are, the first ones."""
        total, seed = len(collected.prompts), iteration_seed(self.config.run.seed, stage_name, iteration)
        first = collected.take(0, labelled, verdicts=True) if labelled else None
        second = collected.take(labelled, total, classes=stage.needs.classes) if labelled < total else None
        columns = Rollouts(*(None if part is None else part.columns for part in (first, second)))
        owned = self.owners.of_iteration(columns, stage, iteration, seed)

        def received(part: Collected | None, columns: Batch | None) -> Batch | None:
            if part is None or columns is None:
                return None
            watch = None if recorder is None else recorder.of(part.prompts, columns)
            return receive(replace(part, columns=columns), self.owners.held(columns), watch)

        return Rollouts(received(first, owned.labelled), received(second, owned.unlabelled))

    def _draw(self, stage: StageConfig, iteration: int) -> tuple[list[LabelledPrompt], list[UnlabelledPrompt]]:
        needed = stage.prompts_at(iteration)
        return (
            _take(self.labelled, stage.labelled_prompts) if Prompts.labelled in needed else [],
            _take(self.unlabelled, stage.unlabelled_prompts) if Prompts.unlabelled in needed else [],
        )

    def _classes_by(self, stage: StageConfig) -> str | None:
        """The verifier that decides which answers to an unlabelled prompt are equal. None if the method needs none."""
        if not stage.needs.classes:
            return None
        dataset = self.config.data.unlabelled
        assert dataset is not None
        assert dataset.verifier is not None, "the config's rules ask for it"
        return dataset.verifier.name

    def _stream_states(self) -> dict[str, Any]:
        streams = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {name: stream.state() for name, stream in streams.items() if stream is not None}


def _take(stream: PromptStream[_P] | None, count: int) -> list[_P]:
    assert stream is not None, "the config's rules ask for the set that a stage draws from"
    return stream.take(count)
