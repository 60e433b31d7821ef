"""The settings of torch's allocator of GPU memory, without a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_tempo.config.choices import Device
from megatron_tempo.models import device
from megatron_tempo.models.megatron_compat.torch_private import shareable_memory, use_expandable_segments

ON, OFF = "expandable_segments:True", "expandable_segments:False"
OWN = [
    {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
    {"PYTORCH_ALLOC_CONF": OFF},
    {"PYTORCH_HIP_ALLOC_CONF": ON},
]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator was told, in order."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_torch_knows_the_setting() -> None:
    torch._C._accelerator_setAllocatorSettings(ON)
    with pytest.raises(ValueError, match="perhaps"):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:perhaps")
    torch._C._accelerator_setAllocatorSettings(OFF)  # torch's default


def test_segments_grow_from_the_first_allocation_on(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(device, "set_cuda_numerics", lambda **_: None)  # of the whole process
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: settings.append(str(chosen)))
    device.select_device(Device.cuda, 0)
    assert settings == [ON, "cuda:0"]


def test_an_empty_variable_is_none(settings: list[str]) -> None:
    use_expandable_segments({"PYTORCH_CUDA_ALLOC_CONF": ""})
    assert settings == [ON]


@pytest.mark.parametrize("environment", OWN, ids=lambda value: next(iter(value)))
def test_a_users_own_settings_stay(settings: list[str], environment: dict[str, str]) -> None:
    use_expandable_segments(environment)
    with shareable_memory(environment):
        pass
    assert settings == []


def test_memory_for_others_is_in_segments_of_fixed_size(settings: list[str]) -> None:
    with shareable_memory({}):
        assert settings == [OFF]
    with pytest.raises(RuntimeError, match="out of memory"), shareable_memory({}):
        raise RuntimeError("out of memory")
    assert settings == [OFF, ON, OFF, ON]
