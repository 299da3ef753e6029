"""Runs that accelerate, torchrun and no launcher start: equal, quiet about mistakes, and resumed when killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers.crew import Crew
from helpers.ranks import ROOT, clean_environment, run_command, torchrun
from helpers.tiny_run import changed, losses_of, make_inputs, write_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


def test_accelerate_torchrun_and_one_plain_process_give_the_same_run(raw, tmp_path):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/ddp.yaml"]
    starts = {
        "accelerate": [*accelerate, "-m", "qlora_dist"],
        "torchrun": [*torchrun(2), "-m", "qlora_dist"],
        "plain": [sys.executable, "-m", "qlora_dist"],
    }
    found = {}
    for name, start in starts.items():
        config = write_config(tmp_path / f"{name}.yaml", raw, run_dir=str(tmp_path / name), train__steps=3)
        done = run_command([*start, "train", str(config)], timeout=200)
        assert done.returncode == 0, done.stderr
        found[name] = losses_of(tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["world_size"] == (1 if name == "plain" else 2)
        assert done.stdout.count("finished: 3 steps") == 1, "rank 0 speaks, once"
    assert found["accelerate"] == found["torchrun"]
    assert found["accelerate"] == pytest.approx(found["plain"], rel=1e-5)


def test_a_mistake_under_a_launcher_is_said_once_without_a_traceback_of_ours(raw, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw, batch__rows_per_step=3)
    done = run_command([*torchrun(2), "-m", "qlora_dist", "train", str(config)])
    assert done.returncode != 0
    assert done.stderr.count("nearest multiples: 2 or 4") == 1
    assert "qlora_dist/train" not in done.stderr


def test_a_killed_run_goes_on_with_the_losses_of_a_whole_one(raw, tmp_path):
    raw = changed(raw, train__steps=400, train__save_every=5, train__keep=2)
    config = write_config(tmp_path / "c.yaml", raw)
    command = [*torchrun(2), "-m", "qlora_dist", "train", str(config)]
    run = Path(raw["run_dir"])
    with subprocess.Popen(
        command, env=clean_environment(), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        # torchrun's workers have sessions of their own: killing the agent alone would let them train on
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
    killed_at = len(losses_of(run))
    assert 5 <= killed_at < 400
    raw = changed(raw, train__steps=killed_at + 3)
    for folder in (run, tmp_path / "whole"):
        start = write_config(tmp_path / f"{folder.name}.yaml", raw, run_dir=str(folder))
        with Crew(start, tmp_path / f"{folder.name}-log") as crew:
            assert [end.code for end in crew.wait()] == [0, 0], crew.output()
    assert losses_of(run) == losses_of(tmp_path / "whole")
