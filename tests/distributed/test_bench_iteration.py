"""tools/bench_iteration.py at 1/64 of the paper's iteration: what an iteration moves, keeps and calls on each rank.

Only numbers that do not depend on the machine's load are compared: bytes of tensors, and calls of collectives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools/bench_iteration.py"
# The parts of an iteration from the request to the last update. What a checkpoint's threads call depends on timing.
PARTS = (
    *("ask", "collect", "share columns", "divide rows", "receive rows", "values", "critic", "actor", "exchange"),
    *("packing", "record", "seen questions"),
)
HELD = 12.0  # bytes that a rank may keep a token of its own rows: id and log-probability are 8; the rest are columns
MOVED = 9.0  # bytes that a rank may receive a token of all rows: id and log-probability are 8
CALLS = 50  # of collectives in these parts; 34 when this test was written


pytestmark = pytest.mark.release


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the tool measured with two and with four ranks."""
    out = tmp_path_factory.mktemp("bench") / "result.json"
    words = [sys.executable, str(TOOL), "--points", "2:1/64:2000", "4:1/64:2000", "--json", str(out)]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "collective calls, other ranks:" in done.stdout
    return json.loads(out.read_text())


@pytest.fixture
def points(result: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {point["ranks"]: point for point in result["points"]}


def test_the_work_is_the_same_with_any_number_of_ranks(points: dict[int, dict[str, Any]]) -> None:
    assert points[2]["rows"] == points[4]["rows"] == 64
    assert points[2]["tokens"] == points[4]["tokens"] > 64 * 1000


def test_the_calls_of_collectives_do_not_grow_with_ranks(points: dict[int, dict[str, Any]]) -> None:
    for rank in ("first rank", "other ranks"):
        two, four = ({part: cost_of(points[n], rank, part)["calls"] for part in PARTS} for n in (2, 4))
        assert 10 < sum(four.values()) < CALLS
        # While a server takes long to answer, its first rank tells the others every half minute that it waits.
        assert two | {"collect": 0} == four | {"collect": 0}


def test_a_rank_keeps_its_own_rows(points: dict[int, dict[str, Any]]) -> None:
    for ranks, point in points.items():
        held = point["held"] / (point["tokens"] / ranks)
        assert held < HELD, f"{held:.1f} bytes a token with {ranks} ranks"


def test_what_a_rank_receives_does_not_grow_with_ranks(points: dict[int, dict[str, Any]]) -> None:
    for ranks, point in points.items():
        for rank in ("first rank", "other ranks"):
            moved = sum(cost_of(point, rank, part)["moved"] for part in PARTS) / point["tokens"]
            assert 5 < moved < MOVED, f"{moved:.1f} bytes a token with {ranks} ranks"


def test_every_part_is_still_there(result: dict[str, Any]) -> None:
    assert result["not_found"] == [], "tools/iteration_parts/meter.py names functions that do not exist"


def cost_of(point: dict[str, Any], rank: str, part: str) -> dict[str, float]:
    """What a part took; nothing on a rank without it."""
    nothing = {"calls": 0, "moved": 0}
    cost: dict[str, float] = point["costs"][rank].get(part, nothing)
    return cost
