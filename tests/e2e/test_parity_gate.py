"""A run whose engine does not say what the actor would does not train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.embedded import EmbeddedEngine
from megatron_tempo.training.jobs import train
from megatron_tempo.types import Completion
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks


def started(config: Config, shift: float) -> str:
    """What a run says whose engine is wrong about its log-probabilities by `shift` nats; nothing if it trains."""
    generate = EmbeddedEngine.generate

    def wrong(self: EmbeddedEngine, *args: object) -> Iterator[tuple[int, list[Completion]]]:
        for i, answer in generate(self, *args):  # type: ignore[arg-type]
            yield i, [replace(c, logprobs=c.logprobs - shift) for c in answer]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(EmbeddedEngine, "generate", wrong)
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
