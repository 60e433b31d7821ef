"""The benchmark of weight updates runs, and every way of updating arrives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.engine, pytest.mark.release, pytest.mark.timeout(900)]


def test_every_row_has_its_time(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    tool = [sys.executable, ROOT / "tools/bench_weight_sync.py", "--size=tiny", "--rounds=1"]
    command = [*tool, "--engine=sglang", f"--work={tmp_path}", f"--json={out}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    ours = ["ours, group", "ours, shared", "ours, group + checksums", "ours, shared + checksums"]
    others = ["folder", "folder, streamed", "gather-all", "limit: memcpy", "limit: link"]
    assert list(rows) == [*ours, *others]
    for name, row in rows.items():
        assert len(row["times"]) == 1
        assert row["median_seconds"] > 0
        assert name in done.stdout
    assert min(rows[name]["to_ours"] for name in ours[:2]) == 1.0
    assert os.listdir(tmp_path) == ["result.json"]
