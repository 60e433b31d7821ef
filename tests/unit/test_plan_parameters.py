"""Parameter counts against transformers' own models of the published shapes, and shapes read from config.json."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_tempo.config.choices import Published
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.plan.layout import PlannedLayout, PlannedMachine
from megatron_tempo.plan.parameters import (
    Role,
    active_parameters,
    expert_parameters,
    layer_parameters,
    owned,
    parameters,
    resident,
    total_parameters,
)
from megatron_tempo.plan.shapes import ENTRIES, PUBLISHED, shape_of
from tests.support.shapes import qwen3_shape
from tests.support.tiny import write_model
from tests.unit.config_files import configure

# Written down, so that a wrong entry shows even if both counts agree.
COUNTS = {
    Published.qwen3_4b: 4_022_468_096,
    Published.qwen3_8b: 8_190_735_360,
    Published.qwen3_14b: 14_768_307_200,
    Published.qwen3_32b: 32_762_123_264,
    Published.olmo3_7b: 7_298_011_136,
    Published.qwen3_30b_a3b: 30_532_122_624,
    Published.qwen2_5_1_5b: 1_543_714_304,
    Published.qwen2_5_3b: 3_085_938_688,
    Published.qwen2_5_7b: 7_615_616_512,
    Published.qwen2_5_14b: 14_770_033_664,
    Published.qwen2_5_32b: 32_763_876_352,
    Published.llama3_2_1b: 1_235_814_400,
    Published.llama3_2_3b: 3_212_749_824,
    Published.llama3_1_8b: 8_030_261_248,
    Published.llama3_1_70b: 70_553_706_496,
}


def own_config(name: Published) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(**ENTRIES[name])


@pytest.mark.parametrize("name", Published)
def test_counts_are_those_of_transformers(name: Published) -> None:
    config = own_config(name)
    with torch.device("meta"):
        actor = transformers.AutoModelForCausalLM.from_config(config)
    assert total_parameters(PUBLISHED[name]) == COUNTS[name] == sum(p.numel() for p in actor.parameters())
    head = sum(p.numel() for n, p in actor.named_parameters() if n.startswith("lm_head"))
    critic = total_parameters(PUBLISHED[name]) - head + config.hidden_size + 1
    assert total_parameters(PUBLISHED[name], Role.critic) == critic


@pytest.mark.parametrize("name", Published)
def test_a_config_json_gives_the_published_shape(name: Published, tmp_path: Path) -> None:
    own_config(name).save_pretrained(tmp_path)
    shape, problems = shape_of(configure([f"model.path={tmp_path}"]))
    assert problems == []
    assert shape == PUBLISHED[name]


@pytest.mark.parametrize(
    ("text", "wrong"), [(None, "has no config.json"), ("{", "ends too early"), ("{}", "model_type is null")]
)
def test_a_folder_that_cannot_be_read(text: str | None, wrong: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    shape, (problem,) = shape_of(configure([f"model.path={tmp_path}", "model.shape=qwen3_8b"]))
    assert shape is None
    assert problem.field == "model.path"
    assert wrong in problem.wrong


# Two layers of 8 numbers: attention 8 (2 x 8 + 2 x 4) = 192, feed-forward 3 x 8 x 16 = 384, norms 2 x 8 + 2 x 2 = 20.
TINY = qwen3_shape(layers=2, hidden=8, heads=4, groups=2, head_dim=2, ffn=16, vocab=32, max_positions=64)


def test_shards_by_hand() -> None:
    assert total_parameters(TINY) == 2 * 596 + 2 * 256 + 8
    assert total_parameters(TINY, Role.critic) == 2 * 596 + 256 + 8 + 9
    half = 96 + 192 + 20
    stages = [parameters(TINY, PlannedLayout(tensor=2, pipeline=2), Role.actor, stage) for stage in (0, 1)]
    assert stages == [half + 128, half + 128 + 8]
    assert parameters(TINY, PlannedLayout(tensor=2, pipeline=2), Role.critic, 1) == half + 8 + 9


def test_uneven_stages_by_hand() -> None:
    """Three layers of 596 parameters over two stages: two and one; or one and two."""
    three = qwen3_shape(layers=3, hidden=8, heads=4, groups=2, head_dim=2, ffn=16, vocab=32, max_positions=64)
    for layout, counts in (
        (PlannedLayout(pipeline=2), (2, 1)),
        (PlannedLayout(pipeline=2, last_stage_layers=2), (1, 2)),
    ):
        stages = [parameters(three, layout, Role.actor, stage) for stage in (0, 1)]
        assert stages == [counts[0] * 596 + 256, counts[1] * 596 + 8 + 256]
        assert sum(stages) == total_parameters(three)


def test_a_tied_matrix_is_there_twice_under_pipeline_parallelism() -> None:
    tied = qwen3_shape(2, 8, 4, 2, 2, 16, 32, 64, tied=True)
    assert parameters(tied, PlannedLayout(), Role.actor, 0) == total_parameters(tied)
    stages = sum(parameters(tied, PlannedLayout(pipeline=2), Role.actor, stage) for stage in (0, 1))
    assert stages == total_parameters(tied) + 256


def test_bytes_of_a_parameter() -> None:
    count = parameters(TINY, PlannedLayout(data=2), Role.actor, 0)
    bf16, fp32 = (resident(TINY, PlannedLayout(data=2), PlannedMachine(size), Role.actor, 0) for size in (2, 4))
    assert (bf16.weights, bf16.gradients, bf16.optimizer) == (2 * count, 4 * count, 12 * count / 2)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * count, 4 * count, 8 * count / 2)


def test_published_size_of_the_mixture_of_experts() -> None:
    """Qwen's model card: 30.5 billion parameters, of which 3.3 billion are active."""
    shape = PUBLISHED[Published.qwen3_30b_a3b]
    assert total_parameters(shape) == 30_532_122_624
    assert round(active_parameters(shape) / 1e9, 2) == 3.35


@pytest.mark.parametrize(
    "layout",
    [
        PlannedLayout(expert=8, data=8),
        PlannedLayout(tensor=4, expert=4, expert_tensor=1, data=1, sequence=True),
        PlannedLayout(tensor=4, expert=2, data=2, sequence=True),
        PlannedLayout(tensor=2, pipeline=3, expert=4, expert_tensor=1, data=4, context=2),
    ],
)
def test_ranks_hold_all_experts_and_their_state_once(layout: PlannedLayout) -> None:
    """Over the ranks of a stage, each expert's parameter is there `expert_data` times, and its optimizer state once."""
    shape = PUBLISHED[Published.qwen3_30b_a3b]
    assert shape.experts is not None
    whole = shape.layers * shape.experts.count * 3 * shape.experts.ffn * shape.hidden
    ranks, stages = layout.world // layout.pipeline, range(layout.pipeline)
    on_ranks = sum(expert_parameters(shape, layout, stage) * ranks for stage in stages)
    assert on_ranks == whole * layout.expert_data
    dense = sum(
        parameters(shape, layout, Role.actor, stage) - expert_parameters(shape, layout, stage) for stage in stages
    )
    state = sum(owned(shape, layout, Role.actor, stage) * ranks for stage in stages)
    assert state == pytest.approx(whole + dense * layout.tensor)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_of_families_without_norms_of_queries_are_those_of_transformers(
    tmp_path: Path, family: str, tied: bool
) -> None:
    folder = write_model(tmp_path, family=family, tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    shape = read_model_shape(folder)
    assert total_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    # Biases are divided over tensor ranks, norms are not.
    halves = 2 * layer_parameters(shape, 2)
    assert halves == layer_parameters(shape) + 2 * shape.hidden
