"""Runs that accelerate or no launcher starts: equal, quiet about mistakes, and resumed when killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.crew import Crew
from helpers.ranks import clean_environment, run_command, torchrun
from helpers.slurm_cluster import wait_for
from helpers.tiny_run import changed, losses_of, make_inputs, write_config

from qlora_dist.cluster import device
from qlora_dist.commands import start_ranks
from qlora_dist.commands.start_ranks import MOST, number_of_ranks
from qlora_dist.errors import UserError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


@pytest.mark.launched
def test_accelerate_and_no_launcher_give_the_same_run_on_any_number_of_ranks(raw, tmp_path):
    """Under torchrun: test_verify compares its bits with ranks that have no launcher."""
    found = {}
    for name, ranks in (("accelerate", 2), ("two", 2), ("one", 1)):
        config = write_config(tmp_path / f"{name}.yaml", raw, run_dir=str(tmp_path / name), train__steps=3)
        if name == "accelerate":
            start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/ddp.yaml"]
            done = run_command([*start, "-m", "qlora_dist", "train", str(config)], timeout=200)
            assert done.returncode == 0, done.stderr
            output = done.stdout
        else:
            with Crew(config, tmp_path / f"{name}-log", ranks=ranks) as crew:
                assert [end.code for end in crew.wait()] == [0] * ranks, crew.output()
                output = crew.output()
        found[name] = losses_of(tmp_path / name)
        assert json.loads((tmp_path / name / "summary.json").read_text())["world_size"] == ranks
        assert output.count("finished: 3 steps") == 1, "rank 0 speaks, once"
    assert found["accelerate"] == found["two"]
    assert found["accelerate"] == pytest.approx(found["one"], rel=1e-5)


def test_a_mistake_is_said_by_one_of_two_ranks_without_a_traceback_of_ours(raw, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw, batch__rows_per_step=3)
    with Crew(config, tmp_path) as crew:
        assert crew.wait_for_rank(0).code == 2
        crew.send(1, signal.SIGTERM)  # as a launcher does
        crew.wait()
        assert crew.output().count("nearest multiples: 2 or 4") == 1
        assert "qlora_dist/train" not in crew.output()


@pytest.mark.launched
def test_a_mistake_of_ranks_that_the_command_starts_is_the_last_word(raw, tmp_path):
    """--ranks: without a traceback of the launcher, with the exit code of the rank. test_api runs one to its end."""
    start = [sys.executable, "-m", "qlora_dist", "train", str(write_config(tmp_path / "c.yaml", raw, train__steps=2))]
    done = run_command([*start, "--ranks", "2", "--set", "data.train.0.format=messages"])  # found by reading the data
    assert done.returncode == 2, done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: "), done.stderr
    assert "field messages is missing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "exitcode" not in done.stderr
    assert not Path(raw["run_dir"]).exists()


@pytest.mark.launched
def test_under_torchrun_its_report_ends_with_the_mistake(raw, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw, lora__target_modules=["q_prj"])
    done = run_command([*torchrun(2), "-m", "qlora_dist", "train", str(config)])
    assert done.returncode == 1
    assert "error: lora.target_modules: q_prj matches" in done.stderr.rstrip().splitlines()[-2], done.stderr


@pytest.mark.launched
def test_ctrl_c_of_the_launcher_saves_and_ends_with_success(raw, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw, train__steps=100_000)
    command = [sys.executable, "-m", "qlora_dist", "train", str(config), "--ranks", "2"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # tests in the background of a shell inherit that SIGINT is ignored, which the launcher would respect
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: metrics.exists() and metrics.stat().st_size, 120, "a step", lambda: "")
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert "checkpoint saved in" in output and "Traceback" not in output
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_more_ranks_than_gpus_are_refused_before_torch_is_imported(monkeypatch):
    monkeypatch.setattr(device.importlib.metadata, "version", lambda _: "2.11.0+cu128")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-1")
    assert number_of_ranks("2", "auto") == 2 and number_of_ranks("8", "cpu") == 8
    with pytest.raises(UserError, match=r"--ranks 4: 2 GPUs are visible here, expected at least one for each rank"):
        number_of_ranks("4", "auto")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(device.os, "listdir", lambda path: ["0000:01:00.0"])
    with pytest.raises(UserError, match=r"--ranks 2: 1 GPUs"):
        number_of_ranks("2", "cuda")


def test_a_number_of_ranks_is_one_from_1_to_1024_in_plain_digits():
    assert [number_of_ranks(str(ranks), "auto") for ranks in range(1, MOST + 1)] == list(range(1, 1025))
    for ranks in ("0", "-1", "two", "1e3", "99999", "", "01", " 2", "2\n", "٣", *map(str, range(MOST + 1, 10_000, 7))):
        with pytest.raises(UserError, match=r"expected auto or a number of processes from 1 to 1024"):
            number_of_ranks(ranks, "auto")


@pytest.mark.parametrize("gpus", [0, 1, 4])
@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_auto_is_one_rank_for_each_gpu_that_is_used(device, gpus, monkeypatch):
    monkeypatch.setattr(start_ranks, "why_no_cuda", lambda: None if gpus else "there is none")
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert number_of_ranks("auto", device) == (1 if device == "cpu" else max(1, gpus))


@pytest.mark.parametrize("given", [None, "3"])
def test_ranks_share_the_cores_and_get_the_words_of_the_command(given, monkeypatch):
    """Each has a core at least, all together no more than there are; what the user has set stays."""
    words, started = ["train", "x.yaml", "--set", "a=b"], []
    monkeypatch.setattr(os, "execve", lambda program, command, variables: started.append((program, command, variables)))
    for cores in (None, *range(1, 18)):
        for ranks in range(1, 20):
            monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if given is not None:
                monkeypatch.setenv("OMP_NUM_THREADS", given)
            start_ranks.start_ranks(ranks, words)
            program, command, variables = started.pop()
            assert program == command[0] == sys.executable and command[-len(words) - 2 :] == [
                "-m",
                "qlora_dist",
                *words,
            ]
            assert f"--nproc-per-node={ranks}" in command
            threads, cores_there = int(variables["OMP_NUM_THREADS"]), cores or 1
            if given is not None:
                assert threads == int(given)
            else:
                assert threads >= 1 and (threads == 1 or threads * ranks <= cores_there < (threads + 1) * ranks)
                assert threads > 1 or cores_there < 2 * ranks


def test_ranks_within_a_launcher_are_refused_and_auto_is_one_without_a_gpu(monkeypatch):
    assert number_of_ranks("auto", "cpu") == 1 and number_of_ranks("3", "auto") == 3
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="leave out --ranks, or the launcher"):
        number_of_ranks("2", "auto")


def test_a_killed_run_goes_on_with_the_losses_of_a_whole_one(raw, tmp_path):
    """Killed at any moment; test_faults chooses it."""
    raw = changed(raw, train__steps=400, train__save_every=5, train__keep=2)
    run = Path(raw["run_dir"])
    with Crew(write_config(tmp_path / "c.yaml", raw), tmp_path) as crew:
        wait_for(lambda: list(run.glob("checkpoints/step-*")), 120, "a checkpoint", crew.output)
        for rank in range(2):
            crew.send(rank, signal.SIGKILL)
        crew.wait()
    killed_at = len(losses_of(run))
    assert 5 <= killed_at < 400
    raw = changed(raw, train__steps=killed_at + 3)
    for folder in (run, tmp_path / "whole"):
        start = write_config(tmp_path / f"{folder.name}.yaml", raw, run_dir=str(folder))
        with Crew(start, tmp_path / f"{folder.name}-log") as crew:
            assert [end.code for end in crew.wait()] == [0, 0], crew.output()
    assert losses_of(run) == losses_of(tmp_path / "whole")
