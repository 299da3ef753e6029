"""The project's own sbatch files on a real Slurm of two nodes, with CPU processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.ranks import ROOT
from helpers.slurm_cluster import wait_for
from helpers.tiny_run import changed, config_of, losses_of, write_config

from qlora_dist.trainer import train

STEPS = 8


@pytest.fixture
def run(inputs, tmp_path):
    """(config file, run directory, log file) of a run of this test."""
    raw = changed(inputs, run_dir=str(tmp_path / "run"), train__steps=STEPS, train__save_every=4)
    return write_config(tmp_path / "config.yaml", raw), tmp_path / "run", tmp_path / "job.log"


@pytest.fixture(scope="session")
def expected(inputs, tmp_path_factory):
    """Losses of the same run on one process, without Slurm."""
    run_dir = tmp_path_factory.mktemp("expected") / "run"
    train(config_of(inputs, run_dir=str(run_dir), train__steps=STEPS))
    return losses_of(run_dir)


def faults(*faults: dict[str, object]) -> dict[str, str]:
    """Environment for a job whose processes suffer these faults (tests/faults/sitecustomize.py)."""
    paths = [str(ROOT / "tests" / "faults"), str(ROOT)]
    return {"FAULTS": json.dumps(faults), "PYTHONPATH": ":".join(paths)}


SLOW = {"do": "sleep", "seconds": 0.5, "at": "step"}


def test_two_nodes_give_the_losses_of_one_process(cluster, run, expected):
    config, run_dir, log = run
    job = cluster.submit("--nodes=2", "--gpus-per-node=1", "slurm/train.sbatch", str(config), log=log)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", log=log) == "COMPLETED", log.read_text()
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 2
    assert losses_of(run_dir) == pytest.approx(expected, rel=1e-5)  # sums in another order
