r"""The benchmarks and training sets known by name: their sources, prompt suffixes and verifiers.

`megatron-tempo prepare NAME` converts the public form to our JSONL (`megatron_tempo/data/questions.py` reads its
fields). `benchmark=NAME` on the command line adds the evaluation set `evaluation.sets.NAME` of a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.tree import MISSING

_STEPS = "\n\nReason step by step. "
_NUMBER = _STEPS + "Put the final answer in \\boxed{}."
_LETTER = _STEPS + "Put the letter of the right option in \\boxed{}."
_MIXED = _STEPS + (
    "Put the final answer in \\boxed{}: of a question with options the letter, or the letters where several are right; "
    "of one with several blanks the answers in their order, with commas between them."
)
_WORDS = _STEPS + (
    "End with a line of the form Answer: ..., which holds nothing but the final answer, "
    "and of a question with lettered options the letter."
)
_PROGRAM = _STEPS + "End with the whole program in one block of code that begins with ```python and ends with ```."
_GRID = _STEPS + "End with the completed grid, as JSON in exactly this form."


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A public set of questions."""

    source: str  # Hugging Face name, or GitHub repository, of the public form
    files: str  # glob pattern of the set's files, below its folder
    questions: int | None  # as published; None if it depends on the given tasks
    verifier: Verifier | None  # None if every row names its own, or (Dolci) no verifier can read the answers
    suffix: str = ""  # appended to a question; empty for training sets, since their data preset has it
    training: bool = False


BENCHMARKS = {
    "aime2024": Benchmark("HuggingFaceH4/aime_2024", "data/train-*", 30, Verifier.math, _NUMBER),
    "aime2025": Benchmark("MathArena/aime_2025", "data/train-*", 30, Verifier.math, _NUMBER),
    "aime2026": Benchmark("MathArena/aime_2026", "data/train-*", 30, Verifier.math, _NUMBER),
    "beyond_aime": Benchmark("ByteDance-Seed/BeyondAIME", "data/test-*", 100, Verifier.math, _NUMBER),
    "olymmath_easy": Benchmark("RUC-AIBOX/OlymMATH", "data/OlymMATH-EN-EASY.jsonl", 100, Verifier.math, _NUMBER),
    "olymmath_hard": Benchmark("RUC-AIBOX/OlymMATH", "data/OlymMATH-EN-HARD.jsonl", 100, Verifier.math, _NUMBER),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test.jsonl", 500, Verifier.math, _NUMBER),
    "bbh": Benchmark("github.com/suzgunmirac/BIG-Bench-Hard", "bbh/*.json", 6511, None, _WORDS),
    "agieval": Benchmark("github.com/ruixiangcui/AGIEval", "data/v1/*.jsonl", None, None, _MIXED),
    "zebralogic": Benchmark("WildEval/ZebraLogic", "grid_mode/test-*", 1000, Verifier.grid, _GRID),
    "gpqa_diamond": Benchmark("Idavidrein/gpqa", "gpqa_diamond.csv", 198, Verifier.choice, _LETTER),
    "humaneval": Benchmark("openai/openai_humaneval", "openai_humaneval/test-*", 164, Verifier.code, _PROGRAM),
    "mbpp": Benchmark("google-research-datasets/mbpp", "full/test-*", 500, Verifier.code, _PROGRAM),
    "mbpp_sanitized": Benchmark("google-research-datasets/mbpp", "sanitized/test-*", 257, Verifier.code, _PROGRAM),
    "livecodebench": Benchmark("livecodebench/code_generation_lite", "test*.jsonl", None, Verifier.code, _PROGRAM),
    "dapo_math_17k": Benchmark("BytedTsinghua-SIA/DAPO-Math-17k", "data/*.parquet", None, Verifier.math, training=True),
    "dolci_general": Benchmark("allenai/Dolci-RL-Zero-General-7B", "data/train-*", 12841, None, training=True),
}


def preset(name: str) -> dict[str, Any]:
    """The fields that `benchmark=name` adds to the tree: the set's, except its path."""
    benchmark = BENCHMARKS[name]
    verifier = {"verifier_field": "verifier"} if benchmark.verifier is None else {"verifier": benchmark.verifier.name}
    fields = {"path": MISSING, "answer_field": "answer", **verifier, "id_field": "id", "suffix": benchmark.suffix}
    return {"evaluation": {"sets": {name: fields}}}
