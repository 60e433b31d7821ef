"""The table of docs/planning.md is what the planner says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_the_table_of_the_documentation_is_current() -> None:
    command = [sys.executable, "-c", "import runpy, sys; sys.path.append('tools'); "
               "sys.argv = ['plan_tables', '--check']; "
               "runpy.run_path('tools/plan_tables.py', run_name='__main__')"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"make plan-tables\n{done.stderr}"
