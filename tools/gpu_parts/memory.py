"""Four layers of Qwen3-8B and rows of 18,432 tokens: peak memory against the plan, synchronisations, a profile.

Actor and critic are the trainer's own, one at a time on the GPU (`parallel.offload`), with recomputed layers as in the
preset of Qwen3-8B. Peaks are those of torch's allocator, which are real on the null GPU too.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.made import FOUR_OF_8B, SMALL, Sizes, rollouts, write_model
from gpu_parts.measured import synchronize
from gpu_parts.records import Records
from gpu_parts.setting import ROOT, Setting
from gpu_parts.training import Pair, config_of, narrow, opened
from megatron_tempo.config.choices import Recompute
from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.method_settings import Baseline, PpoSettings
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.plan.layout import PlannedMicroBatch
from megatron_tempo.plan.memory import MemoryPhase, place_memory
from megatron_tempo.plan.parameters import Role
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.types import Batch

GB = 1e9
ROWS = 2  # each a micro-batch of its own
SHARE = 0.1  # by which a peak may be off the plan
TOP = 10  # kernels, and places of synchronisations, that are recorded
Phases = dict[MemoryPhase, Callable[[], object]]


def run(setting: Setting, records: Records) -> None:
    sizes = SMALL if setting.small else FOUR_OF_8B
    prompt, response = (32, 224) if setting.small else (2048, 16_384)
    config = configured(setting, sizes, prompt, response)
    plan = planned(config, prompt, response)
    batch = rollouts(sizes.vocab, [(prompt, response)] * ROWS)
    records.note("model", f"{sizes}, layers: {config.model.layers.value}, recompute: layers, offload: on")
    before = torch.cuda.memory_allocated() if setting.device == "cuda" else 0
    with opened(config) as pair:
        for model in (pair.actor.model, pair.critic.model):
            assert isinstance(model, TrainedModel)
            randomize(model)
        phases, peaks = phases_of(pair, batch), {}
        for phase, call in phases.items():
            seconds, peak, reserved = measured(pair, phase, call)
            peaks[phase] = peak - before
            records.figure(f"{phase.value}: first call", seconds, "s")
            if setting.device == "cuda":
                records.figure(f"{phase.value}: reserved", reserved / GB, "GB")
                of_peak(f"{phase.value}: peak", peaks[phase] / GB, plan[phase] / GB, records)
        if setting.rehearsal:
            against_rehearsal(Path(setting.rehearsal), peaks, records)
        for phase, call in phases.items():
            seconds, _, _ = measured(pair, phase, call)
            records.figure(f"{phase.value}: second call", seconds, "s")
        synchronisations(phases[MemoryPhase.actor], setting, records)
        profiled(phases[MemoryPhase.actor], setting, records)


def configured(setting: Setting, sizes: Sizes, prompt: int, response: int) -> Config:
    model = write_model(setting.folder / "memory-model", sizes, empty=True)
    config = config_of(setting, model, narrow(setting))
    config.parallel.recompute, config.parallel.offload, config.parallel.world_size = Recompute.layers, True, 1
    config.parallel.micro_batch_tokens = prompt + response
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = prompt, response
    config.stage1 = StageConfig(PpoSettings(), 1, labelled_prompts=ROWS, responses_per_prompt=1)
    config.stage1.actor.mini_batch_prompts = config.stage1.critic.mini_batch_prompts = ROWS
    config.cluster = ClusterConfig(gpus_per_node=1, memory_gb=80.0)
    return config


def planned(config: Config, prompt: int, response: int) -> dict[MemoryPhase, float]:
    """Bytes by phase, for micro-batches of one row."""
    shape, problems = shape_of(config)
    assert shape is not None, problems
    micro = PlannedMicroBatch(prompt + response, response, prompt + response, ROWS)
    place = {Role.actor: 0, Role.critic: 0}
    return {phase: sum(parts.values()) for phase, parts in place_memory(config, shape, place, micro).items()}


@torch.no_grad()
def randomize(model: TrainedModel) -> None:
    """Random weights in place of the file's zeros: products of zeros take less time and power."""
    with model.at_work():
        for parameter in model.net.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
        model.optimizer.reload_model_params()


