"""What a launcher sets is read in one place; ranks that do not find each other say so soon and name who is missing."""

from __future__ import annotations

import os
import socket
import threading
from types import SimpleNamespace

import pytest
from helpers.ranks import outcome

from qlora_dist.cluster import rendezvous
from qlora_dist.cluster.launcher import (
    Ranks,
    child_environment,
    launched_job,
    launched_ranks,
    launcher_process,
    meeting_place,
)
from qlora_dist.cluster.rendezvous import join_store
from qlora_dist.commands.group import rank
from qlora_dist.errors import MachineFailed, UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launched(monkeypatch):
    """Sets the launcher's variables, and no others."""

    def launched(**values):
        for name in (*VARIABLES, "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return launched


@pytest.fixture
def port(launched):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return port


@pytest.mark.parametrize("text", ["x", "", "-1", "1.5", "9" * 5000, "\x1b[2J"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_named(launched, name, text):
    launched(**{"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, name: text})
    with pytest.raises(UserError, match=f"^{name}=.*expected a whole number, at least [01]$") as found:
        launched_ranks()
        meeting_place()
    assert len(str(found.value)) < 300 and "\x1b" not in str(found.value)
    assert rank() == 0


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 but WORLD_SIZE=2: expected 0 to 1"),
        ({"WORLD_SIZE": 2}, "WORLD_SIZE=2 but RANK is not set"),
        ({"LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 1}, "LOCAL_RANK=2 but LOCAL_WORLD_SIZE=1: expected 0 to 0"),
        ({"WORLD_SIZE": 2, "RANK": 1}, "WORLD_SIZE=2 but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "a"}, "WORLD_SIZE=2 but MASTER_PORT is not set"),
        ({"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 70000}, "MASTER_PORT=70000: expected a port"),
    ],
)
def test_variables_that_contradict_each_other_are_a_users_mistake(launched, values, text):
    launched(**values)
    with pytest.raises(UserError, match=text):
        launched_ranks()
        meeting_place()


def test_a_requeued_job_knows_its_restarts(launched):
    launched(SLURM_JOB_ID="17", SLURM_RESTART_COUNT="2")
    assert launched_job() == ("17", 2)


def test_a_restart_count_that_is_no_number_is_a_users_mistake(launched):
    launched(SLURM_RESTART_COUNT="two")
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT='two'"):
        launched_job()


def test_a_launcher_that_is_started_here_hears_nothing_of_an_outer_one(launched, monkeypatch):
    launched(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, GROUP_RANK=0, MASTER_ADDR="a", MASTER_PORT=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    inner = child_environment(hide_gpus=False)
    assert inner["CUDA_VISIBLE_DEVICES"] == "3" and child_environment(hide_gpus=True)["CUDA_VISIBLE_DEVICES"] == ""
    assert inner.keys() == os.environ.keys() - {
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"
    }  # fmt: skip


def test_only_a_launcher_that_stays_the_parent_is_watched(launched, monkeypatch):
    launched()
    assert launcher_process() is None
    launched(TORCHELASTIC_RUN_ID="7")
    assert launcher_process() == os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launcher_process() is None, "detached from the start"


def test_all_ranks_join_and_a_rank_that_comes_late_is_waited_for(port):
    stores = {}

    def join(number):
        stores[number] = join_store(Ranks(number, 2, number, 2), seconds=20)

    threads = [threading.Thread(target=join, args=(number,)) for number in (1, 0)]
    threads[0].start()
    threads[0].join(0.2)
    assert threads[0].is_alive(), "the first did not wait"
    threads[1].start()
    for thread in threads:
        thread.join(30)
    stores[1].set("x", "of 1")
    assert stores[0].get("x") == b"of 1"


@pytest.mark.parametrize("seconds", [10, 25, 60])
def test_a_rank_that_never_joins_is_named_when_the_time_is_over_and_not_before(port, seconds, monkeypatch):
    clock = [0.0]
    sleep = lambda _: clock.append(clock[-1] + 7.0)  # noqa: E731  looks are 7 seconds apart
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: clock[-1], sleep=sleep))
    with pytest.raises(MachineFailed) as found:
        join_store(Ranks(0, 3, 0, 3), seconds=seconds)
    text = str(found.value)
    assert f"1 of 3 ranks joined at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT) within {seconds} s;" in text
    assert "without rank 1, 2." in text and "same MASTER_ADDR" in text and f"waited {seconds} s" in text
    assert seconds < clock[-1] <= seconds + 7.0


def test_a_rank_that_finds_no_rank_0_says_where_it_looked(port):
    kind, text = outcome(join_store, Ranks(1, 2, 1, 2), 0.5)
    assert kind == "MachineFailed" and f"found no store at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)" in text


def test_a_port_in_use_is_named_by_rank_0_and_ends_the_others_that_find_somebody_else_there(port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        kind, text = outcome(join_store, Ranks(0, 2, 0, 2), 0.5)
        assert kind == "MachineFailed" and f"cannot listen on port {port}: another program" in text
        assert "Set another MASTER_PORT" in text
        kind, text = outcome(join_store, Ranks(1, 2, 1, 2), 0.5)  # it accepts, and never answers
        assert kind == "MachineFailed" and "found no store at" in text
