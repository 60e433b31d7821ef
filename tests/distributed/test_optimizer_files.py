"""The optimizer's state on the disk: what Megatron holds, the same numbers in every layout, and old checkpoints."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tempo.checkpoint import manifest
from megatron_tempo.checkpoint.checkpoints import Checkpoints
from megatron_tempo.checkpoint.loading import gathered_form
from megatron_tempo.config.choices import Precision
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.schema import Config, CriticLayoutConfig, ParallelConfig
from megatron_tempo.config.updates import OptimizerConfig
from megatron_tempo.models.gpt import ValueModel
from megatron_tempo.models.megatron_compat.optimizer import optimizer_parts, without_bucket_padding
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.training.context import RunContext, open_context
from megatron_tempo.training.setup import build_actor, build_critic
from megatron_tempo.weights import tables
from megatron_tempo.weights.param_mapping import ParamMapping, ShardedVocab, tensor_part
from tests.support.checkpoints import adam_steps, saved_states
from tests.support.group_reads import refuse_group_reads
from tests.support.ranks import run_ranks
from tests.support.tiny import VOCAB, write_model

# Each layout goes on from the checkpoint that the one before has saved: its processes, and how it shares the work.
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "dp4": (4, ParallelConfig(ddp_bucket_size=1)),  # a bucket of its own, with padding, for each parameter
    "pp2-dp2": (4, ParallelConfig(pipeline=2, ddp_bucket_size=300)),
    "actor tp2, critic pp2": (4, ParallelConfig(tensor=2, critic=CriticLayoutConfig(tensor=1, pipeline=2))),
    "tp2, stages of 1 and 3 layers": (
        4,
        ParallelConfig(tensor=2, pipeline=2, num_layers_in_first_pipeline_stage=1),
    ),
    "cp2": (2, ParallelConfig(context=2)),
}
# The same for a mixture of experts.
EXPERTS = {
    "one": (1, ParallelConfig()),
    "ep4": (4, ParallelConfig(expert=4)),
    "ep2, tp2, sequence": (4, ParallelConfig(tensor=2, sequence=True, expert=2, expert_tensor=1)),
    "ep2-pp2": (4, ParallelConfig(pipeline=2, expert=2, ddp_bucket_size=300)),
    "ep2-etp2": (4, ParallelConfig(expert=2, expert_tensor=2)),
}
KINDS = {"tied": Precision.bf16, "olmo3": Precision.fp32, "qwen2": Precision.fp32}  # by the model
PRECISIONS = {**KINDS, "experts": Precision.bf16}
MODELS = ("actor", "critic")
BEFORE, AFTER = 2, 3  # steps of the optimizer: what is saved and loaded, and one more


@dataclass(frozen=True, slots=True)
class Folders:
    """Checkpoints by kind of model. `first`: of the layout before."""

    models: dict[str, Path]
    first: Path | None
    out: Path


def mappings_of(model: Path, role: str) -> dict[str, ParamMapping]:
    shape = read_model_shape(model)
    return {mapping.megatron: mapping for mapping in tables.mappings(shape, critic=role == "critic")}


def step(model: TrainedModel, number: int, mappings: dict[str, ParamMapping]) -> None:
    """A step of the optimizer with gradients that depend on the number and the parameter alone."""
    with model.at_work():
        names, layout = model.net.names_in_checkpoints(), model.layout
        for parameter, name in names.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{number} {name}".encode()))
            wholes = [torch.randn(shape, generator=generator) for shape in mappings[name].shapes]
            grad: Any = parameter
            grad.main_grad.copy_(mappings[name].sharding.shard(wholes, *tensor_part(mappings[name], layout)))
        model._set_hyperparameters(OptimizerConfig(lr=1e-2, clip_grad=0.0, warmup_steps=0))
        model._update_weights()
        model.optimizer.zero_grad()


def built(context: RunContext) -> dict[str, TrainedModel]:
    models = {"actor": build_actor(context).model, "critic": build_critic(context).model}
    return {name: model for name, model in models.items() if isinstance(model, TrainedModel)}


def goes_on(parallel: ParallelConfig, folders: Folders) -> None:
    """Save what the layout before has saved, or two steps; take a step, and save that."""
    refuse_group_reads()
    config = Config()
    config.parallel, config.model.path = parallel, str(next(iter(folders.models.values())))
    with open_context(config) as context:
        for kind, path in folders.models.items():
            config.run.precision, config.model.path = PRECISIONS[kind], str(path)
            models = built(context)
            tables_by_role = {role: mappings_of(path, role) for role in models}
            checkpoints = Checkpoints(folders.out / kind, 9, context.layouts.actor)
            if folders.first is None:
                for number in range(BEFORE):
                    for role, model in models.items():
                        step(model, number, tables_by_role[role])
            else:
                before = Checkpoints(folders.first / kind, 9, context.layouts.actor)
                before.load(before_it(before), models)
            checkpoints.save(BEFORE, models, {})
            for role, model in models.items():  # while it is written
                step(model, BEFORE, tables_by_role[role])
            checkpoints.save(AFTER, models, {})
            checkpoints.wait()


def before_it(checkpoints: Checkpoints) -> Any:
    """The checkpoint before the newest one."""
    latest = checkpoints.find()
    path = checkpoints.path(BEFORE)
    return type(latest)(path, manifest.read_state(path), ())


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return {
        "tied": write_model(out / "tied", tied=True),
        "olmo3": write_model(out / "olmo3", family="olmo3"),
        "qwen2": write_model(out / "qwen2", family="qwen2"),
    }


@pytest.fixture(scope="module")
def saved(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each layout's checkpoints."""
    out = tmp_path_factory.mktemp("saved")
    first: Path | None = None
    for number, (world, parallel) in enumerate(LAYOUTS.values()):
        folders = Folders(model_folders, first, out / str(number))
        run_ranks(goes_on, world, out / f"ranks{number}", parallel, folders)
        first = folders.out
    return {name: out / str(number) for number, name in enumerate(LAYOUTS)}


