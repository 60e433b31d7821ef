"""Rules on the judge and on the sandbox of programs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.choices import SandboxKind, Verifier
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
    yield from _code(config)
    yield from _compared(config, training=training)


def runs_programs(config: Config) -> bool:
    """Whether a set of a configuration has programs for answers, as far as the files are not asked."""
    sets = (config.data.labelled, *config.evaluation.sets.values())
    return any(dataset is not None and dataset.verifier is Verifier.code for dataset in sets)


def has_bubblewrap() -> bool:
    return shutil.which("bwrap") is not None


def _code(config: Config) -> Iterator[Problem]:
    code = config.rewards.code
    if code.sandbox is SandboxKind.bubblewrap and not has_bubblewrap():
        wrong, fix = "there is no bwrap on PATH", "apt install bubblewrap, or rewards.code.sandbox=auto"
        yield Problem("rewards.code.sandbox", code.sandbox, wrong, fix)
    if code.wall_seconds < code.seconds:
        wrong = f"all tests of a program have less time than one of them, rewards.code.seconds={code.seconds:g}"
        fix = f"rewards.code.wall_seconds={10 * code.seconds:g}"
        yield Problem("rewards.code.wall_seconds", code.wall_seconds, wrong, fix)
    if code.python is not None and shutil.which(code.python) is None:
        wrong = "is no program that can be run"
        yield Problem(
            "rewards.code.python", code.python, wrong, "give the path of a Python, or rewards.code.python=null"
        )


def _compared(config: Config, *, training: bool) -> Iterator[Problem]:
    """Verifiers that need an answer, where a method has none."""
    unlabelled = config.data.unlabelled
    if not training or not config.compares_answers or unlabelled is None:
        return
    reasons = {
        Verifier.judge: "a judge compares a response with an answer, not responses with one another",
        Verifier.code: "programs are judged by tests, and cannot be compared with one another",
    }
    verifier = unlabelled.verifier
    if isinstance(verifier, Verifier) and verifier in reasons:
        known = ", ".join(one.name for one in Verifier if one not in reasons)
        fix = f"data.unlabelled.verifier=one of {known}"
        yield Problem("data.unlabelled.verifier", verifier, reasons[verifier], fix)


def _verifiers(config: Config, training: bool) -> Iterator[tuple[str, Verifier | Extension | None]]:
    """The verifier of each set whose responses are compared with answers."""
    if training and config.data.labelled is not None:
        yield "data.labelled", config.data.labelled.verifier
    for name, dataset in config.evaluation.sets.items():
        yield f"evaluation.sets.{name}", dataset.verifier
