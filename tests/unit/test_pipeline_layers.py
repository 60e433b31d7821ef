"""How layers are divided over pipeline stages: tables by hand, and Megatron's own numbering of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_tempo.config.choices import Precision
from megatron_tempo.config.pipeline_layers import PipelineLayers
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
    assert [len(of_stage) for of_stage in divided.ranges(layers)] == list(counts)
    assert [layer for of_stage in divided.ranges(layers) for layer in of_stage] == list(range(layers))
    assert divided.is_even(layers) == (len(set(counts)) == 1)


@pytest.mark.parametrize("layers", range(1, 50))
def test_every_layer_is_on_one_stage_and_no_stage_is_more_than_a_layer_larger(layers: int) -> None:
    for stages in range(1, layers + 1):
        counts = PipelineLayers(stages).counts(layers)
        assert sum(counts) == layers
        assert max(counts) - min(counts) <= 1
        assert counts[-1] == layers // stages, "the last stage, which has the output layer, has no more than others"


def layout_of(rank: int, split: PipelineLayers) -> Layout:
    stages = split.stages
    return Layout(rank, stages, 0, 1, rank, stages, 0, 1, 0, 1, False, split.first, split.last)


@pytest.mark.parametrize("split", [PipelineLayers(3), PipelineLayers(3, 2), PipelineLayers(3, 1, 3)], ids=str)
def test_megatron_numbers_layers_as_the_stages_have_them(
    split: PipelineLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers that are built have the numbers by which Megatron saves them."""
    shape = qwen3_shape(layers=7, hidden=8, heads=4, groups=2, head_dim=2, ffn=16, vocab=32, max_positions=64)
    shape = replace(shape, attention=tuple(replace(shape.attention[0], window=i + 1) for i in range(7)))
    for rank in range(3):
        monkeypatch.setattr("megatron.core.parallel_state.get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        config = transformer_config(shape, layout_of(rank, split), Precision.fp32)
        first = get_transformer_layer_offset(config, pp_rank=rank)
        assert first == split.ranges(7)[rank].start
        assert config.pipeline_model_parallel_layout.get_num_layers_to_build() == split.counts(7)[rank]
        specs = block_spec(config, shape, layout_of(rank, split)).layer_specs
        assert [window_of(spec) for spec in specs] == [i + 1 for i in split.ranges(7)[rank]]


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
    ranges = PipelineLayers(4, first, last).ranges(36)
    assert [get_transformer_layer_offset(config, pp_rank=rank) for rank in range(4)] == [one.start for one in ranges]


def test_the_critic_has_the_actors_ends_if_it_has_as_many_stages() -> None:
    parallel = ParallelConfig(pipeline=4, num_layers_in_first_pipeline_stage=3)
    parallel.critic = CriticLayoutConfig(tensor=2)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(4, 3)
    parallel.critic = CriticLayoutConfig(pipeline=2)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(2)
    parallel.critic = CriticLayoutConfig(pipeline=2, num_layers_in_last_pipeline_stage=5)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(2, None, 5)
    parallel.critic = CriticLayoutConfig(num_layers_in_first_pipeline_stage=2)
    assert parallel.of_critic().pipeline_layers == PipelineLayers(4, 2)
