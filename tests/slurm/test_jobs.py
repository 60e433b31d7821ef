"""The scripts of launch/ on two nodes: complete runs, interrupted runs, runs that cannot continue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import script
from tests.slurm.jobs import LAST, Site, Submitted, command, numbers, weights
from tests.support.slurm import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


def test_a_run_over_two_nodes(undisturbed: Submitted) -> None:
    first, second = undisturbed.facts(0), undisturbed.facts(1)
    assert (first["JobState"], first["NodeList"], first["Restarts"]) == ("COMPLETED", "node[1-2]", "0")
    assert undisturbed.done() == LAST
    assert {name.partition("/")[0] for name in weights(undisturbed.exported)} == {"actor", "critic"}
    # A stage is on each node, and written from there.
    written = {path.name for path in (undisturbed.run / f"checkpoints/step_{LAST:08d}/actor").glob("*.distcp")}
    assert {name.split("_")[2] for name in written} == {"0", "1"}
    assert second["JobState"] == "COMPLETED"
    assert "the run is finished: nothing to do" in undisturbed.log(1)


def as_before_the_limit(job: Submitted) -> None:
    """What SLURM does `grace_seconds` before the time limit."""
    command("scancel", "--batch", "--signal=USR1", job.ids[0])


def by_another_job(job: Submitted) -> None:
    """One that goes before, on the same nodes: SLURM sends TERM, and requeues by itself after a grace time."""
    command("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


@pytest.mark.parametrize(("disturb", "signal"), [(as_before_the_limit, "USR1"), (by_another_job, "TERM")])
def test_told_to_stop_it_ends_as_if_it_had_not_been(
    site: Site, undisturbed: Submitted, disturb: Callable[[Submitted], None], signal: str
) -> None:
    job = site.started(f"stopped_by_{signal}")
    assert "waits or runs" in site.submit(job.run.name).stderr
    job.until(lambda: job.done() >= 2)
    disturb(job)
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    log = job.log()
    assert f"asked to stop by {signal}" in log or f"as requested by {signal}" in log
    assert "resumed from" in log
    (stopped,) = (line for line in log.splitlines() if line.startswith("stopped after "))
    assert 2 <= int(stopped.split()[2]) < LAST, "it was stopped in the middle of the run"
    assert weights(job.exported) == weights(undisturbed.exported)
    assert numbers(job.run) == numbers(undisturbed.run)
    assert not (job.folder / "failures").exists()


def test_submitted_again_it_says_what_is_otherwise(site: Site, undisturbed: Submitted) -> None:
    again = site.started("undisturbed", "metrics.tensorboard=true")
    command("scancel", again.ids[0])
    assert again.folder.name == "0002"
    assert "metrics.tensorboard: False -> True" in again.output


def test_cancelled_it_stays_so(site: Site) -> None:
    job = site.started("cancelled")
    job.until(lambda: "on node1 node2" in job.log())
    command("scancel", job.ids[0])
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")


def test_a_hang_is_cut_short_and_the_second_failure_at_a_step_is_the_last(site: Site, planted: Path) -> None:
    job = site.started(
        "hangs", f"cluster.slurm.python={planted}", "cluster.slurm.grace_seconds=6", "checkpoint.every=1"
    )
    job.until(lambda: (job.run / "hung").exists())
    command("scancel", "--batch", "--signal=USR1", job.ids[0])
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "2")
    log = job.log()
    assert "the trainer has not stopped in time" in log
    assert log.count("RuntimeError: planted") >= 2
    assert f'File "{job.folder}/code/megatron_tempo/training/jobs.py"' in log, "the snapshot is what runs"
    assert "failed twice after step 2 (exit code " in log
    assert (job.folder / "failures").read_text().startswith("step 2: exit code ")
    assert (job.run / "checkpoints/step_00000002").exists()
    # The other jobs of a chain would say so at once.
    assert "failed twice" in (job.folder / "given_up").read_text()


def test_servers_that_do_not_start_are_told_of(site: Site) -> None:
    broken = script(site.folder / "broken", "#!/bin/sh\necho 'RuntimeError: no GPU here'\nexit 3\n")
    words = ["rollout.engine=sglang", f"rollout.servers.python={broken}", "rollout.servers.host=hostname"]
    job = site.started("no_servers", *words, "cluster.rollout_nodes=1", "parallel.pipeline=1")
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1")
    log = job.log()
    assert "only 0 of 1 rollout servers are ready: training does not start" in log
    assert "SGLang ended with exit code 3" in log
    assert "RuntimeError: no GPU here" in log
    assert "failed twice after step 0" in log
    keys = list((job.folder / "servers").glob("*/key"))
    assert len(keys) == 2
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


@pytest.mark.timeout(1500)
def test_servers_on_the_second_node(site: Site) -> None:
    """A real engine: its weights come from the trainer, on the other node, and the trainer checks what it says."""
    words = ["rollout.engine=sglang", f"rollout.servers.python={ROOT}/.venv-sglang/bin/python"]
    limits = "rollout.servers.arguments=['--max-total-tokens=4096','--max-running-requests=32']"
    more = ["rollout.servers.host=hostname", limits, "parallel.pipeline=1", "evaluation.every=0"]
    job = site.started("served", *words, *more, "cluster.rollout_nodes=1")
    facts = job.ended(900)
    assert facts["JobState"] == "COMPLETED", job.log()[-4000:]
    assert "1 rollout servers are ready: 'http://127.0.0.1:" in job.log()
    (served,) = (job.folder / "servers").iterdir()
    assert (served / "addresses/node2-0").read_text().startswith("http://")
    assert (served / "node2/0/sglang.log").exists()
    assert job.done() == LAST


def test_eval_and_conversion(site: Site, undisturbed: Submitted) -> None:
    exported = undisturbed.exported
    score = site.started("scores", "--job", "eval", f"model={exported}/actor")
    checkpoint, out = undisturbed.run / f"checkpoints/step_{LAST:08d}", site.folder / "converted"
    tool = ["--", "megatron-to-hf", str(checkpoint), str(out), "--model", "critic"]
    convert = site.started("conversion", "--job", "convert", *tool)
    assert score.ended()["JobState"] == "COMPLETED", score.log()
    assert convert.ended()["JobState"] == "COMPLETED", convert.log()
    assert "written to" in score.log()
    assert (score.run / "evaluations.jsonl").read_text().count("\n") == 1
    assert weights(out) == weights(exported / "critic")
