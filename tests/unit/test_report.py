"""The report of a synthetic run: what it says, that hostile text stays text, and that any piece may be missing."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tempo.config.schema import Config, ModelConfig, RunConfig, to_plain
from megatron_tempo.config.stages import CriticTargets
from megatron_tempo.evaluation.calibration import calibration_record
from megatron_tempo.observability.records import append
from megatron_tempo.report.html import write_report
from megatron_tempo.report.plots import plot_curves
from megatron_tempo.report.summary import summary_table

HOSTILE = '<script>alert("x")</script>&<img src=x onerror=alert(1)>\x1b[31m\u202e\ud800 $x^'


def write_run(
    run_dir: Path,
    stage1: int = 40,
    stage2: int = 60,
    scores: tuple[float, ...] = (0.17, 0.28, 0.69),
    calibrated: bool = True,
) -> Path:
    """A run folder as the trainer leaves it, with made-up numbers."""
    run_dir.mkdir()
    rng = np.random.default_rng(0)
    config = Config(run=RunConfig(dir=str(run_dir)), model=ModelConfig(path="models/tiny"))
    config.stage1.iterations, config.stage2.iterations = stage1, stage2
    (run_dir / "config.json").write_text(json.dumps(to_plain(config)))
    for step in range(1, stage1 + stage2 + 1):
        append(run_dir / "metrics.jsonl", step_record(step, stage1, rng))
    total = stage1 + stage2
    points = {0: "before"} | ({stage1: "between"} if stage1 else {}) | ({total: "after"} if stage2 else {})
    known = dict(sorted({total: scores[2], stage1: scores[1], 0: scores[0]}.items()))
    for step in sorted({*points, *range(0, total, 10)}):
        avg = float(np.interp(step, list(known), list(known.values())))
        for name, shift in (("unlabelled", 0.0), ("held_out", -0.08)):
            record = evaluation_record(step, points.get(step, "during"), name, max(avg + shift, 0.01))
            record["stage"] = "stage1" if step <= stage1 else "stage2"
            if calibrated and name == "held_out" and step in points:
                record["calibration"] = made_up_calibration(rng, sharpness=1.0 + 3 * step / max(total, 1))
            append(run_dir / "evaluations.jsonl", record)
    for step, point in points.items():
        for correct in (1, 1, 0, 0, 0):
            append(run_dir / "samples.jsonl", sample_record(step, point, correct, rng))
    return run_dir


def write_samples(run_dir: Path, **fields: Any) -> Path:
    """A run folder with one response after stage 2 and no curves to draw but the scores."""
    write_run(run_dir, calibrated=False)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run_dir / name).unlink()
    append(run_dir / "samples.jsonl", sample_record(100, "after", 1, np.random.default_rng(0)) | fields)
    return run_dir


def step_record(step: int, stage1: int, rng: np.random.Generator) -> dict[str, Any]:
    first = step <= stage1
    record = {
        "time": 1.7e9 + step,
        "stage": "stage1" if first else "stage2",
        "method": "ppo" if first else "tempo",
        "iteration": step if first else step - stage1,
        "step": step,
        "seconds": 1.5,
        "reward/labelled": 0.2 + 0.004 * step + rng.normal(0, 0.03),
        "actor/entropy": 0.9 * 0.99**step,
        "actor/grad_norm": float(np.exp(rng.normal(-1, 0.4))),
        "actor/clip_fraction": 0.1 + rng.normal(0, 0.01),
        "critic/loss": 0.2 * 0.98**step + 0.02,
        "critic/grad_norm": float(np.exp(rng.normal(1, 0.4))),
        "response_length/mean": 15.0 + rng.normal(0, 0.1),
        "tokens_per_second": 3000 + rng.normal(0, 100),
        "memory_gb/generate": 2.0,
        "memory_gb/mstep": 4.0 if step == 3 else 3.5,
        "time/generate": 0.7,
        "time/generate/sync": 0.1,
        "time/mstep": 0.5,
    }
    if not first:
        record |= {"reward/unlabelled_value": 0.3 + 0.004 * step, "time/estep": 0.2}
    return record


def evaluation_record(step: int, point: str, name: str, avg: float) -> dict[str, Any]:
    return {
        "time": 1.7e9 + step,
        "stage": "stage1",
        "iteration": step,
        "step": step,
        "point": point,
        "set": name,
        "avg": avg,
        "avg_se": 0.02,
        "avg_k": 16,
        "pass": {"8": min(avg + 0.2, 1.0)},
        "pass_se": {"8": 0.03},
        "questions": 128,
        "response_length": 15.0,
        "truncated": 0.0,
        "calibration": None,
        "seconds": 2.0,
        "time/evaluate": 1.9,
    }


def made_up_calibration(rng: np.random.Generator, sharpness: float) -> dict[str, Any]:
    correct = rng.random(400) < 0.4
    ends = 1 / (1 + np.exp(-sharpness * (correct - 0.5) - rng.normal(0, 1, 400)))
    values = [np.linspace(0.4, end, 16) + rng.normal(0, 0.05, 16) for end in ends]
    return calibration_record(values, correct)


def sample_record(step: int, point: str, correct: int, rng: np.random.Generator) -> dict[str, Any]:
    tokens = [*"2*4=8+5=", "13", *"-6=7y$"]
    values = np.clip(np.linspace(0.45, 0.95 if correct else 0.08, len(tokens) + 1) + rng.normal(0, 0.06, 16), 0, 1)
    return {
        "point": point,
        "stage": "stage1",
        "step": step,
        "set": "held_out",
        "prompt": "2 4 5 6 > 7 :",
        "tokens": [token + " " for token in tokens],
        "values": values.tolist(),
        "correct": correct,
        "answer": "7",
    }


class Text(HTMLParser):
    """The elements of a page, its text, and the attributes that could fetch or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.links.append(value or "")
            if name == "title":
                self.titles.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def report(run_dir: Path) -> Text:
    return Text(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """The report of a run of both stages."""
    return report(write_run(tmp_path_factory.mktemp("whole") / "run"))


def test_a_whole_run(whole: Text) -> None:
    assert (
        "unlabelled (128 questions): avg@16 was 0.170 ± 0.020 before training, 0.280 ± 0.020 after stage 1 and "
        "0.690 ± 0.020 after stage 2." in whole.text
    )
    assert "Stage 2 beat stage 1: +0.410 ± 0.028." in whole.text  # sqrt(2) * 0.02
    assert "not finished" not in whole.text
    for heading in ("Scores", "The critic's calibration", "Training", "Where the time went", "A few responses"):
        assert heading in whole.text
    pictures = [base64.b64decode(link.split(",")[1]).decode() for link in whole.links]
    # two sets, two reliability diagrams, three scores by prefix, seven groups of curves
    assert len(pictures) == 2 + 2 + 3 + 7
    assert all(">iteration<" in picture for picture in (pictures[:2] + pictures[7:]))
    assert all("Stage 1 · PPO" in picture and "Stage 2 · TEMPO" in picture for picture in pictures[:2])
    assert len(whole.titles) == 3 * 4 * 15  # three points, two right and two wrong, fifteen tokens each


def test_it_is_one_file_that_runs_and_fetches_nothing(whole: Text) -> None:
    assert {"script", "link", "iframe", "object"}.isdisjoint(whole.tags)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in whole.links)
    assert whole.handlers == []


