"""What a process needs in its environment to have the null GPU."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_tempo.errors import InputError
from megatron_tempo.nullgpu.build import PRELOAD, libraries
from megatron_tempo.nullgpu.guard import MARKER

MAX_DEVICES = 16  # NULLGPU_MAX_DEVICES of csrc/nullgpu.h
COPY_MAX_BYTES = 1 << 20
# Variables that would hide the device, or send a library past it.
REMOVED = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TRITON_INTERPRET")
NULL = "(null)"  # ends each device's name: whatever is written about it shows what it was


def environment(
    *,
    devices: int = 1,
    memory_gb: float = 80.0,
    capability: int = 90,
    name: str = "NVIDIA H100 80GB HBM3",
    copy_max_bytes: int = COPY_MAX_BYTES,
    stub_log: Path | None = None,
) -> dict[str, str]:
    """The whole environment of a child process that has the null GPU: this process's, with what it takes.

    memory_gb: of each device, in 10^9 bytes. capability: 90 for sm_90. name: of each device, which gets " (null)".
    copy_max_bytes: copies of more bytes are counted and not made, so that memory stays unwritten. stub_log: a file that
    gets a line for each stub that is called. Builds the libraries if they do not exist.

    Raises InputError as `libraries` does, or for a number out of bounds.

    cuDNN is not replaced, and requires a real driver: call `without_cudnn` in the child after importing torch.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise InputError(f"devices {devices}: the null GPU has 1 to {MAX_DEVICES}")
    if not 0 < memory_gb < 1e6:
        raise InputError(f"memory_gb {memory_gb}: a device has more than 0 and less than 10^6 GB")
    if not 70 <= capability < 200:
        raise InputError(f"capability {capability}: give it without a dot, such as 90 for sm_90")
    folder = libraries()
    result = {key: value for key, value in os.environ.items() if key not in REMOVED}
    preloads = [part for part in result.get("LD_PRELOAD", "").replace(":", " ").split() if PRELOAD not in part]
    paths = [part for part in result.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    result |= {
        "LD_PRELOAD": ":".join([str(folder / PRELOAD), *preloads]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder), *paths]),
        "TRITON_LIBCUDA_PATH": str(folder),
        # Its kernels are linked with this libcuda; they must not be found by a run on a real GPU, nor the reverse.
        "TRITON_CACHE_DIR": str(folder.parent / "triton"),
        "NVTE_DISABLE_NVRTC": "1",  # Transformer Engine's compiled kernels instead of those that it compiles itself
        "NULLGPU_DEVICES": str(devices),
        "NULLGPU_MEMORY_BYTES": str(round(memory_gb * 1e9)),
        "NULLGPU_CAPABILITY": str(capability),
        "NULLGPU_NAME": name if name.endswith(NULL) else f"{name} {NULL}",
        "NULLGPU_COPY_MAX_BYTES": str(copy_max_bytes),
        "NULLGPU_STUB_LOG": str(stub_log or ""),
        MARKER: "1",
    }
    return result


def without_cudnn() -> None:
    """Keeps torch from calling cuDNN: call it in the child, before the first attention. Sends attention to flash."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.enabled = False
