"""Fixtures for the tests on the SLURM that `make test-slurm` starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import Site, Submitted


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    if "SLURM_TEST_FOLDER" not in os.environ:
        pytest.fail("no SLURM is running: use make test-slurm, which starts one", pytrace=False)
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def undisturbed(site: Site) -> Submitted:
    """A finished run on two nodes, submitted as a chain of two jobs. The second job has nothing to do."""
    job = site.started("undisturbed", "--chain", "2")
    job.ended()
    return job


@pytest.fixture(scope="session")
def planted(site: Site) -> Path:
    """A replacement for the cluster's Python: a run that hangs in its third iteration the first time, and fails there
    afterwards."""
    return script(site.folder / "planted", _PLANTED)


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


_PLANTED = f"""\
#!{sys.executable}
import pathlib, sys, time

from megatron_tempo import cli
from megatron_tempo.training import trainer

iterate = trainer.Trainer.iterate


def planted(self, *stage):
    if self.step == 2:
        hung = pathlib.Path(self.config.run.dir) / "hung"
        if not hung.exists():
            self.context.is_writer and hung.touch()
            time.sleep(600)
        time.sleep(1)
        raise RuntimeError("planted")
    return iterate(self, *stage)


if __name__ == "__main__":
    trainer.Trainer.iterate = planted
    sys.exit(cli.main(sys.argv[3:]))
"""
