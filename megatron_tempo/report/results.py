"""results.json of the eval command: its table, and the comparison of two of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tempo.config.tree import differences
from megatron_tempo.config.tree import load as load_config
from megatron_tempo.errors import InputError
from megatron_tempo.evaluation.paired import Paired, paired
from megatron_tempo.files import replace_file
from megatron_tempo.observability.records import RESPONSES, Record, read
from megatron_tempo.report.summary import plain_table, printable, sampled_words, seen_words

RESULTS = "results.json"
NAMED = 10  # questions that an error names, at most

# Settings of generation and verification. If two runs differ in them, that may explain a difference of their scores.
_ASKED = (
    *("run.seed", "run.precision", "rollout.", "evaluation."),
    *("rewards.judge.model", "rewards.math.seconds", "rewards.read_unfinished_thoughts"),
)
_NO_MATTER = (
    *("rollout.servers.", "rollout.batch_rows", "rollout.dump", "rollout.replay"),
    *("rollout.max_staleness", "rollout.stale_groups", "rollout.partial_rollouts"),
)


def results_table(results: Record, pass_k: Sequence[int]) -> str:
    """The scores of every set with 95% intervals, pass@k only for the given k, and the questions trained on."""
    rows = []
    for name, result in results["sets"].items():
        scores = {f"avg@{result['samples']}": result["avg"]}
        scores |= {f"pass@{k}": result["pass"][str(k)] for k in dict.fromkeys(pass_k)}
        rows += [[name, str(result["questions"]), label, *_cells(score)] for label, score in scores.items()]
    lines = plain_table(["set", "questions", "score", "value", "95% interval"], rows)
    if "temperature" in results:
        lines.append(f"sampling: {sampled_words(results)}")
    for name, result in results["sets"].items():
        length = result["response_length"]
        lines.append(
            f"{name}: {length['mean']:.0f} tokens per response, {result['truncated']:.1%} truncated; "
            + seen_words(result["seen"], result["questions"])
        )
    return printable("\n".join(lines))


def _cells(score: dict[str, float | None]) -> list[str]:
    ends = "-" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
    return [f"{score['value']:.3f}", ends]


@dataclass(frozen=True, slots=True)
class Difference:
    """Two runs on a set: the share of correct responses of each question, compared (`evaluation.paired`)."""

    set: str
    first: tuple[float, int]  # avg@k and k
    second: tuple[float, int]
    paired: Paired  # second minus first


def compare(first: Path, second: Path) -> str:
    """A table that compares two folders of the eval command. Raises InputError if they cannot be compared."""
    differences = differences_of(first, second)
    rows = [
        [
            d.set,
            str(d.paired.questions),
            f"{d.first[0]:.3f} @{d.first[1]}",
            f"{d.second[0]:.3f} @{d.second[1]}",
            f"{d.paired.difference:+.3f}",
            "-" if d.paired.interval is None else "{:+.3f} to {:+.3f}".format(*d.paired.interval),
            "-" if d.paired.p is None else f"{d.paired.p:.4f}",
        ]
        for d in differences
    ]
    lines = [f"A  {first}", f"B  {second}", ""]
    lines += plain_table(["set", "questions", "avg@k of A", "of B", "B - A", "95% interval", "p"], rows)
    if settings := _other_settings(first, second):
        lines += ["settings that differ (A -> B):", *(f"  {line}" for line in settings)]
    return printable("\n".join(lines).rstrip())


def differences_of(first: Path, second: Path) -> list[Difference]:
    """One entry per set that both runs have. Raises InputError if there is none, or if the questions differ."""
    a, b = _Answers.read(first), _Answers.read(second)
    names = [name for name in a.correct if name in b.correct]
    if not names:
        raise InputError(
            f"{first} has {_listed(a.correct)}, {second} has {_listed(b.correct)}: no set in common. "
            f"Evaluate both models on the same set"
        )
    problems = [line for name in names for line in _unlike(name, a, b, first, second)]
    if problems:
        more = [f"... and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
        raise InputError(
            "\n  ".join(["the two folders cannot be compared: their questions differ:", *problems[:NAMED], *more])
        )
    return [_difference(name, a.correct[name], b.correct[name]) for name in names]


@dataclass(frozen=True, slots=True)
class _Answers:
    """A run's verdicts, one per response, and its questions' keys, both by set and by the question's id."""

    correct: dict[str, dict[str, list[int]]]
    keys: dict[str, dict[str, str]]

    @classmethod
    def read(cls, run_dir: Path) -> _Answers:
        if not (run_dir / RESULTS).is_file() or not (run_dir / RESPONSES).is_file():
            raise InputError(f"{run_dir} lacks {RESULTS} or {RESPONSES}: give two folders that eval has written to")
        responses = cls({}, {})
        for record in read(run_dir / RESPONSES):
            name, question = record["set"], record["id"]
            responses.correct.setdefault(name, {}).setdefault(question, []).append(record["correct"])
            responses.keys.setdefault(name, {})[question] = record["question"]
        return responses


def _unlike(name: str, a: _Answers, b: _Answers, first: Path, second: Path) -> list[str]:
    """The questions of a set that differ between the runs."""
    of_a, of_b = a.keys[name], b.keys[name]
    return [
        *(f"{name}: {question} is only in {first}" for question in of_a if question not in of_b),
        *(f"{name}: {question} is only in {second}" for question in of_b if question not in of_a),
        *(f"{name}: {q} has different texts" for q in of_a if q in of_b and of_a[q] != of_b[q]),
    ]


def _difference(name: str, a: dict[str, list[int]], b: dict[str, list[int]]) -> Difference:
    first = np.array([np.mean(a[question]) for question in a])
    second = np.array([np.mean(b[question]) for question in a])
    k = [max(map(len, answers.values())) for answers in (a, b)]
    return Difference(name, (float(first.mean()), k[0]), (float(second.mean()), k[1]), paired(first, second))


def _other_settings(first: Path, second: Path) -> list[str]:
    """Settings, except the model, that could make the scores differ."""
    configs = [load_config(folder / "config.json") for folder in (first, second)]
    return [line for line in differences(*configs) if line.startswith(_ASKED) and not line.startswith(_NO_MATTER)]


def _listed(sets: dict[str, Any]) -> str:
    return ", ".join(sets) or "no sets"


def write(path: Path, results: Record) -> None:
    """Writes results.json, all or nothing."""
    replace_file(path, json.dumps(results, indent=2, allow_nan=False) + "\n", fsync=True)
