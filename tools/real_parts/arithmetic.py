"""Arithmetic questions for the published model: sums of two numbers of two digits, each question once."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron_tempo.files import replace_file

# Questions by file. No question is in two of them.
FILES = {"labelled": 512, "unlabelled": 128, "heldout": 200}
SUFFIX = " Answer with the number only."


def write_questions(out: Path, seed: int = 1) -> None:
    """Write `labelled.jsonl`, `unlabelled.jsonl` and `heldout.jsonl`, with their answers.

    Training does not read those of `unlabelled.jsonl`; its evaluation does.
    """
    sums = [(first, second) for first in range(10, 100) for second in range(10, 100)]
    random.Random(seed).shuffle(sums)
    out.mkdir(parents=True, exist_ok=True)
    for name, count in FILES.items():
        taken, sums = sums[:count], sums[count:]
        rows = [
            {"id": f"{first}+{second}", "prompt": f"What is {first} + {second}?", "answer": str(first + second)}
            for first, second in taken
        ]
        replace_file(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows), fsync=True)
