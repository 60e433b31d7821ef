"""Megatron-Core on a machine without CUDA: what it creates for CUDA is on the CPU, and other calls are torch's own."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

import megatron.core
import pytest
import torch
from torch.overrides import _len_torch_function_stack

from megatron_tempo.models.megatron_compat import cpu_backend
from tests.support.ranks import run_ranks

# Modules that a run imports and does not call: FP8, experts, FSDP, inference, CUDA graphs, multimodal models, other
# optimizers, NCCL's allocator, streams of CUDA.
UNUSED = {
    "distributed.fsdp.src.megatron_fsdp.mixed_precision",
    "distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer",
    "fp8_utils",
    "full_cuda_graph",
    "fusions.fused_indices_converter",
    "inference.symmetric_memory",
    "models.mimo.optimizer",
    "nccl_allocator",
    "optimizer.layer_wise_optimizer",
    "pipeline_parallel.hybrid_cp_schedule",
    "pipeline_parallel.utils",
    "transformer.cuda_graphs",
    "transformer.moe.moe_layer",
    "transformer.moe.moe_utils",
    "transformer.moe.paged_stash",
    "transformer.moe.token_dispatcher",
}


def on_a_rank() -> None:
    """In a process of its own: the replacements stay."""
    cpu_backend.install_cpu_backend()
    cpu_backend.install_cpu_backend()
    assert _len_torch_function_stack() == 0  # no mode, which would be called for every call of torch
    assert (torch.zeros(1).type(), torch.zeros(1, dtype=torch.bfloat16).type()) == (
        "torch.cuda.FloatTensor",
        "torch.cuda.BFloat16Tensor",
    )
    assert torch.zeros(1, dtype=torch.int64).type() == "torch.LongTensor"
    assert torch.equal(torch.ones(2).type(torch.int64), torch.ones(2, dtype=torch.int64))
    for name in cpu_backend._MODULES:
        theirs = importlib.import_module(f"megatron.core.{name}").torch
        for given in ("cuda", torch.device("cuda", 0)):
            made = theirs.zeros(2, dtype=torch.int32, device=given), theirs.tensor([1.5], device=given)
            assert [(x.device.type, x.dtype) for x in made] == [("cpu", torch.int32), ("cpu", torch.float32)]
        assert theirs.empty(1, device="meta").device.type == "meta"
        assert theirs.Tensor is torch.Tensor
        assert theirs.cuda is torch.cuda
        assert theirs.autograd.Function is torch.autograd.Function


def test_only_what_megatron_creates_for_cuda_is_replaced(tmp_path: Path) -> None:
    run_ranks(on_a_rank, 1, tmp_path)


def test_a_cuda_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be installed where CUDA is available"):
        cpu_backend.install_cpu_backend()


def test_no_module_of_megatron_is_missed() -> None:
    """Of the modules that a run imports. A new version of Megatron-Core may have more."""
    importlib.import_module("megatron_tempo.training.jobs")
    root, known = Path(megatron.core.__path__[0]), {*cpu_backend._MODULES, *UNUSED}
    missed = []
    for name, module in list(sys.modules.items()):
        if not name.startswith("megatron.core.") or not (file := getattr(module, "__file__", None)):
            continue
        short = name.removeprefix("megatron.core.")
        text = Path(file).read_text(encoding="utf-8") if Path(file).is_relative_to(root) else ""
        if re.search(r"""device=["']cuda["']""", text) and short not in known:
            missed.append(short)
    assert not missed, inspect.cleandoc(
        f"device='cuda' in {missed}: add them to _MODULES, or to UNUSED with the reason"
    )
