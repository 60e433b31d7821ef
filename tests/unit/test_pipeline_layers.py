"""How layers are divided over pipeline stages: tables by hand, and Megatron's own numbering of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_tempo.config.choices import Precision
from megatron_tempo.config.pipeline_layers import PipelineLayers, micro_batch_group
from megatron_tempo.config.schema import CriticLayoutConfig, ParallelConfig
from megatron_tempo.models.families import block_spec, transformer_config
from megatron_tempo.models.parallel import Layout
from tests.support.shapes import qwen3_shape

# stages, layers of the first, of the last, layers: of each stage
TABLE = [
    ((1, None, None, 7), (7,)),
    ((4, None, None, 36), (9, 9, 9, 9)),
    ((8, None, None, 36), (4, 4, 4, 5, 5, 5, 5, 4)),
    ((2, None, None, 5), (3, 2)),
    ((4, None, None, 7), (2, 2, 2, 1)),
    ((3, None, None, 4), (1, 2, 1)),
    ((5, None, None, 5), (1, 1, 1, 1, 1)),
    ((4, 3, None, 36), (3, 11, 11, 11)),
    ((4, None, 6, 36), (10, 10, 10, 6)),
    ((4, None, 7, 36), (9, 10, 10, 7)),
    ((4, 8, None, 36), (8, 9, 10, 9)),
    ((4, 7, 6, 36), (7, 11, 12, 6)),
    ((2, 20, None, 36), (20, 16)),
    ((2, None, 10, 36), (26, 10)),
    ((2, 20, 16, 36), (20, 16)),
]


@pytest.mark.parametrize(("given", "counts"), TABLE)
def test_layers_of_each_stage_by_hand(given: tuple[int, int | None, int | None, int], counts: tuple[int, ...]) -> None:
    *split, layers = given
    divided = PipelineLayers(*split)
    assert divided.counts(layers) == counts
    assert [len(of_stage) for of_stage in divided.chunks(layers)] == [1] * len(counts)
    assert [layer for (of_stage,) in divided.chunks(layers) for layer in of_stage] == list(range(layers))
    assert divided.is_even(layers) == (len(set(counts)) == 1)


@pytest.mark.parametrize("layers", range(1, 50))
def test_every_layer_is_on_one_stage_and_no_stage_is_more_than_a_layer_larger(layers: int) -> None:
    for stages in range(1, layers + 1):
        counts = PipelineLayers(stages).counts(layers)
        assert sum(counts) == layers
        assert max(counts) - min(counts) <= 1
        assert counts[-1] == layers // stages, "the last stage, which has the output layer, has no more than others"


# stages, layers of the first, of the last, chunks, layers: layers of each chunk of each stage
VIRTUAL = [
    # Megatron-Core's own examples (transformer_block.py, `get_num_layers_to_build`)
    ((2, None, None, 4, 8), [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]),
    ((2, None, None, 2, 8), [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    # 7 layers in 4 parts: 2, 2, 2, 1
    ((2, None, None, 2, 7), [[[0, 1], [4, 5]], [[2, 3], [6]]]),
    # 8 layers in 6 parts: 1, 1, 1, 2, 2, 1
    ((3, None, None, 2, 8), [[[0], [3, 4]], [[1], [5, 6]], [[2], [7]]]),
    # 2 layers of the first stage in two chunks; the other 7 in four: 1, 2, 2, 2, of which the last part gets none more
    ((3, 2, None, 2, 9), [[[0], [5]], [[1, 2], [6, 7]], [[3, 4], [8]]]),
    ((2, 2, 6, 2, 8), [[[0], [4]], [[1, 2, 3], [5, 6, 7]]]),
]


@pytest.mark.parametrize(("given", "chunks"), VIRTUAL)
def test_layers_of_each_chunk_by_hand(given: tuple[int, Any, Any, int, int], chunks: list[list[list[int]]]) -> None:
    *split, layers = given
    divided = PipelineLayers(*split)
    assert [[list(chunk) for chunk in stage] for stage in divided.chunks(layers)] == chunks
    assert divided.counts(layers) == tuple(sum(map(len, stage)) for stage in chunks)


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_groups_of_micro_batches_are_those_that_megatron_accepts(stages: int) -> None:
    """forward_backward_pipelining_with_interleaving: a group, and the last one, has a micro-batch for each stage."""
    for count in range(stages, 100):
        group = micro_batch_group(count, stages)
        assert stages <= group <= count
        assert count % group == 0 or count % group >= stages
        table = get_schedule_table(count, 2, group)
        assert sorted(table) == [(micro, chunk) for micro in range(count) for chunk in range(2)]
    assert [micro_batch_group(count, 4) for count in (4, 5, 8, 9, 13)] == [4, 5, 4, 5, 7]


def layout_of(rank: int, split: PipelineLayers) -> Layout:
    stages = split.stages
    return Layout(rank, stages, 0, 1, rank, stages, 0, 1, 0, 1, False, split.first, split.last, split.virtual)


SPLITS = [PipelineLayers(3), PipelineLayers(3, 2), PipelineLayers(3, 1, 3), PipelineLayers(3, virtual=2)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_megatron_numbers_layers_as_the_stages_have_them(
    split: PipelineLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers that are built have the numbers by which Megatron saves them."""
    virtual = split.virtual if split.virtual > 1 else None
    state = "megatron.core.parallel_state"
    monkeypatch.setattr(f"{state}.get_virtual_pipeline_model_parallel_world_size", lambda: virtual)
    shape = qwen3_shape(layers=7, hidden=8, heads=4, groups=2, head_dim=2, ffn=16, vocab=32, max_positions=64)
    shape = replace(shape, attention=tuple(replace(shape.attention[0], window=i + 1) for i in range(7)))
    for rank in range(3):
        monkeypatch.setattr(f"{state}.get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        config = transformer_config(shape, layout_of(rank, split), Precision.fp32)
        for chunk, layers in enumerate(split.chunks(7)[rank]):
            assert get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=rank) == layers.start
            built = config.pipeline_model_parallel_layout.get_num_layers_to_build(vp_stage=chunk)
            assert built == len(layers)
            specs = block_spec(config, shape, layout_of(rank, split), chunk).layer_specs
            assert [window_of(spec) for spec in specs] == [i + 1 for i in layers]


