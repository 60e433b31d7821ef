"""seen.jsonl: each question once, with and without its answer; what is gone is forgotten, what was before is known."""

from __future__ import annotations

from pathlib import Path

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
