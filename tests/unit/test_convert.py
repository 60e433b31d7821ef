"""Hugging Face folders to Megatron checkpoints and back: what is kept, what is refused, what is done again."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tempo import cli
from megatron_tempo.checkpoint import convert, resumable_folder
from megatron_tempo.checkpoint.convert import to_hugging_face, to_megatron
from megatron_tempo.commands.convert import SCRIPTS
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.errors import InputError
from megatron_tempo.files import temporaries_in
from megatron_tempo.runtime.folder_lock import FolderLock
from megatron_tempo.weights import distributed
from megatron_tempo.weights.export import TARGETS, _is_exported, critic_changes
from megatron_tempo.weights.files import write_safetensors
from megatron_tempo.weights.folder import INDEX, ORIGIN, tensor_files
from tests.support.logged import logged
from tests.support.tiny import VOCAB, write_model
from tests.support.tools import TOOLS
from tests.support.weights import tensors

PART = 50_000  # bytes: some parts for each model
ROW_BYTES = 32 * 4


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for bucket in tensors(folder) for name, tensor in bucket}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, types and bytes."""
    return one.keys() == other.keys() and all(
        one[name].dtype is other[name].dtype and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Change a folder's tensors; two files, and an index, take the place of one."""
    weights = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in halves.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def with_odd_numbers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """bfloat16, with numbers that are lost where a number is made another type and back, or computed with."""
    converted = {name: tensor.bfloat16() for name, tensor in weights.items()}
    head = converted["model.layers.1.mlp.down_proj.weight"]
    head.view(torch.int16)[0, :4] = torch.tensor([0x7FC1, -32768, 0x0001, 0x7F80], dtype=torch.int16)
    return converted


def in_bfloat16(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


def repeated_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}


def as_critic(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """In bfloat16, but for the head."""
    converted = {name: tensor.bfloat16() for name, tensor in weights.items() if name != "lm_head.weight"}
    return converted | {"score.weight": torch.randn(1, 32), "score.bias": torch.randn(1)}


def write_critic(folder: Path) -> Path:
    rewrite(write_model(folder, tied=False), as_critic)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | critic_changes(read_model_shape(folder), None) | {TARGETS: "plus_minus_one"})
    )
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "untied": lambda folder: write_model(folder, tied=False),
    "tied": lambda folder: write_model(folder, tied=True),
    "bfloat16": lambda folder: rewrite(write_model(folder, tied=False), with_odd_numbers),
    "tied, head repeated": lambda folder: rewrite(write_model(folder, tied=True), repeated_head),
    "critic": write_critic,
    "olmo3": lambda folder: write_model(folder, family="olmo3"),
    "llama": lambda folder: write_model(folder, family="llama", tied=True),
    "qwen2": lambda folder: write_model(folder, family="qwen2"),
    "experts": lambda folder: rewrite(write_model(folder, family="qwen3_moe", layers=2), in_bfloat16),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(distributed, "CHUNK_BYTES", 20 * ROW_BYTES)  # a vocabulary in chunks
    folder = FOLDERS[name](tmp_path / "folder")
    model = "critic" if name == "critic" else "actor"
    with logged() as messages:
        size = to_megatron(folder, tmp_path / "megatron", model, PART)
    assert size == sum(path.stat().st_size for path in (tmp_path / "megatron").iterdir())
    assert len(messages) == len(list((tmp_path / "megatron").glob("*.distcp"))) - 1 > 1
    with logged() as messages:
        size = to_hugging_face(tmp_path / "megatron", tmp_path / "back", model, folder, None, PART)
    assert size == sum(path.stat().st_size for path in (tmp_path / "back").iterdir())
    shards = list((tmp_path / "back").glob("*.safetensors"))
    assert len(messages) == len(shards) > 1
    assert all(path.stat().st_size < PART + 5000 for path in shards)  # and the header
    expected = read(folder)
    if "head repeated" in name:
        del expected["lm_head.weight"]
    assert equal(read(tmp_path / "back"), expected)
    assert not list(tmp_path.glob("*.partial"))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes()
    config, before = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("back", "folder"))
    embedding = expected["model.embed_tokens.weight"]
    assert config == before | {"dtype": str(embedding.dtype).removeprefix("torch.")}