def phases_of(pair: Pair, batch: Batch) -> Phases:
    """Calls of the phases in the order of an iteration; the actor's update uses what the others have returned."""
    seen: dict[str, Any] = {}
    settings = StageConfig(PpoSettings())
    order = [torch.arange(len(batch))]
    targets = batch.correct
    assert targets is not None

    def update() -> None:
        experience = Experience(seen["logprobs"], seen["values"], targets)
        pair.actor.update(batch, experience, Baseline.before_token, settings.actor, order)

    return {
        MemoryPhase.values: lambda: seen.update(values=pair.critic.values(batch)),
        MemoryPhase.critic: lambda: pair.critic.update(batch, targets, settings.critic, order),
        MemoryPhase.logprobs: lambda: seen.update(logprobs=pair.actor.logprobs(batch)),
        MemoryPhase.actor: update,
    }


def measured(pair: Pair, phase: MemoryPhase, call: Callable[[], object]) -> tuple[float, int, int]:
    """Seconds, peak of allocated bytes, and reserved bytes. The phase's model is loaded before, as in a run."""
    critic = phase in (MemoryPhase.values, MemoryPhase.critic)
    pair.context.offloader.load((pair.critic if critic else pair.actor).model)
    gc.collect()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    call()
    synchronize()
    seconds = time.perf_counter() - started
    if not torch.cuda.is_available():
        return seconds, 0, 0
    return seconds, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def of_peak(name: str, peak: float, plan: float, records: Records) -> None:
    records.between(name, peak, (1 - SHARE) * plan, (1 + SHARE) * plan, f"GB, planned {plan:.2f}", numeric=False)


def synchronisations(call: Callable[[], object], setting: Setting, records: Records) -> None:
    """The calls in one actor update for which the CPU waits for the GPU, and where they are."""
    if setting.device != "cuda":
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(place(one) for one in caught if "synchronizing" in str(one.message))
    records.figure("actor: synchronisations of an update", places.total())
    for where, count in places.most_common(TOP):
        records.note(f"actor: synchronisations at {where}", str(count))


def place(caught: warnings.WarningMessage) -> str:
    path = Path(caught.filename)
    inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{inside}:{caught.lineno}"


def profiled(call: Callable[[], object], setting: Setting, records: Records) -> None:
    """The kernels of one actor update that take most time. CUPTI, which measures them, needs a real GPU."""
    if setting.device != "cuda" or not records.has_numbers:
        return
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        started = time.perf_counter()
        call()
        synchronize()
        seconds = time.perf_counter() - started
    rows = sorted(trace.key_averages(), key=lambda row: row.self_device_time_total, reverse=True)
    busy = sum(row.self_device_time_total for row in rows) / 1e6
    records.figure("actor: profiled update", seconds, "s")
    records.figure("actor: share of it in which kernels run", busy / seconds)
    for row in rows[:TOP]:
        records.note(f"kernel {row.key[:80]}", f"{row.self_device_time_total / 1e3:.2f} ms in {row.count} calls")


def rehearsed(path: Path) -> dict[str, float]:
    """The peaks of a rehearsal's first rank by phase, in bytes. Raises ValueError if the file is of another form."""
    try:
        phases = json.loads(path.read_text(encoding="utf-8"))["ranks"][0]["phases"]
        return {str(phase["phase"]): float(phase["peak"]) for phase in phases}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the JSON of a rehearsal (megatron-tempo rehearse --json FILE)") from error


def against_rehearsal(path: Path, peaks: dict[MemoryPhase, int], records: Records) -> None:
    """Put a rehearsal's peaks next to those measured. Nothing is compared: it may have been of another layout."""
    with records.attempt("rehearsal"):
        found = rehearsed(path)
        for phase, peak in peaks.items():
            if phase.value in found:
                records.figure(f"{phase.value}: rehearsed peak", found[phase.value] / GB, "GB")
                records.figure(f"{phase.value}: peak / rehearsed peak", peak / max(found[phase.value], 1.0))
