"""Steps that are not made, where what was seen of them cannot be kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tempo.config.updates import OptimizerConfig
from megatron_tempo.errors import NotFiniteError
from megatron_tempo.models.nonfinite_guard import LossInputs, NonFiniteGuard
from megatron_tempo.models.trained import Step
from megatron_tempo.models.update import run_mini_batches
from tests.support.tiny import ragged_batch


def test_if_a_dump_cannot_be_written_the_run_warns_and_continues(
    single: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "skipped").touch()  # a file, where a folder is wanted
    batch, rows = ragged_batch(4), torch.tensor([0, 1])
    step = Step(torch.empty(0, 1), torch.full((2,), torch.nan), float("nan"), made=False)
    trained: Any = SimpleNamespace(step=lambda *_: step, layout=SimpleNamespace(data_rank=0, is_reporter=True))
    owners = torch.zeros(4, dtype=torch.int64)
    guard = NonFiniteGuard("actor", tmp_path / "skipped", limit=2, is_writer=True)
    given: Any = (trained, guard, batch, owners, [rows], None, 1, OptimizerConfig(), lambda: LossInputs({}), 3)
    metrics = run_mini_batches(*given)
    assert metrics.skipped == 1
    assert "step_00000003_actor_1.safetensors cannot be written (" in caplog.text
    with pytest.raises(NotFiniteError, match="2 optimizer steps in a row"):
        run_mini_batches(*given)
