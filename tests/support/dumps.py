"""The dumped rollouts of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rollouts(run: Path) -> list[list[dict[str, Any]]]:
    """The lines of each iteration."""
    return [list(map(json.loads, file.read_text().splitlines())) for file in sorted((run / "rollouts").glob("*.jsonl"))]
