"""Test verifiers on prepared sets: python tools/check_answers.py math500.jsonl --verifier math

Each correct answer is written in several forms, which the verifier must accept, and corrupted in several ways, which it
must reject. Every other verdict is printed. The rows of `bbh` and `agieval` name their own verifier.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.choices import Verifier
from megatron_tempo.rewards.choice import gold, options
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers

SHOWN = 20  # unexpected decisions of each kind

Row = dict[str, str]
Forms = Iterator[tuple[str, str]]  # a name and a response


def math_forms(row: Row) -> Forms:
    answer = row["answer"].strip().strip("$")
    yield "boxed", f"\\boxed{{{answer}}}"
    yield "boxed, not to the letter", f"\\boxed{{\\displaystyle {answer}}}"
    yield "in a sentence", f"The final answer is ${answer}$."


def choice_forms(row: Row) -> Forms:
    letters = sorted(gold(row["prompt"], row["answer"]))
    bare, marked = ", ".join(letters), " and ".join(f"({letter})" for letter in letters)
    yield "boxed", f"\\boxed{{{bare}}}"
    yield "boxed text", f"\\boxed{{\\text{{{marked}}}}}"
    yield "answer line", f"**Answer:** {marked}"
    yield "sentence", f"So the answer is {marked}."
    yield "last line", f"Let us see.\n\n{marked}"
    known = options(row["prompt"])
    if len(letters) == 1 and known:
        yield "letter and text", f"Answer: ({bare}) {known[bare]}"


def text_forms(row: Row) -> Forms:
    answer = row["answer"]
    yield "answer line", f"Answer: {answer}"
    yield "bold", f"**Answer:** **{answer}**"
    yield "sentence", f"So the answer is {answer}."
    yield "commas", f"Answer: {answer.replace(' ', ', ')}"
    yield "capitals", f"Answer: {answer.upper()}"
    if not re.search(r"[{}\\]", answer):
        yield "boxed", f"\\boxed{{\\text{{{answer}}}}}"


def grid_forms(row: Row) -> Forms:
    grid = json.loads(row["answer"])
    yield "JSON", row["answer"]
    yield "solution", "```json\n" + json.dumps({"reasoning": "{ by elimination", "solution": grid}, indent=1) + "\n```"
    head = list(next(iter(grid.values())))
    lines = [["House", *head], ["---"] * (len(head) + 1), *([house, *cells.values()] for house, cells in grid.items())]
    yield "table", "\n".join(f"| {' | '.join(line)} |" for line in lines)


def math_corrupted(row: Row, other: str) -> Forms:
    answer = row["answer"].strip().strip("$")
    yield "another question's", f"\\boxed{{{other.strip().strip('$')}}}"
    if digit := re.search(r"\d", answer):
        changed = str((int(digit[0]) + 1) % 10)
        yield "one digit changed", f"\\boxed{{{answer[: digit.start()]}{changed}{answer[digit.end() :]}}}"
    yield "both at once", f"\\boxed{{{answer} \\text{{ or }} {other.strip().strip('$')}}}"
    yield "corrected afterwards", f"\\boxed{{{answer}}} No: \\boxed{{{other.strip().strip('$')}}}"


def choice_corrupted(row: Row, other: str) -> Forms:
    letters = gold(row["prompt"], row["answer"])
    known = options(row["prompt"]) or dict.fromkeys("ABCDE", "")
    for letter, text in known.items():
        if letters != {letter}:
            yield "another option", f"\\boxed{{{letter}}}"
            yield "another option, its text", f"Answer: ({letter}) {text}"
    if len(letters) < len(known):
        yield "all options", f"\\boxed{{{', '.join(known)}}}"
        yield "all options, in a sentence", f"The answer is {' or '.join(f'({letter})' for letter in known)}."
    yield "a letter that is none", "\\boxed{Z}"


def text_corrupted(row: Row, other: str) -> Forms:
    words = row["answer"].split()
    yield "another question's", f"Answer: {other}"
    yield "both at once", f"Answer: {row['answer']} or {other}"
    if len(words) > 1 and words[0] != words[1]:
        yield "two words changed places", f"Answer: {' '.join([words[1], words[0], *words[2:]])}"
        yield "a word left out", f"Answer: {' '.join(words[1:])}"


def grid_corrupted(row: Row, other: str) -> Forms:
    grid = json.loads(row["answer"])
    first, second = list(grid)[:2]
    for name in grid[first]:
        changed = json.loads(row["answer"])
        changed[first][name], changed[second][name] = grid[second][name], grid[first][name]
        yield "two cells changed places", json.dumps(changed)
        del changed[first][name]
        yield "a cell left out", json.dumps(changed)
        yield "a cell with all values", json.dumps(grid | {first: grid[first] | {name: [*grid[first].values()]}})


RIGHT = {"math": math_forms, "choice": choice_forms, "text": text_forms, "grid": grid_forms}
CORRUPTED = {"math": math_corrupted, "choice": choice_corrupted, "text": text_corrupted, "grid": grid_corrupted}


def cases(rows: list[Row], verifier: str | None) -> Iterator[tuple[str, str, Item]]:
    """("right" or "wrong", the form's name, the item) for every form of every row."""
    answers = list(dict.fromkeys(row["answer"] for row in rows))
    others = dict(zip(answers, [*answers[1:], answers[0]], strict=True))
    for number, row in enumerate(rows):
        name = row.get("verifier") or verifier
        if name not in RIGHT:
            raise SystemExit(f"row {number} names none of the verifiers {', '.join(RIGHT)}: give --verifier")
        for form, response in RIGHT[name](row):
            yield "right", form, Item(name, row["prompt"], response, row["answer"])
        for form, response in CORRUPTED[name](row, others[row["answer"]]):
            yield "wrong", form, Item(name, row["prompt"], response, row["answer"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl", help="files that prepare_data.py wrote")
    parser.add_argument("--verifier", choices=list(Verifier.__members__), help="verifier of rows that name none")
    args = parser.parse_args()
    failed = 0
    with Verifiers(workers=2, seconds=10) as verifiers:
        for path in args.files:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            tried = list(cases(rows, args.verifier))
            scores = verifiers.score([item for _, _, item in tried])
            counts: Counter[tuple[str, str, str]] = Counter()
            wrong: Counter[tuple[str, str, str]] = Counter()
            print(f"{path}: {len(rows)} answers")
            for (expected, form, item), score in zip(tried, scores, strict=True):
                kind = (item.verifier, expected, form)
                counts[kind] += 1
                if score != (expected == "right"):
                    wrong[kind] += 1
                    if wrong[kind] <= SHOWN:
                        print(f"  not {expected}: {item.answer[:100]!r}, response {item.response[:160]!r}")
            for kind, count in sorted(counts.items()):
                print(f"  {kind[0]}: {count - wrong[kind]} of {count} found {kind[1]}: {kind[2]}")
            failed += sum(wrong.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
