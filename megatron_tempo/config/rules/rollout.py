"""Rules on the engine that generates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config, EngineKind


def check(config: Config) -> Iterator[Problem]:
    if config.rollout.engine is EngineKind.sglang:
        yield from _sglang(config)


def _sglang(config: Config) -> Iterator[Problem]:
    sglang = config.rollout.sglang
    if shutil.which(sglang.python) is None:
        fix = "give rollout.sglang.python=ENVIRONMENT/bin/python, of the environment that has SGLang"
        yield Problem("rollout.sglang.python", sglang.python, "is no program that can be run", fix)
    if sglang.devices is not None and len(sglang.devices) != sglang.tensor:
        fix = f"give {sglang.tensor} of them, or rollout.sglang.tensor={len(sglang.devices)}"
        wrong = f"are {len(sglang.devices)} devices for rollout.sglang.tensor={sglang.tensor}"
        yield Problem("rollout.sglang.devices", sglang.devices, wrong, fix)