def test_time_is_summed_over_outer_phases(whole: Text) -> None:
    text = whole.text
    # 100 steps of 1.5 s, 11 points x 2 sets of 2 s
    assert "Time 3:14" in text
    assert "generate 70.0 36.1 %" in text
    assert "evaluate 41.8 21.5 %" in text
    assert "estep 12.0 6.2 %" in text
    assert "other 20.2 10.4 %" in text
    assert not re.search(r"\bsync\b", text)


def test_memory_is_the_highest_peak_of_each_phase(whole: Text) -> None:
    assert "Memory" in whole.text
    assert "mstep 4 generate 2" in whole.text


def test_alerts_and_warnings_are_told(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    assert "Worth a look" not in report(run_dir).text
    record = step_record(101, 40, np.random.default_rng(0)) | {"actor/skipped": 2.0}
    append(run_dir / "metrics.jsonl", record)
    append(run_dir / "warnings.jsonl", {"time": 1.7e9, "text": f"vllm server 1 {HOSTILE}"})
    page = report(run_dir)
    assert "steps are skipped, step 101: 2 of the actor's steps were not finite" in page.text
    assert 'vllm server 1 <script>alert("x")</script>' in page.text
    assert "script" not in page.tags


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = {"set": HOSTILE, "prompt": HOSTILE, "tokens": [HOSTILE, "b"], "answer": HOSTILE}
    run_dir = write_samples(tmp_path / "run", **hostile, values=[0.5, None, 2.0])
    append(run_dir / "evaluations.jsonl", evaluation_record(100, "after", HOSTILE, 0.5) | {"stage": "stage2"})
    page = report(run_dir)
    assert "script" not in page.tags
    assert page.handlers == []
    assert page.tags.count("img") == len(page.links) == 3
    assert page.text.count('<script>alert("x")</script>&<img src=x onerror=alert(1)>␛[31m') == 7
    assert "\x1b" not in page.text
    svg = base64.b64decode(page.links[2].split(",")[1]).decode()
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((0.17, 0.28, 0.27), "Stage 2 did not beat stage 1: -0.010 ± 0.028."),
        ((0.17, 0.28, 0.28), "Stage 2 did not beat stage 1: +0.000 ± 0.028."),
        ((0.17, 0.28, 0.31), "Stage 2 scored above stage 1, by less than two standard errors: +0.030 ± 0.028."),
    ],
)
def test_a_stage_that_did_not_pay_is_said_to(tmp_path: Path, scores: tuple[float, ...], verdict: str) -> None:
    run_dir = write_run(tmp_path / "run", scores=scores)
    assert verdict in summary_table(run_dir)


