"""The study's arms are configurations that pass, and its report says what its runs' records say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_tempo.cli import build
from megatron_tempo.config.compose import REPOSITORY
from tests.support.tools import load_tool
from tests.unit.config_files import write_model, write_rows

MODEL = REPOSITORY / "examples" / "quickstart" / "model"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/study.py, at work in a folder of its own, behind one stage 1."""
    module = load_tool("study", monkeypatch)
    monkeypatch.setattr(module, "OUT", tmp_path / "study")
    for start in (module.COUNTDOWN, module.COUNTDOWN_PLAIN, *module.COUNTDOWN_TESTS.values()):
        export = module.folder(start.name, 0) / "hf_step_00000070"
        export.mkdir(parents=True)
        for role in ("actor", "critic"):
            (export / role).symlink_to(MODEL)
    for role in ("actor", "critic"):
        write_model(module.folder(module.SECOND_TASK.name, 0) / "hf_step_00000060" / role)
    module.write_files()
    shutil.copy(module.data() / "known.jsonl", module.data() / "acquired_0.jsonl")
    return module


def there(study: ModuleType, start: Any, folder: Path) -> list[str]:
    """Overrides for the files of the second task, which a program has to make first."""
    if start.task == "countdown":
        return []
    fields = ("data.labelled", "data.unlabelled", *(f"evaluation.sets.{n}" for n in ("labelled", "heldout")))
    return [f"{name}.path={write_rows(folder / f'{i}.jsonl')}" for i, name in enumerate(fields)]


@pytest.mark.long
def test_every_arm_passes_the_check_and_is_unlike_the_others_of_its_table(study: ModuleType, tmp_path: Path) -> None:
    configs = {}
    lengths = {"long": 350, "logic_dates": 60}
    for arm in study.EVERY:
        config = build([*study.stage_two(arm, 0), *there(study, arm.start, tmp_path)], world_size=1)
        assert config.stage1.iterations == (70 if arm.name.startswith("refined_kl_to_") else 0)
        assert config.stage2.iterations == lengths.get(arm.group, 70)
        assert len(config.evaluation.sets) == 3
        config.run.dir = ""
        configs[arm.name] = config
    assert len(configs) == len(study.EVERY)
    # by what they are compared with
    groups = {arm.name: study.BASELINES.get(arm.group, "tempo") for arm in study.ARMS}
    groups |= dict.fromkeys((arm.name for arm in study.FACTORIAL), "factorial")
    assert all(configs[a] != configs[b] for a in configs for b in configs if a != b and groups[a] == groups[b])
    assert configs["tempo"] == configs["tempo_again"]
    assert configs["early_baseline"] == configs["baseline_reference"]
    configs["factorial_none"].evaluation.every = configs["tempo"].evaluation.every
    assert configs["tempo"] == configs["factorial_none"]
    for test in study.TEST_SEEDS:
        tempo = configs[f"{test}_tempo"]
        data, sets = tempo.data, tempo.evaluation.sets
        paths = [data.labelled.path, data.unlabelled.path, sets["heldout"].path, sets["labelled"].path]
        kinds = [Path(path).stem.removeprefix(f"{test}_") for path in paths]
        assert kinds == ["labelled", "unlabelled", "heldout", "labelled"]
        assert sets["unlabelled"].path == data.unlabelled.path
    assert build(study.stage_one(0), world_size=1).stage2.iterations == 0
    second = study.SECOND_TASK
    words = [*study.stage_one(0, second), *there(study, second, tmp_path), f"model.path={write_model(tmp_path / 'm')}"]
    assert build(words, world_size=1).stage2.iterations == 0


