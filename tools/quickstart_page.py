"""The numbers and the picture of docs/quickstart.md, from runs of the shipped code.

    python tools/quickstart_page.py record seed0=runs/quickstart seed1=... seed2=... ppo=... short=runs/ci
    python tools/quickstart_page.py page              # writes the table, from docs/quickstart.json
    python tools/quickstart_page.py page --check      # exit status 1 if the table is not what it would be
    python tools/quickstart_page.py check runs/ci     # compares a shortened run with the recorded one

`record` writes docs/quickstart.json, and draws docs/quickstart.png from `seed0`. `short` is the run that .ci/run
makes. `check` compares scores to three digits on the machine of the record, and within standard errors on another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from made_parts import replaced

from megatron_tempo.report.plots import plot_curves
from megatron_tempo.report.summary import Run

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, RECORD, PICTURE = DOCS / "quickstart.md", DOCS / "quickstart.json", DOCS / "quickstart.png"
SETS = ("unlabelled", "heldout")
NAMES = {"seed0": "0", "seed1": "1", "seed2": "2", "ppo": "0, `algorithm=ppo`"}
STANDARD_ERRORS = 4.0  # that a score may be off on another processor


def machine() -> dict[str, str]:
    """What the rounding of a CPU's numbers depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return {
        "processor": model,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__).partition("+")[0],
        "megatron-core": importlib.metadata.version("megatron-core"),
    }


def scores(folder: Path) -> list[dict[str, Any]]:
    """The scores of each set, before training and after each stage."""
    rows = []
    for milestone in Run.read(folder).milestones():
        for name in SETS:
            record = milestone.scores[name]
            kept = {key: record[key] for key in ("set", "avg", "avg_se", "truncated", "questions")}
            kept |= {"after": milestone.stage, "pass": record["pass"]["8"], "pass_se": record["pass_se"]["8"]}
            critic = (record.get("calibration") or {}).get("last") or {}
            rows.append(kept | {key: critic.get(key) for key in ("auroc", "brier")})
    return rows


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    rows = [["seed", "set", "before", "after stage 1", "after stage 2"], ["---"] * 5]
    for name in SETS:
        for run, words in NAMES.items():
            cells = [f"{_short(one['avg'])} / {_short(one['pass'])}" for one in runs[run] if one["set"] == name]
            rows.append([words, name, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _short(score: float) -> str:
    return f"{score:.3f}".removeprefix("0")


def record(runs: dict[str, Path]) -> None:
    was = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"runs": {}}
    recorded = was["runs"] | {name: scores(folder) for name, folder in runs.items()}
    RECORD.write_text(json.dumps({"machine": machine(), "runs": recorded}, indent=1) + "\n", encoding="utf-8")
    if "seed0" in runs:
        plot_curves(runs["seed0"], PICTURE)


def differences(folder: Path) -> list[str]:
    """Where the scores of a shortened run are not the recorded ones, and by how much."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    same = recorded["machine"] == machine()
    print("the same" if same else f"recorded on another machine: {recorded['machine']}, this is {machine()}")
    wrong = []
    for old, new in zip(recorded["runs"]["short"], scores(folder), strict=True):
        for key in ("avg", "pass"):
            allowed = 5e-4 if same else STANDARD_ERRORS * math.hypot(old[f"{key}_se"], new[f"{key}_se"])
            if abs(old[key] - new[key]) > allowed:
                where = f"{old['set']}, {key} after {old['after'] or 'no stage'}"
                wrong.append(f"{where}: {new[key]:.4f}, recorded {old[key]:.4f}, allowed {allowed:.4f} apart")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("runs", nargs="+", metavar="NAME=RUN")
    commands.add_parser("page").add_argument("--check", action="store_true")
    commands.add_parser("check").add_argument("run", type=Path)
    asked = parser.parse_args()
    if asked.command == "record":
        record({name: Path(folder) for name, _, folder in (run.partition("=") for run in asked.runs)})
        return 0
    if asked.command == "check":
        wrong = differences(asked.run)
        for line in wrong:
            print(line, file=sys.stderr)
        return int(bool(wrong))
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    about = "Measured on {processor} ({vectors}), two processes, torch {torch}, megatron-core {megatron-core}.\n"
    made = table(recorded["runs"]) + "\n" + about.format_map(recorded["machine"])
    wanted = replaced(PAGE, {"tools/quickstart_page.py": made})
    if asked.check:
        return int(PAGE.read_text(encoding="utf-8") != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
