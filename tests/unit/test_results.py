"""results.json against hand-computed numbers and scipy's t-test; what `compare` tells and refuses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_tempo import cli
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import save
from megatron_tempo.errors import InputError
from megatron_tempo.evaluation.evaluator import ScoredResponses, by_question
from megatron_tempo.evaluation.paired import paired
from megatron_tempo.evaluation.results import result
from megatron_tempo.observability.records import extend
from megatron_tempo.report.results import differences_of, results_table, write
from megatron_tempo.types import LabelledPrompt
from tests.support.completions import batch_of, completion

RIGHT = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


def scored(correct: np.ndarray) -> ScoredResponses:
    prompts = [LabelledPrompt(f"q:{i}", "Find it.", (1,), "2", "math") for i in range(len(correct))]
    completions = [
        [completion((5,) * (1 + s), (0.0,) * (1 + s), "stop" if s else "length") for s in range(len(row))]
        for row in correct
    ]
    return ScoredResponses(
        prompts, batch_of(prompts, completions, correct.astype(float).tolist()), correct.astype(float)
    )


def test_a_sets_results_by_hand() -> None:
    results = result(scored(RIGHT))
    by_question = [1 / 4, 1 / 2, 1.0]
    low, high = stats.t.interval(0.95, 2, np.mean(by_question), stats.sem(by_question))
    assert low < 0 < 1 < high, "so both ends are cut"
    expected = {"value": np.mean(by_question), "se": stats.sem(by_question), "low": 0.0, "high": 1.0}
    assert results["avg"] == pytest.approx(expected)
    # 1 - C(n - c, 2) / C(4, 2): 1 - 3/6, 1 - 1/6, 1
    assert results["pass"]["2"]["value"] == pytest.approx((1 / 2 + 5 / 6 + 1) / 3)
    assert list(results["pass"]) == ["1", "2", "3", "4"]
    assert (results["questions"], results["samples"], results["verifiers"]) == (3, 4, ["math"])
    assert results["response_length"] == {"mean": 2.5, "max": 4}
    assert results["truncated"] == pytest.approx(1 / 4)
    alone = result(scored(RIGHT[:1]))["avg"]
    assert (alone["se"], alone["low"], alone["high"]) == (None, None, None)


def test_all_wrong_or_all_right_is_not_certainty() -> None:
    none, every = (result(scored(np.full((30, 4), verdict)))["avg"] for verdict in (0, 1))
    reach = stats.binomtest(0, 30).proportion_ci(0.95, method="exact").high
    assert (none["low"], none["high"]) == (0.0, pytest.approx(reach))
    assert (every["low"], every["high"]) == (pytest.approx(1 - reach), 1.0)


def test_the_interval_is_that_of_questions_not_of_responses() -> None:
    correct = np.repeat([[1], [0]] * 15, 16, axis=1)  # every question always or never right: 30 observations, not 480
    avg = result(scored(correct))["avg"]
    shares = correct.mean(axis=1)
    assert (avg["low"], avg["high"]) == pytest.approx(stats.t.interval(0.95, 29, 0.5, stats.sem(shares)))


def test_the_table_has_intervals_and_what_was_trained_on() -> None:
    sets = {
        "a\x1b": result(scored(RIGHT)) | {"seen": None},
        "b": result(scored(RIGHT[:1])) | {"seen": {"with_answers": 0, "without_answers": 1}},
    }
    table = results_table({"sets": sets}, [4, 2]).splitlines()
    assert table[0].split("  ")[0] == "set"
    assert [line.split()[2] for line in table[2:8]] == ["avg@4", "pass@4", "pass@2"] * 2
    assert "0.583  0.000 to 1.000" in table[2]
    assert table[5].endswith("0.250  -")
    assert "\x1b" not in "".join(table)
    assert table[-2].endswith("25.0% truncated; it is unknown which questions the model was trained on")
    assert table[-1].endswith("of the 1 questions, the model was trained on 0 with answers and 1 without")


def test_questions_are_paired_by_what_they_are_not_by_their_place() -> None:
    keys = {"q:0": "b", "q:1": "a", "q:2": "c"}
    whole = scored(RIGHT)
    by_key = by_question(whole, keys)
    assert by_key["right"] == [2, 1, 4], "in the order of the keys"
    turned = ScoredResponses(whole.prompts[::-1], whole.batch, whole.correct[::-1])
    assert by_question(turned, keys) == by_key
    for change in ({"answer": "3"}, {"verifier": "choice"}):
        prompts = [replace(whole.prompts[0], **change), *whole.prompts[1:]]
        other = by_question(ScoredResponses(prompts, whole.batch, whole.correct), keys)
        assert other["questions_hash"] != by_key["questions_hash"]
    assert by_question(whole, keys | {"q:0": "d"})["questions_hash"] != by_key["questions_hash"]


def test_a_paired_test_of_many_questions_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    first, gain = rng.random(3000), rng.normal(0.01, 0.3, 3000)
    own = paired(first, first + gain)
    reference = stats.ttest_rel(first + gain, first)
    assert own.p == pytest.approx(reference.pvalue, abs=0.02)
    assert own.interval == pytest.approx(tuple(reference.confidence_interval(0.95)))
    with pytest.raises(ValueError, match="paired scores need"):
        paired(first, gain[:-1])


def eval_folder(folder: Path, correct: Sequence[Sequence[int]], ids: Sequence[str] = (), **keys: str) -> Path:
    """What eval leaves of one set, `aime`, as far as a comparison reads it."""
    folder.mkdir()
    ids = ids or [f"q:{i}" for i in range(len(correct))]
    extend(
        folder / "responses.jsonl",
        (
            {"set": "aime", "id": name, "question": keys.get(name[0], "text of " + name), "sample": s, "correct": c}
            for name, row in zip(ids, correct, strict=True)
            for s, c in enumerate(row)
        ),
    )
    write(folder / "results.json", {"sets": {"aime": {}}})
    config = Config()
    config.run.dir, config.model.path = str(folder), str(folder / "model")
    save(config, folder / "config.json")
    return folder


def test_differences_are_paired(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    easy = rng.random((12, 1))
    a, b = (rng.random((12, 8)) < easy).astype(int), (rng.random((12, 4)) < 0.8 * easy + 0.2).astype(int)
    order = [f"q:{i}" for i in range(12)]
    first = eval_folder(tmp_path / "a", a.tolist())
    second = eval_folder(tmp_path / "b", b.tolist()[::-1], order[::-1])  # another order, another number of samples
    (difference,) = differences_of(first, second)
    shares = a.mean(axis=1), b.mean(axis=1)
    reference = stats.ttest_rel(shares[1], shares[0])
    assert difference.paired.difference == pytest.approx(b.mean() - a.mean())
    assert difference.paired.interval == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert (difference.first, difference.second) == ((pytest.approx(a.mean()), 8), (pytest.approx(b.mean()), 4))
    # all 2^12 signs, counted here one by one
    change = shares[1] - shares[0]
    means = [np.dot(signs, change) / 12 for signs in itertools.product((-1, 1), repeat=12)]
    tail = np.mean(np.array(means) >= abs(change.mean()) - 1e-12)
    assert difference.paired.p == pytest.approx(2 * tail)


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    first, second = (eval_folder(tmp_path / name, RIGHT.tolist()) for name in "ab")
    (difference,) = differences_of(first, second)
    assert (difference.paired.difference, difference.paired.interval, difference.paired.p) == (0.0, (0.0, 0.0), 1.0)
    (alone,) = differences_of(*(eval_folder(tmp_path / name, [[1, 0]]) for name in "cd"))
    assert (alone.paired.interval, alone.paired.p) == (None, None)


def test_compare_tells_settings_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (eval_folder(tmp_path / name, RIGHT.tolist()) for name in "ab")
    changed = json.loads((second / "config.json").read_text())
    changed["evaluation"]["temperature"] = 0.6
    (second / "config.json").write_text(json.dumps(changed))
    assert cli.main(["compare", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "aime  3          0.583 @4    0.583 @4  +0.000  +0.000 to +0.000  1.0000" in out
    assert out.splitlines()[-2:] == ["settings that differ (A -> B):", "  evaluation.temperature: 1.0 -> 0.6"]


def test_other_questions_are_refused_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = eval_folder(tmp_path / "a", RIGHT.tolist(), ["p:0", "p:1", "q:2"])
    second = eval_folder(tmp_path / "b", RIGHT.tolist(), ["p:0", "r:1", "q:2"], q="another text")
    assert cli.main(["compare", str(first), str(second)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: the two folders cannot be compared: their questions differ:",
        f"  aime: p:1 is only in {first}",
        f"  aime: r:1 is only in {second}",
        "  aime: q:2 has different texts",
    ]


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    first = eval_folder(tmp_path / "a", RIGHT.tolist())
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=r"b lacks results\.json or responses\.jsonl"):
        differences_of(first, tmp_path / "b")
    other = eval_folder(tmp_path / "c", RIGHT.tolist())
    text = (other / "responses.jsonl").read_text()
    (other / "responses.jsonl").write_text(text.replace("aime", "bbh"))
    with pytest.raises(InputError, match=r"has aime, .* has bbh: no set in common"):
        differences_of(first, other)


def test_verdicts_are_floats_on_the_way() -> None:
    assert scored(RIGHT).batch.correct is not None
    assert torch.equal(scored(RIGHT).batch.correct, torch.tensor(RIGHT.flatten(), dtype=torch.float32))
