"""Chooses which questions of a pool to label, from a policy's responses to them (RLAVR and CARE, arXiv 2605.25864).

    python tools/acquire.py runs/pool/rollouts/stage2-000001.jsonl pool.jsonl --budget 64 --out chosen.jsonl
    python tools/acquire.py runs/pool/responses.jsonl pool.jsonl --budget 64 --out chosen.jsonl --verifier countdown \\
        --known labelled.jsonl

The responses are rollouts (rollout.dump=true; the pool needs no answers), or those of an evaluation. --verifier
compares their answers, unless the rollouts' method did. What is written are the chosen rows of the pool. With their
answers added, any method takes them as data.labelled.path. docs/methods.md has the commands. The rules:

    care      the greatest expected corrective advantage gap, without the share --gate that most likely needs no label
    oracle    the greatest gap itself, which reads all labels: what a rule could reach at best
    entropy   the greatest entropy of the answers
    random    at random, by --seed

`care` reads the verdicts of the questions in --known alone: a logistic regression on them predicts whether an answer is
right. Without --known an answer's share of the responses is taken for its probability.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tempo.algorithm.acquisition import (
    advantage_gaps,
    class_counts,
    class_features,
    class_probabilities,
    expected_gaps,
    fit_logistic,
    to_label,
)
from megatron_tempo.algorithm.groups import shares, votes
from megatron_tempo.config.choices import Verifier
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_text, replace_file
from megatron_tempo.rewards.verifiers import Verifiers

GATE = 0.25  # of the paper's published scripts
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pool:
    """The questions in the order of the pool, and the policy's n responses to each."""

    questions: list[Line]
    classes: Tensor  # int64 [questions, n]
    correct: Tensor  # float64 [questions, n], NaN without a verdict; only `oracle`, --known and the summary read it
    lengths: Tensor  # int64 [questions, n]

    @property
    def groups(self) -> Tensor:
        """The question of each response: int64 [questions * n]."""
        return torch.arange(len(self.questions)).repeat_interleave(self.classes.shape[1])

    @property
    def gaps(self) -> Tensor:
        """The corrective advantage gap of each question, which reads its label: float64 [questions]."""
        won, _ = votes(self.classes.flatten(), self.groups)
        return advantage_gaps(won.view(self.classes.shape), self.correct)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a JSONL file, and its object."""

    where: str  # file and number, for messages
    text: str
    row: Row

    @property
    def id(self) -> str:
        return str(self.row["id"])

    def field(self, kind: type, what: str, *names: str) -> Any:
        """The first of these fields that is there. Raises InputError if none is, or if it is of another kind."""
        found = next((self.row[name] for name in names if name in self.row), None)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise InputError(f"{self.where}: {' or '.join(map(repr, names))} is {found!r}, not {what}")
        return found


def read_lines(path: Path, name: str = "id") -> list[Line]:
    """The lines of a JSONL file, each with an id in the field `name`. Raises InputError with file and line."""
    lines = []
    for number, text in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no JSON ({error})") from error
        found = row.get(name) if isinstance(row, dict) else None
        if not isinstance(found, str | int) or isinstance(found, bool):
            raise InputError(f"{where} is not an object with {name!r}, a text or a whole number")
        lines.append(Line(where, text.strip(), row | {"id": str(found)}))
    if not lines:
        raise InputError(f"{path} is empty")
    return lines


def read_pool(responses: Path, pool: Path, chosen_set: str | None, verifier: str | None, prompt_field: str) -> Pool:
    """The pool with its responses. Raises InputError if some questions lack theirs, or nothing compares them."""
    questions = read_lines(pool)
    places: dict[str, str] = {}
    for line in questions:
        if line.id in places:
            raise InputError(f"{line.where} has the id {line.id!r}, as has {places[line.id]}; keep one")
        places[line.id] = line.where
    given = _by_question(responses, pool, chosen_set, list(places))
    if all("answer_class" in line.row for of in given for line in of):
        classes = [[_class(line) for line in of] for of in given]
    elif verifier is None:
        raise InputError(
            f"{responses} does not say which answers are equal: --verifier={'|'.join(Verifier.__members__)}"
        )
    else:
        prompts = [line.row.get(prompt_field) for line in questions]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"{pool} has rows without the text {prompt_field!r}: --prompt-field=NAME")
        texts = [[line.field(str, "a text", "text", "response") for line in of] for of in given]
        classes = _compared(verifier, prompts, texts)
    verdicts = [[_verdict(line) for line in of] for of in given]
    lengths = [[_length(line) for line in of] for of in given]
    return Pool(questions, torch.tensor(classes), torch.tensor(verdicts, dtype=torch.float64), torch.tensor(lengths))


def _by_question(path: Path, pool: Path, chosen_set: str | None, ids: list[str]) -> list[list[Line]]:
    """The responses to each question: of rollouts, or of an evaluation."""
    first = read_text(path).partition("\n")[0]
    found: dict[str, list[Line]] = {one: [] for one in ids}
    lines = read_lines(path, "prompt_id" if '"prompt_id"' in first else "id")
    sets = sorted({str(line.row["set"]) for line in lines if "set" in line.row})
    if chosen_set is None and len(sets) > 1:
        raise InputError(f"{path} has responses of {len(sets)} sets, each with ids of its own: --set={'|'.join(sets)}")
    if chosen_set is not None and chosen_set not in sets:
        raise InputError(f"--set={chosen_set}: {path} has {', '.join(sets) or 'no set: leave it out'}")
    for line in lines:
        if line.id in found and chosen_set in (None, line.row.get("set")):
            found[line.id].append(line)
    if not any(found.values()):
        raise InputError(f"{path} has no response to a question of {pool}: their ids differ. Ids are those of the file "
                         "with id_field=id: of the data, or of the evaluation set")  # fmt: skip
    counts = sorted({len(of) for of in found.values()})
    if len(counts) > 1 or counts[0] < 2:
        least = min(ids, key=lambda one: len(found[one]))
        wrong = f"has {counts[0]} responses to {least!r} of {pool}, and up to {counts[-1]} to others"
        raise InputError(f"{path} {wrong}: it needs as many to each question, two or more")
    return list(found.values())


def _class(line: Line) -> int:
    found = line.field(int, "the number of a class, -1 for no answer", "answer_class")
    if found < -1:
        raise InputError(f"{line.where}: 'answer_class' is {found}; -1 is no answer")
    return int(found)


def _verdict(line: Line) -> float:
    """NaN if there is none."""
    found = line.row.get("correct")
    if found is None:
        return math.nan
    if isinstance(found, bool):
        return float(found)
    value = float(line.field(int | float, "a verdict from 0 to 1", "correct"))  # type: ignore[arg-type]
    if not 0 <= value <= 1:
        raise InputError(f"{line.where}: 'correct' is {found}, not a verdict from 0 to 1")
    return value


def _length(line: Line) -> int:
    if "response_tokens" in line.row:
        return len(line.field(list, "a list of tokens", "response_tokens"))
    return int(line.field(int, "a number of tokens", "tokens", "response_tokens"))


def _compared(verifier: str, prompts: list[Any], texts: list[list[str]]) -> list[list[int]]:
    """Which responses to each question have equal answers, -1 for none."""
    with Verifiers() as verifiers:
        classes = [verifiers.classes(verifier, *given) for given in zip(prompts, texts, strict=True)]
    return [[-1 if number is None else number for number in of] for of in classes]


def care(pool: Pool, known: Tensor) -> tuple[Tensor, Tensor]:
    """The expected gap of each question and the probability that its majority is right: float64 [questions] each.

    `known`: bool [questions], whose verdicts may be read.
    """
    counts = class_counts(pool.classes)
    right = counts / pool.classes.shape[1]
    if bool(known.any()):
        _need_verdicts(pool, known, "--known")
        features = class_features(pool.classes, pool.lengths)
        labelled = known[:, None] & (counts > 0)
        members = [((pool.classes == number) & (pool.correct > 0.5)).any(1) for number in range(counts.shape[1])]
        weights = fit_logistic(features[labelled], torch.stack(members, dim=1)[labelled].double())
        right = class_probabilities(features, counts, weights)
    return expected_gaps(pool.classes, right)


def _need_verdicts(pool: Pool, rows: Tensor, who: str) -> None:
    """Raises InputError if the responses to these questions have no verdicts."""
    if bool(pool.correct[rows].isnan().any()):
        raise InputError(f"{who} needs verdicts, which the responses lack: use those of an evaluation with answers")


def choose(pool: Pool, rule: str, known: Tensor, budget: int, gate: float, seed: int) -> Tensor:
    """The questions to label, int64 [budget], ascending. Known ones are not chosen."""
    never = torch.zeros(len(pool.questions), dtype=torch.float64)
    if rule == "oracle":
        _need_verdicts(pool, torch.ones_like(known), "--rule=oracle")
    score: Mapping[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "care": lambda: care(pool, known),
        "oracle": lambda: (pool.gaps, never),
        "entropy": lambda: (_entropies(pool), never),
        "random": lambda: (torch.rand(len(pool.questions), generator=torch.Generator().manual_seed(seed)), never),
    }
    scores, majority_right = score[rule]()
    free = (~known).nonzero().flatten()
    return free[to_label(scores[free], majority_right[free], budget, gate if rule == "care" else 0.0)]


def _entropies(pool: Pool) -> Tensor:
    """The entropy of each question's answers, in nats: float64 [questions]."""
    _, entropy = shares(pool.classes.flatten(), pool.groups)
    return entropy.view(pool.classes.shape)[:, 0].double()


