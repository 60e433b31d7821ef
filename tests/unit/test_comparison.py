"""The page that compares runs: what it says of made-up ones, and that any piece may be missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_tempo import cli
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.errors import InputError
from megatron_tempo.evaluation.scores import avg_at_k_se, pass_at_k
from megatron_tempo.observability.records import append, read_metrics
from megatron_tempo.report.comparison import names, write_comparison
from megatron_tempo.report.html import write_report
from tests.unit.test_report import HOSTILE, Text, evaluation_record, write_run


def compare(out: Path, *runs: Path) -> Text:
    return Text(write_comparison(runs, out).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs, the second shorter, without a critic's calibration, with another rate and another end."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    first = write_run(folder / "a" / "run")
    second = write_run(folder / "b" / "run", stage2=40, scores=(0.17, 0.28, 0.4), calibrated=False)
    config = json.loads((second / "config.json").read_text())
    config["stage2"]["actor"]["optimizer"]["lr"] = 2e-6
    config["run"]["resume"] = False
    (second / "config.json").write_text(json.dumps(config))
    append(second / "metrics.jsonl", read_metrics(second)[-1] | {"step": 81, "critic/skipped": 1.0})
    return first, second


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path]) -> Text:
    write_report(runs[0])
    return compare(runs[0].parent.parent / "comparison.html", *runs)


def test_scores_side_by_side(page: Text) -> None:
    assert "2 runs compared" in page.text
    assert (
        "set score a/run b/run unlabelled avg@16 0.690 ± 0.020 step 100, from 0.170 0.400 ± 0.020 step 80" in page.text
    )
    assert page.tags.count("strong") == 1 + 4  # of the alerts, and one a row: every difference is real
    assert "not tested" not in page.text


def test_curves_and_their_key(page: Text) -> None:
    # two sets by avg and pass; two AUROCs and ECE; nine curves (reward twice, gradient norm twice)
    assert len(page.charts) == 4 + 3 + 9
    assert all([line["label"] for line in chart["lines"]] == ["a/run", "b/run"] for chart in page.charts[:4])
    assert [line["label"] for line in page.charts[4]["lines"]] == ["a/run"]  # without calibration
    assert page.charts[1]["title"] == "unlabelled: pass@8"
    assert page.text.count("a/run: 1.32 s") == 1, "the bar of its phases"


def test_time_and_memory_by_phase(page: Text) -> None:
    # The second run has 81 lines, of which 41 are of stage 2 and have an E-step of 0.2 s.
    assert "phase a/run b/run generate 0.7 0.7 mstep 0.5 0.5 estep 0.12 0.101" in page.text
    assert "phase a/run b/run mstep 4 4 generate 2 2" in page.text


def test_in_what_they_differ(page: Text) -> None:
    assert "field a/run b/run run.resume true false" in page.text
    assert "stage2.iterations 60 40" in page.text
    assert "stage2.actor.optimizer.lr 1e-06 2e-06" in page.text
    assert "run.dir" not in page.text


def test_alerts_samples_and_links(page: Text) -> None:
    assert "b/run: steps are skipped, step 81: 1 of the critic's steps were not finite" in page.text
    assert (
        len([title for title in page.titles if title.startswith("value")]) == 2 * 4 * 15
    )  # the last milestone of each, two right and two wrong, fifteen tokens each
    assert page.links == ["a/run/report.html"]
    assert {"link", "iframe", "object"}.isdisjoint(page.tags)
    assert page.has_only_its_own_script()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run", calibrated=False)
    append(run / "evaluations.jsonl", evaluation_record(100, "after", HOSTILE, 0.5))
    page = compare(tmp_path / "page.html", run)
    assert page.has_only_its_own_script()
    assert {"img", "b"}.isdisjoint(page.tags)
    assert "<b>run" in page.text


def test_runs_that_have_hardly_begun(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path):
        (folder / "config.json").write_text("{}")
    page = compare(tmp_path / "page.html", tmp_path / "empty", runs[0])
    assert "set score empty run unlabelled avg@16 - 0.690" in page.text
    assert "2 runs compared" in compare(tmp_path / "page.html", tmp_path / "empty", tmp_path).text


def test_a_set_without_a_pass_k_in_common(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    (tmp_path / "other").mkdir()
    record = evaluation_record(3, "during", "unlabelled", 0.3) | {"pass": {"4": 0.5}, "pass_se": {"4": None}}
    record |= {"right": [5] * 128, "questions_hash": "of unlabelled"}
    append(tmp_path / "other" / "evaluations.jsonl", record)
    page = compare(tmp_path / "page.html", tmp_path / "other", runs[0])
    titles = [chart["title"] for chart in page.charts]
    assert "unlabelled: avg@16" in titles
    assert not any(title.startswith("unlabelled: pass@") for title in titles)
    assert "held_out: pass@8" in titles


def scored_run(run_dir: Path, right: list[int], questions: str = "same", temperature: float = 1.0) -> Path:
    """A run folder with one evaluation of the set `unlabelled`, 16 samples a question."""
    run_dir.mkdir()
    correct = np.array([[int(s < count) for s in range(16)] for count in right])
    record = evaluation_record(10, "after", "unlabelled", float(correct.mean()))
    record |= {"questions": len(right), "right": right, "questions_hash": questions}
    record |= {"avg_se": avg_at_k_se(correct), "pass": {"8": pass_at_k(correct, 8)}, "pass_se": {"8": 0.0}}
    append(run_dir / "evaluations.jsonl", record)
    config = Config()
    config.run.dir, config.model.path, config.evaluation.temperature = str(run_dir), "model", temperature
    (run_dir / "config.json").write_text(json.dumps(to_plain(config)))
    return run_dir


def bold(page: Text) -> list[str]:
    return re.findall(r"<strong>([^<]*)</strong>", page.page)


def test_other_questions_are_not_put_side_by_side(tmp_path: Path) -> None:
    whole = scored_run(tmp_path / "whole", [9, 10] * 256, "512 of them")
    part = scored_run(tmp_path / "part", [1, 2] * 32, "64 of them")
    page = compare(tmp_path / "page.html", whole, part)
    assert bold(page) == []
    assert "unlabelled (512 questions) avg@16 0.594 ± 0.001 step 10 - unlabelled (512 questions) pass@8" in page.text
    assert "unlabelled (64 questions) avg@16 - 0.094" in page.text
    assert [chart["title"] for chart in page.charts[:2]] == [
        "unlabelled (512 questions): avg@16",
        "unlabelled (512 questions): pass@8",
    ]
    # as many questions, but others
    other = scored_run(tmp_path / "other", [1] * 512, "others")
    page = compare(tmp_path / "page.html", whole, other)
    assert bold(page) == []
    assert "unlabelled (512 questions, set 2)" in page.text


def test_bold_is_what_a_test_supports(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(64)
    low, high = (rng.binomial(16, np.clip(hard + shift, 0, 1)).tolist() for shift in (0.0, 0.03))
    first, second = scored_run(tmp_path / "a", low), scored_run(tmp_path / "b", high)
    assert sum(high) > sum(low)
    assert bold(compare(tmp_path / "page.html", first, second)) == []
    # One more correct response per question: small against the spread over questions, significant when paired.
    third = scored_run(tmp_path / "c", [min(count + 1, 16) for count in low])
    assert len(bold(compare(tmp_path / "page.html", first, third))) >= 1
    # the best of three must be better than each of the others, and its twin is not worse
    twin = scored_run(tmp_path / "d", [min(count + 1, 16) for count in low])
    assert bold(compare(tmp_path / "page.html", first, third, twin)) == []
    assert bold(compare(tmp_path / "page.html", third)) == []


def test_what_was_measured_otherwise_is_not_tested(tmp_path: Path) -> None:
    first = scored_run(tmp_path / "a", [4] * 64)
    second = scored_run(tmp_path / "b", [12] * 64, temperature=0.6)
    page = compare(tmp_path / "page.html", first, second)
    assert bold(page) == []
    assert "unlabelled: not tested, as the runs differ in evaluation.temperature." in page.text
    # The record of a version that had no top-p sampled from the whole distribution, as the default does.
    third = scored_run(tmp_path / "before", [12] * 64)
    plain = json.loads((third / "config.json").read_text())
    for group, name in (("evaluation", "top_p"), ("evaluation", "stop"), ("rollout", "stop")):
        del plain[group][name]
    (third / "config.json").write_text(json.dumps(plain))
    assert "not tested" not in compare(tmp_path / "page.html", first, third).text
    (tmp_path / "old").mkdir()
    append(tmp_path / "old" / "evaluations.jsonl", evaluation_record(10, "after", "unlabelled", 0.9))
    older = compare(tmp_path / "page.html", tmp_path / "old", scored_run(tmp_path / "c", [4] * 128))
    assert bold(older) == []


def test_names(tmp_path: Path) -> None:
    assert names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names([Path("/x/seed0/tempo"), Path("/x/seed1/tempo")]) == ["seed0/tempo", "seed1/tempo"]
    assert names([Path("/a"), Path("/x/a")]) == ["//a", "x/a"]


def test_the_command(tmp_path: Path, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.exists()
    assert cli.main(["report", str(runs[1])]) == 0
    assert capsys.readouterr().out == f"{runs[1] / 'report.html'}\n"
    assert cli.main(["report", str(runs[0]), str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    with pytest.raises(InputError, match="is given twice"):
        write_comparison([runs[0], runs[0]], out)
