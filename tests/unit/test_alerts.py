"""Each rule on hand-made records: it fires where it should, at the step where it should, and not beside it."""

from __future__ import annotations

import json
import timeit
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.observability.alerts import RULES, Alert, Watch, alerts

FIXTURES = Path(__file__).parents[1] / "fixtures"

QUIET = {
    "actor/entropy": 0.5,
    "actor/clip_fraction": 0.1,
    "actor/rows": 64.0,
    "actor/grad_norm": 1.0,
    "critic/grad_norm": 2.0,
    "actor/skipped": 0.0,
    "critic/skipped": 0.0,
    "engine/logprob_gap_mean": 0.01,
    "engine/ess": 0.95,
    "correction/ess": 0.99,
    "correction/tokens_masked": 0.01,
    "truncated": 0.02,
    "seconds": 10.0,
}


def steps(name: str, numbers: Sequence[float | None], stage: str = "stage1", first: int = 1) -> list[dict[str, Any]]:
    """Records with these numbers of one name; all others are quiet."""
    return [{"stage": stage, "step": first + i} | QUIET | {name: number} for i, number in enumerate(numbers)]


def evaluations(*aurocs: float | None) -> list[dict[str, Any]]:
    return [
        {"step": 10 * i, "set": "aime", "calibration": None if auroc is None else {"last": {"auroc": auroc}}}
        for i, auroc in enumerate(aurocs)
    ]


def fired(
    metrics: list[dict[str, Any]], scores: list[dict[str, Any]] | None = None
) -> list[tuple[str, int, int, bool]]:
    return [(alert.name, alert.first, alert.last, alert.active) for alert in alerts(metrics, scores or [])]


TEN = [1.0] * 10
# name of the number, numbers, rule, first and last step at which it fires, whether it still does
FIRES: dict[str, tuple[str, list[float | None], str, int, int, bool]] = {
    # means of the last five from step 11: 0.02, 0.03, ...: above twice 0.01 at the second
    "gap": ("engine/logprob_gap_mean", [0.01] * 10 + [0.06] * 2, "engine and trainer drift apart", 12, 12, True),
    # 0.5, then 0.05: means of five 0.41, 0.32, 0.23, 0.14, 0.05, below 0.1 at the fifth
    "entropy": ("actor/entropy", [0.5] * 10 + [0.05] * 6, "entropy collapses", 15, 16, True),
    "clips much": ("actor/clip_fraction", [0.1] * 5 + [0.7] * 5 + [0.1] * 5, "clipping takes over", 9, 11, False),
    "clips no more": ("actor/clip_fraction", [0.01] + [0.0] * 21, "clipping has ceased", 21, 22, True),
    "masked": (
        "correction/tokens_masked",
        [0.8] * 4 + [0.6] * 5 + [0.0] * 5,
        "the correction masks most tokens",
        5,
        9,
        False,
    ),
    "no rows": (
        "actor/rows",
        [64.0] + [0.0] * 6 + [64.0],
        "the actor is not trained",
        6,
        7,
        False,
    ),
    "engine's ess": ("engine/ess", [0.9] * 5 + [0.01] * 6, "few samples are effective", 10, 11, True),
    "correction's ess": ("correction/ess", [0.05] * 5, "the correction leaves few samples", 5, 5, True),
    # means of five 0.0595, ..., 0.2175 at the fifth of 0.2175: above 0.17 at the fourth
    "truncated": ("truncated", [0.02] * 10 + [0.2175] * 5, "truncated responses rise", 14, 15, True),
    "resynced": ("engine/resyncs", [0.0, 0.0, 1.0, 0.0], "engine has drifted", 3, 3, False),
    "dropped": ("actor/rows_dropped", [None, 64.0], "engine has drifted", 2, 2, True),
    "skipped": ("critic/skipped", [0.0, 2.0, 0.0], "steps are skipped", 2, 2, False),
    # the first iteration, which warms up, is not what was; a median of five is past at the third
    "slow": ("seconds", [90.0] + [10.0] * 10 + [21.0] * 3, "iterations slow down", 14, 14, True),
    "spike": ("actor/grad_norm", [1.0] * 5 + [10.5, 1.0], "gradient norm spikes", 6, 6, False),
    "gaps are passed over": ("critic/grad_norm", [2.0, None] * 5 + [21.0], "gradient norm spikes", 11, 11, True),
}


@pytest.mark.parametrize("case", FIRES)
def test_fires(case: str) -> None:
    name, numbers, rule, first, last, active = FIRES[case]
    assert fired(steps(name, numbers)) == [(rule, first, last, active)]


