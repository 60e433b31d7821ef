"""Good inputs, which the fuzzer damages: what a user and the program itself write, made small by hand."""

from __future__ import annotations

import csv
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tempo.config.method_settings import PpoSettings
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.evaluation.calibration import calibration_record
from megatron_tempo.observability.records import finite
from tests.unit.config_files import configure, good_overrides

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 1+1?", "answer": "2", "id": "a"},
    {"prompt": "Find the sum of 3.5 and 4.", "answer": 7.5, "id": "b"},
    {"prompt": "数学: 2·3?", "answer": "\\frac{12}{2}", "id": "c"},
    {"prompt": [{"role": "user", "content": "Say 9."}], "answer": "9", "id": "d"},
]
NOW = 1_764_000_000.0


def whole_config(folder: Path) -> dict[str, Any]:
    """A config.json that breaks no rule, on the files of `config_files.write_all`."""
    return to_plain(configure(good_overrides(folder)))


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_table(path: Path) -> Path:
    """Questions as a .json, .jsonl, .csv, .parquet or .arrow file."""
    rows = [row | {"prompt": str(row["prompt"]), "answer": str(row["answer"])} for row in ROWS]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        write_lines(path, rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    return path


def write_run(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A training run after 3 of 5 iterations, with every file that a run writes and two checkpoints."""
    folder.mkdir()
    if config is None:
        made = Config(stage1=StageConfig(PpoSettings(), iterations=2), stage2=StageConfig(iterations=3))
        made.model.path = "models/Qwen3-8B"
        config = to_plain(made)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [_step(step) for step in (1, 2, 3)])
    points = ((0, "before"), (2, "between"), (3, "during"))
    scored = [_score(step, point, name) for step, point in points for name in ("heldout", "aime")]
    write_lines(folder / "evaluations.jsonl", scored)
    sample = {"point": "before", "stage": "stage1", "step": 0, "set": "heldout", "prompt": "1+1?", "correct": 1}
    sample |= {"tokens": ["It", " is", " 2"], "values": [0.1, 0.2, 0.5, 0.9], "answer": "2", "verifier": "math"}
    write_lines(folder / "samples.jsonl", [sample, sample | {"correct": 0, "point": "between", "step": 2}])
    write_lines(folder / "warnings.jsonl", [{"time": NOW, "text": "vllm server 0 was restarted"}])
    start = {"time": NOW, "step": 0, "command": "megatron-tempo train", "folder": "/x", "commit": "abc", "changed": 0}
    start |= {"versions": {"torch": "2.13.0"}, "hardware": "a CPU", "gpus": [], "host": "node7", "processes": 2}
    write_lines(folder / "starts.jsonl", [start])
    seen = {"step": 1, "labels": True, "question": "ab" * 16}
    write_lines(folder / "seen.jsonl", [seen, seen | {"labels": False}])
    engine = {"name": "vllm server 0", "state": "serving", "requests": 3, "restarts": 1, "address": "http://n:1"}
    beat = {"time": NOW, "host": "node7", "pid": 42, "started": NOW - 90, "phase": "generate", "since": NOW - 9}
    (folder / "heartbeat.json").write_text(json.dumps(beat | {"ended": None, "engines": [engine]}))
    lock = {"host": "node7", "pid": 42, "since": NOW, "command": "train", "token": "x"}
    (folder / "lock.json").write_text(json.dumps(lock))
    (folder / "last_checkpoint.json").write_text('{"step": 3}')
    for step in (2, 3):
        _write_checkpoint(folder / "checkpoints" / f"step_{step:08d}", step, config)
    return folder


def _step(step: int) -> dict[str, Any]:
    stage, iteration = ("stage1", step) if step <= 2 else ("stage2", step - 2)
    place = {"time": NOW + step, "stage": stage, "method": "ppo" if step <= 2 else "tempo", "iteration": iteration}
    numbers = {"reward/labelled": 0.2, "actor/entropy": 0.9, "actor/grad_norm": 0.4, "critic/loss": 0.2}
    numbers |= {"response_length/mean": 15.0, "tokens_per_second": 3000.0, "truncated": 0.1, "critic/skipped": 0.0}
    numbers |= {"memory_gb/generate": 2.0, "memory_gb/mstep": 3.5, "time/generate": 0.7, "time/mstep": 0.5}
    return place | {"step": step, "seconds": 1.5} | numbers


def _score(step: int, point: str, name: str) -> dict[str, Any]:
    place = {"time": NOW + step, "stage": "stage1", "iteration": step, "step": step, "point": point, "set": name}
    scores = {"avg": 0.5, "avg_se": 0.02, "avg_k": 4, "pass": {"1": 0.5, "4": 0.7}, "pass_se": {"1": 0.1, "4": None}}
    scores |= {"questions": 4, "response_length": 15.0, "truncated": 0.0, "seconds": 2.0, "time/evaluate": 1.9}
    scores |= {"right": [4, 0, 2, 2], "questions_hash": "abc", "seen": {"with_answers": 0, "without_answers": 1}}
    return place | scores | {"calibration": _calibration() if step == 2 else None}


def _calibration() -> dict[str, Any]:
    values = np.linspace(0.1, [0.9, 0.3, 0.6, 0.2], 5, axis=1)
    return finite(calibration_record(values, np.array([[1.0, 0.0], [1.0, 0.0]])))[0]


def _write_checkpoint(folder: Path, step: int, config: dict[str, Any]) -> None:
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "weights.distcp").write_bytes(b"weights")
    state = {"step": step, "config": config, "position": {"stage1": 2, "stage2": step - 2}, "streams": {}, "inputs": {}}
    (folder / "run.json").write_text(json.dumps(state | {"optimizer_steps": {"actor": step}}), encoding="utf-8")
    names = ("actor/weights.distcp", "run.json")
    contents = {name: (folder / name).read_bytes() for name in names}
    digests = {name: f"{len(content)}:{zlib.crc32(content):08x}" for name, content in contents.items()}
    (folder / "MANIFEST.json").write_text(json.dumps(digests))


def write_evaluation(folder: Path) -> Path:
    """What the eval command leaves: config.json, responses.jsonl and results.json, and the records of its scores."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_plain(Config())), encoding="utf-8")
    responses = [
        {"set": "aime", "id": f"aime:{q}", "question": f"key{q}", "sample": s, "correct": (q + s) % 2}
        for q in range(3)
        for s in range(2)
    ]
    write_lines(
        folder / "responses.jsonl", [r | {"text": "It is 2.", "tokens": 4, "finish": "stop"} for r in responses]
    )
    avg = {"value": 0.5, "se": 0.1, "low": 0.3, "high": 0.7}
    result = {"questions": 3, "samples": 2, "verifiers": ["math"], "avg": avg, "pass": {"1": avg, "2": avg}}
    result |= {"response_length": {"mean": 4.0, "max": 4}, "truncated": 0.0, "seen": None, "sha256": "00"}
    (folder / "results.json").write_text(json.dumps({"sets": {"aime": result}}))
    write_lines(folder / "evaluations.jsonl", [_score(0, "alone", "aime")])
    return folder
