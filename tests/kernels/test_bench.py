"""tools/bench_kernels.py runs where there is no GPU, and gives a wrong variant no time."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "300", "--vocab", "50", "--hidden", "16", "--repeats", "1"]


def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, **replaced: Any) -> list[dict[str, Any]]:
    monkeypatch.syspath_prepend(ROOT / "tools")
    bench = importlib.import_module("bench_kernels")
    for name, value in replaced.items():
        monkeypatch.setattr(f"bench_operations.{name}", value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # compiling takes seconds a function
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", *SMALL, "--json", str(tmp_path / "runs.jsonl"), *arguments])
    bench.main()
    return json.loads((tmp_path / "runs.jsonl").read_text())["rows"]


def test_every_variant_has_a_time_or_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = rows(monkeypatch, tmp_path)
    assert {row["operation"] for row in results} == {"policy", "value", "logprobs", "linear"}
    for row in results:
        assert row["note"].startswith("not run") if row["variant"].startswith("liger") else row["seconds"] > 0, row


def test_a_wrong_variant_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def half(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logprobs = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        return logprobs, logprobs * 0

    for row in rows(monkeypatch, tmp_path, "--only", "logprobs", "linear", plain_logprobs=half):
        if row["variant"] == "compile":
            assert row["note"].startswith("wrong: max error 1.0"), row
            assert row["seconds"] is None
