"""Converted checkpoints load in every layout, and those of runs in any layout become the folders that runs export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor

from megatron_tempo.checkpoint.convert import to_hugging_face, to_megatron
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import InputError
from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.training.context import open_context
from megatron_tempo.training.jobs import train
from megatron_tempo.training.setup import build_actor, build_critic
from tests.support.logged import logged
from tests.support.project import RANDOM, config_of, from_nothing, write_project
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model
from tests.support.weights import tensors

PART = 50_000
KINDS = ("untied", *RANDOM)
LAYOUTS = {"tp1": (1, 1, 1), "tp2-pp2": (2, 2, 4)}  # tensor, pipeline, processes


def state(net: PackedGPT) -> dict[str, Tensor]:
    """This rank's shards, and its copy of a tied embedding."""
    return {name: tensor.clone() for name, tensor in net.state_dict().items() if isinstance(tensor, Tensor)}


def differing(net: PackedGPT, checkpoint: Path) -> list[str]:
    """The parameters of a network that a checkpoint does not give the bits that they have."""
    before = state(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    loaded = dist_checkpointing.load(
        {"model": net.sharded_state_dict(metadata=metadata)}, str(checkpoint), strict="raise_all"
    )
    net.load_state_dict(loaded["model"])
    after = state(net)
    assert before.keys() == after.keys()
    assert len(before) > 10
    return [name for name in before if not torch.equal(before[name], after[name])]


def compare(models: dict[str, Path], checkpoints: dict[str, Path], tensor: int, pipeline: int) -> dict[str, list[str]]:
    equal = {}
    config = Config()
    config.parallel.tensor, config.parallel.pipeline = tensor, pipeline
    config.model.path = str(next(iter(models.values())))
    with open_context(config) as context:
        for kind, model in models.items():
            config.model.path = str(model)
            for name, build in (("actor", build_actor), ("critic", build_critic)):
                equal[f"{kind} {name}"] = differing(build(context).model.net, checkpoints[f"{kind} {name}"])
    return equal


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Path]]:
    """Hugging Face folders, and the checkpoints that were made of them."""
    out = tmp_path_factory.mktemp("converted")
    models = {kind: write_model(out / kind, **RANDOM.get(kind, {})) for kind in KINDS}
    models["qwen2"] = write_model(out / "qwen2", family="qwen2")
    checkpoints = {}
    for kind, model in models.items():
        for name in ("actor", "critic"):
            checkpoints[f"{kind} {name}"] = out / f"{kind}-{name}"
            to_megatron(model, checkpoints[f"{kind} {name}"], name, PART)
    return models, checkpoints


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_folder_loads_as_the_folder_does(
    converted: tuple[dict[str, Path], dict[str, Path]], tmp_path: Path, layout: str
) -> None:
    """All that the network asks for is there, and nothing else (`raise_all`)."""
    tensor, pipeline, world = LAYOUTS[layout]
    for result in run_ranks(compare, world, tmp_path, *converted, tensor, pipeline):
        assert set(result) == set(converted[1])
        assert not any(result.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An iteration of training at TP2/PP2, by kind of model."""
    out = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        project = write_project(out / f"{kind}-project", kind)
        config = config_of(project, out / kind)
        if kind in RANDOM:
            from_nothing(config)
        config.parallel.tensor, config.parallel.pipeline, world = LAYOUTS["tp2-pp2"]
        config.parallel.sequence = kind == "mixture"  # Megatron-Core requires it
        config.evaluation.sets, config.evaluation.calibration_set = {}, None
        run_ranks(train, world, out / f"{kind}-ranks", config)
    return {kind: out / kind for kind in KINDS}


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for bucket in tensors(folder) for name, tensor in bucket}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """What a model says of tokens, [rows, tokens, vocabulary or 1].

    Its weights are copied first: as they lie in a mapped file, their addresses decide in which order sums are made.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model(tokens).logits


STEP = "checkpoints/step_00000001"


@pytest.mark.parametrize("model", ["actor", "critic"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_runs_checkpoint_becomes_what_the_run_exports(
    runs: dict[str, Path], tmp_path: Path, kind: str, model: str
) -> None:
    """Config and tokenizer come from where the run's did: `like` is not given."""
    with logged() as messages:
        to_hugging_face(runs[kind] / STEP, tmp_path / "out", model, None, None, PART)
    assert "MANIFEST.json" in messages[0]
    exported = runs[kind] / "hf_step_00000001" / model
    expected, actual = read(exported), read(tmp_path / "out")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((exported / "config.json").read_text())
    assert {path.name for path in exported.iterdir() if path.suffix != ".safetensors"} == {
        path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"
    }
    if (kind, model) == ("olmo3", "critic"):
        return  # transformers has no such class
    auto = transformers.AutoModelForCausalLM if model == "actor" else transformers.AutoModelForTokenClassification
    tokens = torch.arange(10)[None]
    one, other = (logits(auto.from_pretrained(path), tokens) for path in (exported, tmp_path / "out"))
    assert torch.equal(one, other)
    assert one.abs().max() > 0


def test_a_runs_checkpoint_that_is_damaged_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    """Only the files of the model that is asked for are looked at."""
    step = tmp_path / "step"
    step.mkdir()
    for path in (runs["untied"] / STEP).iterdir():
        (step / path.name).symlink_to(path)
    (step / "actor").unlink()
    shutil.copytree(runs["untied"] / STEP / "actor", step / "actor")
    file = step / "actor/__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"step is damaged: actor/__1_0.distcp is .*, was written as"):
        to_hugging_face(step, tmp_path / "out", "actor", None, None, PART)
    assert not (tmp_path / "out.partial").exists()
    to_hugging_face(step, tmp_path / "out", "critic", None, None, PART)


def test_a_run_whose_model_is_gone_needs_another(runs: dict[str, Path], tmp_path: Path) -> None:
    step = tmp_path / "step"
    step.mkdir()
    for path in (runs["untied"] / STEP).iterdir():
        (step / path.name).symlink_to(path)
    state = json.loads((step / "run.json").read_text())
    state["config"]["model"]["path"] = str(tmp_path / "gone")
    (step / "run.json").unlink()
    (step / "run.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"the run was started from .*gone, which does not exist here: give .* --like"):
        to_hugging_face(step, tmp_path / "out", "actor", None, None, PART)
    (step / "critic").unlink()
    with pytest.raises(InputError, match=r"step has no critic: the run did not train one"):
        to_hugging_face(step, tmp_path / "out", "critic", None, None, PART)


def test_from_a_run_to_megatron_again(runs: dict[str, Path], tmp_path: Path) -> None:
    """What a critic's config.json says of its targets stays, and so do its weights."""
    exported = runs["tied"] / "hf_step_00000001/critic"
    to_megatron(exported, tmp_path / "megatron", "critic", PART)
    to_hugging_face(tmp_path / "megatron", tmp_path / "out", "critic", exported, None, PART)
    expected, actual = read(exported), read(tmp_path / "out")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((exported / "config.json").read_text())
