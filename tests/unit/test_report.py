"""The report of a synthetic run: what it says, that hostile text stays text, and that any piece may be missing."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_tempo.config.schema import Config, ModelConfig, RunConfig, to_plain
from megatron_tempo.config.tree import save
from megatron_tempo.config.updates import CriticTargets
from megatron_tempo.errors import InputError
from megatron_tempo.evaluation.calibration import calibration_record
from megatron_tempo.evaluation.scores import pass_at_k
from megatron_tempo.observability.records import append, read_evaluations
from megatron_tempo.observability.start import command_line, start_record
from megatron_tempo.report.charts import POINTS
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
            record |= {"right": made_up_right(max(avg + shift, 0.01)), "questions_hash": f"of {name}"}
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


def made_up_right(avg: float, questions: int = 128, samples: int = 16) -> list[int]:
    """Right responses of each question: a middling question gains most by training. Their mean is avg * samples."""
    hard = np.random.default_rng(1).permutation(np.linspace(0, 1, questions))
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        right = np.rint(samples / (1 + np.exp(4 * hard - middle))).astype(int)
        low, high = (middle, high) if right.mean() < avg * samples else (low, middle)
    return [int(count) for count in right]


def made_up_calibration(rng: np.random.Generator, sharpness: float) -> dict[str, Any]:
    correct = rng.random(400) < 0.4
    ends = 1 / (1 + np.exp(-sharpness * (correct - 0.5) - rng.normal(0, 1, 400)))
    values = np.stack([np.linspace(0.4, end, 16) + rng.normal(0, 0.05, 16) for end in ends])
    return calibration_record(values[:, [0, 4, 8, 11, 15]], correct.reshape(-1, 4))


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
        self._hidden = False
        self.words: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.handlers: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.page = page
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag in ("script", "style")
        for name, value in attrs:
            if name in ("src", "href"):
                self.links.append(value or "")
            if name == "title":
                self.titles.append(value or "")
            if name == "data-chart":
                self.charts.append(json.loads(value or ""))
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    def has_only_its_own_script(self) -> bool:
        """Whether there is one script, without a source, and the page's policy lets that one run alone."""
        policy = re.search(r"script-src '(sha256-[^']+)'", self.page)
        scripts = re.findall(r"<script\b[^>]*>(.*?)</script>", self.page, flags=re.S)
        assert policy is not None
        digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
        return self.tags.count("script") == len(scripts) == 1 and policy[1] == f"sha256-{digest}"

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
    assert "Stage 2 beat stage 1 in avg@16: +0.410 (95% interval +0.394 to +0.425, p < 0.001)." in whole.text
    assert "pass@8 rose: +0.168 (95% interval +0.132 to +0.203, p < 0.001)." in whole.text
    assert "The whole run beat the start in avg@16: +0.520" in whole.text
    assert "Paired over 128 questions." in whole.text
    assert "not finished" not in whole.text
    for heading in ("Scores", "The critic's calibration", "Training", "Where the time went", "A few responses"):
        assert heading in whole.text
    # two sets, two reliability diagrams, four scores by prefix, seven groups of curves, memory
    assert len(whole.charts) == 2 + 2 + 4 + 7 + 1
    assert all(chart["x"] == "iteration" for chart in whole.charts[:2] + whole.charts[8:])
    assert all(
        chart["stages"] == [[0, 40, "Stage 1 · PPO"], [40, 100, "Stage 2 · TEMPO"]] for chart in whole.charts[:2]
    )
    avg, passed = whole.charts[0]["lines"]
    assert (avg["label"], avg["x"], avg["y"][0], avg["low"][0]) == ("avg@16", list(range(0, 101, 10)), 0.17, 0.15)
    assert passed["label"] == "pass@8"
    assert (
        len([title for title in whole.titles if title]) == 3 * 4 * 15
    )  # three points, two right and two wrong, fifteen tokens each


def test_it_is_one_file_that_fetches_nothing_and_runs_its_own_script_alone(whole: Text) -> None:
    assert {"link", "iframe", "object", "img"}.isdisjoint(whole.tags)
    assert whole.has_only_its_own_script()
    assert "default-src 'none'" in whole.page
    assert (whole.links, whole.handlers) == ([], [])
    assert len(whole.page.encode()) < 400_000


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
    curves = {line["label"]: max(line["y"]) for line in whole.charts[-1]["lines"]}
    assert curves == {"generate": 2.0, "mstep": 4.0}


def test_phases_with_the_same_memory_share_a_curve_and_are_said_to(tmp_path: Path) -> None:
    run_dir = write_samples(tmp_path / "run")
    for step in (1, 2, 3):
        record = step_record(step, 40, np.random.default_rng(0))
        append(run_dir / "metrics.jsonl", record | {"memory_gb/generate": 3.5, "memory_gb/mstep": 3.5 + 0.01 * step})
    page = report(run_dir)
    assert [line["label"] for line in page.charts[-1]["lines"]] == ["generate, mstep"]
    assert "phase GB mstep, generate 3.53" in page.text
    assert "All phases reach the same peak within 5%: no phase stands out." in page.text


