"""The page that compares runs: what it says of made-up ones, and that any piece may be missing."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.errors import InputError
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
    assert page.tags.count("strong") == 1 + 4  # of the alerts, and one a row


def test_curves_and_their_key(page: Text) -> None:
    pictures = [base64.b64decode(link.split(",")[1]).decode() for link in page.links if link.startswith("data:")]
    # two sets by avg and pass; AUROC and ECE; eight curves (reward twice, gradient norm twice); phases
    assert len(pictures) == 4 + 2 + 9 + 1
    for colour in ("#0072b2", "#d55e00"):  # of the two runs
        assert all(colour in picture for picture in pictures[:4])
    assert "#d55e00" not in pictures[4]  # without calibration
    assert ">pass@8<" not in pictures[0]
    assert "unlabelled: pass@8" in pictures[1]


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
    assert len(page.titles) == 2 * 4 * 15  # the last milestone of each, two right and two wrong, fifteen tokens each
    assert [link for link in page.links if not link.startswith("data:")] == ["a/run/report.html"]
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run", calibrated=False)
    append(run / "evaluations.jsonl", evaluation_record(100, "after", HOSTILE, 0.5))
    page = compare(tmp_path / "page.html", run)
    assert {"script", "b"}.isdisjoint(page.tags)
    assert "<b>run" in page.text


def test_runs_that_have_hardly_begun(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    (tmp_path / "empty").mkdir()
    page = compare(tmp_path / "page.html", tmp_path / "empty", runs[0])
    assert "set score empty run unlabelled avg@16 - 0.690" in page.text
    assert "2 runs compared" in compare(tmp_path / "page.html", tmp_path / "empty", tmp_path).text


def test_a_set_without_a_pass_k_in_common(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    (tmp_path / "other").mkdir()
    record = evaluation_record(3, "during", "unlabelled", 0.3) | {"pass": {"4": 0.5}, "pass_se": {"4": None}}
    append(tmp_path / "other" / "evaluations.jsonl", record)
    page = compare(tmp_path / "page.html", tmp_path / "other", runs[0])
    svg = "".join(base64.b64decode(link.split(",")[1]).decode() for link in page.links if link.startswith("data:"))
    assert "unlabelled: avg@16" in svg
    assert "unlabelled: pass@" not in svg
    assert "held_out: pass@8" in svg


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
