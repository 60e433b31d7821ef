"""Refill (dynamic sampling, DAPO, Yu et al. 2025, arXiv 2503.14476, 3.2): groups without a signal give way to others.

Where all responses of a prompt group get the same reward, all their advantages are 0. With `stageN.refill_limit` such a
group is thrown away, and the engine is asked for the next prompt in its place, until the iteration has its groups. When
the limit on the prompts that are asked for it is reached, groups that agree stay in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.methods.learner import agreeing_groups
from megatron_tempo.rollout.batches import Collected
from megatron_tempo.types import Batch


@dataclass(slots=True)
class Refill:
    """Of one iteration. It is the same on every rank: it reads only columns."""

    stage: StageConfig
    half: Prompts  # whose groups are compared
    limit: int
    judged: int = 0  # groups so far
    agreed: int = 0  # of those that stay in the batch
    dropped: list[str] = field(default_factory=list)  # the ids of their prompts
    verdicts: float = 0.0  # the sum over all responses so far
    responses: int = 0

    @classmethod
    def of(cls, stage: StageConfig, iteration: int) -> Refill | None:
        """None if the stage has none, or if this iteration does not train the actor."""
        half = stage.refilled
        if stage.refill_limit is None or half is None or stage.warms_up(iteration):
            return None
        return cls(stage, half, stage.refill_limit)

    def unwanted(self, collected: Collected, first: int, last: int) -> list[int]:
        """Of new groups, the numbers of those to be replaced. `first` to `last` - 1 are the half's."""
        self._count(collected.columns, first, last)
        agree = agreeing_groups(collected.columns, self.stage, len(collected.prompts))[first:last]
        numbers = [first + i for i in agree.nonzero().flatten().tolist()]
        self.judged += last - first
        chosen = numbers[: max(0, self.limit - self.judged)]
        self.agreed += len(numbers) - len(chosen)
        self.dropped += [collected.prompts[number].id for number in chosen]
        return chosen

    def _count(self, columns: Batch, first: int, last: int) -> None:
        """Count the verdicts on groups that are new, also on those that will be dropped."""
        if self.half is Prompts.labelled and columns.correct is not None:
            of_half = (columns.group >= first) & (columns.group < last)
            self.verdicts += float(columns.correct[of_half].double().sum())
            self.responses += int(of_half.sum())

    def metrics(self) -> dict[str, float]:
        """What was asked for and thrown away in this iteration."""
        found = {
            "refill/asked": float(self.judged),
            "refill/dropped": float(len(self.dropped)),
            "refill/agreeing": float(self.agreed),
            "refill/limit_reached": float(self.agreed > 0),
        }
        if self.responses:
            found["reward/labelled_asked"] = self.verdicts / self.responses
        return found
