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

    rows: list[Row]
    classes: Tensor  # int64 [questions, n]
    correct: Tensor  # float64 [questions, n], NaN without a verdict; only `oracle`, --known and the summary read it
    lengths: Tensor  # int64 [questions, n]

    @property
    def groups(self) -> Tensor:
        """The question of each response: int64 [questions * n]."""
        return torch.arange(len(self.rows)).repeat_interleave(self.classes.shape[1])

    @property
    def gaps(self) -> Tensor:
        """The corrective advantage gap of each question, which reads its label: float64 [questions]."""
        won, _ = votes(self.classes.flatten(), self.groups)
        return advantage_gaps(won.view(self.classes.shape), self.correct)


def read_rows(path: Path, name: str = "id") -> list[Row]:
    """The lines of a JSONL file, each with a text `name`. Raises InputError with file and line."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise InputError(f"{path}, line {number} is not an object with the text {name!r}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty")
    return rows


def read_pool(responses: Path, pool: Path, verifier: str | None, prompt_field: str) -> Pool:
    """The pool with its responses. Raises InputError if some questions lack theirs, or nothing compares them."""
    rows = read_rows(pool)
    given = _by_question(responses, pool, [row["id"] for row in rows])
    if all("answer_class" in response for of in given for response in of):
        classes = [[response["answer_class"] for response in of] for of in given]
    elif verifier is None:
        raise InputError(
            f"{responses} does not say which answers are equal: --verifier={'|'.join(Verifier.__members__)}"
        )
    else:
        prompts = [row.get(prompt_field) for row in rows]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"{pool} has rows without the text {prompt_field!r}: --prompt-field=NAME")
        classes = _compared(verifier, prompts, [[_of(response, "text", "response") for response in of] for of in given])
    correct = [[_of(response, "correct") for response in of] for of in given]
    lengths = [[response["tokens"] if "tokens" in response else len(response["response_tokens"]) for response in of]
               for of in given]  # fmt: skip
    verdicts = [[math.nan if one is None else float(one) for one in of] for of in correct]
    return Pool(rows, torch.tensor(classes), torch.tensor(verdicts, dtype=torch.float64), torch.tensor(lengths))


def _by_question(path: Path, pool: Path, ids: list[str]) -> list[list[Row]]:
    """The responses to each question: of rollouts, or of an evaluation."""
    first = read_text(path).partition("\n")[0]
    name = "prompt_id" if '"prompt_id"' in first else "id"
    found: dict[str, list[Row]] = {one: [] for one in ids}
    for response in read_rows(path, name):
        if response[name] in found:
            found[response[name]].append(response)
    if not any(found.values()):
        raise InputError(f"{path} has no response to a question of {pool}: their ids differ. Ids are those of the file "
                         "with id_field=id: of the data, or of the evaluation set")  # fmt: skip
    counts = sorted({len(of) for of in found.values()})
    if len(counts) > 1 or counts[0] < 2:
        least = min(ids, key=lambda one: len(found[one]))
        wrong = f"has {counts[0]} responses to {least!r} of {pool}, and up to {counts[-1]} to others"
        raise InputError(f"{path} {wrong}: it needs as many to each question, two or more")
    return list(found.values())


def _of(response: Row, *names: str) -> Any:
    return next((response[name] for name in names if name in response), None)


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
    never = torch.zeros(len(pool.rows), dtype=torch.float64)
    if rule == "oracle":
        _need_verdicts(pool, torch.ones_like(known), "--rule=oracle")
    score: Mapping[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "care": lambda: care(pool, known),
        "oracle": lambda: (pool.gaps, never),
        "entropy": lambda: (_entropies(pool), never),
        "random": lambda: (torch.rand(len(pool.rows), generator=torch.Generator().manual_seed(seed)), never),
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
    parser.add_argument("--verifier", choices=list(Verifier.__members__), help="of answers that were not compared yet")
    parser.add_argument("--budget", type=int, required=True, help="how many questions to label")
    parser.add_argument("--rule", choices=("care", "oracle", "entropy", "random"), default="care")
    parser.add_argument("--known", type=Path, help="JSONL with the `id` of questions that have labels already")
    parser.add_argument("--gate", type=float, default=GATE, help=f"care: a share of the pool, {GATE} by default")
    parser.add_argument("--seed", type=int, default=0, help="of random")
    parser.add_argument("--prompt-field", default="prompt", help="of the pool")
    parser.add_argument("--out", type=Path, required=True, help="what to write; it must not exist")
    arguments = parser.parse_args(given)
    if arguments.out.exists():
        raise InputError(f"{arguments.out} exists; give another --out")
    if not 0 <= arguments.gate < 1:
        raise InputError(f"--gate={arguments.gate} is not a share of at least 0 and below 1; the paper's is {GATE}")
    pool = read_pool(arguments.responses, arguments.pool, arguments.verifier, arguments.prompt_field)
    labelled = {row["id"] for row in read_rows(arguments.known)} if arguments.known else set()
    known = torch.tensor([row["id"] in labelled for row in pool.rows])
    free = int((~known).sum())
    if labelled and not bool(known.any()):
        raise InputError(f"{arguments.known} has none of the pool's questions: their ids differ")
    if not free:
        raise InputError(f"every question of the pool has a label in {arguments.known}")
    if not 0 < arguments.budget <= free:
        raise InputError(f"--budget={arguments.budget}: {free} questions have no label; give 1 to {free}")
    chosen = choose(pool, arguments.rule, known, arguments.budget, arguments.gate, arguments.seed).tolist()
    replace_file(arguments.out, "".join(json.dumps(pool.rows[i]) + "\n" for i in chosen), fsync=True)
    print(f"{arguments.out}: {len(chosen)} of {len(pool.rows)} questions, by {arguments.rule}")
    if not bool(pool.correct.isnan().any()):
        gaps = pool.gaps
        print(f"mean corrective advantage gap: {gaps[chosen].mean():.3f}, of the whole pool {gaps.mean():.3f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