def wholes(folder: Path, mappings: dict[str, ParamMapping]) -> dict[str, Tensor]:
    """The optimizer's state as whole Hugging Face tensors, by STATE/NAME."""
    by_parameter: dict[tuple[str, str], list[Tensor]] = {}
    for key, numbers in sorted(saved_states(folder).items()):
        state, parameter, _ = key.split("/")
        by_parameter.setdefault((state, parameter), []).append(numbers)
    found = {}
    for (state, parameter), shards in by_parameter.items():
        mapping = mappings[parameter]
        tensors = [torch.full(shape, torch.nan) for shape in mapping.shapes]
        meta = [torch.empty(shape, device="meta") for shape in mapping.shapes]
        for rank, numbers in enumerate(shards):
            shape = mapping.sharding.shard(meta, rank, len(shards)).shape
            mapping.sharding.scatter(numbers.view(shape), tensors, rank, len(shards))
        found |= {f"{state}/{name}": tensor for name, tensor in zip(mapping.names, tensors, strict=True)}
    return found


def weights(folder: Path, mappings: dict[str, ParamMapping]) -> dict[str, Tensor]:
    """Megatron's reading of the weights, without the rows that fill up a vocabulary."""
    padded = {name for name, mapping in mappings.items() if isinstance(mapping.sharding, ShardedVocab)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = dist_checkpointing.load_plain_tensors(str(folder))
    finally:
        dist.destroy_process_group()
    tensors = {name: tensor for name, tensor in plain.items() if isinstance(tensor, Tensor)}
    return {name: tensor[:VOCAB] if name in padded else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("role", MODELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_goes_on_from_the_one_before(
    saved: dict[str, Path], model_folders: dict[str, Path], name: str, kind: str, role: str
) -> None:
    """To the bit: the state as it was loaded, and the state and the weights after one more step."""
    mappings = mappings_of(model_folders[kind], role)
    for number in (BEFORE, AFTER):
        here, there = (saved[one] / kind / f"step_{number:08d}" / role for one in (name, "one"))
        assert adam_steps(here / "optimizer") == number
        found, expected = wholes(here / "optimizer", mappings), wholes(there / "optimizer", mappings)
        assert len(expected) == 3 * sum(len(mapping.names) for mapping in mappings.values())
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
        loaded, wanted = weights(here, mappings), weights(there, mappings)
        assert loaded.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(loaded[key], wanted[key])] == []
    assert not torch.equal(expected["main/model.norm.weight"], torch.ones(32)), "the steps changed the weights"


@pytest.fixture(scope="module")
def saved_experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A mixture of experts, and the folder of each layout's checkpoints of it."""
    out = tmp_path_factory.mktemp("experts")
    model = write_model(out / "model", family="qwen3_moe", layers=2)
    first: Path | None = None
    for number, (world, parallel) in enumerate(EXPERTS.values()):
        run_ranks(
            goes_on, world, out / f"ranks{number}", parallel, Folders({"experts": model}, first, out / str(number))
        )
        first = out / str(number)
    return model, {name: out / str(number) for number, name in enumerate(EXPERTS)}


@pytest.mark.parametrize("role", MODELS)
@pytest.mark.parametrize("name", EXPERTS)
def test_every_layout_of_experts_goes_on_from_the_one_before(
    saved_experts: tuple[Path, dict[str, Path]], name: str, role: str
) -> None:
    model, saved = saved_experts
    test_every_layout_goes_on_from_the_one_before(saved, {"experts": model}, name, "experts", role)


class Sent(TorchDispatchMode):
    """Notes the bytes of each collective of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [one for one in torch.utils._pytree.tree_leaves(args) if isinstance(one, Tensor)]
            self.bytes.append(sum(one.nbytes for one in tensors))
        return func(*args, **(kwargs or {}))


def held(model: TrainedModel) -> dict[str, Tensor]:
    """Megatron's own gather of its states: whole shards, flat, by STATE/PARAMETER/tensor rank."""
    names, found = model.net.names_in_checkpoints(), {}
    with without_bucket_padding(model.optimizer):
        for part in optimizer_parts(model.optimizer):
            gathered = part.get_parameter_state_dp_zero(use_gloo_comm=False, empty_data=False, return_on_all_ranks=True)
            for index, buffer in enumerate(part.buffers):
                ((_, states),) = gathered[index].items()
                for parameter, (start, stop, _) in buffer.param_index_map.items():
                    for ours, theirs in (("main", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
                        key = f"{ours}/{names[parameter]}/{model.layout.tensor_rank}"
                        found[key] = states[theirs][start:stop].clone()
    return found


def gathered_and_sent(model: Path, folder: Path) -> tuple[dict[str, dict[str, Tensor]], list[int]]:
    """What Megatron gathers of each model's optimizer, and the bytes of each collective until `save` returns."""
    config = Config()
    config.parallel, config.model.path = ParallelConfig(pipeline=2), str(model)
    with open_context(config) as context:
        models = built(context)
        for role, one in models.items():
            step(one, 0, mappings_of(model, role))
        checkpoints = Checkpoints(folder, 1, context.layouts.actor)
        with Sent() as sent:
            checkpoints.save(1, models, {})
        checkpoints.wait()
        found = {}
        for role, one in models.items():
            with one.at_work():
                found[role] = held(one)
        return found, sent.bytes


def test_the_files_hold_what_megatron_gathers_and_a_save_sends_nothing_of_it(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    results = run_ranks(gathered_and_sent, 4, tmp_path / "ranks", model_folders["tied"], tmp_path / "steps")
    for role in MODELS:
        folder = tmp_path / "steps/step_00000001" / role / "optimizer"
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["index.json", *(f"rank_{rank:05d}.safetensors" for rank in range(4))]
        found = saved_states(folder)
        expected = {key: tensor for result, _ in results for key, tensor in result[role].items()}
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    for _, sent in results:  # the size of the checkpoint, whether the disk has room
        assert len(sent) <= 3
        assert max(sent) <= 16


def writes_as_before(model: Path, folder: Path) -> None:
    """A checkpoint as versions before this one wrote it: Megatron's gathered form, and a run.json without a format."""
    config = Config()
    config.parallel, config.model.path = ParallelConfig(pipeline=2), str(model)
    with open_context(config) as context:
        path = folder / f"step_{BEFORE:08d}"
        models = built(context)
        for role, one in models.items():
            for number in range(BEFORE):
                step(one, number, mappings_of(model, role))
            if context.is_writer:
                (path / role).mkdir(parents=True)
            dist.barrier()
            with one.at_work(), without_bucket_padding(one.optimizer):
                metadata = gathered_form(one.layout)
                state = one.net.sharded_state_dict(metadata=metadata)
                optimizer = one.optimizer.sharded_state_dict(state, is_loading=False, metadata=metadata)
                dist_checkpointing.save({"model": state, "optimizer": optimizer}, str(path / role))
        if context.is_writer:
            steps = {"step": BEFORE, "optimizer_steps": dict.fromkeys(models, BEFORE)}
            (path / manifest.STATE).write_text(json.dumps(steps))
            manifest.write(path, manifest.digests(path, manifest.files(path)))
        dist.barrier()


def loads_the_old(parallel: ParallelConfig, model: Path, old: Path, out: Path) -> None:
    config = Config()
    config.parallel, config.model.path = parallel, str(model)
    with open_context(config) as context:
        models = built(context)
        checkpoints, written = (Checkpoints(folder, 9, context.layouts.actor) for folder in (old, out))
        written.reserve(models)  # as at a run's start; Megatron's loading then replaces the optimizer's tensors
        checkpoints.load(checkpoints.find(), models)
        for role, one in models.items():
            assert isinstance(one.net, ValueModel) == (role == "critic")
            step(one, BEFORE, mappings_of(model, role))
        written.save(AFTER, models, {})
        written.wait()


def test_a_run_goes_on_from_a_checkpoint_of_an_earlier_version(
    saved: dict[str, Path], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = model_folders["olmo3"]
    run_ranks(writes_as_before, 4, tmp_path / "before", model, tmp_path / "old")
    run_ranks(loads_the_old, 2, tmp_path / "ranks", ParallelConfig(tensor=2), model, tmp_path / "old", tmp_path / "new")
    for role in MODELS:
        mappings = mappings_of(model, role)
        found = wholes(tmp_path / f"new/step_{AFTER:08d}" / role / "optimizer", mappings)
        expected = wholes(saved["one"] / f"olmo3/step_{AFTER:08d}" / role / "optimizer", mappings)
        assert adam_steps(tmp_path / f"new/step_{AFTER:08d}" / role / "optimizer") == AFTER
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
