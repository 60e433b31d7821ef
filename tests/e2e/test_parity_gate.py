"""A run whose engine does not say what the actor would does not train."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.config.choices import OnDrift
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.rollout.embedded import EmbeddedEngine
from megatron_tempo.training import parity
from megatron_tempo.training.jobs import train
from megatron_tempo.types import Completion
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks


def started(config: Config, shift: float, wrong_at: tuple[int, ...] | None = None) -> str:
    """What a run says whose engine is wrong about its log-probabilities by `shift` nats; nothing if it ends.

    `wrong_at`: the loads of weights, from 0, after which it is; None: all.
    """
    generate, load = EmbeddedEngine.generate, EmbeddedEngine.load_weights
    loads = itertools.count()
    is_wrong = [True]

    def wrong(self: EmbeddedEngine, *args: object) -> Iterator[tuple[int, list[Completion]]]:
        for i, answer in generate(self, *args):  # type: ignore[arg-type]
            yield i, [replace(c, logprobs=c.logprobs - shift * is_wrong[0]) for c in answer]

    def loading(self: EmbeddedEngine, *args: Any) -> None:
        load(self, *args)
        number = next(loads)
        is_wrong[0] = wrong_at is None or number in wrong_at

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(EmbeddedEngine, "generate", wrong)
        monkeypatch.setattr(EmbeddedEngine, "load_weights", loading)
        try:
            train(config)
        except EngineError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_a_run_stops_before_it_learns_from_a_wrong_engine(tmp_path: Path, shift: float) -> None:
    config = config_of(write_project(tmp_path / "project"), tmp_path / "run")
    (message,) = run_ranks(started, 1, tmp_path / "ranks", config, shift)
    if shift:
        assert message.startswith("the engine's log-probabilities are 0.2 nats from the actor's")
        assert "rollout.parity_tolerance=0.05 (default for fp32 in the trainer, fp32 in the engine): every" in message
        assert not list((tmp_path / "run").glob("checkpoints/step_*"))
        assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()
    else:
        assert message == ""
        assert list((tmp_path / "run").glob("checkpoints/step_*"))


def garbled_from_the_second_sync(config: Config, on_drift: OnDrift, every: int, wrong_at: tuple[int, ...]) -> str:
    config.rollout.on_drift, config.rollout.parity_every = on_drift, every
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(parity, "OWN_TOKENS", 16)  # the tiny run has few
        return started(config, 0.2, wrong_at)


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_whose_second_sync_garbles_the_engine_stops_before_the_actor_learns_from_it(
    tmp_path: Path, every: int
) -> None:
    """Without a sample after the sync, the iteration's own rollouts show it: then its E-step is not kept either."""
    config = config_of(write_project(tmp_path / "project"), tmp_path / "run")
    config.stage2.iterations, config.checkpoint.every = 4, 0
    arguments = (config, OnDrift.stop, every, (2, 3, 4))
    (message,) = run_ranks(garbled_from_the_second_sync, 1, tmp_path / "ranks", *arguments)
    assert message.startswith("the engine's log-probabilities are 0.2 nats from the actor's")
    assert ("of iteration 3" in message) == (every == 0)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
    checkpoints = [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")]
    assert checkpoints == ([] if every == 0 else ["step_00000002"])


@pytest.mark.parametrize("every", [0, 1])
def test_a_resync_saves_the_run(tmp_path: Path, every: int) -> None:
    config = config_of(write_project(tmp_path / "project"), tmp_path / "run")
    config.stage2.iterations = 4
    arguments = (config, OnDrift.resync, every, (2,))
    (message,) = run_ranks(garbled_from_the_second_sync, 1, tmp_path / "ranks", *arguments)
    assert message == ""
    lines = list(read_metrics(tmp_path / "run"))
    assert [line["engine/resyncs"] for line in lines] == [0, 0, 1, 0]
    assert [line.get("actor/rows_dropped", 0) > 0 for line in lines] == [False, False, every == 0, False]
    assert ["actor/grad_norm" in line for line in lines] == [True, True, every == 1, True]
