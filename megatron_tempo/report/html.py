"""The report as one self-contained HTML file: its script and styles are in it, and it fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from megatron_tempo.files import replace_file
from megatron_tempo.observability.progress import clock
from megatron_tempo.observability.records import Record
from megatron_tempo.report import charts
from megatron_tempo.report.summary import (
    Milestone,
    Run,
    memory_peaks,
    outcome,
    phase_totals,
    printable,
    sampled_words,
    score_rows,
)

RIGHT_AND_WRONG = 2  # responses of each kind shown at a milestone
WARNED = 5  # warnings shown, the latest
HEAD, TAIL = 400, 200  # tokens shown of a long response
# From wrong over undecided to right. Colour-blind readers can distinguish them; they are light enough for dark text.
SCALE = ((236, 150, 80), (247, 246, 242), (92, 165, 218))
# The label of the data file's answer, if a response may give another one.
ANSWER_LABELS = {"countdown": "operators of a solution (reference answer)"}
PREFIX_SCORES = (
    ("auroc", "AUROC", "AUROC (1 is best)"),
    ("auroc_within_questions", "AUROC within questions", "AUROC (1 is best)"),
    ("brier", "Brier score", "Brier score (0 is best)"),
    ("ece", "Calibration error", "ECE (0 is best)"),
)


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    colour: str | None
    title: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A response, ready to render. `curve`: the points of its values in a box of 100 by 20."""

    set: str
    prompt: str
    head: list[Token]
    left_out: int
    tail: list[Token]
    correct: bool
    answer: str
    answer_label: str
    first_value: str
    last_value: str
    curve: str


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    seconds: float
    share: float  # of the run's time


def write_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/report.html from the run's records, over an earlier one. Raises InputError for broken files."""
    run = Run.read(run_dir)
    calibrated = [(m, r) for m in run.milestones() for r in m.scores.values() if r.get("calibration")]
    header, rows = score_rows(run)
    page = template("report.html").render(
        title=f"{run.name} · TEMPO run",
        name=run.name,
        facts=_facts(run),
        outcome=[
            (printable(finding.scores), [printable(sentence) for sentence in finding.verdict])
            for finding in outcome(run)
        ],
        alerts=[printable(alert.line()) for alert in run.alerts()],
        warnings=[printable(warning["text"]) for warning in run.warnings[-WARNED:]],
        header=header,
        rows=[[printable(cell) for cell in row] for row in rows],
        scores=[charts.score_chart(run, name) for name in run.sets()],
        reliability=[charts.reliability(m, r) for m, r in calibrated if m.stage],
        prefixes=[chart for score in PREFIX_SCORES if (chart := charts.by_prefix(calibrated, *score))],
        calibration_rows=list(_calibration_rows(calibrated)),
        training=list(charts.training_charts(run)),
        phases=_phases(run),
        memory=_memory(run),
        memory_note=_memory_note(run),
        memory_chart=charts.memory_chart(run),
        made_with=made_with(run.starts),
        samples=[(m.label, chosen) for m in reversed(run.milestones()) if (chosen := samples(run, m))],
        scale=scale(),
        value_range=value_range_of(run),
        config=printable(json.dumps(run.config, indent=2, ensure_ascii=False)) if run.config else "",
    )
    path = run_dir / "report.html"
    replace_file(path, page, fsync=True)
    return path


def template(name: str) -> Template:
    """A template of this folder. It may include other templates of the folder."""
    folder = files("megatron_tempo.report")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= chart_parts()
    return environment.get_template(name)


@cache
def chart_parts() -> dict[str, str]:
    """The script of a page, its hash, which the page's policy allows to run, and uPlot's styles."""
    folder = files("megatron_tempo.report")
    library, styles, own = (
        folder.joinpath(name).read_text(encoding="utf-8")
        for name in ("uplot/uPlot.iife.min.js", "uplot/uPlot.min.css", "chart.js")
    )
    script = f"{library}\n{own}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": script, "script_hash": digest, "chart_css": styles}


def scale() -> list[str]:
    """The colours of values, from wrong over undecided to right."""
    return [_css(colour) for colour in SCALE]


def _facts(run: Run) -> list[tuple[str, str]]:
    records = run.metrics + run.evaluations
    done, planned = run.iterations()
    facts = [("Iterations", str(done) if done == planned else f"{done} of {planned}")]
    if run.config:
        facts = [
            ("Model", Path(str(run.config["model"]["path"])).name),
            *facts,
            ("Seed", str(run.config["run"]["seed"])),
            *_sampling(run.config),
        ]
    if records:
        facts.append(("Time", clock(sum(record.get("seconds", 0.0) for record in records))))
        facts.append(
            ("Last record", time.strftime("%Y-%m-%d %H:%M", time.localtime(max(r.get("time") or 0 for r in records))))
        )
    return facts


def _sampling(config: Record) -> list[tuple[str, str]]:
    """How the evaluations' responses were sampled. Nothing if the record is of an earlier version without settings."""
    evaluation = config.get("evaluation")
    if not isinstance(evaluation, dict) or "temperature" not in evaluation:
        return []
    rollout = config.get("rollout")
    stop = evaluation.get("stop")
    own = rollout.get("stop") if stop is None and isinstance(rollout, dict) else stop
    return [("Evaluated at", printable(sampled_words(evaluation | {"stop": own})))]


def _memory(run: Run) -> list[tuple[str, float, float]]:
    """Phases, their highest peak in 10^9 bytes, and that peak as a fraction of the highest of all.

    Phases whose peaks differ by less than 1% share a row.
    """
    rows: list[tuple[list[str], float]] = []
    for phase, peak in memory_peaks(run.metrics).items():  # the highest first
        if rows and peak >= 0.99 * rows[-1][1]:
            rows[-1][0].append(phase)
        else:
            rows.append(([phase], peak))
    return [(", ".join(phases), peak, peak / max(rows[0][1], 1e-9)) for phases, peak in rows]


