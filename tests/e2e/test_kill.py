"""A run that is killed and started again ends as the run that was not killed, to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_tempo.config.tree import save
from megatron_tempo.observability.records import read_evaluations, read_metrics
from tests.support.checkpoints import saved_tensors
from tests.support.fork_server import FORK_SERVER, Forked
from tests.support.project import config_of, from_nothing, write_project
from tests.support.ranks import rank_environments

ITERATIONS = 3  # of each stage
LAST = 2 * ITERATIONS
SCRIPT = """
import sys
from megatron_tempo.config import load
from megatron_tempo.training.jobs import train

if __name__ == "__main__":
    train(load(sys.argv[1]))
"""


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


# Moments at which the run is killed: each a condition on the run's folder.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first iteration": lambda run: (run / "config.json").exists(),
    "in an iteration": lambda run: lines(run) >= 3,
    "as a save begins": lambda run: checkpoint_folder(run, 2).with_suffix(".partial").exists(),
    "in a save, half written": lambda run: any(
        checkpoint_folder(run, 4).with_suffix(".partial").glob("actor/*.distcp")
    ),
    "as a save has ended": lambda run: checkpoint_folder(run, 4).exists(),
    "in the last iterations": lambda run: lines(run) >= LAST - 1,
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """Megatron reads checkpoints in a process group only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


def write_config(project: Path, run: Path) -> Path:
    config = config_of(project, run)
    config.stage1.iterations = config.stage2.iterations = ITERATIONS
    # The checkpoint at step 2 is of the warm-up: the actor's optimizer has then made no step.
    config.stage1.critic.warmup_iterations = 2
    config.stage2.critic.warmup_iterations = 1
    config.evaluation.every = 2
    config.checkpoint.every = 2
    config.checkpoint.keep = 2
    path = run.with_suffix(".json")
    save(config, path)
    return path


def start(config: Path, log: Path, world: int = 1) -> list[Forked]:
    """The run's processes, which append to `log`."""
    script = config.with_suffix(".py")
    script.write_text(SCRIPT)
    return [FORK_SERVER.script(script, config, environment=one, log=log) for one in rank_environments(world)]


def finish(config: Path, log: Path, world: int = 1) -> None:
    processes = start(config, log, world)
    assert [process.wait(timeout=280) for process in processes] == [0] * world, log.read_text()[-3000:]


def kill_when(processes: list[Forked], moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 280
    while not moment():
        assert all(process.poll() is None for process in processes), "the run ended before the moment came"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def final_tensors(run: Path, last: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of actor and critic at the end."""
    return saved_tensors(checkpoint_folder(run, last))


def assert_same_end(run: Path, reference: Path, last: int = LAST) -> None:
    """`last`: the number of iterations."""
    expected, actual = final_tensors(reference, last), final_tensors(run, last)
    assert expected.keys() == actual.keys()
    assert any("exp_avg_sq" in name for name in expected), "the optimizer's state is in the comparison"
    different = [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert not different
    for file in ("actor/model-00001.safetensors", "critic/model-00001.safetensors"):
        path = Path(f"hf_step_{last:08d}") / file
        assert (run / path).read_bytes() == (reference / path).read_bytes()

    def numbers(records: list[dict]) -> list[dict]:
        """Without times, and without the parity check, which each start makes."""
        timing = ("time", "seconds", "idle_share", "tokens_per_second")
        others = ("time/", "memory_gb/", "engine/parity_gap_")
        return [{k: v for k, v in r.items() if k not in timing and not k.startswith(others)} for r in records]

    assert numbers(read_metrics(run)) == numbers(read_metrics(reference))
    assert numbers(read_evaluations(run)) == numbers(read_evaluations(reference))


@pytest.fixture(scope="module")
def undisturbed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(write_config(project, run), run.with_suffix(".log"))
    return run


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.slow
def test_killed_once_and_started_again(project: Path, undisturbed: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    config, log = write_config(project, run), tmp_path / "log"
    kill_when(start(config, log), lambda: MOMENTS[name](run))
    finish(config, log)
    assert_same_end(run, undisturbed)
    assert not list((run / "checkpoints").glob("*.damaged"))


@pytest.mark.slow
def test_two_processes_killed_twice(project: Path, tmp_path: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    finish(write_config(project, undisturbed), tmp_path / "log0", world=2)
    config, log = write_config(project, run), tmp_path / "log"
    kill_when(start(config, log, world=2), lambda: MOMENTS["in a save, half written"](run))
    kill_when(start(config, log, world=2), lambda: lines(run) >= LAST - 1)
    finish(config, log, world=2)
    assert_same_end(run, undisturbed)


def write_mixture_config(project: Path, run: Path) -> Path:
    """Four iterations of TEMPO, a checkpoint after each two: a mixture of experts over two ranks, rollouts on disk."""
    config = from_nothing(config_of(project, run))
    config.stage2.iterations, config.stage2.labelled_prompts, config.stage2.unlabelled_prompts = 4, 4, 4
    config.parallel.expert, config.rollout.dump = 2, True
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    config.checkpoint.every, config.checkpoint.keep = 2, 2
    path = run.with_suffix(".json")
    save(config, path)
    return path


@pytest.mark.slow
def test_a_mixture_of_experts_killed_and_started_again(tmp_path: Path) -> None:
    """The same weights, optimizer states, metrics and rollouts, and the same experts replayed."""
    project = write_project(tmp_path / "project", "mixture")
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    finish(write_mixture_config(project, undisturbed), tmp_path / "log0", world=2)
    config, log = write_mixture_config(project, run), tmp_path / "log"
    kill_when(start(config, log, world=2), lambda: lines(run) >= 3)
    finish(config, log, world=2)
    assert f"resumed from {checkpoint_folder(run, 2)}, 2 iterations done" in log.read_text()
    assert_same_end(run, undisturbed, 4)
    names = sorted(path.name for path in (undisturbed / "rollouts").iterdir())
    assert names == [f"stage2-{n:06d}.{kind}" for n in range(1, 5) for kind in ("experts", "jsonl")]
    assert names == sorted(path.name for path in (run / "rollouts").iterdir())
    for name in names:
        assert (run / "rollouts" / name).read_bytes() == (undisturbed / "rollouts" / name).read_bytes(), name
    replayed = [line["engine/routing_agreement"] for line in read_metrics(run)]
    assert len(replayed) == 4
    assert min(replayed) > 0.9


VICTIMS = {"truncated": "*.distcp", "flipped": "*.safetensors", "missing": "*.distcp", "no manifest": "*.distcp"}


@pytest.mark.parametrize("damage", VICTIMS)
@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    project: Path, undisturbed: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    config, log = write_config(project, run), tmp_path / "log"
    kill_when(start(config, log), lambda: checkpoint_folder(run, 4).exists())
    newest = checkpoint_folder(run, 4)
    victim = max(newest.rglob(VICTIMS[damage]), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / "MANIFEST.json").unlink()
    finish(config, log)
    output = log.read_text()
    assert f"checkpoint {newest} is damaged" in output
    assert ("MANIFEST.json" if damage == "no manifest" else victim.name) in output
    assert f"resumed from {checkpoint_folder(run, 2)}, 2 iterations done" in output
    assert newest.with_name(newest.name + ".damaged").exists()
    assert_same_end(run, undisturbed)
