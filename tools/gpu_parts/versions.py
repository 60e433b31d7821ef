"""What the machine has: the GPU, its driver, packages, and the environment variables that change results."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_parts.records import Records
from gpu_parts.setting import Setting, is_null_gpu

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "transformers", "flash-attn", "apex", "liger-kernel"),
    *("sglang", "vllm", "hydra-core", "omegaconf", "math-verify", "latex2sympy2-extended", "numpy", "pytest"),
)
VARIABLES = ("CUDA", "NCCL", "TORCH", "PYTORCH", "NVTE", "CUBLAS", "NVIDIA", "TRITON")  # that start with these
QUERY = "name,driver_version,memory.total,compute_mode,mig.mode.current,clocks.max.sm,power.limit"


def run(_: Setting, records: Records) -> None:
    records.note("python", f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    for package in PACKAGES:
        try:
            records.note(package, version(package))
        except PackageNotFoundError:
            records.note(package, "not installed")
    for name, value in sorted(os.environ.items()):
        if name.split("_")[0] in VARIABLES and not any(word in name for word in ("KEY", "TOKEN", "SECRET")):
            records.note(name, value)
    if is_null_gpu():
        records.note("GPU", "the null GPU: no number below means anything")
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        records.note("nvidia-smi", (said.stdout or said.stderr).strip())
    records.note("MPS", "running" if mps_runs() else "not running")
    try:
        import torch
    except ImportError:
        return
    of_torch(torch, records)


def mps_runs() -> bool:
    """Whether CUDA's multi-process service has its pipe where processes of this user look for it."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists()


def of_torch(torch: Any, records: Records) -> None:
    """What torch says of CUDA. `torch`: the module, which may be absent where the rest of this part is of use."""
    records.note("torch's CUDA", str(torch.version.cuda))
    if not torch.cuda.is_available():
        return
    records.note("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    records.note("cuDNN", str(torch.backends.cudnn.version()))
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    records.note("TF32 of products", f"cuBLAS {allowed[0]}, cuDNN {allowed[1]}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        records.note(f"GPU {index}", f"{found.name}, compute capability {found.major}.{found.minor}")
        records.figure(f"GPU {index} memory", found.total_memory / 1e9, "GB")
        records.figure(f"GPU {index} free", torch.cuda.mem_get_info(index)[0] / 1e9, "GB")
        records.figure(f"GPU {index} multiprocessors", found.multi_processor_count)
