"""The project's sbatch file on a Slurm cluster whose two nodes have networks and names of their own."""

from __future__ import annotations

import json

import pytest
from helpers import slurm_cluster, two_hosts
from helpers.slurm_cluster import faults, wait_for
from helpers.tiny_run import losses_of, write_config

from qlora_dist.config import load_config

REASON = two_hosts.why_not()
pytestmark = [pytest.mark.hosts, pytest.mark.timeout(1200), pytest.mark.skipif(bool(REASON), reason=REASON)]
SLOW = {"do": "sleep", "seconds": 0.5, "at": "step"}
TWO_NODES = ("--nodes=2", "--gpus-per-node=1", "slurm/train.sbatch")


@pytest.fixture(params=["names", "debian, own name only", "none"])
def names(request):
    """What the hosts' names resolve to."""
    return request.param


@pytest.fixture
def hosts(tmp_path, names):
    with two_hosts.Hosts(tmp_path, names) as hosts:
        yield hosts


@pytest.fixture
def cluster(hosts):
    """A cluster on these hosts."""
    if missing := slurm_cluster.missing_programs():
        pytest.skip(f"no Slurm here ({', '.join(missing)} not found); Debian: apt-get install {slurm_cluster.PACKAGES}")
    running = slurm_cluster.Cluster(hosts)
    try:
        running.start()
        yield running
    finally:
        left = running.stop()
    assert left == [], "the cluster left processes behind"


def _require_completed(cluster, job, log):
    state = cluster.wait_for_state(job, "COMPLETED", "FAILED", timeout=600, log=log)
    assert state == "COMPLETED", log.read_text()


def test_a_job_on_two_hosts_has_the_losses_of_one(cluster, run, bitwise, expected):
    config, run_dir, log = run
    job = cluster.submit(*TWO_NODES, str(config), log=log)
    _require_completed(cluster, job, log)
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 2
    assert "2 ranks on 2 nodes: " in log.read_text() and "attempt 0: finished" in log.read_text()
    assert losses_of(run_dir) == bitwise
    assert bitwise == pytest.approx(expected, rel=1e-5)  # sums in another order


@pytest.mark.parametrize("names", ["debian, own name only"], indirect=True)
def test_a_host_that_is_lost_is_named_and_the_job_goes_on_when_it_is_back(cluster, hosts, run, bitwise):
    config, run_dir, log = run
    changes = {"train__save_every": 2, "strategy__timeout_seconds": 12}
    write_config(config, load_config(config).model_dump(mode="json"), **changes)
    job = cluster.submit(*TWO_NODES, str(config), log=log, **faults(SLOW))
    wait_for(lambda: _num_steps(run_dir) >= 3, 120, "the third step", log.read_text)
    hosts.fail(1)
    wait_for(lambda: "attempt 0" in log.read_text(), 120, "the end of the first attempt", log.read_text)
    assert "rank 1 (hostb" in log.read_text().split("attempt 0")[0], log.read_text()
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 300, "Slurm to notice it too", log.read_text)
    newest = max((run_dir / "checkpoints").glob("step-*"))
    hosts.plug(True)
    cluster.start_node(1)
    _require_completed(cluster, job, log)
    assert f"resuming from {newest} " in log.read_text(), "the last checkpoint is whole"
    assert losses_of(run_dir) == bitwise


def _num_steps(run_dir):
    return len(losses_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
