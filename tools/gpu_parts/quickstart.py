"""The quickstart, cut short: the whole trainer with the embedded engine, verifiers, evaluation, checkpoints and report.

Its score says little after a few iterations. What counts is that every phase runs in bf16, that the log-probabilities
of engine and trainer agree, and that gradients are finite and not zero.
"""

from __future__ import annotations

import importlib
import math
import time
from pathlib import Path

from gpu_parts.records import Records
from gpu_parts.setting import Setting
from megatron_tempo import cli
from megatron_tempo.observability.records import read_metrics

ITERATIONS = 10  # of each stage; the critic's warm-up is a part of them
NORM = 1e-6  # the least gradient norm that counts as a gradient
FIGURES = ("time/", "tokens_per_second", "grad_norm", "reward", "memory_gb/", "parity")


def run(setting: Setting, records: Records) -> None:
    folder = setting.folder / "quickstart-run"
    if not records.has_numbers:
        importlib.import_module("gpu_parts.null").make_up_rollouts()
    started = time.perf_counter()
    code = cli.main(words(setting, folder))
    records.holds("train ends with exit status 0", code == 0, str(code), numeric=False)
    records.figure("train", time.perf_counter() - started, "s")
    lines = read_metrics(folder)
    iterations = 2 * iterations_of(setting)
    records.holds("a line of metrics for each iteration", len(lines) == iterations, str(len(lines)), numeric=False)
    for name in ("actor/grad_norm", "critic/grad_norm"):
        norms = [line[name] for line in lines if name in line]
        finite = bool(norms) and all(math.isfinite(norm) and norm > NORM for norm in norms)
        records.holds(f"{name}: finite and not zero", finite, f"{len(norms)} iterations")
    skipped = sum(line.get("actor/skipped", 0.0) + line.get("critic/skipped", 0.0) for line in lines)
    records.at_most("skipped steps", skipped, 0.0)
    for name in sorted(lines[-1]) if lines else ():
        if any(part in name for part in FIGURES):
            records.figure(f"last iteration: {name}", lines[-1][name])
    for name in ("report.html", "metrics.jsonl"):
        records.holds(f"{name} is written", (folder / name).exists(), numeric=False)


def iterations_of(setting: Setting) -> int:
    return 1 if setting.small else ITERATIONS


def words(setting: Setting, folder: Path) -> list[str]:
    """The command's arguments. The stages are short; their settings are the quickstart's."""
    iterations = iterations_of(setting)
    precision = "bf16" if setting.device == "cuda" else "fp32"
    small = ["stage1.labelled_prompts=16", "stage2.labelled_prompts=16", "stage2.unlabelled_prompts=16"]
    return [
        *("train", "experiment=quickstart", f"run.dir={folder}", f"run.precision={precision}"),
        *(f"run.device={setting.device}", "metrics.progress=false", "checkpoint.every=0", "evaluation.every=0"),
        *("evaluation.samples=2", "evaluation.pass_k=[2]", f"stage1.iterations={iterations}"),
        *(f"stage2.iterations={iterations}", "stage1.critic.warmup_iterations=0", "stage2.critic.warmup_iterations=0"),
        *(small if setting.small else []),
    ]
