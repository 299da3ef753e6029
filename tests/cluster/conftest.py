"""One Slurm cluster for all tests of this folder."""

from __future__ import annotations

import pytest
from helpers import slurm_cluster
from helpers.tiny_run import make_inputs


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
