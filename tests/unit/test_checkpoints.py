"""Which folders are checkpoints, which is used, and what is never touched. The folders are made by hand."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tempo.checkpoint import checkpoints as module
from megatron_tempo.checkpoint import loading, manifest, saving
from megatron_tempo.checkpoint.checkpoints import LAST, Checkpoints, last_step
from megatron_tempo.checkpoint.weight_files import WeightChunk, WeightShare, describe_weights, write_weights
from megatron_tempo.config.resume import check_run_folder
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.tree import save
from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import Layout
from megatron_tempo.observability.records import extend
from megatron_tempo.training.resume_point import find
from tests.support.logged import logged

ALONE = Layout(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, sequence_parallel=False)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_of(run: Path) -> Config:
    config = Config()
    config.run.dir = str(run)
    config.stage1.iterations = config.stage2.iterations = 4
    return config


def write_checkpoint(run: Path, name: str, step: int, config: Config | None = None) -> Path:
    path = run / "checkpoints" / name
    (path / "actor").mkdir(parents=True)
    (path / "actor/__0_0.distcp").write_bytes(bytes(100))
    position = {"stage1": min(step, 4), "stage2": max(step - 4, 0)}
    state = {"step": step, "optimizer_steps": {}, "streams": {}, "position": position, "evaluated": True}
    (path / manifest.STATE).write_text(json.dumps(state | {"config": to_plain(config or config_of(run))}))
    manifest.write(path, manifest.digests(path, manifest.files(path)))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 8 iterations that was killed behind its sixth."""
    run = tmp_path / "run"
    for step in (4, 6):
        write_checkpoint(run, f"step_{step:08d}", step)
    save(config_of(run), run / "config.json")
    record = {"time": 1.0, "stage": "stage1", "method": "ppo", "seconds": 1.0}
    extend(run / "metrics.jsonl", [record | {"iteration": step, "step": step} for step in range(1, 7)])
    (run / LAST).write_text('{"step": 6}')
    return run


def opened(run: Path) -> Checkpoints:
    return Checkpoints(run / "checkpoints", 2, ALONE)


def latest(run: Path, config: Config | None = None) -> module.LatestCheckpoint:
    config = config or config_of(run)
    check_run_folder(config)
    return find(config, opened(run), {}, {}, {}, is_writer=True)


def snapshot(folder: Path) -> dict[str, Any]:
    """Every file and folder below, with its time and content."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            os.readlink(path) if path.is_symlink() else path.is_file() and hashlib.sha256(path.read_bytes()).digest(),
        )
        for path in paths
    }


def refusal(run: Path, config: Config | None = None) -> str:
    """Why a start is refused, which changes nothing."""
    before = snapshot(run)
    with pytest.raises(InputError) as raised:
        latest(run, config)
    assert snapshot(run) == before
    return str(raised.value)


def test_the_state_is_that_of_the_moment_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on while its checkpoint is written."""
    goes_on = threading.Event()

    def write_later(self: saving.Saving) -> dict[str, Any]:
        goes_on.wait()
        (tmp_path / "checkpoints/step_00000004.partial").mkdir(parents=True)
        return {}

    monkeypatch.setattr(saving.Saving, "_write_files", write_later)
    checkpoints = opened(tmp_path)
    state = {"inputs": {"model.path": "a"}, "streams": {"labelled": {"epoch": 0}}}
    checkpoints.save(4, {}, state)
    state["inputs"] |= {"reference": "b"}
    state["streams"]["labelled"]["epoch"] = 1
    goes_on.set()
    checkpoints.wait()
    saved = manifest.read_state(checkpoints.path(4))
    assert saved["inputs"] == {"model.path": "a"}
    assert saved["streams"] == {"labelled": {"epoch": 0}}


def test_the_newest_is_used(run: Path) -> None:
    path = latest(run).path
    assert path is not None
    assert path.name == "step_00000006"


