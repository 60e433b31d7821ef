"""The training and evaluation sets of a configuration, and what identifies their questions."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.schema import Config
from megatron_tempo.data.copies import LABELLED, UNLABELLED, QuestionSet, copies_between, datasets, held_out
from megatron_tempo.data.dataset import load_labelled, load_unlabelled, question_keys
from megatron_tempo.data.question_keys import exact_key
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.data.template_date import DATE, asks_for_date
from megatron_tempo.data.tokenizer import check_stop_strings, findings
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt

log = logging.getLogger(__name__)

SAMPLED = 32  # prompts of each set that are compared with the text of their tokens
_P = TypeVar("_P", LabelledPrompt, UnlabelledPrompt)


@dataclass(frozen=True, slots=True)
class QuestionKeys:
    """The keys of each set's questions, by id (`data.question_keys`)."""

    labelled: dict[str, str]
    unlabelled: dict[str, str]
    evaluation: dict[str, dict[str, str]]  # by set
    matching: dict[str, dict[str, str]]  # the same for all typesettings of a question, by the field of the set
    warnings: list[str]  # of questions that are in several sets

    @classmethod
    def read(cls, config: Config, *, warn: bool = True) -> QuestionKeys:
        """`warn`: look for questions that are in several sets. Only one rank needs to."""
        sets = {name: QuestionSet.read(name, dataset) for name, dataset in datasets(config).items()}
        exact = {name: {key: exact_key(texts) for key, texts in one.texts.items()} for name, one in sets.items()}
        return cls(
            labelled=exact.get(LABELLED, {}),
            unlabelled=exact.get(UNLABELLED, {}),
            evaluation={name: exact[f"evaluation.sets.{name}"] for name in config.evaluation.sets},
            matching={name: one.keys for name, one in sets.items()},
            warnings=copies_between(list(sets.values()), config.data.held_out) if warn else [],
        )

    @staticmethod
    def evaluated(config: Config) -> dict[str, dict[str, str]]:
        """The keys of only the evaluation sets."""
        return {name: question_keys(dataset) for name, dataset in config.evaluation.sets.items()}


@contextmanager
def unchanged_files(config: Config) -> Iterator[dict[str, str | None]]:
    """The SHA-256 of the evaluation sets' files, by set, while the sets are read inside.

    None for a file that a user's reader reads. Raises InputError at the end if a file has changed meanwhile, so the
    digests are of the bytes that were read.
    """
    before = {name: _sha256(Path(dataset.path)) for name, dataset in config.evaluation.sets.items()}
    yield before
    for name, dataset in config.evaluation.sets.items():
        if _sha256(Path(dataset.path)) != before[name]:
            raise InputError(f"{dataset.path} (evaluation.sets.{name}) changed while it was read: start again")


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prompt_streams(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    verifiers: Verifiers,
    keys: QuestionKeys,
) -> tuple[PromptStream[LabelledPrompt] | None, PromptStream[UnlabelledPrompt] | None]:
    """The training prompts without those of `data.held_out`, in shuffled order.

    Logs the questions that were left out, and those that are in several sets.
    """
    length, seed = config.rollout.max_prompt_tokens, config.run.seed
    labelled = load_labelled(config.data.labelled, tokenizer, length) if config.data.labelled else None
    unlabelled = load_unlabelled(config.data.unlabelled, tokenizer, length) if config.data.unlabelled else None
    if labelled is not None:
        labelled = _trained_on(LABELLED, labelled, config, keys)
        verifiers.check(labelled)
    if unlabelled is not None:
        unlabelled = _trained_on(UNLABELLED, unlabelled, config, keys)
    if unlabelled is not None and config.compares_answers:
        assert config.data.unlabelled is not None
        assert config.data.unlabelled.verifier is not None
        verifiers.check_questions(config.data.unlabelled.verifier.name, unlabelled)
    for line in keys.warnings:
        log.info("%s", line)
    return (
        None if labelled is None else PromptStream(labelled, seed, "labelled"),
        None if unlabelled is None else PromptStream(unlabelled, seed, "unlabelled"),
    )


def _trained_on(name: str, prompts: list[_P], config: Config, keys: QuestionKeys) -> list[_P]:
    """The prompts of a training set without those of `data.held_out`. Raises InputError if none is left."""
    own, held = keys.matching[name], {one: keys.matching[f"evaluation.sets.{one}"] for one in config.data.held_out}
    if (line := held_out(name, own, held)) is not None:
        log.info("%s", line)
    known = {key for one in held.values() for key in one.values()}
    kept = [prompt for prompt in prompts if own[prompt.id] not in known]
    if not kept:
        raise InputError(f"data.held_out={config.data.held_out} leaves no question of {name}: take a set out of it")
    return kept


def evaluation_sets(
    config: Config, tokenizer: PreTrainedTokenizerBase, verifiers: Verifiers
) -> dict[str, list[LabelledPrompt]]:
    """The evaluation sets by name. Raises one InputError for all sets that cannot be used."""
    sets, problems = {}, []
    for name, dataset in config.evaluation.sets.items():
        try:
            sets[name] = load_labelled(dataset, tokenizer, config.rollout.max_prompt_tokens)
            verifiers.check(sets[name])
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return sets


def tokenizer_findings(
    config: Config, tokenizer: PreTrainedTokenizerBase, sets: Iterable[Sequence[LabelledPrompt | UnlabelledPrompt]]
) -> list[str]:
    """Findings on the tokenizer and its chat template, one per line. `sets`: the prompts of a job.

    Raises InputError if the tokenizer loses all spaces of a prompt, or cannot write a stop string.
    """
    for field, stop in (("rollout.stop", config.rollout.stop), ("evaluation.stop", config.evaluation.stop or [])):
        check_stop_strings(tokenizer, Path(config.model.path), stop, field)
    texts = [prompt.text for prompts in sets for prompt in prompts[:SAMPLED]]
    lines = findings(tokenizer, Path(config.model.path), texts)
    if isinstance(tokenizer.chat_template, str) and asks_for_date(tokenizer.chat_template):
        lines.append(
            f"the chat template asks for the date, and gets {DATE:%Y-%m-%d} on every day: prompts stay the same"
        )
    return lines
