"""The GPUs of servers, and the environment that they start with."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_tempo.config.choices import Device, EngineKind, Transport
from megatron_tempo.config.schema import Config, ServersConfig
from megatron_tempo.errors import InputError
from megatron_tempo.models import device as devices
from megatron_tempo.models.device import select_device, shared_gpu
from megatron_tempo.rollout.nccl import SETTINGS, align_nccl
from megatron_tempo.rollout.placement import placed
from megatron_tempo.rollout.server import environment_of
from megatron_tempo.rollout.server_adapter import Launch
from megatron_tempo.training import context

GPUS = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]


def servers(**fields: object) -> ServersConfig:
    return ServersConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "trainers", "found"),
    [
        (servers(), ["GPU-a"], [1]),
        (servers(replicas=2), ["GPU-a", "GPU-b"], [2, 3]),
        (servers(tensor=2), ["GPU-a", "GPU-c"], [1, 3]),  # a launcher that numbers GPUs in another order
        (servers(devices=[3, 2], replicas=2), ["GPU-a", "GPU-b"], [3, 2]),
        (servers(devices=[0], transport=Transport.shared), ["GPU-a"], [0]),
        (servers(transport=Transport.shared), ["GPU-a"], [1]),
    ],
)
def test_servers_take_gpus_that_the_trainer_does_not_have(
    config: ServersConfig, trainers: list[str], found: list[int]
) -> None:
    assert placed(config, GPUS, trainers) == found


@pytest.mark.parametrize(
    ("config", "visible", "words"),
    [
        (servers(), GPUS[:1], r"devices=null: 1 x 1 .* needs 1 GPUs .* 0 of the 1 that"),
        (servers(replicas=2, tensor=2), GPUS, r"devices=null: 2 x 2 .* needs 4 GPUs .* 3 of the 4 that"),
        (servers(transport=Transport.shared), GPUS[:1], r"devices may also name GPUs of the trainer"),
        (
            servers(devices=[0]),
            GPUS,
            r"devices=\[0\]: the trainer uses GPU 0 too, .*set rollout.servers.transport=shared",
        ),
        (servers(devices=[3, 0], tensor=2), GPUS, r"the trainer uses GPU 0 too"),
        (servers(devices=[1]), GPUS[:1], r"there is no GPU 1: .* sees 1, .*give numbers below 1"),
    ],
)
def test_servers_without_gpus_of_their_own_are_refused(config: ServersConfig, visible: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        placed(config, visible, ["GPU-a"])


# The trainer's own GPUs


@pytest.mark.parametrize(("local_rank", "count", "number"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (3, 1, 0)])
def test_a_process_uses_its_own_gpu(monkeypatch: pytest.MonkeyPatch, local_rank: int, count: int, number: int) -> None:
    """Where a launcher shows each process one GPU, that one is number 0."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert select_device(Device.auto, local_rank) == torch.device("cuda", number)
    assert chosen == [torch.device("cuda", number)]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="process 4 of this machine finds 4 CUDA devices"):
        select_device(Device.auto, 4)


def test_two_processes_of_a_machine_with_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_gpu([("GPU-a", 0), ("GPU-b", 1), ("GPU-c", 0)]) is None
    assert shared_gpu([("GPU-a", 0), ("GPU-b", 1), ("GPU-a", 2)]) is not None

    def gather(places: list[object], mine: object) -> None:
        places[:] = [("GPU-a", 0), mine]

    properties = type("Properties", (), {"uuid": "GPU-a"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(devices.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(devices.dist, "all_gather_object", gather)
    with pytest.raises(InputError, match="processes 0, 1 of a machine have one GPU, GPU-a"):
        devices.refuse_shared_gpus(torch.device("cuda", 0), 1)
    devices.refuse_shared_gpus(torch.device("cuda", 0), 0)  # the same process, by a stand-in for several ranks
    devices.refuse_shared_gpus(torch.device("cpu"), 1)


# NCCL


def test_trainer_and_servers_have_the_same_settings_of_nccl() -> None:
    """Those that SGLang would set for itself alone."""
    assert SETTINGS == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
    for theirs in ({}, {"NCCL_CUMEM_ENABLE": "1"}, {"NCCL_NVLS_ENABLE": "1", "NCCL_CUMEM_ENABLE": "1"}):
        trainer = dict(theirs)
        align_nccl(trainer)
        assert trainer == SETTINGS | theirs
        for inherited in (trainer, theirs):  # from a trainer's rank, or from `serve`
            server = environment_of(Launch([]), "3", inherited)
            assert {name: server[name] for name in SETTINGS} == trainer
            assert server["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize("engine", [EngineKind.embedded, EngineKind.sglang, EngineKind.vllm])
def test_a_run_with_servers_aligns_nccl_before_its_first_communicator(
    monkeypatch: pytest.MonkeyPatch, engine: EngineKind
) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(os.environ, name, "")  # so that what the run sets is undone
        del os.environ[name]
    seen: list[dict[str, str | None]] = []

    def select(requested: Device, local_rank: int, *, deterministic: bool) -> torch.device:
        seen.append({name: os.environ.get(name) for name in SETTINGS})
        raise InputError("no further")

    monkeypatch.setattr(context, "select_device", select)
    config = Config()
    config.rollout.engine = engine
    with pytest.raises(InputError, match="no further"), context.open_context(config):
        pass
    assert seen == [dict.fromkeys(SETTINGS) if engine is EngineKind.embedded else SETTINGS]


def test_a_server_does_not_get_what_is_the_trainers_own() -> None:
    inherited = {
        "PYTHONPATH": "/code",
        "PYTHONHOME": "/python",
        "RANK": "3",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVIDIA_TF32_OVERRIDE": "0",
        "HTTPS_PROXY": "http://p",
        "HOME": "/home",
    }
    environment = environment_of(Launch([]), "", inherited)
    assert environment.keys() - SETTINGS.keys() == {"HOME", "CUDA_VISIBLE_DEVICES"}
    environment = environment_of(Launch([], {"PYTHONPATH": "/module"}), "", inherited)
    assert environment["PYTHONPATH"] == "/module"


@pytest.mark.parametrize(
    ("config", "trainers", "found"),
    [
        (servers(), GPUS, [0]),
        (servers(replicas=2, tensor=2), GPUS, [0, 1, 2, 3]),
        (servers(tensor=2), ["GPU-b", "GPU-d"], [1, 3]),
        (servers(devices=[3, 1], replicas=2), ["GPU-b", "GPU-d"], [3, 1]),
    ],
)
def test_colocated_servers_take_the_trainers_gpus(config: ServersConfig, trainers: list[str], found: list[int]) -> None:
    assert placed(config, GPUS, trainers, colocated=True) == found


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (servers(replicas=3), r"placement=colocated: 3 x 1 .* needs 3 GPUs of the trainer, which has 2 of the 4"),
        (servers(devices=[0, 2], replicas=2), r"devices=\[0, 2\]: no process of the trainer has GPU 2, .*devices=null"),
        (servers(devices=[5]), r"there is no GPU 5: .* sees 4"),
    ],
)
def test_colocated_servers_without_gpus_of_the_trainer_are_refused(config: ServersConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        placed(config, GPUS, GPUS[:2], colocated=True)