NAMES = [
    "step_best", "step_7", "step_00000007_backup", "step_00000007.damaged", "step_000000007", "step_0000000x",
    "step_00000007 (copy)", "Step_00000007", "step_-0000007", "step_00000\u0667\u0667\u0667", "notes",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_neither_used_nor_touched(run: Path, name: str) -> None:
    other = write_checkpoint(run, name, 7)
    abandoned = write_checkpoint(run, "step_best.partial", 7)
    checkpoints, before = opened(run), (snapshot(other), snapshot(abandoned))
    path = checkpoints.find().path
    assert path is not None
    assert path.name == "step_00000006"
    write_checkpoint(run, "step_00000008", 8)
    write_checkpoint(run, "step_00000009.partial", 9)
    checkpoints._completed(8)
    assert (snapshot(other), snapshot(abandoned)) == before
    kept = {entry.name for entry in (run / "checkpoints").iterdir()} - {name, abandoned.name}
    assert kept == {"step_00000006", "step_00000008"}
    assert last_step(run) == 8


def test_a_copy_under_another_number_is_not_used_nor_removed(run: Path) -> None:
    for name in ("step_00000001", "step_00000007"):
        write_checkpoint(run, name, 6)
    checkpoints = opened(run)
    with logged() as messages:
        path = checkpoints.find().path
    assert path is not None
    assert path.name == "step_00000006"
    assert messages == [
        f"{run}/checkpoints/{name} is not counted as a checkpoint: its run.json is of step 6"
        for name in ("step_00000001", "step_00000007")
    ]
    write_checkpoint(run, "step_00000008", 8)
    checkpoints._completed(8)
    assert sorted(entry.name[-1] for entry in (run / "checkpoints").iterdir()) == ["1", "6", "7", "8"]


def test_a_folder_without_a_checkpoints_files_is_neither_used_nor_touched(run: Path) -> None:
    other = run / "checkpoints/step_99999999"
    other.mkdir()
    (other / "notes").write_text("mine")
    checkpoints = opened(run)
    found_now = checkpoints.find()
    assert found_now.path is not None
    assert (found_now.path.name, found_now.damaged) == ("step_00000006", ())
    checkpoints.set_aside(found_now)
    write_checkpoint(run, "step_00000008", 8)
    checkpoints._completed(8)
    assert (other / "notes").read_text() == "mine"


def test_links_are_read_and_never_removed(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints/step_00000004").rename(tmp_path / "archive")
    (run / "checkpoints/step_00000004").symlink_to(tmp_path / "archive")
    checkpoints = opened(run)
    write_checkpoint(run, "step_00000008", 8)
    checkpoints._completed(8)
    assert (run / "checkpoints/step_00000004/MANIFEST.json").exists()


def test_what_cannot_be_removed_does_not_end_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    write_checkpoint(run, "step_00000008", 8)
    monkeypatch.setattr(module.shutil, "rmtree", failing)
    with logged() as messages:
        opened(run)._completed(8)
    old = run / "checkpoints/step_00000004"
    assert messages == [f"older checkpoints cannot be removed ({old}: Input/output error)"]
    assert last_step(run) == 8


def damaged(path: Path, kind: str) -> None:
    file = path / ("run.json" if "state" in kind else manifest.MANIFEST if "manifest" in kind else "actor/__0_0.distcp")
    if kind.startswith(("no ", "pipe ", "folder ")):
        file.unlink()
        if kind.startswith("pipe "):
            os.mkfifo(file)  # to open it would wait for ever
        elif kind.startswith("folder "):
            file.mkdir()
    elif kind.startswith("sealed "):  # wrong, with a manifest that fits
        file.write_text({"sealed state": "[]", "sealed bare state": '{"step": 6}'}[kind])
        manifest.write(path, manifest.digests(path, manifest.files(path)))
    else:
        file.write_bytes(b"[]" if kind.startswith("shape") else file.read_bytes()[:-3])


KINDS = [
    *(f"{how} {what}" for how in ("no", "cut", "pipe", "folder") for what in ("file", "state", "manifest")),
    *("shape of state", "shape manifest", "sealed state", "sealed bare state"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(run: Path, kind: str) -> None:
    damaged(run / "checkpoints/step_00000006", kind)
    (run / "checkpoints/step_00000006.damaged").mkdir()  # of an earlier time: it is kept
    before, checkpoints = snapshot(run), opened(run)
    result = find(config_of(run), checkpoints, {}, {}, {}, is_writer=True)
    assert result.path is not None
    assert result.path.name == "step_00000004"
    assert snapshot(run) == before
    with logged() as messages:
        checkpoints.set_aside(result)
    names = ["step_00000004", "step_00000006.damaged", "step_00000006.damaged-2"]
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == names
    assert "step_00000006 is damaged (" in messages[0]


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("what", ["a file", "manifest", "state", "folder"])
def test_what_cannot_be_read_is_no_damage(run: Path, what: str, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "folder":
        patched: tuple[Any, str] = (os, "listdir")
    else:
        patched = (Path, "open") if what == "a file" else (Path, "read_text")
    name = {"a file": "__0_0.distcp", "manifest": manifest.MANIFEST, "state": "run.json", "folder": "checkpoints"}[what]
    real = getattr(*patched)

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if Path(path).name == name and "checkpoints" in str(path):
            raise OSError(error, os.strerror(error), str(path))
        return real(path, *arguments, **options)

    before = snapshot(run)
    with monkeypatch.context() as patch:
        patch.setattr(*patched, failing)
        with pytest.raises(InputError) as raised:
            latest(run)
    assert snapshot(run) == before
    message = str(raised.value)
    assert f"cannot be read ({os.strerror(error)})" in message
    assert name in message
    assert latest(run).path is not None, "when it has passed, all is as before"


@pytest.mark.parametrize("kind", ["purged", "emptied", "unmounted", "all damaged", "renamed", "no records"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_at_0(run: Path, tmp_path: Path, kind: str) -> None:
    below = run / "checkpoints"
    if kind == "all damaged":
        for path in below.iterdir():
            damaged(path, "cut file")
    elif kind == "renamed":
        for path in below.iterdir():
            path.rename(path.with_name(f"{path.name}.old"))
    else:
        below.rename(tmp_path / "away")
    if kind == "emptied":
        below.mkdir()
    elif kind == "unmounted":
        below.symlink_to(tmp_path / "nowhere")
    elif kind == "no records":
        (run / "metrics.jsonl").unlink()
    message = refusal(run)
    assert ("no checkpoint is whole" if kind == "all damaged" else str(run)) in message
    if kind in ("purged", "emptied", "no records"):
        assert "its checkpoint of step 6 is gone" in message
        if kind == "emptied":
            below.rmdir()
        (tmp_path / "away").rename(below)  # what the message offers
        assert latest(run).path is not None


def test_records_of_a_version_without_notes_are_kept_too(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints").rename(tmp_path / "away")
    (run / LAST).unlink()
    assert "the records end with step 6, but there is no checkpoint" in refusal(run)
    for wrong in ("", "[]", '{"step": "x"}'):
        (run / LAST).write_text(wrong)
        assert f"{LAST} cannot be read" in refusal(run)


@pytest.mark.parametrize("name", ["seen.jsonl", "starts.jsonl"])
def test_a_bad_line_is_refused_before_anything_is_written(run: Path, name: str) -> None:
    (run / name).write_text("{bad\n")
    assert f"{run / name}:1: not a JSON record" in refusal(run)


def test_a_bad_line_in_what_the_model_was_trained_on_is_refused_too(tmp_path: Path) -> None:
    new, model = tmp_path / "new", tmp_path / "model"
    model.mkdir()
    (model / "seen.jsonl").write_text('{"a": 1}\n')
    config = config_of(new)
    config.model.path = str(model)
    with pytest.raises(InputError, match=r"model/seen\.jsonl:1: the record has no step"):
        find(config, opened(new), {}, {}, {}, is_writer=True)
    assert not new.exists()


def test_a_run_that_had_no_checkpoint_yet_begins_anew(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints").rename(tmp_path / "away")
    opened(run).note(None)
    assert latest(run).path is None
    assert latest(tmp_path / "new").path is None


def test_an_export_of_a_run_that_is_gone_is_not_taken_for_the_new_ones(run: Path, tmp_path: Path) -> None:
    for name in ("checkpoints", "metrics.jsonl", LAST, "config.json"):
        (run / name).rename(tmp_path / name)
    (run / "hf_step_00000008/actor").mkdir(parents=True)
    assert "hf_step_00000008 is there, but no checkpoint of the run that exported it" in refusal(run)


def test_another_configuration_is_refused_by_the_folder_and_by_the_checkpoint(run: Path) -> None:
    other = config_of(run)
    other.rollout.temperature = 0.5
    assert "rollout.temperature: 1.0 -> 0.5" in refusal(run, other)
    (run / "config.json").unlink()
    assert "rollout.temperature: 1.0 -> 0.5" in refusal(run, other)
    save(other, run / "config.json")  # the folder's word alone does not do
    message = refusal(run, other)
    assert "step_00000006 is of a run with another configuration: rollout.temperature: 1.0 -> 0.5" in message


def test_a_state_that_no_run_has_written_is_refused(run: Path) -> None:
    path = run / "checkpoints/step_00000006"
    state = json.loads((path / "run.json").read_text())
    for name in ("config", "position", "streams"):
        (path / "run.json").write_text(json.dumps({**state, name: []}))
        manifest.write(path, manifest.digests(path, manifest.files(path)))
        assert f"run.json has no {name}: no run has written it" in refusal(run)


def test_lengths_may_change_for_what_is_still_to_come(run: Path) -> None:
    config = config_of(run)
    config.stage2.iterations = 2
    assert latest(run, config).path is not None
    config.stage2.iterations = 1
    assert "stage2.iterations=1: the run in" in refusal(run, config)
    config.stage1.iterations, config.stage2.iterations = 5, 4
    assert "give the earlier stages' lengths as they were" in refusal(run, config)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# What happens to a file of Megatron's between the check against the manifest and the loading.
LOST: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights unreadable": ("__0_0.distcp", as_folder, "__0_0.distcp: Is a directory"),
    "weights lost": ("__0_0.distcp", Path.unlink, "__0_0.distcp: No such file or directory"),
    "weights cut": ("__0_0.distcp", cut, "a file is not as it was written ("),
    "index lost": (".metadata", Path.unlink, "No such file or directory: "),
    "index cut": (".metadata", cut, "pickle data was truncated"),
    "common part unreadable": ("common.pt", as_folder, "common.pt: Is a directory"),
    "common part lost": ("common.pt", Path.unlink, "common.pt: No such file or directory"),
    "common part cut": ("common.pt", cut, "a file is not as it was written ("),
    "format cut": ("metadata.json", cut, "a file is not as it was written ("),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_file_that_fails_after_it_was_checked_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Megatron's own loading, of a small checkpoint of ours."""
    name, lose, words = LOST[kind]
    folder = run / "checkpoints/step_00000006/actor"
    (folder / "__0_0.distcp").unlink()
    install_cpu_backend()
    share = WeightShare([WeightChunk("w", (64,), (0,), torch.ones(64))], {})
    describe_weights(folder, write_weights(folder / "__0_0.distcp", share))
    monkeypatch.setattr(
        loading,
        "_wanted",
        lambda model, with_optimizer: {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(64))},
    )
    model: Any = SimpleNamespace(at_work=nullcontext)
    whole = loading._loaded(model, folder, with_optimizer=False)
    assert torch.equal(whole["w"], torch.ones(64))
    lose(folder / name)
    before = snapshot(run)
    result = module.LatestCheckpoint(folder.parent, {"step": 6, "optimizer_steps": {"actor": 1}}, ())
    with pytest.raises(InputError) as raised:
        opened(run).load(result, {"actor": model})
    assert str(raised.value).startswith(f"{folder.parent}: ")
    assert words in str(raised.value)
    assert "nothing was changed. Mend the disk" in str(raised.value)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO), "/a"), "/a: Input/output error; nothing was changed"),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/a"), "/a: Stale file handle; nothing was changed"),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), "a file is not as it was written (Py"),
        (RuntimeError("NCCL communicator was aborted"), None),
        (ConnectionResetError(104, "Connection reset by peer"), None),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
        (KeyError("w"), None),
    ],
)
@pytest.mark.parametrize("gathered", [False, True])
def test_only_what_cannot_be_read_is_told_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str | None, gathered: bool
) -> None:
    """As Megatron raises it, and as torch does for an error on another rank."""
    raised = CheckpointException("read", {3: (error, [])}) if gathered else error  # type: ignore[dict-item]

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(loading, "_wanted", lambda model, with_optimizer: {})
    monkeypatch.setattr(loading.dist_checkpointing, "load", fail)
    model: Any = SimpleNamespace()
    (run / "checkpoints/step_00000006/actor/common.pt").touch()
    with pytest.raises((InputError, type(raised))) as caught:
        loading._loaded(model, run / "checkpoints/step_00000006/actor", with_optimizer=False)
    assert (caught.value is raised) == (words is None)
    assert words is None or words in str(caught.value)
