"""torchrun that does not notice the end of its ranks is ended, one that does is left alone; nodes that do not meet say
so in words.
"""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest
from helpers.ranks import outcome, run_forked, run_python
from torch.distributed import TCPStore

from qlora_dist.cluster import agent

RUNNING, ENDED = psutil.STATUS_SLEEPING, psutil.STATUS_ZOMBIE


class _Exited(Exception):
    pass


@pytest.fixture
def exits_within(monkeypatch):
    """Whether it exits in looks at its children, each a list of their statuses (None: gone)."""

    def child(status):
        def read():
            if status is None:
                raise psutil.NoSuchProcess(1)
            return status

        return SimpleNamespace(status=read)

    def exit_now(code):
        raise _Exited(code)

    def run(*looks):
        seen = iter(looks)
        monkeypatch.setattr(agent.time, "sleep", lambda _: None)
        monkeypatch.setattr(agent.os, "_exit", exit_now)
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(children=lambda: [*map(child, next(seen))]))
        try:
            agent.exit_if_stuck(seconds=3.0, look_seconds=1.0)
        except StopIteration:
            return False
        except _Exited as error:
            return error.args == (1,)
        return False

    return run


def test_an_agent_that_leaves_ended_ranks_unread_exits(exits_within, capsys):
    assert exits_within([RUNNING, RUNNING], [RUNNING, ENDED], [ENDED, ENDED], [ENDED, ENDED], [ENDED, ENDED])
    assert "all ranks of this node have ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([[RUNNING, ENDED]] * 9, id="a rank still runs: it may be saving"),
        pytest.param([[]] * 9, id="it has read all: it waits for other nodes"),
        pytest.param([[ENDED]] * 2 + [[None]] + [[ENDED]] * 2, id="it reads late, but it does: ranks start again"),
    ],
)
def test_an_agent_that_is_at_work_is_left_alone(exits_within, looks):
    assert not exits_within(*looks)


def _failure(exitcode, timestamp, message=""):
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, message=message)


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        pytest.param(
            {0: _failure(2, 9, {"message": "mistake"}), 1: _failure(-15, 8)}, 0, id="who said why, not who ended"
        ),
        pytest.param({0: _failure(-15, 8), 1: _failure(-9, 9)}, 1, id="SIGTERM is how torchrun ends the others"),
        pytest.param({0: _failure(-9, 8), 1: _failure(1, 9)}, 1, id="an exit before a signal"),
        pytest.param({0: _failure(1, 9, {}), 1: _failure(2, 8, {})}, 1, id="the first of two"),
    ],
)
def test_the_failure_that_counts_is_the_one_that_the_others_follow_from(failures, rank):
    assert agent.decisive(failures) == (rank, failures[rank])


def test_it_ends_a_real_process_with_threads_and_says_why():
    done = run_python(
        """
        import subprocess, threading
        from qlora_dist.cluster.agent import exit_if_stuck

        children = [subprocess.Popen(["true"]), subprocess.Popen(["true"])]
        threading.Thread(target=exit_if_stuck, args=(0.3, 0.1), daemon=True).start()
        threading.Event().wait(60)
        """,
        check=False,
    )
    assert done.returncode == 1 and "the first node, or the network to it, is lost" in done.stderr


def test_another_program_on_the_port_of_the_rendezvous_is_named_and_not_waited_for():
    """It accepts, and never answers: torchrun would hang, without a limit."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        kind, text = outcome(agent.require_store, "127.0.0.1", port, 0.3)
    assert kind == "MachineFailed" and f"another program than torchrun listens at 127.0.0.1:{port}" in text
    assert outcome(agent.require_store, "127.0.0.1", port, 0.3) == ("", ""), "nobody serves there yet"


def test_a_node_asks_who_listens_before_torchrun_does():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = f"--rdzv-endpoint=127.0.0.1:{other.getsockname()[1]}"
        done = run_forked(
            "import sys; from qlora_dist.cluster.agent import run; print('exit code', run(sys.argv[1:]))",
            endpoint, "--rdzv-backend=c10d", "--nnodes=2", "absent.py", timeout=60,
        )  # fmt: skip
    assert "exit code 1" in done.stdout and "another program than torchrun" in done.stderr, done


def test_a_store_that_answers_is_torchrun():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert outcome(agent.require_store, "127.0.0.1", store.port) == ("", "")


def test_a_node_that_waits_in_vain_for_the_others_says_so_without_a_traceback():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-backend=c10d", "--rdzv-conf=is_host=1,join_timeout=1"]
    done = run_forked(
        "import sys; from qlora_dist.cluster.agent import run; print('exit code', run(sys.argv[1:]))",
        *options, "--nnodes=2", "absent.py",
    )  # fmt: skip
    assert "exit code 1" in done.stdout and "Traceback" not in done.stderr, done
    assert f"error: torchrun on {socket.gethostname()}: it has not met the other nodes" in done.stderr
