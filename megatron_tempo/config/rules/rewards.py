"""Rules on the judge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.hosts import host_of
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.files import wrong_with_key
from megatron_tempo.config.schema import Config

_URL = re.compile(r"https?://[^/\s?#]+(/[^\s?#]*)?")
_CALL = "/chat/completions"


def check(config: Config, *, training: bool) -> Iterator[Problem]:
    """`training`: the sets of training count too."""
    judge = config.rewards.judge
    if judge.url is not None and (not _URL.fullmatch(judge.url) or host_of(judge.url) is None):
        yield Problem("rewards.judge.url", judge.url, "is no address", "give it as http://HOST:PORT/v1")
    elif judge.url is not None and judge.url.rstrip("/").endswith(_CALL):
        fix = f"rewards.judge.url={judge.url.rstrip('/').removesuffix(_CALL)}"
        yield Problem("rewards.judge.url", judge.url, f"{_CALL} is added to it", fix)
    if judge.key_file is not None and (wrong_key := wrong_with_key(Path(judge.key_file))):
        fix = "write the judge's key into it, or give the file with the key"
        yield Problem("rewards.judge.key_file", judge.key_file, wrong_key, fix)
    users = [name for name, verifier in _verifiers(config, training) if verifier is Verifier.judge]
    for field, example in (("url", "http://HOST:PORT/v1"), ("model", "NAME, as that server calls it")):
        if getattr(judge, field) is None and (users or judge.url or judge.model):
            wrong = (
                f"{users[0]}.verifier=judge asks a judge" if users else "is required: url and model are given together"
            )
            yield Problem(f"rewards.judge.{field}", None, wrong, f"rewards.judge.{field}={example}")
    unlabelled = config.data.unlabelled
    if training and config.compares_answers and unlabelled is not None and unlabelled.verifier is Verifier.judge:
        wrong = "a judge compares a response with an answer, not responses with one another"
        known = ", ".join(name for name in Verifier.__members__ if name != Verifier.judge.name)
        yield Problem("data.unlabelled.verifier", Verifier.judge, wrong, f"data.unlabelled.verifier=one of {known}")


def _verifiers(config: Config, training: bool) -> Iterator[tuple[str, Verifier | Extension | None]]:
    """The verifier of each set whose responses are compared with answers."""
    if training and config.data.labelled is not None:
        yield "data.labelled", config.data.labelled.verifier
    for name, dataset in config.evaluation.sets.items():
        yield f"evaluation.sets.{name}", dataset.verifier
