"""The training and evaluation sets of a configuration, and what identifies their questions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.schema import Config
from megatron_tempo.data.dataset import load_labelled, load_unlabelled, overlap, question_keys
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt

_P = TypeVar("_P", LabelledPrompt, UnlabelledPrompt)


@dataclass(frozen=True, slots=True)
class QuestionKeys:
    """What the questions of each set are known by, by their ids (`data.dataset.question_keys`)."""

    labelled: dict[str, str]
    unlabelled: dict[str, str]
    evaluation: dict[str, dict[str, str]]  # by set

    @classmethod
    def read(cls, config: Config) -> QuestionKeys:
        data = config.data
        labelled = {} if data.labelled is None else question_keys(data.labelled)
        unlabelled = {} if data.unlabelled is None else question_keys(data.unlabelled)
        return cls(labelled, unlabelled, cls.evaluated(config))

    @staticmethod
    def evaluated(config: Config) -> dict[str, dict[str, str]]:
        """Of the evaluation sets alone."""
        return {name: question_keys(dataset) for name, dataset in config.evaluation.sets.items()}


@contextmanager
def unchanged_files(config: Config) -> Iterator[dict[str, str | None]]:
    """For the time in which the evaluation sets are read: the SHA-256 of their files, by set.

    None for what a user's own reader reads. InputError at the end if a file has changed meanwhile: so the digests are
    of the bytes that were read.
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
    log: Callable[[str], None],
) -> tuple[PromptStream[LabelledPrompt] | None, PromptStream[UnlabelledPrompt] | None]:
    """The training prompts but those of `data.held_out`, in their shuffled order.

    Questions that were left out, and those that stand in both sets, are told of.
    """
    length, seed = config.rollout.max_prompt_tokens, config.run.seed
    labelled = load_labelled(config.data.labelled, tokenizer, length) if config.data.labelled else None
    unlabelled = load_unlabelled(config.data.unlabelled, tokenizer, length) if config.data.unlabelled else None
    if labelled is not None:
        labelled = _trained_on("labelled", labelled, keys.labelled, config, keys, log)
        verifiers.check(labelled)
    if unlabelled is not None:
        unlabelled = _trained_on("unlabelled", unlabelled, keys.unlabelled, config, keys, log)
    if unlabelled is not None and config.compares_answers:
        assert config.data.unlabelled is not None
        assert config.data.unlabelled.verifier is not None
        verifiers.check_questions(config.data.unlabelled.verifier.name, unlabelled)
    if shared := overlap(_keys_of(labelled, keys.labelled), _keys_of(unlabelled, keys.unlabelled)):
        first = " and ".join(shared[0])
        log(f"warning: {len(shared)} unlabelled questions stand in the labelled set too, first {first}")
    return (
        None if labelled is None else PromptStream(labelled, seed, "labelled"),
        None if unlabelled is None else PromptStream(unlabelled, seed, "unlabelled"),
    )


def _trained_on(
    name: str,
    prompts: list[_P],
    own: dict[str, str],
    config: Config,
    keys: QuestionKeys,
    log: Callable[[str], None],
) -> list[_P]:
    """The prompts of a training set but those of `data.held_out`. InputError where none is left."""
    where = {key: held for held in config.data.held_out for key in keys.evaluation[held].values()}
    kept = [prompt for prompt in prompts if own[prompt.id] not in where]
    if len(kept) < len(prompts):
        count = Counter(where[own[prompt.id]] for prompt in prompts if own[prompt.id] in where)
        sets = ", ".join(f"{held} {number}" for held, number in count.items())
        log(f"held out of the {name} set: {len(prompts) - len(kept)} of {len(prompts)} questions ({sets})")
    if not kept:
        raise InputError(
            f"data.held_out={config.data.held_out} leaves no question of data.{name}: take a set out of it"
        )
    return kept


def _keys_of(prompts: Sequence[_P] | None, keys: dict[str, str]) -> dict[str, str]:
    return {prompt.id: keys[prompt.id] for prompt in prompts or ()}


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
