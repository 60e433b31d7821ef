"""The model collapse step: the first evaluation at which the reward accuracy is below 1%."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_tempo.config.schema import EvaluationConfig
from megatron_tempo.evaluation.evaluator import Evaluator
from megatron_tempo.evaluation.scores import vote_accuracy
from megatron_tempo.observability.records import read_evaluations
from megatron_tempo.report.collapse import collapse_sentence, collapse_step, collapse_words, reward_accuracies
from megatron_tempo.report.summary import summary_table
from megatron_tempo.types import LabelledPrompt
from tests.unit.test_comparison import compare
from tests.unit.test_report import write_run


def test_the_reward_accuracy_by_hand() -> None:
    """Of the first question all four rewards, 1 1 0 0, are right. Of the second they are 0 1 1 0 instead of 1 0 0 0.

    The third has no answer and no right response. The fourth is a tie, which the first answer wins, wrongly.
    """
    classes = np.array([[0, 0, 1, -1], [0, 1, 1, 2], [-1, -1, -1, -1], [0, 1, 0, 1]])
    correct = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=float)
    found = vote_accuracy(classes, correct)
    assert found == {"reward_accuracy": pytest.approx((1 + 1 / 4 + 1 + 0) / 4), "label_accuracy": 0.25}
    one = vote_accuracy(np.array([[-1], [-1]]), np.array([[0.0], [1.0]]))
    assert one == {"reward_accuracy": 0.5, "label_accuracy": 0.0}


@pytest.mark.parametrize(
    ("votes", "verifiers", "by"),
    [
        (True, ("math", "math"), "math"),
        (False, ("math", "math"), None),
        (True, ("math", "countdown"), None),  # answers by two rules are not compared
        (True, ("judge", "judge"), None),  # a judge compares no responses
    ],
)
def test_what_compares_the_answers_of_a_set(votes: bool, verifiers: tuple[str, ...], by: str | None) -> None:
    prompts = [LabelledPrompt(str(i), "q", (i,), "a", name) for i, name in enumerate(verifiers)]
    evaluator: Any = SimpleNamespace(config=EvaluationConfig(votes=votes))
    assert Evaluator._votes_by(evaluator, prompts) == by


def test_the_step_is_the_first_below_one_percent() -> None:
    assert collapse_step({}) is None
    assert collapse_step({0: 0.6, 5: 0.01, 10: 0.5}) is None, "1% is not below it"
    curve = {20: 0.3, 0: 0.6, 10: 0.009, 15: 0.0}
    assert collapse_step(curve) == 10
    assert (collapse_words(curve), collapse_words({0: 0.6, 5: 0.2})) == ("10", "none by 5")
    assert collapse_sentence("u", curve).startswith("u: model collapse step 10,")
    assert "lowest with 0.200 at step 5" in collapse_sentence("u", {0: 0.6, 5: 0.2, 10: 0.2})


def with_votes(run: Path, **accuracies: list[float]) -> Path:
    """The run with a reward accuracy at each evaluation of these sets."""
    records: list[dict[str, Any]] = read_evaluations(run)
    for name, values in accuracies.items():
        of_set = [record for record in records if record["set"] == name]
        for record, value in zip(of_set, values, strict=True):
            record["vote"] = {"reward_accuracy": value, "label_accuracy": 0.5}
    (run / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_it_is_in_the_summary_and_on_the_page_of_several_runs(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    runs = [write_run(tmp_path / name / "run") for name in ("a", "b", "c")]
    records = read_evaluations(runs[0])
    steps = [record["step"] for record in records if record["set"] == "unlabelled"]
    falling = [0.5] * (len(steps) - 1) + [0.001]
    with_votes(runs[0], unlabelled=falling)
    with_votes(runs[1], unlabelled=[0.5] * len(steps))
    assert reward_accuracies(records) == {}
    assert f"unlabelled: model collapse step {steps[-1]}, from which" in summary_table(runs[0])
    assert "unlabelled: no model collapse step; the reward accuracy" in summary_table(runs[1])
    assert "collapse" not in summary_table(runs[2]), "nothing was recorded"
    text = compare(tmp_path / "page.html", *runs).text
    assert f"unlabelled model collapse step {steps[-1]} none by {steps[-1]} -" in text
    assert text.count("model collapse step") == 1, "not of a set without votes"
