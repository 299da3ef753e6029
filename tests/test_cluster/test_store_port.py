"""Between the choice of the port of rank 0's store and rank 0's listening there, nobody else gets it."""

from __future__ import annotations

import errno
import re
import socket
import sys
import threading
from pathlib import Path

import pytest
from helpers.ranks import run_command
from helpers.two_hosts import Hosts, why_not

from qlora_dist.cluster.launcher import Ranks
from qlora_dist.cluster.rendezvous import join_store
from qlora_dist.cluster.store_port import hold_free_port
from qlora_dist.commands.torchrun import require_free_port
from qlora_dist.errors import MachineFailed


@pytest.fixture
def held(monkeypatch):
    """Sockets that hold ports, and the environment of a launcher."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    held = []
    yield held
    for holder in held:
        holder.close()


def _refusal(port, address=""):
    """Why another program does not get a port; None when it does."""
    with socket.socket() as other:
        try:
            other.bind((address, port))
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


def _ports_given_while_one_is_held():
    """On a host with two ports to give: the one that is held, and what others get from the kernel."""
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40001")
    held: list[socket.socket] = []
    port, others, given = hold_free_port(held), [], []
    for _ in range(2):
        others.append(socket.socket())
        try:
            others[-1].bind(("", 0))
            given.append(others[-1].getsockname()[1])
        except OSError as error:
            given.append(error.strerror)
    return port, given


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_the_kernel_gives_a_port_that_is_held_to_nobody(tmp_path):
    with Hosts(tmp_path, "none") as hosts:
        for port, given in hosts.call(_ports_given_while_one_is_held):
            assert given == [{40000: 40001, 40001: 40000}[port], "Address already in use"]


def test_a_new_choice_is_another_port_and_frees_the_one_before(held):
    """As when torchrun starts its ranks again."""
    before, holder = hold_free_port(held), held[0]
    port = hold_free_port(held)
    assert port != before and _refusal(port) == errno.EADDRINUSE
    assert holder.fileno() == -1 and len(held) == 1


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
OWN_GROUP = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")  # as other trainers do
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print(f"rank {dist.get_rank()}: sum {total.item()}", flush=True)
dist.destroy_process_group()
"""
ALONE = """
from qlora_dist.cluster.world import World

world = World.init()
print(f"rank {world.rank}: size {world.size}", flush=True)
world.close()
"""


def _torchrun(tmp_path, script, ranks):
    """The output of a script that `qlora-dist torchrun` starts on this node."""
    (tmp_path / "script.py").write_text(script)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qlora_dist", "torchrun", f"127.0.0.1:{port}", f"--nproc-per-node={ranks}"]
    done = run_command([*command, str(tmp_path / "script.py"), str(tmp_path / "tried")], timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _sums(output):
    return sorted(re.findall(r"rank \d: sum [\d.]+", output))


@pytest.mark.launched
def test_a_program_that_wants_the_port_in_between_does_not_get_it_from_torchrun(tmp_path):
    output = _torchrun(tmp_path, TAKE_IT, 2)
    assert "refused: Address already in use" in output
    assert _sums(output) == ["rank 0: sum 3.0", "rank 1: sum 3.0"]


@pytest.mark.launched
def test_scripts_that_create_their_own_group_meet_at_the_port_that_is_held(tmp_path):
    assert _sums(_torchrun(tmp_path, OWN_GROUP, 2)) == ["rank 0: sum 3.0", "rank 1: sum 3.0"]


@pytest.mark.launched
def test_a_single_rank_of_torchrun_starts_though_its_port_is_held(tmp_path):
    assert "rank 0: size 1" in _torchrun(tmp_path, ALONE, 1)


def test_a_port_of_the_first_node_that_is_used_is_named_before_torchrun_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with pytest.raises(MachineFailed, match=f"cannot serve the rendezvous on port {port}: .*another job, uses it"):
            require_free_port(port)
    require_free_port(port)
