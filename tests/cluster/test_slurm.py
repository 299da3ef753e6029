"""The project's sbatch files on a real two-node Slurm cluster, with CPU processes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from helpers.ranks import ROOT
from helpers.slurm_cluster import GRACE_SECONDS, faults, wait_for
from helpers.tiny_run import losses_of

from qlora_dist.config import load_config

# each process of a job imports for a second, much longer on a busy machine
pytestmark = [pytest.mark.launched, pytest.mark.timeout(600)]


SLOW = {"do": "sleep", "seconds": 0.5, "at": "step"}
TWO_RANKS = {"RANKS_PER_NODE": "2"}


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch")))
def test_slurm_accepts_every_file_and_each_shows_how_to_launch_it(cluster, file):
    text = (ROOT / "slurm" / file).read_text()
    assert "# To launch: sbatch " in text.splitlines()[1] and f"slurm/{file}" in text.splitlines()[1]
    done = cluster.run("sbatch", "--test-only", f"slurm/{file}", "config.yaml")
    assert "to start at" in done.stderr


def test_the_warning_before_the_time_limit_saves_requeues_and_changes_no_bit(cluster, run, bitwise):
    config, run_dir, log = run
    job = cluster.submit("--gpus-per-node=0", "slurm/train.sbatch", str(config), log=log, **faults(SLOW), **TWO_RANKS)
    wait_for(lambda: _num_steps(run_dir) >= 1, 120, "the first step", log.read_text)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@120 does
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 60, "the requeue", log.read_text)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", log=log) == "COMPLETED", log.read_text()
    output = log.read_text()
    stopped_after = int(output.split("stopped by SIGUSR1 after step ")[1].split(";")[0])
    assert (
        stopped_after < len(bitwise) and f"(step {stopped_after})" in output.split("resuming from")[1]
    )  # no step is lost
    assert losses_of(run_dir) == bitwise


def test_a_preempted_job_saves_frees_its_nodes_at_once_and_finishes_later(cluster, run, bitwise):
    config, run_dir, log = run
    options = ["--partition=low", "--nodes=2", "--cpus-per-task=8", "--gpus-per-node=0"]
    job = cluster.submit(*options, "slurm/train.sbatch", str(config), log=log, **faults(SLOW))
    wait_for(lambda: _num_steps(run_dir) >= 1, 120, "the first step", log.read_text)
    submitted = time.monotonic()
    urgent = cluster.submit(
        "--partition=high", "--nodes=2", "--cpus-per-task=8", "--wrap=sleep 1", log=log.with_suffix(".high")
    )
    cluster.wait_for_state(urgent, "RUNNING", "COMPLETED", log=log)
    assert time.monotonic() - submitted < GRACE_SECONDS, "it waited for the end of the grace time"
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", log=log) == "COMPLETED", log.read_text()
    output = log.read_text()
    assert "stopped by SIGTERM after step" in output and cluster.job(job)["Restarts"] == "1"
    assert "restart 0, attempt 1" not in output, "something was started within the grace time"
    assert losses_of(run_dir) == bitwise


def test_scancel_saves_does_not_requeue_and_leaves_no_process(cluster, run):
    config, run_dir, log = run
    job = cluster.submit("--nodes=2", "--gpus-per-node=0", "slurm/train.sbatch", str(config), log=log, **faults(SLOW))
    wait_for(lambda: _num_steps(run_dir) >= 1, 120, "the first step", log.read_text)
    cluster.run("scancel", job)
    assert cluster.wait_for_state(job, "CANCELLED", "COMPLETED", "FAILED", log=log) == "CANCELLED"
    wait_for(lambda: not cluster.processes(of_jobs=True), 30, "its processes to end")
    fields = cluster.job(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), log.read_text()
    assert "stopped by SIGTERM after step" in log.read_text() and "requeued" not in log.read_text()
    assert len(list((run_dir / "checkpoints").iterdir())) == 1


def test_an_array_trains_each_line_of_a_sweep_in_its_own_run_directory(cluster, run, tmp_path):
    config, _, log = run
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("optim.lr=1e-3 lora.rank=8\noptim.lr=2e-3 'lora.target_modules=[q_proj, v_proj]'\n")
    arguments = [str(config), str(sweep), str(tmp_path / "out"), "--set", "train.steps=2"]
    job = cluster.submit("--array=1-2", "--gpus-per-node=0", "slurm/sweep.sbatch", *arguments, log=log)
    for task in (1, 2):
        state = cluster.wait_for_state(f"{job}_{task}", "COMPLETED", "FAILED", log=log)
        assert state == "COMPLETED", log.read_text()
    one, two = (load_config(tmp_path / "out" / str(task) / "config.yaml") for task in (1, 2))
    assert (one.optim.lr, one.lora.rank, two.optim.lr) == (1e-3, 8, 2e-3)
    assert two.lora.target_modules == ("q_proj", "v_proj")
    assert all((tmp_path / "out" / str(task) / "completed").exists() for task in (1, 2))


def test_two_nodes_give_the_losses_of_one_process_also_after_a_rank_was_killed_in_a_step(
    cluster, run, bitwise, expected, tmp_path
):
    config, run_dir, log = run
    kill = {"do": "SIGKILL", "at": "step", "rank": 1, "step": 5, "once": str(tmp_path / "killed")}
    job = cluster.submit("--nodes=2", "--gpus-per-node=1", "slurm/train.sbatch", str(config), log=log, **faults(kill))
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", log=log) == "COMPLETED", log.read_text()
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 2
    output = log.read_text()
    assert "rank 1 (" in output.split("attempt 0")[0] and "last seen" in output.split("attempt 0")[0], output
    assert "newest checkpoint: -1 -> 4" in output and "attempt 1: finished" in output
    assert losses_of(run_dir) == bitwise
    assert bitwise == pytest.approx(expected, rel=1e-5)  # sums in another order


def test_three_attempts_without_progress_end_with_93(cluster, run):
    config, _, log = run
    crash = {"do": "exit", "at": "import"}
    job = cluster.submit("--gpus-per-node=0", "slurm/train.sbatch", str(config), log=log, **faults(crash))
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", log=log) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "93:0"
    output = log.read_text()
    assert output.count("supervise: job") == 3 and "3 attempts in a row ended without a new checkpoint" in output


def test_a_users_mistake_ends_the_job_at_once(cluster, run):
    config, run_dir, log = run
    arguments = [str(config), "--set", f"data.train.0.path={run_dir}/absent.json"]
    job = cluster.submit("--gpus-per-node=0", "slurm/train.sbatch", *arguments, log=log)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", log=log) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0" and log.read_text().count("supervise: job") == 1


def test_a_benchmark_runs_on_one_node_and_on_all(cluster, tmp_path):
    script, log = tmp_path / "bench.py", tmp_path / "job.log"
    script.write_text("import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])")
    options = ["--nodes=2", "--gpus-per-node=1", "slurm/bench.sbatch"]
    job = cluster.submit(*options, str(script), f"{tmp_path}/nodes-{{nodes}}-rank-", log=log)
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED", log=log) == "COMPLETED", log.read_text()
    found = {file.name: file.read_text() for file in tmp_path.glob("nodes-*")}
    assert found == {"nodes-1-rank-0": "1", "nodes-2-rank-0": "2", "nodes-2-rank-1": "2"}


def _num_steps(run_dir: Path) -> int:
    return len(losses_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
