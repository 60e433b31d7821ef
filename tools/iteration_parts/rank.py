"""One rank of a measured run: `train` itself, with made-up outputs in place of the networks' forward passes."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iteration_parts.made import LOGPROB
from iteration_parts.meter import Meter
from megatron_tempo.config.schema import Config
from megatron_tempo.models.gpt import LanguageModel, PackedGPT, ValueModel
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.training.jobs import train
from megatron_tempo.training.rollout_requests import RolloutRequests
from megatron_tempo.training.run_state import RunState
from megatron_tempo.types import Batch


def run_rank(rank: int, world: int, port: int, config: Config, result: Path) -> None:
    """Run a rank in this process, and write the costs of its last iteration to `result`, as JSON."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: it ends with the process that started it
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    meter = Meter()
    meter.install()
    _replace_forward_passes()
    record: dict[str, Any] = {"missing": meter.missing}

    def note_rollouts(rollouts: Any) -> None:
        batches = [batch for batch in (rollouts.labelled, rollouts.unlabelled) if batch is not None]
        record["rows"] = sum(map(len, batches))
        record["tokens"] = sum(int(batch.lengths.sum()) for batch in batches)
        record["held"] = sum(map(held_bytes, batches))

    def note_costs(_: object) -> None:
        record["costs"] = {name: asdict(cost) for name, cost in meter.take().items()}

    _after(RolloutRequests, "generate", note_rollouts)
    _after(RunState, "checkpoint_if_due", note_costs)
    train(config)
    result.write_text(json.dumps(record))


def held_bytes(batch: Batch) -> int:
    """Bytes of a batch's tensors. Views of one storage count once."""
    tensors = [value for field in dataclasses.fields(batch) for value in _tensors(getattr(batch, field.name))]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in _tensors(getattr(value, field.name))]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _after(owner: type, name: str, note: Callable[[Any], None]) -> None:
    """Let a method also give its result to `note`."""
    method = getattr(owner, name)

    def noted(*args: Any, **given: Any) -> Any:
        result = method(*args, **given)
        note(result)
        return result

    setattr(owner, name, noted)


def _replace_forward_passes() -> None:
    """Outputs of the right shapes, with a graph to the weights: schedule, losses and optimizer run as ever."""

    def anchor(net: PackedGPT) -> Tensor:
        for hook in net.decoder._forward_hooks.values():  # waits for weights that are still being gathered
            hook(net.decoder, (), None)
        return torch.stack([parameter.flatten()[0].float() for parameter in net.parameters()]).sum() * 0.0

    def logprobs(self: LanguageModel, micro: MicroBatch) -> Tensor:
        constants = torch.tensor([[LOGPROB], [-LOGPROB]])
        return constants.expand(2, len(micro.response_cells)) + anchor(self)

    def values(self: ValueModel, micro: MicroBatch) -> Tensor:
        return torch.full((len(micro.value_cells),), 0.5) + anchor(self)

    LanguageModel.forward = logprobs  # type: ignore[method-assign]
    ValueModel.forward = values  # type: ignore[method-assign]