def test_the_table(tmp_path: Path) -> None:
    assert summary_table(write_run(tmp_path / "run")).splitlines()[:6] == [
        "set         score   before training  after stage 1  after stage 2",
        "----------  ------  ---------------  -------------  -------------",
        "unlabelled  avg@16  0.170 ± 0.020    0.280 ± 0.020  0.690 ± 0.020",
        "unlabelled  pass@8  0.370 ± 0.030    0.480 ± 0.030  0.890 ± 0.030",
        "held_out    avg@16  0.090 ± 0.020    0.200 ± 0.020  0.610 ± 0.020",
        "held_out    pass@8  0.290 ± 0.030    0.400 ± 0.030  0.810 ± 0.030",
    ]


def test_without_calibration(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", calibrated=False)
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    (run_dir / "samples.jsonl").unlink()
    for line in lines:
        append(run_dir / "samples.jsonl", line | {"values": None})
    page = report(run_dir)
    assert "calibration" not in page.text.split("Configuration")[0]
    assert page.titles == []
    assert "2 4 5 6 > 7 :" in page.text


def test_one_stage_only(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", stage2=0))
    assert "0.170 ± 0.020 before training and 0.280 ± 0.020 after stage 1. Stage 1 beat the start: +0.110" in page.text
    assert "stage 2" not in page.text
    assert "stage 1" not in report(write_run(tmp_path / "second", stage1=0)).text.split("Configuration")[0]


def test_no_iterations_at_all(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", stage1=0, stage2=0)
    assert "avg@16 was 0.170 ± 0.020 before training." in report(run_dir).text
    plot_curves(run_dir, tmp_path / "curves.png")


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
        (run_dir / name).unlink()
        for line in lines:
            if line["step"] <= 35:
                append(run_dir / name, line)
    assert "This run is not finished: 35 of 100 iterations are done." in report(run_dir).text


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    assert "Nothing has been evaluated yet." in report(tmp_path).text
    assert summary_table(tmp_path) == "Nothing has been evaluated yet."
    with pytest.raises(ValueError, match="no evaluations to plot"):
        plot_curves(tmp_path, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


def test_numbers_that_were_nan_are_gaps(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    append(run_dir / "metrics.jsonl", step_record(101, 40, np.random.default_rng(0)) | {"actor/entropy": None})
    append(
        run_dir / "evaluations.jsonl",
        evaluation_record(101, "after", "unlabelled", 0.5) | {"avg": None, "avg_se": None},
    )
    assert "Stage 2 beat stage 1" in report(run_dir).text


def test_a_critic_of_plus_minus_one_is_coloured_on_its_own_scale(tmp_path: Path) -> None:
    run_dir = write_samples(tmp_path / "run", tokens=["a", "b", "c"], values=[0, -1, 0, 1])
    config = Config()
    config.stage1.critic.targets = config.stage2.critic.targets = CriticTargets.plus_minus_one
    (run_dir / "config.json").write_text(json.dumps(to_plain(config)))
    page = write_report(run_dir).read_text()
    colours = re.findall(r'<span style="background: (rgb\(.*?\))"', page)
    assert colours == ["rgb(236, 150, 80)", "rgb(247, 246, 242)", "rgb(92, 165, 218)"]
    assert "-1, wrong" in page


def test_a_long_response_is_shortened_in_the_middle(tmp_path: Path) -> None:
    tokens = [f"<{i}>" for i in range(5000)]
    page = report(write_samples(tmp_path / "run", tokens=tokens, values=[0.5] * 5001))
    assert len(page.titles) == 600
    assert "<399>  … 4400 tokens left out …  <4800>" in " ".join(page.words)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    plot_curves(write_run(tmp_path / "run"), tmp_path / "curves.png")
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1600  # two sets, five inches each, 160 dots an inch
