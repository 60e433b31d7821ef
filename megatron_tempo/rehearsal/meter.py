"""Measures the phases of a rehearsal: memory by torch's own allocator, and what the null GPU counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_tempo.models.offload import ModelOffloader, Offloadable
from megatron_tempo.nullgpu import counters
from megatron_tempo.plan.memory import GB
from megatron_tempo.training.peak_memory import PeakMemory


@dataclass(frozen=True, slots=True)
class Measured:
    """A phase: bytes on the GPU by torch's allocator, and work by the null GPU's counts."""

    name: str
    before: int  # allocated
    loading: int  # allocated, at the peak until the phase's model is loaded and the one before is offloaded
    peak: int  # allocated, from then on
    reserved: int  # at its peak
    after: int  # allocated
    largest_free: int  # the largest free piece of the reserved memory, at the end
    retries: int  # how often the allocator gave back all free pieces because none was large enough
    seconds: float  # on this machine's CPU
    counts: dict[str, float] = field(default_factory=dict)


class Compilations:
    """Counts Triton kernels that are compiled, and graphs that Dynamo compiles."""

    def __init__(self) -> None:
        self.triton = 0
        import triton  # only with CUDA builds of torch

        triton.knobs.runtime.jit_post_compile_hook = self._compiled

    def _compiled(self, **_: Any) -> None:
        self.triton += 1

    def counts(self) -> dict[str, float]:
        from torch._dynamo.utils import counters as dynamo  # no public name

        return {"triton_compilations": self.triton, "dynamo_graphs": dynamo["stats"]["unique_graphs"]}


class PhaseMeter(PeakMemory):
    """Stands for the trainer's `PeakMemory`: keeps a `Measured` of each phase that ends, and tells the running one.

    `began`: called at the start of each phase with its name.
    """

    def __init__(self, device: torch.device, began: Callable[[str], None]) -> None:
        super().__init__(device, {})
        self.phases: list[Measured] = []
        self.running = "start"
        self.at_fault: dict[str, int] = {}  # memory where an error was raised: allocated, reserved, largest free piece
        self._began = began
        self._loading: int | None = None
        self._compilations = Compilations()
        self._stage = ""

    def stage(self, name: str) -> None:
        """The phases from now on are those of stage `name`."""
        self._stage = name

    def loaded(self) -> None:
        """The phase's model is loaded. Called again, in a phase that loads several, it changes nothing."""
        if self._loading is None:
            self._loading = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.running = f"{self._stage} {name}".strip()
        self._began(self.running)
        torch.cuda.reset_peak_memory_stats()
        self._loading = None
        started, counted, before = time.monotonic(), self._counts(), torch.cuda.memory_allocated()
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        try:
            yield
        except Exception:
            self.at_fault = {
                "allocated": torch.cuda.memory_allocated(),
                "reserved": torch.cuda.memory_reserved(),
                "largest_free": largest_free(),
            }
            raise
        seconds = time.monotonic() - started
        counts = {key: value - counted[key] for key, value in self._counts().items()}
        stats = torch.cuda.memory_stats()
        self.phases.append(
            Measured(
                self.running,
                before,
                self._loading or before,
                stats["allocated_bytes.all.peak"],
                stats["reserved_bytes.all.peak"],
                torch.cuda.memory_allocated(),
                largest_free(),
                stats["num_alloc_retries"] - retries,
                seconds,
                counts,
            )
        )
        self.running = f"after {self.running}"

    def take(self) -> dict[str, float]:
        return {f"memory_gb/{phase.name}": phase.peak / GB for phase in self.phases}

    def _counts(self) -> dict[str, float]:
        read = counters.read()
        host = [read.copies[kind].bytes for kind in ("host_to_device", "device_to_host")]
        return {
            "flops": read.flops,
            "kernel_launches": read.kernel_launches,
            "triton_launches": read.triton_launches,
            "products": read.products,
            "nccl_calls": sum(tally.calls for tally in read.nccl.values()),
            "nccl_bytes": sum(tally.bytes for tally in read.nccl.values()),
            "host_bytes": sum(host),
            "host_copies": sum(read.copies[kind].calls for kind in ("host_to_device", "device_to_host")),
            "synchronisations": sum(read.synchronisations.values()),
            **self._compilations.counts(),
        }


class MeteredOffloader(ModelOffloader):
    """The trainer's offloader, which tells the meter when a model is loaded."""

    def __init__(self, *, one_at_a_time: bool, lends: bool, meter: PhaseMeter) -> None:
        super().__init__(one_at_a_time=one_at_a_time, lends=lends)
        self._meter = meter

    def load(self, model: Offloadable) -> None:
        super().load(model)
        self._meter.loaded()

    def load_weights(self, model: Offloadable) -> None:
        super().load_weights(model)
        self._meter.loaded()


def largest_free() -> int:
    """Bytes of the largest free piece of the memory that torch's allocator holds."""
    blocks = (block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"])
    return max((block["size"] for block in blocks if block["state"] == "inactive"), default=0)
