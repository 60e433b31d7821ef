"""What the planner predicts of memory, against the storages that are alive in real processes, by part and by phase."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_tempo.config import Config
from megatron_tempo.config.choices import Device, Logits, Recompute
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.method_settings import Baseline, PpoSettings
from megatron_tempo.config.schema import CriticLayoutConfig, ParallelConfig
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.plan.layout import PlannedMicroBatch
from megatron_tempo.plan.memory import MemoryPhase, Part, place_memory
from megatron_tempo.plan.parameters import Role
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.training.context import open_context
from megatron_tempo.training.setup import build_actor, build_critic
from megatron_tempo.types import Batch
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks
from tests.support.storages import Storages, bytes_of
from tests.support.tiny import one_version

# name: processes, and the layout
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "tp2-stored": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp1-attention": (1, {"recompute": Recompute.attention}),
    "pp2-critic-tp2": (2, {"pipeline": 2, "critic": CriticLayoutConfig(tensor=2, pipeline=1, sequence=True)}),
    "offload": (1, {"offload": True}),
    "tp2-critic-pp2-offload": (
        2,
        {"tensor": 2, "critic": CriticLayoutConfig(tensor=1, pipeline=2), "offload": True},
    ),
    "pp2-first-3": (2, {"pipeline": 2, "num_layers_in_first_pipeline_stage": 3}),
    "pp2-virtual-2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2-layers": (2, {"pipeline": 2, "recompute": Recompute.layers}),
}
# The first has an attention wider than its hidden size, the second a feed-forward part that outweighs the rest.
MODELS = {
    "even": {"hidden_size": 128, "head_dim": 24, "intermediate_size": 320, "vocab_size": 1003},
    "wide": {"hidden_size": 96, "head_dim": 16, "intermediate_size": 512, "vocab_size": 500},
}
PROMPT, RESPONSE, BUDGET, ROWS = 16, 112, 256, 8  # two rows a micro-batch
TOLERANCE = 0.1
MOMENTS = {MemoryPhase.logprobs, MemoryPhase.values, MemoryPhase.actor, MemoryPhase.critic}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    for name, shape in MODELS.items():
        config = transformers.Qwen3Config(
            **shape, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        )  # fmt: skip
        transformers.Qwen3ForCausalLM(config).save_pretrained(out / name)
    return {name: out / name for name in MODELS}


def configured(model: Path, name: str) -> Config:
    config = Config()
    world, layout = LAYOUTS[name]
    config.model.path, config.model.logits = str(model), Logits.stored if "stored" in name else Logits.recomputed
    config.run.device = Device.cpu
    config.parallel = ParallelConfig(world_size=world, micro_batch_tokens=BUDGET, **layout)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = PROMPT, RESPONSE
    config.stage1 = StageConfig(PpoSettings(), 1, labelled_prompts=ROWS, responses_per_prompt=1)
    config.stage1.actor.mini_batch_prompts = config.stage1.critic.mini_batch_prompts = ROWS
    config.cluster = ClusterConfig(gpus_per_node=world, memory_gb=1.0)
    return config


def batch_of_rows(vocab: int) -> Batch:
    """Of the planned length, but for a few tokens: rows of one length need no copies for the attention grid."""
    generator = torch.Generator().manual_seed(0)
    lengths = RESPONSE - torch.arange(ROWS) // 3

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(0, vocab, (count,), generator=generator).int()

    return Batch(
        prompt_ids=tuple(map(str, range(ROWS))),
        group=torch.arange(ROWS),
        prompt_tokens=tokens(ROWS * PROMPT),
        prompt_lengths=torch.full((ROWS,), PROMPT),
        response_tokens=tokens(int(lengths.sum())),
        response_lengths=lengths,
        engine_logprobs=torch.zeros(int(lengths.sum())),
        stopped=torch.ones(ROWS, dtype=torch.bool),
        versions=one_version(lengths),
        correct=torch.ones(ROWS),
    )


def resident(model: TrainedModel) -> dict[Part, int]:
    """What a model holds, by its own objects."""
    parts = getattr(model.optimizer, "chained_optimizers", [model.optimizer])
    states = [t for part in parts for s in part.optimizer.state.values() for t in s.values()]
    return {
        Part.weights: bytes_of(list(model.net.parameters())),
        Part.gradients: bytes_of([buffer.grad_data for buffer in model.module.buffers]),
        Part.optimizer: bytes_of(states),
    }


def measure(config: Config) -> dict[str, Any]:
    """On this rank: its place, bytes of what is resident by part and in all, and what each phase needs beyond it."""
    vocab = json.loads((Path(config.model.path) / "config.json").read_text())["vocab_size"]
    batch, order, stage = batch_of_rows(vocab), [torch.arange(ROWS)], config.stage1
    assert batch.correct is not None
    with open_context(config) as context, Storages() as storages:
        actor, critic = build_actor(context), build_critic(context)

        def parts() -> dict[Part, int]:
            """Of the models that are there."""
            each = [resident(model.model) for model in (actor, critic)]
            return {part: sum(one[part] for one in each) for part in each[0]}

        def there(bytes_: int) -> int:
            """Without the memory in which models wait: on a CPU that counts too."""
            return bytes_ - sum(map(len, context.offloader._hosts.values()))

        def phase(name: MemoryPhase, model: TrainedModel, run: Any) -> Any:
            context.offloader.load(model)
            gc.collect()
            storages.restart()
            result = run()
            # Not beyond what was there just before: Megatron's buffer of gathered states stays from the first pass on.
            measured[name.name] = there(storages.peak) - sum(parts().values())
            return result

        gc.collect()
        measured: dict[str, Any] = {
            "place": {
                Role.actor: context.layouts.actor.pipeline_rank,
                Role.critic: context.layouts.critic.pipeline_rank,
            },
            "parts": parts(),
            "resident": there(storages.now()),
        }
        values = phase(MemoryPhase.values, critic.model, lambda: critic.values(batch))
        old = phase(MemoryPhase.logprobs, actor.model, lambda: actor.logprobs(batch))
        given = Experience(old, values, torch.ones(ROWS))
        phase(MemoryPhase.critic, critic.model, lambda: critic.update(batch, batch.correct, stage.critic, order))
        update = partial(actor.update, batch, given, Baseline.before_token, stage.actor, order)
        phase(MemoryPhase.actor, actor.model, update)
    return measured


CASES = [(name, "even") for name in LAYOUTS] + [(name, "wide") for name in ("tp1", "tp2-sp", "pp2")]
FEW = [(name, "even") for name in ("dp2", "tp2-stored", "tp1-attention", "pp2-critic-tp2", "pp2-virtual-2")]
FEW += [("tp2-critic-pp2-offload", "even"), ("pp2-layers", "even"), ("tp2-sp", "wide")]


@pytest.mark.parametrize(("name", "kind"), matrix(CASES, FEW))
def test_the_plan_is_what_is_measured(models: dict[str, Path], kind: str, name: str, tmp_path: Path) -> None:
    world = LAYOUTS[name][0]
    config = configured(models[kind], name)
    shape, problems = shape_of(config)
    assert shape is not None
    assert problems == []
    count = ROWS * (PROMPT + RESPONSE) // BUDGET // (world // config.parallel.ranks_of_a_replica)
    micro = PlannedMicroBatch(BUDGET, BUDGET * RESPONSE // (PROMPT + RESPONSE), BUDGET, count)
    lines = []
    for rank, measured in enumerate(run_ranks(measure, world, tmp_path / "ranks", config)):
        planned = place_memory(config, shape, measured["place"], micro)
        # The critic, which was built last, or with it the actor.
        held = {part: planned[MemoryPhase.values][part] for part in measured["parts"]}
        rows = [(part.value, size, held[part]) for part, size in measured["parts"].items()]
        rows.append(("resident", measured["resident"], sum(held.values())))
        for phase in MOMENTS:
            moment = sum(size for part, size in planned[phase].items() if part not in held)
            rows.append((phase.value, measured[phase.name], moment))
        lines += [(f"{name} {kind} rank {rank} {what}", size, plan, plan / size - 1) for what, size, plan in rows]
    for line in lines:
        print(f"{line[0]}: measured {line[1]}, planned {line[2]:.0f}, {line[3]:+.1%}")
    assert [line for line in lines if abs(line[3]) > TOLERANCE] == []