def test_types_on_the_way(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "folder", tied=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    to_megatron(folder, tmp_path / "megatron", "actor", PART)
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", "actor", folder, torch.bfloat16, PART)
    assert equal(read(tmp_path / "back"), {name: tensor.bfloat16() for name, tensor in read(folder).items()})
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_critic_of_an_actors_folder_has_a_head_of_zeros(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "folder", tied=True)
    to_megatron(folder, tmp_path / "megatron", "critic", PART)
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", "critic", folder, None, PART)
    zeros = {"score.weight": torch.zeros(1, 32), "score.bias": torch.zeros(1)}
    assert equal(read(tmp_path / "back"), read(folder) | zeros)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == ["Qwen3ForTokenClassification"]
    assert TARGETS not in config


def test_safetensors_in_pieces(tmp_path: Path) -> None:
    """The bytes are those that the library reads, whatever the pieces."""
    wide, narrow = torch.randn(7, 3), torch.randn(5).bfloat16()
    entries = [("wide", wide.dtype, (7, 3)), ("narrow", narrow.dtype, (5,))]
    with (tmp_path / "file").open("wb") as file:
        size = write_safetensors(file, entries, iter([wide[:2], wide[2:].t().contiguous().t(), narrow]))
    assert (tmp_path / "file").stat().st_size == size
    assert equal(load_file(tmp_path / "file"), {"wide": wide, "narrow": narrow})
    with safe_open(tmp_path / "file", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


# Refused


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in names}


def test_a_folder_that_does_not_fit_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(4) for kind in ("gate", "up", "down")]
    names += [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(4) for kind in "qkvo"]

    def spoil(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights |= {"model.norm.weight": torch.ones(31), "model.layers.4.input_layernorm.weight": torch.ones(32)}
        return without(*names)(weights)

    folder = rewrite(write_model(tmp_path / "folder", tied=False), spoil)
    with pytest.raises(InputError) as error:
        to_megatron(folder, tmp_path / "out", "actor", PART)
    lines = {line.strip() for line in str(error.value).splitlines()[1:]}
    assert lines == {f"missing: {name}" for name in names} | {
        "wrong shape: model.norm.weight is [31], the config.json says [32]",
        "unexpected: model.layers.4.input_layernorm.weight",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


def test_types_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    def mix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.2.self_attn.k_proj.weight"
        return weights | {name: weights[name].bfloat16(), "model.norm.weight": torch.ones(32, dtype=torch.float64)}

    folder = rewrite(write_model(tmp_path / "folder", tied=False), mix)
    with pytest.raises(
        InputError, match=r"linear_qkv.weight have the types BF16, F32(.|\n)*norm.weight have the types F64"
    ):
        to_megatron(folder, tmp_path / "out", "actor", PART)


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    """A folder and its checkpoint."""
    folder = write_model(tmp_path / "folder", tied=False)
    to_megatron(folder, tmp_path / "megatron", "actor", PART)
    return folder, tmp_path / "megatron"


def test_a_checkpoint_that_is_of_another_model_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = converted
    small = write_model(tmp_path / "small", tied=True, layers=2, ffn=64)
    for like, model, message in (
        (
            folder,
            "critic",
            ["missing: output_layer.bias", "wrong shape: output_layer.weight is [80, 32], the config.json"],
        ),
        (small, "actor", ["unexpected: output_layer.weight", "linear_fc2.weight is [4, 32, 48]", "says [2, 32, 64]"]),
    ):
        with pytest.raises(InputError) as error:
            to_hugging_face(checkpoint, tmp_path / "out", model, like, None, PART)
        assert all(text in str(error.value) for text in message)
    assert not (tmp_path / "out.partial").exists()


def test_what_is_no_model_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = converted
    with pytest.raises(InputError, match=r"is not a Hugging Face folder: it has no config.json"):
        to_megatron(checkpoint, tmp_path / "out", "actor", PART)
    with pytest.raises(InputError, match=r"neither a step of a run .* nor a distributed checkpoint"):
        to_hugging_face(folder, tmp_path / "out", "actor", folder, None, PART)
    with pytest.raises(InputError, match=r"does not record its model: give .* --like"):
        to_hugging_face(checkpoint, tmp_path / "out", "actor", None, None, PART)
    (checkpoint / "__1_0.distcp").unlink()
    with pytest.raises(InputError, match=r"files are missing: __1_0.distcp"):
        to_hugging_face(checkpoint, tmp_path / "out", "actor", folder, None, PART)
    (checkpoint / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(InputError, match=r"its .metadata or metadata.json cannot be read"):
        to_hugging_face(checkpoint, tmp_path / "out", "actor", folder, None, PART)
    assert not (tmp_path / "out.partial").exists()


def test_a_file_cut_short_is_told_of(converted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = converted
    os.truncate(checkpoint / "__1_0.distcp", 100)
    with pytest.raises(InputError, match=r"megatron is damaged: .* cannot be read"):
        to_hugging_face(checkpoint, tmp_path / "out", "actor", folder, None, PART)


def test_an_output_that_exists_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "folder", tied=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists: move it away"):
        to_megatron(folder, tmp_path / "out", "actor", PART)
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_without_room_is_told_of_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "folder", tied=False)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(resumable_folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"0.00 GiB free, and .*out needs .* GiB"):
        to_megatron(folder, tmp_path / "below/out", "actor", PART)
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


class Stop(Exception):
    pass


@contextmanager
def stopped_after(lines: int) -> Iterator[None]:
    """Inside, a conversion stops when it has logged this number of lines."""
    messages: list[logging.LogRecord] = []

    def stop(record: logging.LogRecord) -> bool:
        messages.append(record)
        if len(messages) == lines:
            raise Stop
        return True

    convert.log.addFilter(stop)
    try:
        with pytest.raises(Stop):
            yield
    finally:
        convert.log.removeFilter(stop)


def test_other_inputs_than_what_it_was_begun_with_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "folder", tied=False)
    out = tmp_path / "out"
    with stopped_after(2):
        to_megatron(folder, out, "actor", PART)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for args, why in (
        ((copy, out, "actor", PART), r"source was .*folder, is .*copy"),
        ((folder, out, "critic", PART), "model was actor, is critic"),
        ((folder, out, "actor", PART + 1), f"part was {PART}, is {PART + 1}"),
    ):
        with pytest.raises(
            InputError, match=rf"out.partial was begun with other inputs \({why}\): remove it to start over"
        ):
            to_megatron(*args)
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(InputError, match=r"files: model.safetensors changed"):
        to_megatron(folder, out, "actor", PART)
    (out.with_name("out.partial") / "inputs.json").unlink()
    with pytest.raises(InputError, match="was not written by this program"):
        to_megatron(folder, out, "actor", PART)


def test_a_part_that_is_gone_is_made_again(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "folder", tied=False)
    with stopped_after(3):
        to_megatron(folder, tmp_path / "out", "actor", PART)
    (tmp_path / "out.partial/whole/__0_0.distcp").unlink()
    os.truncate(tmp_path / "out.partial/whole/__1_0.distcp", 10)
    with logged() as messages:
        to_megatron(folder, tmp_path / "out", "actor", PART)
    assert ["already done" in line for line in messages] == [False, False, True, *(False for _ in messages[3:])]
    to_hugging_face(tmp_path / "out", tmp_path / "back", "actor", folder, None, PART)
    assert equal(read(tmp_path / "back"), read(folder))


# As commands


@pytest.mark.long
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "folder", tied=False)

    capsys.readouterr()

    def call(name: str, *words: object) -> tuple[int, str, str]:
        code = cli.main(["convert", name, *map(str, words)])
        return code, *capsys.readouterr()

    code, out, error = call("hf-to-megatron", folder, tmp_path / "megatron", "--part-gb", "0.00005")
    assert (code, error) == (0, "")
    *parts, closing = out.splitlines()
    assert parts[1].startswith(f"part 2 of {len(parts)}: __1_0.distcp, ")
    size = sum(path.stat().st_size for path in (tmp_path / "megatron").iterdir())
    assert closing.startswith(f"{tmp_path}/megatron: {size} bytes in ")
    assert closing.endswith(" MiB")
    words = (tmp_path / "megatron", tmp_path / "back", "--like", folder, "--dtype", "bfloat16")
    code, out, error = call("megatron-to-hf", *words)
    assert (code, error) == (0, "")
    assert "shard 1 of 1: model-00001-of-00001.safetensors" in out
    assert read(tmp_path / "back")["lm_head.weight"].dtype is torch.bfloat16
    code, out, error = call("megatron-to-hf", *words)
    assert (code, out) == (2, "")
    assert error == f"error: {tmp_path}/back exists: move it away, or choose another name\n"
    # Two that write the same folder would mix their parts.
    with FolderLock(tmp_path / "other.lock", "other", "a test", ""):
        code, out, error = call("hf-to-megatron", folder, tmp_path / "other")
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {tmp_path}/other is in use by process {os.getpid()} on ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "folder", "megatron"]


