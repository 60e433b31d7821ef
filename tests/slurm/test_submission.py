"""What does not come into the queue, and that every shipped cluster file is understood by sbatch."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.jobs import Site, command
from tests.support.slurm import ROOT

pytestmark = pytest.mark.slurm

CLUSTERS = sorted(path.stem for path in (ROOT / "configs/cluster").glob("*.yaml"))
LAID_OUT = ["parallel.tensor=2", "parallel.pipeline=2"]  # the model is too small for 64 replicas of it


def verdict(path: Path, text: str) -> subprocess.CompletedProcess[str]:
    path.write_text(text)
    return subprocess.run(["sbatch", "--test-only", str(path)], capture_output=True, text=True, check=False)


def script(site: Site, *words: str, cluster: str) -> str:
    done = site.submit("dry", "--dry-run", *words, cluster=cluster)
    assert done.returncode == 0, done.stderr
    return done.stdout[done.stdout.index("#!") :]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_sbatch_would_take_it(site: Site, tmp_path: Path, cluster: str) -> None:
    text = script(site, *LAID_OUT, cluster=cluster)
    done = verdict(tmp_path / "job.sh", text)
    assert done.returncode == 0, done.stderr
    nodes = {"8": 1, "16": 2, "64": 8, "site": 2}[cluster.rpartition("x")[2].rpartition("_")[2]]
    on = "node big1 " if nodes == 1 else f"nodes big[1-{nodes}] "
    assert on in f"{done.stderr} ".replace("nodes big1 ", on)
    assert not (site.folder / "dry").exists()


@pytest.mark.parametrize(
    "words", ["cluster.slurm.gres=gpu:a100", "cluster.gpus_per_node=16 cluster.nodes=1", "cluster.slurm.partition=none"]
)
def test_sbatch_would_refuse_it(site: Site, tmp_path: Path, words: str) -> None:
    """Or else the test above could not fail."""
    assert verdict(tmp_path / "job.sh", script(site, *LAID_OUT, *words.split(), cluster="h100x16")).returncode != 0


def test_a_bad_configuration_is_refused_before_sbatch(site: Site) -> None:
    before = command("scontrol", "show", "jobs", "--oneliner")
    done = site.submit("bad", "parallel.tensor=3", "cluster.slurm.time_limit=soon")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("2 problems in the configuration:")
    assert "cluster.slurm.time_limit=soon: is no time that sbatch reads" in done.stderr
    assert "parallel.tensor=3: does not divide" in done.stderr
    assert command("scontrol", "show", "jobs", "--oneliner") == before
    assert not (site.folder / "bad").exists()


def test_what_sbatch_refuses_leaves_nothing(site: Site) -> None:
    done = site.submit("refused", "cluster.slurm.partition=none")
    assert done.returncode == 2
    assert "error: sbatch failed: " in done.stderr
    assert "invalid partition specified: none" in done.stderr
    assert list((site.folder / "refused/jobs").iterdir()) == []
