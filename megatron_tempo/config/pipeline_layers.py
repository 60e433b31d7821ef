"""Which layers of a model each pipeline stage has, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class PipelineLayers:
    """How a model's layers are divided over pipeline stages.

    `first`, `last`: layers of the first and of the last stage, as Megatron's `num_layers_in_first_pipeline_stage` and
    `num_layers_in_last_pipeline_stage`; None: like the other stages.

    The other stages have equally many layers. A remainder goes to stages before the last one, one layer each, the later
    ones first: the last stage also has the output layer, and earlier stages hold more micro-batches under 1F1B.

    >>> PipelineLayers(8).counts(36)
    (4, 4, 4, 5, 5, 5, 5, 4)
    >>> PipelineLayers(4, last=6).counts(36)
    (10, 10, 10, 6)
    """

    stages: int = 1
    first: int | None = None
    last: int | None = None

    def counts(self, layers: int) -> tuple[int, ...]:
        """Layers of each stage of a model with `layers` layers. The rules of `config.rules.layout` hold."""
        return _counts(self, layers)

    def ranges(self, layers: int) -> list[range]:
        """The layers of each stage, counted over the whole model."""
        counts = self.counts(layers)
        ends = list(accumulate(counts))
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def is_even(self, layers: int) -> bool:
        """Whether all stages have equally many layers."""
        return len(set(self.counts(layers))) == 1


@lru_cache(maxsize=1024)  # a search of layouts asks millions of times
def _counts(split: PipelineLayers, layers: int) -> tuple[int, ...]:
    given = {0: split.first, split.stages - 1: split.last}
    counts = {stage: count for stage, count in given.items() if count is not None}
    free = [stage for stage in range(split.stages) if stage not in counts]
    each, more = divmod(layers - sum(counts.values()), len(free)) if free else (0, 0)
    counts |= dict.fromkeys(free, each)
    for stage in [stage for stage in free if stage < split.stages - 1][::-1][:more]:
        counts[stage] += 1
    return tuple(counts[stage] for stage in range(split.stages))
