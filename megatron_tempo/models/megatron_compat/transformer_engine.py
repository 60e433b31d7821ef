"""Transformer Engine (TE): whether it can be imported, and which of its attentions it chose."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping
from importlib import metadata

import torch

from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.torch_private import hide_missing_cuda

_PARTS = ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13", "transformer-engine-torch")
# What Megatron-Core 0.16.1 imports of TE when it is imported itself.
_IMPORTED = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.distributed")
_BLACKWELL = (10, 0)


def check_import() -> None:
    """Import TE if it is installed. Raises InputError if that fails. Call it before the first import of Megatron-Core.

    Megatron-Core 0.16.1 imports TE in about thirty of its files (such as tensor_parallel/random.py). These expect
    ImportError if it is absent, and nothing else. But a broken TE raises FileNotFoundError (no torch part), OSError (no
    CUDA library), AssertionError (parts of different versions), RuntimeError or AttributeError. Without this, the user
    sees a traceback from the middle of Megatron's import. And after an ImportError, some of these files use TE and
    others do not.
    """
    hide_missing_cuda()
    if importlib.util.find_spec("transformer_engine") is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TE warns of what is the error here
            for name in _IMPORTED:
                importlib.import_module(name)
    except Exception as error:  # any of the above, and whatever another broken build raises
        raise InputError(_fault(error)) from error


def _fault(error: Exception) -> str:
    words = f"{type(error).__name__}: {error}".split("\n", 1)[0].rstrip(".")
    found = {part: version for part in _PARTS if (version := _version(part))}
    spec = importlib.util.find_spec("transformer_engine")
    origin = spec.origin if spec is not None else None
    where = ", ".join(f"{part} {version}" for part, version in found.items()) or origin
    remove = f"pip uninstall {' '.join(found)}" if found else "remove that folder"
    return (
        f"Transformer Engine is installed ({where}), but cannot be imported: {words}. Reinstall it: all its parts need "
        f"one version, and its torch part is compiled against the installed torch, here {torch.__version__} (pip "
        f"install --no-build-isolation '.[te]', docs/gpu.md). Or {remove}: without it, the layers are Megatron-Core's "
        f"and torch's"
    )


def _version(part: str) -> str | None:
    try:
        return metadata.version(part)
    except metadata.PackageNotFoundError:
        return None


def drop_fp8_weights(net: torch.nn.Module) -> None:
    """Drop the FP8 copies of the weights that TE's layers keep between passes; the next pass makes them again.

    TE 2.11 (pytorch/module/base.py, `get_weight_workspace`): a byte for each number, two where the backward pass needs
    the transposed copy. No function of TE drops them.
    """
    for module in net.modules():
        copies = getattr(module, "_fp8_workspaces", None)
        if copies:
            copies.clear()


def refuse_unfused_attention(*, in_fp8: bool) -> None:
    """Raise InputError if TE's last attention kept the scores of all pairs of tokens.

    TE 2.11 (pytorch/attention/dot_product_attention/dot_product_attention.py, `_attention_backends`, which its package
    exports). TE documents that it chooses among flash-attn, cuDNN and its own unfused attention by GPU, format and
    determinism, and that NVTE_DEBUG=1 logs the choice (docs/examples/attention/attention.ipynb). No function tells it.
    The unfused one needs heads * S * S numbers, 22 GB for a row of Qwen3-8B of 18,432 tokens in bf16, instead of a few
    MB. `in_fp8`: whether the layers compute in FP8.
    """
    backends = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention")
    chosen = getattr(backends, "_attention_backends", None)  # absent in other versions
    if chosen is None or not chosen["use_unfused_attention"]:
        return
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    raise InputError(unfused_message(capability, os.environ, deterministic=deterministic, in_fp8=in_fp8))


def unfused_message(
    capability: tuple[int, int] | None, environment: Mapping[str, str], *, deterministic: bool, in_fp8: bool
) -> str:
    """What to do where TE has only its unfused attention. `capability`: of the GPU."""
    off = [name for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN") if environment.get(name) == "0"]
    fixes = [f"unset {' and '.join(off)} in the environment"] if off else []
    fixes.append("install flash-attn for this torch")
    if deterministic and capability is not None and capability >= _BLACKWELL:
        fixes.append("set run.deterministic=false, because cuDNN's backward pass is not deterministic on Blackwell")
    fixes.append(f"set {'run.precision=bf16 and ' if in_fp8 else ''}model.layers=local")
    gpu = "this machine" if capability is None else f"a GPU of compute capability {capability[0]}.{capability[1]}"
    return (
        f"Transformer Engine chose its unfused attention on {gpu}: it keeps the scores of all pairs of tokens, whose "
        f"memory grows with the square of the row; fix: {', or '.join(fixes)} (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 prints "
        f"why it chose it)"
    )