SILENT: dict[str, tuple[str, list[float | None]]] = {
    "a gap that grows below the floor": ("engine/logprob_gap_mean", [0.001] * 10 + [0.019] * 10),
    "a gap that was large at once": ("engine/logprob_gap_mean", [0.04] * 20),
    "one lapse of entropy": ("actor/entropy", [0.5] * 10 + [0.0] + [0.5] * 5),
    "entropy that halves": ("actor/entropy", [0.5] * 10 + [0.2] * 10),
    "high clipping for a moment": ("actor/clip_fraction", [0.1] * 5 + [0.9] + [0.1] * 5),
    "no clipping ever": ("actor/clip_fraction", [0.0] * 40),
    "no clipping for a while": ("actor/clip_fraction", [0.01] + [0.0] * 19),
    "half of the tokens masked": ("correction/tokens_masked", [0.5] * 10),
    "four iterations without rows": ("actor/rows", [0.0] * 4 + [8.0] + [0.0] * 4),
    "one iteration of few samples": ("engine/ess", [0.9] * 5 + [0.0] + [0.9] * 5),
    "a fifth of the samples": ("correction/ess", [0.2] * 10),
    "truncated always": ("truncated", [0.5] * 20),
    "a slow start": ("seconds", [90.0] + [10.0] * 20),
    "one slow iteration": ("seconds", [10.0] * 12 + [90.0] + [10.0] * 3),
    "a high norm from the start": ("actor/grad_norm", [30.0, 1.0, 1.0, 1.0]),
    "a norm of nine times": ("actor/grad_norm", [1.0] * 9 + [9.0]),
    "a first gradient after none": ("actor/grad_norm", [0.0] * 9 + [1.0]),
    "no resync": ("engine/resyncs", [0.0] * 20),
    "numbers that are not there": ("actor/entropy", [None] * 20),
}


@pytest.mark.parametrize("case", SILENT)
def test_is_silent(case: str) -> None:
    assert fired(steps(*SILENT[case])) == []


def test_a_stage_is_held_against_itself() -> None:
    """Other prompts and another method: another entropy, another gap."""
    first, second = steps("actor/entropy", [0.5] * 10), steps("actor/entropy", [0.05] * 10, "stage2", 11)
    assert fired(first + second) == []
    second = steps("actor/entropy", [0.05] * 5 + [0.001] * 5, "stage2", 11)
    assert fired(first + second) == [("entropy collapses", 20, 20, True)]


def test_the_critics_auroc() -> None:
    fall = "critic's AUROC falls"
    assert fired([], evaluations(0.80, 0.90, 0.86)) == []
    assert fired([], evaluations(0.80, None, 0.90, 0.84, None)) == [(fall, 30, 30, True)]
    assert fired([], evaluations(0.90, 0.84, 0.89)) == [(fall, 10, 10, False)]
    (alert,) = alerts([], evaluations(0.80, 0.90, 0.50))
    assert alert.seen == "AUROC on aime 0.500, was 0.900 at step 10"
    assert alert.line().startswith("critic's AUROC falls, step 20: AUROC on aime 0.500, was 0.900 at step 10; ")


def within(*aurocs: float, stage: str = "stage2") -> list[dict[str, Any]]:
    return [
        {"step": 10 * i, "set": "aime", "stage": stage,
         "calibration": {"last": {"auroc": 0.9, "auroc_within_questions": auroc}}}
        for i, auroc in enumerate(aurocs)
    ]  # fmt: skip


def test_a_critic_that_does_not_tell_responses_apart_twice_in_a_row() -> None:
    name = "critic does not tell a question's responses apart"
    assert fired([], within(0.55, 0.70, 0.55, 0.61)) == []
    assert fired([], within(0.55, 0.58, 0.61)) == [(name, 10, 10, False)]
    assert fired([], within(0.55, 0.58, stage="stage1")) == [], "the critic is still learning"
    assert fired([], evaluations(0.55, 0.55)) == [], "records of an earlier version"
    (alert,) = alerts([], within(0.55, 0.5))
    assert alert.seen == "AUROC within the questions of aime 0.50, before 0.55"


def judged(step: int, *bins: tuple[float, float, int], name: str = "aime") -> dict[str, Any]:
    """An evaluation with these bins of the critic: mean value, share of right responses, responses."""
    rows = [{"mean_value": mean, "fraction_right": right, "count": count} for mean, right, count in bins]
    return {"step": step, "set": name, "calibration": {"last": {"auroc": 0.9, "bins": rows}}}


def test_a_critic_that_is_too_optimistic_twice_in_a_row() -> None:
    name = "critic is too optimistic"
    # (30 * 0.1 + 10 * 0.3) / 40 = 0.15; errors of both signs cancel: (30 * -0.1 + 10 * 0.3) / 40 = 0
    high, fair = [(0.3, 0.2, 30), (0.9, 0.6, 10)], [(0.2, 0.3, 30), (0.9, 0.6, 10)]
    assert fired([], [judged(10, *high), judged(20, *fair), judged(30, *high)]) == []
    assert fired([], [judged(10, *high), judged(20, *high), judged(30, *fair)]) == [(name, 20, 20, False)]
    two_sets = [judged(10, *high), judged(10, *high, name="math"), judged(20, *high)]
    (alert,) = alerts([], two_sets)
    assert alert.seen == "on aime its values are 0.15 above the share of right responses, before 0.15"
    assert fired([], [judged(10, *high), judged(20, (0.3, 0.2, 0)), judged(30, *fair)]) == [], "a damaged record"
    pessimist = [(0.1, 0.9, 10)]
    assert fired([], [judged(10, *pessimist), judged(20, *pessimist)]) == []


