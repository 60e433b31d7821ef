"""What a process with the null GPU asked of the device. Reads the library that is loaded into this very process."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from megatron_tempo.errors import InputError
from megatron_tempo.nullgpu.guard import is_loaded

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all", "send", "recv")
COPIES = ("host_to_device", "device_to_host", "device_to_device")
SYNCHRONISATIONS = ("stream", "device", "event")


@dataclass(frozen=True)
class Tally:
    """How many calls, and of how many bytes in all."""

    calls: int = 0
    bytes: int = 0

    def __sub__(self, before: Tally) -> Tally:
        return Tally(self.calls - before.calls, self.bytes - before.bytes)


@dataclass(frozen=True)
class Counters:
    """Totals since the process started; the difference of two readings is what happened between them.

    flops: of matrix products by cuBLAS, 2 m n k each. Attention, grouped products and all other kernels have none.
    products: calls of cuBLAS. kernel_launches: through the runtime. triton_launches: through the driver.
    nccl: by kind, in bytes of the larger buffer (a gather's output, a scatter's input). copies: by direction.
    synchronisations: waits of the host for a stream, a device or an event.
    device_mallocs, device_frees: calls of cudaMalloc and cudaFree that took or gave memory.
    peak_bytes: the most that each device had in use, by the driver's count; not a sum, so a difference keeps the later.
    """

    flops: float
    products: int
    kernel_launches: int
    triton_launches: int
    device_mallocs: int
    device_frees: int
    nccl_communicators: int
    nccl: dict[str, Tally]
    copies: dict[str, Tally]
    synchronisations: dict[str, int]
    peak_bytes: tuple[int, ...]

    def __sub__(self, before: Counters) -> Counters:
        return Counters(
            flops=self.flops - before.flops,
            products=self.products - before.products,
            kernel_launches=self.kernel_launches - before.kernel_launches,
            triton_launches=self.triton_launches - before.triton_launches,
            device_mallocs=self.device_mallocs - before.device_mallocs,
            device_frees=self.device_frees - before.device_frees,
            nccl_communicators=self.nccl_communicators - before.nccl_communicators,
            nccl={kind: tally - before.nccl[kind] for kind, tally in self.nccl.items()},
            copies={kind: tally - before.copies[kind] for kind, tally in self.copies.items()},
            synchronisations={kind: n - before.synchronisations[kind] for kind, n in self.synchronisations.items()},
            peak_bytes=self.peak_bytes,
        )


def read() -> Counters:
    """The counters now. Raises InputError in a process without the null GPU."""
    library = _library()
    values = {
        library.nullgpu_counter_name(index).decode(): library.nullgpu_counter_value(index)
        for index in range(library.nullgpu_counter_count())
    }
    whole = {name: int(value) for name, value in values.items()}
    devices = ctypes.c_int()
    library.cudaGetDeviceCount(ctypes.byref(devices))
    return Counters(
        flops=values["flops"],
        products=whole["products"],
        kernel_launches=whole["kernel_launches"],
        triton_launches=whole["triton_launches"],
        device_mallocs=whole["device_mallocs"],
        device_frees=whole["device_frees"],
        nccl_communicators=whole["nccl_communicators"],
        nccl={kind: Tally(whole[f"nccl_{kind}_calls"], whole[f"nccl_{kind}_bytes"]) for kind in COLLECTIVES},
        copies={kind: Tally(whole[f"{kind}_copies"], whole[f"{kind}_bytes"]) for kind in COPIES},
        synchronisations={kind: whole[f"{kind}_synchronisations"] for kind in SYNCHRONISATIONS},
        peak_bytes=tuple(library.nullgpu_peak(device) for device in range(devices.value)),
    )


def reset_peak(device: int = 0) -> None:
    """Starts a new peak of the driver's memory, from what is in use now."""
    _library().nullgpu_reset_peak(device)


def used_bytes(device: int = 0) -> int:
    """What the device has in use now, by the driver's count: torch's reserved memory, and what else there is."""
    return int(_library().nullgpu_used(device))


def stub_calls() -> list[str]:
    """NVIDIA's functions that were called and that the null GPU only answers with success, in order of first calls."""
    library = _library()
    return [library.nullgpu_stub_name(index).decode() for index in range(library.nullgpu_stub_count())]


def _library() -> ctypes.CDLL:
    if not is_loaded():
        raise InputError("this process has no null GPU: it is not a rehearsal")
    library = ctypes.CDLL(None)
    library.nullgpu_counter_name.restype = library.nullgpu_stub_name.restype = ctypes.c_char_p
    library.nullgpu_counter_value.restype = ctypes.c_double
    library.nullgpu_peak.restype = library.nullgpu_used.restype = ctypes.c_size_t
    return library
