"""Rules on the replay of an engine's routers: which engines return experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tempo.config import Purpose, check
from tests.unit.config_files import MOE, configure, good_overrides, write_all, write_model

VLLM = ["rollout.engine=vllm", "rollout.servers.python=sh"]
NO_CACHE = "rollout.servers.arguments=['--no-enable-prefix-caching']"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_all(folder)
    write_model(folder / "moe", **MOE)
    return folder


def fields(files: Path, *overrides: str, purpose: Purpose = Purpose.train) -> list[str]:
    config = configure([*good_overrides(files), *overrides])
    return [problem.field for problem in check(config, world_size=None, purpose=purpose)]


@pytest.mark.parametrize("mode", ["on", "rollout"])
def test_vllm_returns_no_experts_on_a_cpu_or_without_its_prefix_cache(files: Path, mode: str) -> None:
    moe = [f"model.path={files}/moe", f"model.router_replay={mode}", *VLLM]
    assert fields(files, *moe, "run.device=cpu") == ["model.router_replay"]
    assert fields(files, *moe, NO_CACHE) == ["rollout.servers.arguments"]
    assert fields(files, *moe, "rollout.servers.arguments=[-pp,'2']") == ["rollout.servers.arguments"]
    assert fields(files, *moe) == []
    assert fields(files, *moe, "run.device=cpu", purpose=Purpose.eval) == []


def test_other_engines_models_and_runs_without_replay_are_free(files: Path) -> None:
    moe = f"model.path={files}/moe"
    assert fields(files, moe, "run.device=cpu", NO_CACHE) == []
    assert fields(files, moe, "rollout.engine=sglang", VLLM[1], "run.device=cpu") == []
    assert fields(files, *VLLM, "run.device=cpu", NO_CACHE) == []
    assert fields(files, moe, *VLLM, "run.device=cpu", NO_CACHE, "model.router_replay=off") == []