@pytest.mark.parametrize("size", ["0", "-1", "many", "nan", "inf"])
def test_a_size_that_is_none_is_wrong_usage(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["convert", "hf-to-megatron", "A", "B", "--part-gb", size])
    assert leaving.value.code == 2
    assert f"{size} is not a positive number of GiB" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["convert_hf_to_megatron", "convert_megatron_to_hf", "prepare_data"])
def test_the_programs_of_tools_are_the_commands(name: str) -> None:
    command = [sys.executable, str(TOOLS / f"{name}.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    subject = "prepare" if name == "prepare_data" else f"convert {SCRIPTS[name]}"
    assert out.startswith(f"usage: megatron-tempo {subject} ")


# Killed. The tensors are read slowly, so that there is a middle to kill it in.
SLOWLY = """
import runpy, sys, time
from megatron_tempo.weights import distributed

def slowly(function):
    def slow(*args):
        time.sleep(0.02)
        return function(*args)
    return slow

for kind in (distributed.Chunk, distributed.StoredWeights):
    kind.read = slowly(kind.read)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.parametrize("name", ["convert_hf_to_megatron", "convert_megatron_to_hf"])
def test_killed_it_goes_on_behind_what_is_done(converted: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    folder, checkpoint = converted
    out, whole = tmp_path / "out", tmp_path / "out.partial/whole"
    words = [str(TOOLS / f"{name}.py")]
    if name == "convert_hf_to_megatron":
        words += [str(folder), str(out), "--part-gb", "0.00002"]
    else:
        words += [str(checkpoint), str(out), "--shard-gb", "0.00002", "--like", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(TOOLS.parent), "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *words], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        try:
            lines = [child.stdout.readline() for _ in range(2)]
            assert lines[1].split()[1:3] == ["2", "of"]
            while not temporaries_in(whole):  # the third is being written
                time.sleep(0.001)
        finally:
            child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    before = {path.name: path.stat().st_mtime_ns for path in {*whole.iterdir()} - {*temporaries_in(whole)}}
    assert len(before) >= 2
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.count("already done") in (len(before), len(before) - 1)  # killed before the note of the last
    kept = [name for name, time in before.items() if (out / name).stat().st_mtime_ns == time]
    assert len(kept) == done.stdout.count("already done")
    assert not out.with_name("out.partial").exists()
    if name == "convert_hf_to_megatron":
        to_hugging_face(out, tmp_path / "back", "actor", folder, None, PART)
        out = tmp_path / "back"
    assert equal(read(out), read(folder))
    assert set(tensor_files(out)) == set(read(folder))
    assert read(out)["lm_head.weight"].shape[0] == VOCAB


def test_killed_before_the_last_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are there but for the name: they stay as they are."""
    folder = write_model(tmp_path / "folder", tied=False)

    def stop(*_: object) -> int:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(convert.ResumableFolder, "finish", stop)
        with pytest.raises(Stop):
            to_megatron(folder, tmp_path / "out", "actor", PART)
    with logged() as messages:
        to_megatron(folder, tmp_path / "out", "actor", PART)
    assert all("already done" in line for line in messages)
    to_hugging_face(tmp_path / "out", tmp_path / "back", "actor", folder, None, PART)
    assert equal(read(tmp_path / "back"), read(folder))


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda actor: (actor / "model.safetensors").unlink(), "model.safetensors is gone"),
        (lambda actor: (actor / "config.json").unlink(), "config.json is gone"),
        (lambda actor: os.truncate(actor / "model.safetensors", 40), "model.safetensors"),
        (lambda actor: (actor / INDEX).write_text("{"), INDEX),
    ],
)
def test_an_export_that_lost_a_file_is_made_anew(tmp_path: Path, damage: Callable[[Path], None], wrong: str) -> None:
    origin = {"run": "/elsewhere", "step": 2, "checkpoint_sha256": "abc"}
    actor = tmp_path / "actor"
    actor.mkdir()
    save_file({"model.norm.weight": torch.ones(4)}, actor / "model.safetensors")
    (actor / "config.json").write_text("{}")
    (actor / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    (actor / ORIGIN).write_text(json.dumps(origin))
    assert _is_exported(actor, origin | {"run": "/moved"})
    damage(actor)
    with logged() as lines:
        assert not _is_exported(actor, origin)
    assert not actor.exists()
    assert (tmp_path / "actor.other-1").is_dir()
    assert "is not whole" in str(lines)
    assert wrong in str(lines)
