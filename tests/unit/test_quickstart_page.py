"""The numbers of docs/quickstart.md are those of docs/quickstart.json, which .ci/run holds a shortened run to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/quickstart_page.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_page_is_current() -> None:
    assert tool("page", "--check").returncode == 0, "python tools/quickstart_page.py page"


@pytest.mark.long
def test_a_run_with_other_scores_is_named(tmp_path: Path) -> None:
    """Scores that are five standard errors off, whatever the machine."""
    recorded = json.loads((ROOT / "docs/quickstart.json").read_text(encoding="utf-8"))["runs"]["short"]
    points = {"": "before", "stage1": "between", "stage2": "after"}
    off = {("heldout", "stage2"): 5.0}
    for factor, code in ((0.0, 0), (1.0, 1)):
        lines = []
        for step, old in enumerate(recorded):
            avg = old["avg"] + factor * off.get((old["set"], old["after"]), 0.0) * 1.5 * old["avg_se"]
            record = {"set": old["set"], "step": step // 2, "stage": old["after"], "point": points[old["after"]]}
            record |= {
                "avg": avg,
                "avg_se": old["avg_se"],
                "pass": {"8": old["pass"]},
                "pass_se": {"8": old["pass_se"]},
            }
            record |= {key: old[key] for key in ("truncated", "questions")} | {
                "time": 0.0,
                "seconds": 0.0,
                "iteration": 0,
                "avg_k": 16,
            }
            lines.append(json.dumps(record) + "\n")
        (tmp_path / "evaluations.jsonl").write_text("".join(lines))
        done = tool("check", str(tmp_path))
        assert done.returncode == code, done.stderr
        assert ("heldout, avg after stage2" in done.stderr) == bool(code)