def main(given: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("responses", type=Path, help="a file of rollouts/, or responses.jsonl of an evaluation")
    parser.add_argument("pool", type=Path, help="the questions, JSONL with `id`")
    parser.add_argument("--set", help="of an evaluation of several sets: the one that is the pool")
    parser.add_argument("--verifier", choices=list(Verifier.__members__), help="of answers that were not compared yet")
    parser.add_argument("--budget", type=int, required=True, help="how many questions to label")
    parser.add_argument("--rule", choices=("care", "oracle", "entropy", "random"), default="care")
    parser.add_argument("--known", type=Path, help="JSONL with the `id` of questions that have labels already")
    parser.add_argument("--gate", type=float, default=GATE, help=f"care: a share of the questions, {GATE} by default")
    parser.add_argument("--seed", type=int, default=0, help="of random")
    parser.add_argument("--prompt-field", default="prompt", help="of the pool")
    parser.add_argument("--out", type=Path, required=True, help="what to write; it must not exist")
    arguments = parser.parse_args(given)
    if os.path.lexists(arguments.out):
        raise InputError(f"{arguments.out} exists; give another --out")
    if not arguments.out.parent.is_dir():
        raise InputError(f"--out={arguments.out}: there is no folder {arguments.out.parent}; make it first")
    if not 0 <= arguments.seed < 2**63:
        raise InputError(f"--seed={arguments.seed} is not a number from 0 to 2^63 - 1")
    if not 0 <= arguments.gate < 1:
        raise InputError(f"--gate={arguments.gate} is not a share of at least 0 and below 1; the paper's is {GATE}")
    pool = read_pool(arguments.responses, arguments.pool, arguments.set, arguments.verifier, arguments.prompt_field)
    labelled = {line.id for line in read_lines(arguments.known)} if arguments.known else set()
    known = torch.tensor([line.id in labelled for line in pool.questions])
    free = int((~known).sum())
    if labelled and not bool(known.any()):
        raise InputError(f"{arguments.known} has none of the pool's questions: their ids differ")
    if not free:
        raise InputError(f"every question of the pool has a label in {arguments.known}")
    if not 0 < arguments.budget <= free:
        raise InputError(f"--budget={arguments.budget}: {free} questions have no label; give 1 to {free}")
    chosen = choose(pool, arguments.rule, known, arguments.budget, arguments.gate, arguments.seed).tolist()
    replace_file(arguments.out, "".join(pool.questions[i].text + "\n" for i in chosen), fsync=True)
    print(f"{arguments.out}: {len(chosen)} of {len(pool.questions)} questions, by {arguments.rule}")
    if not bool(pool.correct.isnan().any()):
        gaps = pool.gaps
        print(f"mean corrective advantage gap: {gaps[chosen].mean():.3f}, of the whole pool {gaps.mean():.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        sys.exit(str(error))
