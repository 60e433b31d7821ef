"""seen.jsonl: each question once, with and without its answer; what is gone is forgotten, what was before is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tempo.config.trained_with import ENTRY
from megatron_tempo.data.seen import SEEN, Seen, carry, read_seen, seen_of
from megatron_tempo.observability.records import read

LABELLED = {"l:0": "a", "l:1": "b", "l:2": "b"}  # the last two are one question
UNLABELLED = {"u:0": "b", "u:1": "c"}


def test_counts_and_lines(tmp_path: Path) -> None:
    seen = Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True)
    seen.resume(0, tmp_path / "no model")
    assert not (tmp_path / SEEN).exists()
    seen.add(1, ["l:1"], ["u:0", "u:1"])
    seen.add(2, ["l:1", "l:2", "l:0"], ["u:1"])
    assert [(r["step"], r["labels"], r["id"], r["question"]) for r in read(tmp_path / SEEN)] == [
        (1, True, "l:1", "b"),
        (1, False, "u:0", "b"),
        (1, False, "u:1", "c"),
        (2, True, "l:0", "a"),
    ]
    # b was trained on both ways, which counts as with its answer
    assert seen.count(["a", "b", "c", "d", "c"]) == {"with_answers": 2, "without_answers": 2}


def test_a_resumed_run_forgets_what_is_gone(tmp_path: Path) -> None:
    Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True).add(1, ["l:1"], [])
    Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True).add(2, ["l:0"], ["u:1"])
    seen = Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True)
    seen.resume(1, tmp_path / "no model")
    assert seen.count(["a", "b", "c"]) == {"with_answers": 1, "without_answers": 0}
    seen.add(2, ["l:0"], ["u:1"])
    assert [r["step"] for r in read(tmp_path / SEEN)] == [1, 2, 2]


def test_an_earlier_runs_questions_stay_known(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    for folder in (model, run_dir):
        folder.mkdir()
    assert read_seen(model) is None
    assert seen_of(model, ["a"]) is None
    Seen(model, LABELLED, UNLABELLED, is_writer=True).add(7, ["l:0"], [])
    assert seen_of(model, ["a", "b"]) == {"with_answers": 1, "without_answers": 0}
    for _ in range(2):  # started, and started again
        seen = Seen(run_dir, LABELLED, UNLABELLED, is_writer=True)
        seen.resume(0, model)
        assert seen.count(["a", "b"]) == {"with_answers": 1, "without_answers": 0}
    assert [(r["step"], r["question"]) for r in read(run_dir / SEEN)] == [(0, "a")]


def test_a_converted_step_carries_what_was_seen_until_then(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    step = run_dir / "checkpoints" / "step_00000002"
    step.mkdir(parents=True)
    out.mkdir()
    carry(step, out)
    assert read_seen(out) is None, "a step without its run"
    seen = Seen(run_dir, LABELLED, UNLABELLED, is_writer=True)
    seen.add(2, ["l:0"], [])
    seen.add(3, ["l:1"], [])
    for _ in range(2):  # cut short, and begun again
        carry(step, out)
    assert [r["question"] for r in read_seen(out) or ()] == ["a"]


def test_only_the_writer_writes(tmp_path: Path) -> None:
    seen = Seen(tmp_path, LABELLED, UNLABELLED, is_writer=False)
    seen.resume(0, tmp_path)
    seen.add(1, ["l:0"], [])
    assert not (tmp_path / SEEN).exists()


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def replace_a_question(path: Path) -> None:
    path.write_text(path.read_text().replace('"a"', '"z"'))


def empty(path: Path) -> None:
    path.write_text("")


DAMAGE = {"lost": Path.unlink, "emptied": empty, "cut": cut, "changed": replace_a_question}


def trained(run_dir: Path) -> tuple[Seen, dict[str, object]]:
    """A run of two iterations, and what its checkpoint holds of seen.jsonl."""
    seen = Seen(run_dir, LABELLED, UNLABELLED, is_writer=True)
    assert seen.resume(0, run_dir / "no model") is None
    seen.add(1, ["l:0"], ["u:1"])
    seen.add(2, ["l:1"], [])
    return seen, seen.summary()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_not_the_checkpoints_makes_it_unknown_for_good(tmp_path: Path, name: str) -> None:
    seen, saved = trained(tmp_path)
    again = Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True)
    assert again.resume(2, tmp_path / "no model", saved) is None
    assert again.count(["a", "z"]) == seen.count(["a", "z"]) == {"with_answers": 1, "without_answers": 0}
    DAMAGE[name](tmp_path / SEEN)
    resumed = Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True)
    warning = resumed.resume(2, tmp_path / "no model", saved)
    assert warning is not None
    assert "which questions the model was trained on is unknown" in warning
    assert resumed.count(["a"]) is None
    resumed.add(3, ["l:2"], [])
    assert resumed.count(["a"]) is None
    # The next start knows it too, and does not warn again; so does an evaluation of the export.
    later = Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True)
    assert later.resume(3, tmp_path / "no model", resumed.summary()) is None
    assert later.count(["a"]) is None
    assert seen_of(tmp_path, ["a"]) is None


def test_lines_after_the_checkpoint_do_not_make_it_unknown(tmp_path: Path) -> None:
    seen, saved = trained(tmp_path)
    seen.add(3, ["l:0"], ["u:0"])
    resumed = Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True)
    assert resumed.resume(2, tmp_path / "no model", saved) is None
    assert resumed.count(["c"]) == {"with_answers": 0, "without_answers": 1}
    # a checkpoint of an earlier version says nothing of the file
    assert Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True).resume(2, tmp_path / "no model", None) is None
    (tmp_path / SEEN).unlink()
    assert Seen(tmp_path, LABELLED, UNLABELLED, is_writer=True).resume(2, tmp_path / "no model", None) is not None


def exported(run_dir: Path, seen: Seen, folder: Path) -> Path:
    folder.mkdir()
    (folder / SEEN).write_bytes((run_dir / SEEN).read_bytes())
    (folder / "config.json").write_text(json.dumps({ENTRY: {"seen": seen.summary()}}))
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_an_export_without_its_own_file_is_unknown(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    seen, _ = trained(tmp_path / "run")
    model = exported(tmp_path / "run", seen, tmp_path / "model")
    assert seen_of(model, ["a"]) == {"with_answers": 1, "without_answers": 0}
    DAMAGE[name](model / SEEN)
    assert seen_of(model, ["a"]) is None
    # and a run that begins with it does not say that nothing was trained on
    (tmp_path / "next").mkdir()
    following = Seen(tmp_path / "next", LABELLED, UNLABELLED, is_writer=True)
    assert "is an export whose seen.jsonl is missing or changed" in str(following.resume(0, model))
    assert following.count(["a"]) is None


@pytest.mark.parametrize("name", DAMAGE)
def test_a_conversion_carries_only_the_checkpoints_own_file(tmp_path: Path, name: str) -> None:
    step, out = tmp_path / "checkpoints" / "step_00000002", tmp_path / "out"
    step.mkdir(parents=True)
    out.mkdir()
    _, saved = trained(tmp_path)
    (step / "run.json").write_text(json.dumps({"step": 2, "seen": saved}))
    assert carry(step, out) == saved
    assert seen_of(out, ["a"]) == {"with_answers": 1, "without_answers": 0}
    DAMAGE[name](tmp_path / SEEN)
    carry(step, out)
    assert seen_of(out, ["a"]) is None
