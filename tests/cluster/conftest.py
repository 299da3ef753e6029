"""One Slurm cluster for all tests of this folder."""

from __future__ import annotations

import pytest
from helpers import slurm_cluster
from helpers.ranks import on_ranks
from helpers.tiny_run import changed, losses_of, make_inputs, train_here, write_config

STEPS = 8


@pytest.fixture(scope="session")
def _cluster():
    if missing := slurm_cluster.missing_programs():
        pytest.skip(f"no Slurm here ({', '.join(missing)} not found); Debian: apt-get install {slurm_cluster.PACKAGES}")
    running = slurm_cluster.Cluster()
    try:
        running.start()
        yield running
    finally:
        left = running.stop()
    assert left == [], "the cluster left processes behind"


@pytest.fixture
def cluster(_cluster):
    """The cluster, without jobs before and after the test."""
    yield _cluster
    _cluster.cancel_all()
    slurm_cluster.wait_for(
        lambda: not _cluster.processes(of_jobs=True),
        60,
        "the jobs' processes to end",
        lambda: str(_cluster.processes()),
    )


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(inputs, tmp_path):
    """(config file, run directory, log file) of a run of this test."""
    raw = changed(inputs, run_dir=str(tmp_path / "run"), train__steps=STEPS, train__save_every=4)
    return write_config(tmp_path / "config.yaml", raw), tmp_path / "run", tmp_path / "job.log"


@pytest.fixture(scope="session")
def expected(inputs, tmp_path_factory):
    """Losses of the same run on one process, without Slurm."""
    run_dir = tmp_path_factory.mktemp("expected") / "run"
    train_here(changed(inputs, run_dir=str(run_dir), train__steps=STEPS))
    return losses_of(run_dir)


@pytest.fixture(scope="session")
def bitwise(inputs, tmp_path_factory):
    """Losses of the same run on two undisturbed ranks."""
    run_dir = tmp_path_factory.mktemp("bitwise") / "run"
    on_ranks(train_here, 2, changed(inputs, run_dir=str(run_dir), train__steps=STEPS))
    return losses_of(run_dir)
