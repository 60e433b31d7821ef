"""The study's arms are configurations that pass, and its report says what its runs' records say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_tempo.cli import build
from megatron_tempo.config.compose import REPOSITORY
from tests.support.tools import load_tool

MODEL = REPOSITORY / "examples" / "quickstart" / "model"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/study.py, at work in a folder of its own, behind one stage 1."""
    module = load_tool("study", monkeypatch)
    monkeypatch.setattr(module, "OUT", tmp_path / "study")
    start = module.folder("stage1", 0) / "hf_step_00000070"
    start.mkdir(parents=True)
    for role in ("actor", "critic"):
        (start / role).symlink_to(MODEL)
    module.write_files()
    return module


@pytest.mark.long
def test_every_arm_passes_the_check_and_is_unlike_the_others_of_its_table(study: ModuleType) -> None:
    configs = {}
    for arm in study.ARMS:
        config = build(study.stage_two(arm, 0), world_size=1)
        assert config.stage1.iterations == 0
        assert config.stage2.iterations == 70
        config.run.dir = ""
        configs[arm.name] = config
    assert len(configs) == len(study.ARMS)
    groups = {arm.name: study.BASELINES.get(arm.group, "tempo") for arm in study.ARMS}  # by what they are compared with
    assert all(configs[a] != configs[b] for a in configs for b in configs if a != b and groups[a] == groups[b])
    assert configs["stale_0"] == configs["tempo"]
    assert build(study.stage_one(0), world_size=1).stage2.iterations == 0


def test_the_other_sets_are_parts_of_the_quickstarts(study: ModuleType) -> None:
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in study.data().iterdir()}
    assert len(rows["misleading"]) + len(rows["other"]) == 6000
    assert len(rows["unlabelled_2048"]) == 2048
    assert len(rows["rest"]) == 6000 - 1536
    assert all("answer" not in row for row in rows["unlabelled_2048"])
    prompts = {name: {row["prompt"] for row in kind} for name, kind in rows.items()}
    assert not prompts["rest"] & prompts["unlabelled_2048"]


def test_the_tables_by_hand(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of two arms: means, Student's interval of two, and differences seed by seed."""
    ends = {"tempo": ((0.2, 0.5), (0.2, 0.7)), "ttrl": ((0.2, 0.4), (0.2, 0.5))}
    for arm, seeds in ends.items():
        for seed, points in enumerate(seeds):
            run = study.folder(arm, seed)
            run.mkdir(parents=True)
            lines = [
                {
                    **dict.fromkeys(("time", "seconds", "avg_se"), 0.0),
                    "set": name,
                    "step": 70 * i,
                    "stage": "stage2",
                    "point": "during",
                    "iteration": 70 * i,
                    "avg_k": 16,
                    "pass_se": {"16": 0.0},
                    "avg": avg,
                    "pass": {"16": avg + 0.1},
                    "calibration": None,
                }
                for name in ("unlabelled", "heldout", "labelled")
                for i, avg in enumerate(points)
            ]
            (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            step = {"step": 70, "iteration": 70, "stage": "stage2", "method": "tempo", "time": 0.0, "seconds": 0.0}
            (run / "metrics.jsonl").write_text(json.dumps({**step, "truncated": 0.25}) + "\n")
            (run / "done").write_text("100\n")
    report = load_tool("study_report", monkeypatch)
    arms, runs = [arm for arm in study.ARMS if arm.name in ends], report.finished_runs()
    monkeypatch.setattr(report, "CURVES", tmp_path / "study.jsonl")
    report.save_runs(runs)
    assert report.saved_runs() == runs, "and the page can be made without the runs"
    assert list(runs) == [(arm.name, seed) for arm in arms for seed in (0, 1)]
    half = report.interval(np.array([0.5, 0.7]))
    assert half == pytest.approx(12.706 * 0.1, rel=1e-4)  # t of one degree of freedom; the standard error is 0.1
    header, _, start, tempo, ttrl = "".join(report.table(runs, arms)).splitlines()
    assert header.count("|") == start.count("|") == tempo.count("|") == ttrl.count("|")
    assert tempo.startswith("| TEMPO | 2 | .600 ± 1.271 |")
    assert "| -.150 ± .635 |" in ttrl
    assert report.times(runs) == "4 runs, each 100 to 100 s, median 100 s.\n"