def test_a_long_runs_curves_are_thinned_and_its_highest_peak_stays(tmp_path: Path) -> None:
    run_dir = write_samples(tmp_path / "run")
    rng = np.random.default_rng(0)
    lines = [step_record(step, 40, rng) | {"memory_gb/mstep": 9.0 if step == 3333 else 3.5} for step in range(1, 5001)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run_dir)
    assert len(page.page) < 1_500_000
    assert all(len(line["x"]) <= 2 * POINTS for chart in page.charts for line in chart["lines"])
    peaks = {line["label"]: max(line["y"]) for line in page.charts[-1]["lines"]}
    assert peaks == {"generate": 2.0, "mstep": 9.0}


def test_alerts_and_warnings_are_told(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    assert "Worth a look" not in report(run_dir).text
    record = step_record(101, 40, np.random.default_rng(0)) | {"actor/skipped": 2.0}
    append(run_dir / "metrics.jsonl", record)
    append(run_dir / "warnings.jsonl", {"time": 1.7e9, "text": f"vllm server 1 {HOSTILE}"})
    page = report(run_dir)
    assert "steps are skipped, step 101: 2 of the actor's steps were not finite" in page.text
    assert 'vllm server 1 <script>alert("x")</script>' in page.text
    assert page.has_only_its_own_script()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = {"set": HOSTILE, "prompt": HOSTILE, "tokens": [HOSTILE, "b"], "answer": HOSTILE}
    run_dir = write_samples(tmp_path / "run", **hostile, values=[0.5, None, 2.0])
    append(run_dir / "evaluations.jsonl", evaluation_record(100, "after", HOSTILE, 0.5) | {"stage": "stage2"})
    record = {"command": HOSTILE, "versions": {HOSTILE: HOSTILE}, "hardware": HOSTILE, "host": HOSTILE, "step": 0}
    append(run_dir / "starts.jsonl", record)
    page = report(run_dir)
    assert page.has_only_its_own_script()
    assert page.handlers == []
    assert {"img", "b"}.isdisjoint(page.tags)
    assert page.text.count('<script>alert("x")</script>&<img src=x onerror=alert(1)>␛[31m') == 13
    assert "\x1b" not in page.page
    assert [chart["title"] for chart in page.charts if "<script>" in chart["title"]]


def evaluated(run_dir: Path, *rights: list[int], **fields: Any) -> Path:
    """A run with one set of questions, evaluated before, between and after; 16 samples of each."""
    run_dir.mkdir()
    for place, right in enumerate(rights):
        correct = np.array([[int(s < count) for s in range(16)] for count in right])
        stage = {"stage": "stage1" if place < 2 else "stage2", "questions": len(right)}
        record = evaluation_record(10 * place, ("before", "between", "after")[place], "aime", float(correct.mean()))
        record |= stage | {"pass": {"8": pass_at_k(correct, 8)}, "right": right, "questions_hash": "same"} | fields
        append(run_dir / "evaluations.jsonl", record)
    return run_dir


def test_the_verdict_is_paired_and_tells_that_pass_at_k_fell(tmp_path: Path) -> None:
    # Training makes what was often right always right, and what was seldom right never: avg@k up, pass@8 down.
    before = [12] * 40 + [1] * 24
    after = [15] * 40 + [0] * 24
    table = summary_table(evaluated(tmp_path / "run", before, after))
    change = np.array([3 / 16] * 40 + [-1 / 16] * 24)
    low, high = stats.t.interval(0.95, 63, change.mean(), stats.sem(change))
    words = (
        f"Stage 1 beat the start in avg@16: {change.mean():+.3f} (95% interval {low:+.3f} to {high:+.3f}, p < 0.001)."
    )
    assert words in table
    assert "pass@8 fell: -0.188 (95% interval" in table
    assert words in report(tmp_path / "run").text


def test_a_difference_that_only_pairing_shows_is_found_and_chance_is_not(tmp_path: Path) -> None:
    spread = list(range(17)) * 4  # standard errors of 0.037: unpaired, a gain of one response in 16 is nothing
    better = [min(count + 1, 16) for count in spread]
    assert "Stage 1 beat the start in avg@16" in summary_table(evaluated(tmp_path / "paired", spread, better))
    shuffled = [int(count) for count in np.random.default_rng(0).permutation(better)]
    table = summary_table(evaluated(tmp_path / "chance", spread, shuffled))
    assert "Stage 1 and the start do not differ in avg@16 by more than chance: +0.059" in table
    assert "pass@8 did not change by more than chance" in table


def test_a_stage_that_harms_and_one_that_does_nothing_are_said_to(tmp_path: Path) -> None:
    start = [8] * 40
    table = summary_table(evaluated(tmp_path / "run", start, [12] * 40, [9] * 40))
    assert "Stage 2 did worse than stage 1 in avg@16: -0.188" in table
    assert "The whole run beat the start in avg@16: +0.062" in table
    table = summary_table(evaluated(tmp_path / "same", start, start))
    assert "Stage 1 and the start do not differ in avg@16 by more than chance: +0.000" in table
    table = summary_table(evaluated(tmp_path / "one", [3], [16]))
    assert "do not differ in avg@16 by more than chance: +0.812, of one question." in table


def test_a_stage_that_was_made_longer_after_its_end(tmp_path: Path) -> None:
    """It has two evaluations behind it, which are told apart."""
    run = write_run(tmp_path / "run")
    last = read_evaluations(run)[-1]
    append(run / "evaluations.jsonl", last | {"step": 101, "right": made_up_right(0.75), "avg": 0.75})
    table = summary_table(run)
    assert "after stage 1  after stage 2 (step 100)  after stage 2 (step 101)" in table
    assert "Stage 2 at step 101 beat stage 2 at step 100 in avg@16" in table


def test_other_questions_and_older_records_are_not_paired(tmp_path: Path) -> None:
    run_dir = evaluated(tmp_path / "run", [8] * 40, right=None, questions_hash=None, avg=0.5)
    append(run_dir / "evaluations.jsonl", evaluation_record(10, "after", "aime", 0.6) | {"stage": "stage2"})
    table = summary_table(run_dir)
    assert "Stage 2 beat the start in avg@16: +0.100 ± 0.028, unpaired." in table
    assert "Paired over" not in table


def test_the_table(tmp_path: Path) -> None:
    assert summary_table(write_run(tmp_path / "run")).splitlines()[:6] == [
        "set         score   before training  after stage 1  after stage 2",
        "----------  ------  ---------------  -------------  -------------",
        "unlabelled  avg@16  0.170 ± 0.020    0.280 ± 0.020  0.690 ± 0.020",
        "unlabelled  pass@8  0.370 ± 0.030    0.480 ± 0.030  0.890 ± 0.030",
        "held_out    avg@16  0.090 ± 0.020    0.200 ± 0.020  0.610 ± 0.020",
        "held_out    pass@8  0.290 ± 0.030    0.400 ± 0.030  0.810 ± 0.030",
    ]


def test_a_run_of_before_the_auroc_within_questions(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    name = "auroc_within_questions"
    assert "AUROC within questions" in [chart["title"] for chart in report(run_dir).charts]
    records = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    for record in (record for record in records if record["calibration"]):
        for part in (record["calibration"]["last"], *record["calibration"]["by_prefix"].values()):
            part.pop(name)
    (run_dir / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    titles = [chart["title"] for chart in report(run_dir).charts]
    assert "AUROC" in titles
    assert "AUROC within questions" not in titles


def test_without_calibration(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", calibrated=False)
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    (run_dir / "samples.jsonl").unlink()
    for line in lines:
        append(run_dir / "samples.jsonl", line | {"values": None})
    page = report(run_dir)
    assert "calibration" not in page.text.split("Configuration")[0]
    assert not [title for title in page.titles if title.startswith("value")]
    assert "2 4 5 6 > 7 :" in page.text


def test_one_stage_only(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", stage2=0))
    assert "0.170 ± 0.020 before training and 0.280 ± 0.020 after stage 1. Stage 1 beat the start" in page.text
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
    with pytest.raises(InputError, match="is not the folder of a run"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
    save(Config(), tmp_path / "config.json")
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
    assert len([title for title in page.titles if title]) == 600
    assert "<399>  … 4400 tokens left out …  <4800>" in " ".join(page.words)


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    plot_curves(write_run(tmp_path / "run"), tmp_path / "curves.png")
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1600  # two sets, five inches each, 160 dots an inch


def test_how_it_was_made(tmp_path: Path) -> None:
    run_dir = write_samples(tmp_path / "run")
    assert "How it was made" not in report(run_dir).text
    first, second = start_record(0, 2, [], {}), start_record(40, 4, ["NVIDIA H100", "NVIDIA H100"], {})
    append(run_dir / "starts.jsonl", first | {"commit": "0123abcd", "changed": True})
    page = report(run_dir).text
    assert f"Command {command_line()}" in page
    assert "commit 0123abcd with changes" in page
    assert f"torch {first['versions']['torch']}" in page
    assert "logical cores" in page
    append(run_dir / "starts.jsonl", second | {"commit": None})
    page = report(run_dir).text
    assert "2 x NVIDIA H100, " in page
    assert "not from a git checkout" in page
    assert "Starts 2, at steps 0, 40" in page
    assert "At the first start" in page


def test_the_reference_answer_is_explained(tmp_path: Path) -> None:
    page = report(write_samples(tmp_path / "run", verifier="countdown", answer="+-+")).text
    assert "operators of a solution (reference answer): +-+" in page
    assert "does not compare with it" in page
    assert "reference answer: 7" in report(write_samples(tmp_path / "math", verifier="math")).text
