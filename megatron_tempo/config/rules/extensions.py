"""Rules on the user's own code: the object of `import:package.module:name` loads and fits its field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from megatron_tempo.config.extensions import (
    Extension,
    ExtensionError,
    load_engine,
    load_reader,
    load_template,
    load_verifier,
)
from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config, DatasetConfig
from megatron_tempo.config.stages import ExtensionSettings
from megatron_tempo.config.tree import read_settings


def check(config: Config, *, training: bool) -> Iterator[Problem]:
    """`training`: the sets of training count too."""
    for group, dataset in _sets(config, training):
        yield from _verifier(config, group, dataset)
        if dataset.reader is not None:
            yield from _problem(f"{group}.reader", dataset.reader, load_reader)
        if isinstance(dataset.chat_template, Extension):
            yield from _problem(f"{group}.chat_template", dataset.chat_template, load_template)
    yield from check_engine(config)


def check_engine(config: Config) -> Iterator[Problem]:
    if isinstance(config.rollout.engine, Extension):
        yield from _problem("rollout.engine", config.rollout.engine, load_engine)


def check_methods(config: Config) -> Iterator[Problem]:
    for name, stage in config.stages().items():
        settings = stage.settings
        if stage.iterations > 0 and isinstance(settings, ExtensionSettings):
            try:
                yield from read_settings(settings, name)[1]
            except ExtensionError as error:
                yield Problem(f"{name}.method", settings.method, error.wrong, error.fix)


def without_methods(config: Config, problems: list[Problem]) -> Config:
    """The configuration without the stages whose methods these problems reject: their needs are unknown."""
    refused = [problem.field.partition(".")[0] for problem in problems]
    stages: dict[str, Any] = {name: replace(config.stages()[name], iterations=0) for name in refused}
    return replace(config, **stages)


def imported_verifiers(config: Config) -> list[Extension]:
    """The user's own verifiers that the configuration names."""
    sets = [config.data.labelled, config.data.unlabelled, *config.evaluation.sets.values()]
    return list(dict.fromkeys(s.verifier for s in sets if s is not None and isinstance(s.verifier, Extension)))


def _sets(config: Config, training: bool) -> Iterator[tuple[str, DatasetConfig]]:
    sets = {"data.labelled": config.data.labelled, "data.unlabelled": config.data.unlabelled} if training else {}
    yield from ((field, dataset) for field, dataset in sets.items() if dataset is not None)
    yield from ((f"evaluation.sets.{name}", dataset) for name, dataset in config.evaluation.sets.items())


def _problem(field: str, extension: Extension, load: Callable[[Extension], object]) -> Iterator[Problem]:
    """What is wrong with an extension, if anything."""
    try:
        load(extension)
    except ExtensionError as error:
        yield Problem(field, extension, error.wrong, error.fix)


def _verifier(config: Config, group: str, dataset: DatasetConfig) -> Iterator[Problem]:
    field, extension = f"{group}.verifier", dataset.verifier
    if not isinstance(extension, Extension):
        return
    if problems := list(_problem(field, extension, load_verifier)):
        yield from problems
        return
    verifier = load_verifier(extension)
    if group == "data.unlabelled":
        if config.compares_answers and verifier.answer_of is None:
            wrong = "has no method answer_of, and the stage's method compares the answers of responses"
            yield Problem(field, extension, wrong, "define answer_of(prompt, response), or give a built-in verifier")
    elif verifier.graded:
        yield from _graded(config, field, extension)
    elif group.startswith("evaluation.") and config.evaluation.votes and verifier.answer_of is None:
        wrong = "has no method answer_of, and evaluation.votes=true compares the answers of responses"
        yield Problem(field, extension, wrong, "define answer_of(prompt, response), or evaluation.votes=false")


def _graded(config: Config, field: str, extension: Extension) -> Iterator[Problem]:
    """The rule on a verifier whose verdicts may lie between 0 and 1."""
    if field.startswith("evaluation."):
        wrong = "is graded, and evaluation counts responses that are right: it requires verdicts of 0 and 1"
        yield Problem(field, extension, wrong, "give a verifier without graded = True, such as one with a threshold")
        return
    for name, stage in config.stages().items():
        if stage.iterations > 0 and Prompts.labelled in stage.prompts() and not stage.needs.graded:
            wrong = f"is graded, and {name}.method={stage.method.name} requires verdicts of 0 and 1"
            yield Problem(field, extension, wrong, "give a verifier without graded = True, or another method")
