"""Between the choice of the port of rank 0's store and rank 0's listening there, nobody else gets it."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import threading

import pytest
from helpers.ranks import run_command

from qlora_dist.cluster.launcher import Ranks
from qlora_dist.cluster.rendezvous import join_store
from qlora_dist.cluster.store_port import hold_free_port, listen_on_held
from qlora_dist.commands.torchrun import require_free_port
from qlora_dist.errors import MachineFailed


@pytest.fixture
def held(monkeypatch):
    """Sockets that hold ports, and the environment of a launcher."""
    monkeypatch.setenv("QLORA_DIST_HELD_PORT", "")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    held = []
    yield held
    for holder in held:
        holder.close()


def _refusal(port, address=""):
    """Why another program does not get a port; None when it does."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind((address, port))
            other.listen()
        except OSError as error:
            return error.errno
    return None


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
def test_a_port_that_is_held_is_refused_to_others_and_ranks_meet_there(held, monkeypatch, address):
    port = hold_free_port(held)
    assert _refusal(port, address) == errno.EADDRINUSE
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    stores = {}

    def join(number):
        stores[number] = join_store(Ranks(number, 2, number, 2), seconds=20)

    threads = [threading.Thread(target=join, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    stores[0].set("x", "of 0")
    assert stores[1].get("x") == b"of 0" and _refusal(port, address) == errno.EADDRINUSE


def test_a_new_choice_is_another_port_and_frees_the_one_before(held):
    """As when torchrun starts its ranks again."""
    before, holder = hold_free_port(held), held[0]
    port = hold_free_port(held)
    assert port != before and _refusal(port) == errno.EADDRINUSE
    assert holder.fileno() == -1 and len(held) == 1


def test_two_runs_that_are_given_one_port_do_not_share_it(held):
    port = hold_free_port(held)
    os.environ["QLORA_DIST_HELD_PORT"] = str(port + 1)  # another run's
    assert listen_on_held(port) is None


TAKE_IT = """
import os, pathlib, socket, sys, time

tried = pathlib.Path(sys.argv[1])
if os.environ["RANK"] == "1":  # another program, between torchrun's choice and rank 0's listening
    other = socket.socket()
    try:
        other.bind(("", int(os.environ["MASTER_PORT"])))
        other.listen()
        print("taken", flush=True)
    except OSError as error:
        print(f"refused: {error.strerror}", flush=True)
    tried.touch()
while not tried.exists():
    time.sleep(0.01)
import torch
from qlora_dist.cluster.world import World

world = World.init()
print(f"rank {world.rank}: sum {world.sum(torch.tensor([world.rank + 1.0])).item()}", flush=True)
world.close()
"""


def test_a_program_that_wants_the_port_in_between_does_not_get_it_from_torchrun(tmp_path):
    (tmp_path / "take_it.py").write_text(TAKE_IT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qlora_dist", "torchrun", f"127.0.0.1:{port}", "--nproc-per-node=2"]
    done = run_command([*command, str(tmp_path / "take_it.py"), str(tmp_path / "tried")], timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused: Address already in use" in done.stdout
    assert sorted(re.findall(r"rank \d: sum [\d.]+", done.stdout)) == ["rank 0: sum 3.0", "rank 1: sum 3.0"]


def test_a_port_of_the_first_node_that_is_used_is_named_before_torchrun_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with pytest.raises(MachineFailed, match=f"cannot serve the rendezvous on port {port}: .*another job, uses it"):
            require_free_port(port)
    require_free_port(port)