def scored(*averages: float, name: str = "aime", error: float = 0.01) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "set": name, "avg": avg, "avg_se": error} for i, avg in enumerate(averages)]


def test_accuracy_falls_by_a_third() -> None:
    name = "accuracy falls"
    assert fired([], scored(0.30, 0.40, 0.27, 0.41)) == [], "to 0.675 of the best"
    assert fired([], scored(0.30, 0.40, 0.25, 0.30)) == [(name, 20, 20, False)]
    assert fired([], scored(0.40, 0.20, error=0.1)) == [], "within two standard errors of the difference, 0.28"
    assert fired([], scored(0.40, 0.10, error=0.1)) == [(name, 10, 10, True)]
    (alert,) = alerts([], [*scored(0.40, 0.10), *scored(0.5, 0.5, name="math")])
    assert alert.seen == "avg on aime 0.100, was 0.400 at step 0"


def test_the_alerts_on_the_studys_runs() -> None:
    """Thresholds were chosen on seeds 0 and 1. The numbers are those of docs/monitoring.md."""
    runs = json.loads((FIXTURES / "collapses.json").read_text())
    found: dict[tuple[str, bool], list[int]] = {}

    def count(kind: str, run: dict[str, Any], records: list[dict[str, Any]], *, truth: bool) -> None:
        kept = found.setdefault((kind, run["seed"] == 2), [0, 0, 0, 0])
        kept[(0 if fired([], records) else 1) if truth else (2 if fired([], records) else 3)] += 1

    for run in runs["accuracy"]:
        collapsed = run["unlabelled"][-1] < 0.75 * max(run["unlabelled"])
        of_set = {
            name: [{"step": i, "set": name, "avg": avg} for i, avg in enumerate(run[name])]
            for name in ("heldout", "unlabelled", "labelled")
        }
        count("held-out", run, of_set["heldout"], truth=collapsed)
        count("all sets", run, [*of_set["heldout"], *of_set["unlabelled"], *of_set["labelled"]], truth=collapsed)
    for run in runs["optimism"]:
        records = [judged(i, (0.5 + excess, 0.5, 1)) for i, excess in enumerate(run["heldout"])]
        hacked = run["excess_reward"] > 0.1
        count("optimism", run, records, truth=hacked)
        assert hacked == (run["arm"] == "frozen_critic")
    # right alarms, missed, false alarms, rightly silent
    assert found == {
        ("held-out", False): [8, 0, 0, 39],
        ("held-out", True): [2, 0, 0, 22],
        ("all sets", False): [8, 0, 2, 37],
        ("all sets", True): [2, 0, 1, 21],
        ("optimism", False): [2, 0, 0, 18],
        ("optimism", True): [1, 0, 0, 9],
    }


def test_all_that_fired_in_the_order_of_the_steps() -> None:
    metrics = steps("truncated", [0.0] * 10 + [0.5] * 5)
    metrics[3]["actor/skipped"], metrics[3]["critic/skipped"] = 1.0, 2.0
    fired = alerts(metrics, evaluations(0.9, 0.5))
    assert [alert.name for alert in fired] == ["steps are skipped", "critic's AUROC falls", "truncated responses rise"]
    assert fired[0].seen == "1 of the actor's steps and 2 of the critic's steps were not finite"
    assert fired[2] == Alert(
        fired[2].name, fired[2].advice, 12, 15, 4, "50% of the responses are truncated, was 0%", active=True
    )


def test_every_rule_is_tried_above() -> None:
    of_evaluations = {"critic's AUROC falls", "critic is too optimistic", "accuracy falls"}
    of_evaluations |= {"critic does not tell a question's responses apart"}
    assert {rule.name for rule in RULES} == {rule for _, _, rule, *_ in FIRES.values()} | of_evaluations
    assert alerts([], []) == []


def test_a_long_run_costs_no_more_a_step_and_holds_no_more() -> None:
    record = steps("seconds", [10.0])[0]
    watch, size, seconds = Watch(), [0, 0], [0.0, 0.0]
    tracemalloc.start()
    for i in (0, 1):
        for step in range(5000 * i, 5000 * (i + 1)):
            watch.metrics(record | {"step": step})
        size[i] = tracemalloc.get_traced_memory()[0]
        seconds[i] = min(timeit.repeat(lambda: watch.metrics(record | {"step": 10_000}), number=20, repeat=10)) / 20
    tracemalloc.stop()
    assert size[1] - size[0] < 10_000, "bytes, of 5000 records"
    assert seconds[1] < 2 * seconds[0]
