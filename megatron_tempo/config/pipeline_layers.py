"""Which layers of a model each pipeline stage has, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class PipelineLayers:
    """How a model's layers are divided over pipeline stages.

    `first`, `last`: layers of the first and of the last stage, as Megatron's `num_layers_in_first_pipeline_stage` and
    `num_layers_in_last_pipeline_stage`; None: like the other stages. `virtual`: chunks of each stage, as Megatron's
    `virtual_pipeline_model_parallel_size`. Chunk c of stage s is part c * stages + s of the model.

    The other stages have equally many layers. A remainder goes to parts before the last one, one layer each, the later
    ones first: the last part also has the output layer, and earlier stages hold more micro-batches under 1F1B.

    >>> PipelineLayers(8).counts(36)
    (4, 4, 4, 5, 5, 5, 5, 4)
    >>> PipelineLayers(4, last=6).counts(36)
    (10, 10, 10, 6)
    >>> PipelineLayers(2, virtual=2).chunks(8)
    ((range(0, 2), range(4, 6)), (range(2, 4), range(6, 8)))
    """

    stages: int = 1
    first: int | None = None
    last: int | None = None
    virtual: int = 1

    def counts(self, layers: int) -> tuple[int, ...]:
        """Layers of each stage of a model with `layers` layers. The rules of `config.rules.layout` hold."""
        return _counts(self, layers)

    def chunks(self, layers: int) -> tuple[tuple[range, ...], ...]:
        """The layers of each chunk of each stage, counted over the whole model."""
        return _chunks(self, layers)

    def is_even(self, layers: int) -> bool:
        """Whether all chunks of all stages have equally many layers."""
        return len({len(chunk) for chunks in self.chunks(layers) for chunk in chunks}) == 1


# A search of layouts asks for both millions of times.
@lru_cache(maxsize=1024)
def _counts(split: PipelineLayers, layers: int) -> tuple[int, ...]:
    return tuple(sum(map(len, chunks)) for chunks in _chunks(split, layers))


@lru_cache(maxsize=1024)
def _chunks(split: PipelineLayers, layers: int) -> tuple[tuple[range, ...], ...]:
    parts = range(split.stages * split.virtual)
    given = {0: split.first, split.stages - 1: split.last}
    of_stage = {stage: count // split.virtual for stage, count in given.items() if count is not None}
    counts = {part: of_stage[part % split.stages] for part in parts if part % split.stages in of_stage}
    free = [part for part in parts if part not in counts]
    each, more = divmod(layers - sum(counts.values()), len(free)) if free else (0, 0)
    counts |= dict.fromkeys(free, each)
    for part in [part for part in free if part < parts[-1]][::-1][:more]:
        counts[part] += 1
    ends = list(accumulate(counts[part] for part in parts))
    ranges = [range(end - counts[part], end) for part, end in zip(parts, ends, strict=True)]
    return tuple(tuple(ranges[stage :: split.stages]) for stage in range(split.stages))


def micro_batch_group(count: int, stages: int) -> int:
    """Micro-batches that pass a chunk one after the other, before the rank turns to its next chunk.

    Megatron's schedule needs groups of at least one micro-batch for each stage, also the last group. Small groups keep
    less activations. `count` is at least `stages`.
    """
    return next(size for size in range(stages, count + 1) if count % size == 0 or count % size >= stages)