def window_of(spec: Any) -> int | None:
    return spec.submodules.self_attention.submodules.core_attention.keywords["window"]


@pytest.mark.parametrize(("first", "last"), [(3, None), (None, 6), (6, 8), (18, 6)])
def test_where_megatron_has_fields_for_it_the_division_is_megatrons(first: int | None, last: int | None) -> None:
    config = TransformerConfig(
        num_layers=36,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=4,
        pipeline_dtype="fp32",
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    starts = [one.start for (one,) in PipelineLayers(4, first, last).chunks(36)]
    assert [get_transformer_layer_offset(config, pp_rank=rank) for rank in range(4)] == starts


@pytest.mark.parametrize(("first", "last"), [(None, None), (2, None), (None, 4), (2, 4)])
def test_where_megatron_divides_chunks_the_division_is_megatrons(first: int | None, last: int | None) -> None:
    """32 layers and the given ends over four stages of two chunks; Megatron has no remainder."""
    ends = [8 if count is None else count for count in (first, last)]
    config = TransformerConfig(
        num_layers=16 + sum(ends),
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=2,
        pipeline_dtype="fp32",
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    chunks = PipelineLayers(4, first, last, virtual=2).chunks(config.num_layers)
    for rank in range(4):
        offsets = [get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=rank) for chunk in range(2)]
        assert offsets == [layers.start for layers in chunks[rank]]


def test_the_critic_has_the_actors_ends_if_it_has_as_many_stages() -> None:
    parallel = ParallelConfig(pipeline=4, num_layers_in_first_pipeline_stage=3)
    parallel.critic = CriticLayoutConfig(tensor=2)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(4, 3)
    parallel.critic = CriticLayoutConfig(pipeline=2)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(2)
    parallel.critic = CriticLayoutConfig(pipeline=2, num_layers_in_last_pipeline_stage=5)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(2, None, 5)
    parallel.virtual_pipeline = 2
    parallel.critic = CriticLayoutConfig(pipeline=2)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(2)
    parallel.critic = CriticLayoutConfig(virtual_pipeline=1)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(4, 3)
    parallel.virtual_pipeline = 1
    parallel.critic = CriticLayoutConfig(num_layers_in_first_pipeline_stage=2)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(4, 2)