def test_a_task_is_prepared_once_for_its_arms(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of runs: what makes the task, stage 1, then the arms; none of the other task."""
    calls: list[str] = []
    monkeypatch.setattr(study, "write_files", lambda: calls.append("countdown"))
    monkeypatch.setattr(study.subprocess, "run", lambda words, check: calls.append(" ".join(map(str, words[2:]))))
    monkeypatch.setattr(study, "train", lambda run, words: calls.append(f"{run.parent.name}/{run.name}"))
    monkeypatch.setattr(study, "exported", lambda seed, start: study.OUT / start.name)
    monkeypatch.setattr("sys.argv", ["study.py", "run", "--jobs=1", "--task=logic_dates", "--seeds", "2"])
    assert study.main() == 0
    arms = [f"seed2/logic_{arm}" for arm in ("tempo", "ttrl", "empo", "ppo", "grpo", "tempo_plus")]
    assert calls == ["--bases plain", "seed2/stage1_logic_dates", *arms]
    monkeypatch.setattr("sys.argv", ["study.py", "run", "--task=logic_dates", "--only", "tempo"])
    with pytest.raises(SystemExit):
        study.main()


def test_a_group_runs_its_arms_on_their_seeds(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    made: list[list[Any]] = []
    monkeypatch.setattr(study.subprocess, "run", lambda words, check: made.append(words))
    monkeypatch.setattr(study, "train", lambda run, words: calls.append(f"{run.parent.name}/{run.name}"))
    monkeypatch.setattr(study, "exported", lambda seed, start: study.OUT / start.name)
    monkeypatch.setattr("sys.argv", ["study.py", "run", "--jobs=1", "--only", "first_test", "factorial_none"])
    assert study.main() == 0
    firsts = ["seed0/stage1", "seed1/stage1", *(f"seed{seed}/stage1_first_test" for seed in range(10, 15))]
    assert calls[: len(firsts)] == firsts
    assert calls.count("seed0/factorial_none") == calls.count("seed14/first_test_both") == 1
    assert len(calls) == len(firsts) + 2 + 5 * len([arm for arm in study.ARMS if arm.group == "first_test"])
    assert not made, "these base models are part of the repository"
    monkeypatch.setattr("sys.argv", ["study.py", "run", "--jobs=1", "--only", "plain_ttrl", "--seeds", "5"])
    calls.clear()
    assert study.main() == 0
    assert calls == ["seed5/stage1_plain", "seed5/plain_ttrl"]
    assert [str(word) for word in made[0][-3:]] == ["--misled", "0", "--force"]


def test_the_other_sets_are_parts_of_the_quickstarts(study: ModuleType) -> None:
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in study.data().iterdir()}
    assert len(rows["misleading"]) + len(rows["other"]) == 6000
    assert len(rows["unlabelled_2048"]) == 2048
    assert len(rows["rest"]) == 6000 - 1536
    assert all("answer" not in row for row in rows["unlabelled_2048"])
    prompts = {name: {row["prompt"] for row in kind} for name, kind in rows.items()}
    assert not prompts["rest"] & prompts["unlabelled_2048"]
    read = [json.loads(line) for line in (study.EXAMPLES / "labelled.jsonl").read_text().splitlines()]
    first = {row["prompt"] for row in read[:256]}  # those that are evaluated elsewhere
    tested: set[str] = set()
    for test in study.TEST_SEEDS:
        labelled, unlabelled, heldout = (prompts[f"{test}_{name}"] for name in ("labelled", "unlabelled", "heldout"))
        assert [len(unlabelled), len(heldout), len(labelled)] == [512, 256, 6000 - 768]
        assert len(labelled | unlabelled | heldout) == 6000, "no question is in two of them"
        assert unlabelled | heldout <= prompts["misleading"] - prompts["unlabelled_2048"] - tested
        assert not first & {row["prompt"] for row in rows[f"{test}_labelled"][:256]}
        tested |= unlabelled | heldout


@pytest.mark.long
def test_half_of_the_acquired_questions_are_chosen(study: ModuleType) -> None:
    """By CARE's rule, from the policy's responses to the pool, here of 96 questions."""
    pool, made = study.data() / "pool.jsonl", study.data() / "acquired_0.jsonl"
    rows = pool.read_text().splitlines(keepends=True)
    assert len(rows) == 1024
    pool.write_text("".join(rows[:96]))
    made.unlink()
    study.write_acquired(0)
    written = made.read_text().splitlines(keepends=True)
    assert written[:32] == rows[:32]
    assert len(set(written)) == 64
    assert set(written) <= set(rows[:96])
    pool.unlink()
    study.write_acquired(0)  # it is there
    assert made.read_text() == "".join(written)


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
                    **({"vote": {"reward_accuracy": (0.6, 0.005 if seed == 0 else 0.4)[i]}} if arm == "tempo" else {}),
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
    assert report.mixed(runs) == []
    for seed in (0, 1):
        runs["tempo", seed]["sets"]["heldout"] |= {"auroc": [0.9, 0.8], "ece": [0.1, 0.2]}
    runs["tempo", 1]["sets"]["heldout"]["auroc_within_questions"] = [0.6, 0.7]  # the other seed did not record it
    head, _, critic = "".join(report.critics(runs, arms)).splitlines()
    assert head.endswith("| AUROC within questions, end of stage 1 | lowest | end |")
    of_both = [f"{x} ({x} to {x})" for x in (".900", ".800", ".800", ".100", ".200", ".200")]
    assert critic == f"| TEMPO | {' | '.join([*of_both, '.600', '.600', '.700'])} |"
    header, _, start, tempo, ttrl = "".join(report.table(runs, arms)).splitlines()
    assert header.count("|") == start.count("|") == tempo.count("|") == ttrl.count("|")
    assert tempo.startswith("| TEMPO | 2 | .600 (.500 to .700) |")
    assert "| -.150 (-.200 to -.100) |" in ttrl
    assert report.formatted(np.array([0.5, 0.6, 0.7])) == ".600 ± .248"  # t of two degrees of freedom
    assert header.endswith("| truncated | model collapse step |")
    assert "| .250 (.250 to .250) |" in tempo
    head, _, row = "".join(report.paired(runs, arms[1], [arms[0]])).splitlines()
    assert head.startswith("| TTRL minus | unlabelled, avg@16 | unlabelled, pass@16 |")
    assert row.startswith("| TEMPO | -.150 (-.200 to -.100) (0 of 2, p = .205) |")  # t = -3, of one degree of freedom
    assert tempo.endswith("| 70, none by 70 |"), "of each seed"
    for curves in (curves for run in runs.values() for curves in run["sets"].values()):
        curves.pop("reward accuracy", None)
    assert "collapse" not in "".join(report.table(runs, arms)), "earlier runs recorded no votes"
    assert report.times(runs) == "4 runs of stage 2: 0.1 hours of one core, each 100 to 100 s, median 100 s.\n"
    runs["ttrl", 1]["sets"]["unlabelled"]["avg@16"][0] = 0.25
    report.save_runs(runs)
    assert report.mixed(runs) == ["ttrl, seed 1, starts at .250, and tempo at .200"]
    (study.folder("ttrl", 1) / "done").unlink()  # a run of another machine, of which only the curves are here
    monkeypatch.setattr(report, "DOCUMENT", tmp_path / "study.md")
    with pytest.raises(SystemExit, match=r"docs/study.md is not changed.*\nttrl, seed 1, starts at .250"):
        report.write()
    assert not report.DOCUMENT.exists()