def _memory_note(run: Run) -> str:
    """How to read the peaks: on a CPU they are of the process, which seldom frees memory."""
    peaks = list(memory_peaks(run.metrics).values())
    gpu = bool(run.starts and run.starts[-1].get("gpus"))
    where = "On a GPU: memory allocated by torch. On a CPU: growth of the process."
    if run.starts:
        where = "Memory allocated by torch." if gpu else "Growth of the process: on a CPU it seldom shrinks."
    if len(peaks) > 1 and peaks[-1] > 0.95 * peaks[0]:
        where += " All phases reach the same peak within 5%: no phase stands out."
    return where


def made_with(starts: Sequence[Record]) -> list[tuple[str, str]]:
    """Command, code, versions and hardware of the latest start, and which of them differ from an earlier start."""
    if not starts:
        return []
    last = starts[-1]
    rows = _start_rows(last)
    if len(starts) > 1:
        steps = ", ".join(str(start.get("step", 0)) for start in starts)
        rows.append(("Starts", f"{len(starts)}, at steps {steps}"))
        before = dict(_start_rows(starts[0]))
        changed = [f"{name}: {before[name]}" for name, value in rows if before.get(name, value) != value]
        if changed:
            rows.append(("At the first start", "; ".join(changed)))
    return [(name, printable(value)) for name, value in rows]


def _start_rows(start: Record) -> list[tuple[str, str]]:
    versions = start.get("versions", {})
    commit = start.get("commit")
    code = f"megatron_tempo {versions.get('megatron_tempo', '?')}, " + (
        "not from a git checkout"
        if commit is None
        else f"commit {commit}{' with changes' if start.get('changed') else ''}"
    )
    return [
        ("Command", start.get("command", "")),
        ("Code", code),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items() if name != "megatron_tempo")),
        ("Hardware", start.get("hardware", "")),
        ("Processes", f"{start.get('processes', '?')}, the first on {start.get('host', '?')}"),
    ]


def _phases(run: Run) -> list[Phase]:
    """Seconds of each outermost phase in the run, the longest first, then the time that no phase covers."""
    totals = phase_totals(run.metrics + run.evaluations)
    whole = max(sum(record.get("seconds", 0.0) for record in run.metrics + run.evaluations), sum(totals.values()))
    if not whole:
        return []
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return [
        Phase(name, seconds, seconds / whole) for name, seconds in [*ranked, ("other", whole - sum(totals.values()))]
    ]


def _calibration_rows(calibrated: list[tuple[Milestone, Record]]) -> Iterator[list[str]]:
    for milestone, record in calibrated:
        for fraction, scores in record["calibration"]["by_prefix"].items():
            numbers = (scores.get(score) for score, _, _ in PREFIX_SCORES)
            yield [milestone.label, f"{float(fraction):.0%}", *("-" if n is None else f"{n:.3f}" for n in numbers)]


def samples(run: Run, milestone: Milestone) -> list[Sample]:
    """A few responses of a milestone, right and wrong."""
    records = [r for r in run.samples if r["step"] == milestone.step and r["point"] != "during"]
    right = [record for record in records if record["correct"]][:RIGHT_AND_WRONG]
    wrong = [record for record in records if not record["correct"]][:RIGHT_AND_WRONG]
    return [_sample(record, value_range_of(run)) for record in right + wrong]


def _sample(record: Record, value_range: tuple[float, float]) -> Sample:
    texts = [printable(text) for text in record["tokens"]]
    values = record["values"] or [None] * (len(texts) + 1)
    tokens = [_token(*item, value_range) for item in zip(texts, values[:-1], values[1:], strict=True)]
    head, tail = (tokens, []) if len(tokens) <= HEAD + TAIL else (tokens[:HEAD], tokens[-TAIL:])
    return Sample(
        set=printable(record["set"]),
        prompt=printable(record["prompt"]),
        head=head,
        left_out=len(tokens) - len(head) - len(tail),
        tail=tail,
        correct=bool(record["correct"]),
        answer=printable(str(record["answer"])),
        answer_label=ANSWER_LABELS.get(record.get("verifier", ""), "reference answer"),
        first_value=_number(values[0]),
        last_value=_number(values[-1]),
        curve=_curve(values, value_range),
    )


def _token(text: str, before: float | None, after: float | None, value_range: tuple[float, float]) -> Token:
    if after is None:
        return Token(text, None, "")
    low, high = value_range
    position = min(max((after - low) / (high - low), 0.0), 1.0) * 2
    start, end = SCALE[:2] if position < 1 else SCALE[1:]
    part = position if position < 1 else position - 1
    mixed = tuple(round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return Token(text, _css(mixed), f"value {_number(before)} before, {_number(after)} after")


def _curve(values: list[float | None], value_range: tuple[float, float]) -> str:
    low, high = value_range
    every = max(len(values) // 300, 1)
    return " ".join(
        f"{100 * i / max(len(values) - 1, 1):.1f},{20 - 20 * min(max((v - low) / (high - low), 0.0), 1.0):.1f}"
        for i, v in enumerate(values)
        if v is not None and (i % every == 0 or i == len(values) - 1)
    )


def value_range_of(run: Run) -> tuple[float, float]:
    """The values that mean certainly wrong and certainly right."""
    stages = (run.config.get("stage1", {}), run.config.get("stage2", {}))
    targets = {stage.get("critic", {}).get("targets") for stage in stages}
    return (-1.0, 1.0) if "plus_minus_one" in targets else (0.0, 1.0)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _css(colour: tuple[int, ...]) -> str:
    return f"rgb({', '.join(map(str, colour))})"
