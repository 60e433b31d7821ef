"""The rollouts of a run: draws prompts, asks the engine for responses, and collects and verifies them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import Prompts, StageConfig
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.methods.learner import Rollouts
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout import dump
from megatron_tempo.rollout.batches import Asked, ask, batch_of, collect
from megatron_tempo.rollout.engine import Engine, Sampling
from megatron_tempo.types import Batch, LabelledPrompt, UnlabelledPrompt

# Prompts for each replica of an engine, and tokens for each response, when the engine is checked.
PARITY_PROMPTS, PARITY_TOKENS = 4, 256

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
    pending: list[_Pending] = field(default_factory=list)

    def generate(self, stage_name: str, stage: StageConfig, iteration: int) -> Rollouts:
        """Rollouts of this iteration's prompts, labelled and unlabelled in one pass; labelled ones are verified.

        With `rollout.max_staleness` this also asks for the next iteration's rollouts, within a stage. The engine
        generates them while the run trains on this iteration's. Collective.
        """
        classes_by = self._classes_by(stage)
        if not self.pending:
            self.request(stage_name, stage, iteration)
        current = self.pending[0]
        completions, verdicts, classes = collect(current.asked, self.verifiers, self.tokenizer, classes_by)
        self.engine.work.end_with_slowest()
        if self.config.rollout.max_staleness and iteration + 1 < stage.iterations:
            self.request(stage_name, stage, iteration + 1)
        labelled, unlabelled = current.labelled, current.unlabelled
        n = len(labelled)
        classed = classes_by is not None
        return Rollouts(
            batch_of(labelled, completions[:n], verdicts[:n]) if labelled else None,
            batch_of(unlabelled, completions[n:], None, classes[n:] if classed else None) if unlabelled else None,
        )

    def request(self, stage_name: str, stage: StageConfig, iteration: int) -> None:
        """Draw an iteration's prompts and let the engine start on them. Collective."""
        config, before = self.config.rollout, self._stream_states()
        labelled, unlabelled = self._draw(stage, iteration)
        sampling = Sampling(config.temperature, config.max_response_tokens)
        seed = (self.config.run.seed, stage_name, iteration, "rollout")
        asked = ask(self.engine, [*labelled, *unlabelled], stage.samples, sampling, *seed)
        self.pending.append(_Pending(labelled, unlabelled, asked, before))

    def replay(self, stage_name: str, stage: StageConfig, iteration: int) -> Rollouts:
        """This iteration's rollouts from the folder `rollout.replay`, without the engine."""
        folder = self.config.rollout.replay
        assert folder is not None
        labelled, unlabelled = self._draw(stage, iteration)
        path = dump.path_of(Path(folder), stage_name, iteration + 1)
        classed = self._classes_by(stage) is not None
        return Rollouts(*dump.read(path, labelled, unlabelled, stage.samples, classes=classed))

    def write_dump(self, rollouts: Rollouts, stage_name: str, iteration: int) -> None:
        """Write an iteration's rollouts to the run's folder. Raises OSError."""
        path = dump.path_of(Path(self.config.run.dir) / "rollouts", stage_name, iteration + 1)
        dump.write(path, rollouts.labelled, rollouts.unlabelled, self.tokenizer)

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
        return batch_of(prompts, collect(asked, self.verifiers, self.tokenizer).completions, None)

    def resume_point(self) -> dict[str, Any]:
        """The streams' states for a checkpoint. A resumed run draws and requests the pending prompts again."""
        return self.pending[0].streams_before if self.pending else self._stream_states()

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
