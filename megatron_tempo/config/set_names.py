"""The names of the evaluation sets that data=FILE adds."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.evaluation import SET_NAME_BYTES


def set_names_of(files: Sequence[str], benchmarks: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """The evaluation set of each data=FILE, and the problems of files that are given twice.

    Files of equal names get their folders' names before them, as many as tell them apart.

    >>> set_names_of(["gsm8k/test.jsonl", "math/test.jsonl"], [])[0]
    {'gsm8k/test.jsonl': 'gsm8k_test', 'math/test.jsonl': 'math_test'}
    """
    paths = {given: Path(given).absolute() for given in files}
    problems = []
    for place, given in enumerate(files):
        if paths[given].resolve() in [paths[other].resolve() for other in files[:place]]:
            problems.append(Problem("data", given, "is given twice", "give each file once"))
    names = {given: set_name(path) for given, path in paths.items()}
    for depth in range(2, max((len(path.parts) for path in paths.values()), default=0) + 1):
        count = Counter(names.values())
        for given, path in paths.items():
            if count[names[given]] > 1 and names[given] not in benchmarks:
                names[given] = set_name(Path("_".join(path.parts[-depth:])))
    count, used = Counter(names.values()), Counter[str]()
    for given, name in names.items():
        if count[name] > 1 and name not in benchmarks:  # a-b.jsonl and a_b.jsonl in one folder
            short = set_name(paths[given])
            used[short] += 1
            names[given] = short if used[short] == 1 and short not in count else f"{short}_{used[short]}"
    for given, name in names.items():
        same = [other for other, taken in names.items() if taken == name and other != given]
        if name in benchmarks and same and not problems:
            wrong = f"is the benchmark {name}, as {same[0]} is"
            problems.append(Problem("data", given, wrong, f"give one file of it, as evaluation.sets.{name}.path"))
    return names, problems


def set_name(path: Path) -> str:
    """The name of the evaluation set that data=FILE adds: one that an override can contain.

    >>> [set_name(Path(name)) for name in ("gsm8k-test.jsonl", "24game.jsonl", "数学.jsonl")]
    ['gsm8k_test', 'set_24game', 'set_872c1f']
    """
    name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    digest = hashlib.sha256(path.stem.encode(errors="surrogateescape")).hexdigest()[:6]
    if not re.search(r"[A-Za-z0-9]", name):
        return f"set_{digest}"
    name = name if re.match(r"[A-Za-z_]", name) else f"set_{name}"
    return name if len(name) <= SET_NAME_BYTES else f"{name[: SET_NAME_BYTES - 7]}_{digest}"
