"""The numerics of a process with CUDA: reproducible products, fp32 without TF32, attention without cuDNN's plans."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_tempo.config.choices import Device
from megatron_tempo.errors import InputError
from megatron_tempo.models.device import REPRODUCIBLE_WORKSPACES, select_device, set_cuda_numerics

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def as_in_a_container(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 makes of a process: it is read when torch is imported."""
    monkeypatch.setenv(WORKSPACE, "")  # so that it is taken back at the end
    monkeypatch.delenv(WORKSPACE)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert torch.get_float32_matmul_precision() == "high"
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_fp32_is_not_tf32() -> None:
    set_cuda_numerics(deterministic=False)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.backends.cudnn.allow_tf32 is False
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_attention_is_flash_not_cudnn() -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()
    set_cuda_numerics(deterministic=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()  # for windows, which flash has no mask for
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]):  # other code may ask for it for a while
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_without_cudnn_a_cpu_s_attention_has_the_same_bits() -> None:
    parts = torch.randn(3, 2, 4, 33, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
    set_cuda_numerics(deterministic=False)
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True), before)


def test_a_deterministic_run_sets_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    set_cuda_numerics(deterministic=False)
    assert WORKSPACE not in os.environ
    set_cuda_numerics(deterministic=True)
    assert os.environ[WORKSPACE] == ":4096:8"
    for given in REPRODUCIBLE_WORKSPACES:
        monkeypatch.setenv(WORKSPACE, given)
        set_cuda_numerics(deterministic=True)
        assert os.environ[WORKSPACE] == given


@pytest.mark.parametrize("given", ["", ":0:0", ":4096:2:16:8", ":4096:8 "])
def test_another_workspace_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(WORKSPACE, given)
    with pytest.raises(InputError, match=r"CUBLAS_WORKSPACE_CONFIG=.*run\.deterministic=true.*Unset it, set it to"):
        set_cuda_numerics(deterministic=True)
    set_cuda_numerics(deterministic=False)
    assert os.environ[WORKSPACE] == given


@pytest.mark.parametrize("deterministic", [True, False])
def test_they_are_set_before_cuda_starts(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    seen: list[tuple[str | None, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda _: seen.append((os.environ.get(WORKSPACE), torch.get_float32_matmul_precision())),
    )
    assert select_device(Device.cuda, 3, deterministic=deterministic) == torch.device("cuda", 3)
    assert seen == [(":4096:8" if deterministic else None, "highest")]
