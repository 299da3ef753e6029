"""A node's own address and interface, and what a launch makes of them, without asking names."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.ranks import clean_environment, on_ranks, outcome, run_python

from qlora_dist.cluster import node_links, own_address
from qlora_dist.cluster.own_address import address_towards, interface_of, interfaces, is_loopback, network_id, resolve
from qlora_dist.cluster.world import World
from qlora_dist.commands import torchrun as command
from qlora_dist.errors import MachineFailed, UserError

ROOT = Path(__file__).parents[2]


def test_the_way_to_a_loopback_address_is_lo():
    assert address_towards("127.0.0.1") == "127.0.0.1" and interface_of("127.0.0.1") == "lo"
    assert interface_of("127.0.1.1") == "lo" and interface_of("192.0.2.255") is None
    assert all(map(is_loopback, ("127.0.0.1", "127.0.1.1", "::1", "::1%lo"))) and not is_loopback("10.0.0.1")


def test_every_address_has_its_interface_and_is_the_way_to_itself():
    for name, addresses in interfaces().items():
        for address in addresses:
            assert interface_of(address) == name
            if not address.startswith("fe80"):  # says nothing without its interface
                assert address_towards(address) == address


def test_processes_of_a_host_are_on_one_network():
    assert on_ranks(network_id, 2) == [network_id()] * 2


def test_a_name_server_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(own_address, "RESOLVE_SECONDS", 0.05)
    silence = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: silence.wait(30))
    kind, text = outcome(resolve, "nodea")
    silence.set()
    assert kind == "TimeoutError" and "name server" in text


def _environment():
    world = World.init()
    world.close()
    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")


def test_on_one_host_no_interface_is_chosen():
    assert on_ranks(_environment, 2) == [(None, None)] * 2


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("eth", "eth0"), ("=eth0", "eth0"), ("=eth", None), ("ib,eth1", "eth1"), ("^lo,eth0", "eth1"),
        ("^=eth", "lo"), ("absent", None),
    ],
)  # fmt: skip
def test_the_patterns_of_nccl_name_an_interface(monkeypatch, pattern, found):
    monkeypatch.setattr(node_links, "interfaces", lambda: {name: ["10.0.0.1"] for name in ("lo", "eth0", "eth1")})
    assert node_links._first_named(pattern) == found


@pytest.mark.parametrize(
    ("endpoint", "host", "port"),
    [
        ("a:29500", "a", 29500), ("a", "a", 29400), ("10.0.0.1:1", "10.0.0.1", 1), ("[fd00::1]:2", "fd00::1", 2),
        ("[fd00::1]", "fd00::1", 29400),
    ],
)  # fmt: skip
def test_an_endpoint_is_a_host_and_perhaps_a_port(endpoint, host, port):
    assert command.split_endpoint(endpoint) == (host, port)


@pytest.mark.parametrize("endpoint", ["", ":1", "a:b", "fd00::1", "a:999999"])
def test_an_endpoint_of_another_form_is_a_users_mistake(endpoint):
    with pytest.raises(UserError, match="expected the first node as HOST:PORT"):
        command.split_endpoint(endpoint)


def test_each_node_gets_its_address_and_one_of_them_serves(monkeypatch):
    known = {"first": ["10.0.0.1"], "debian": ["127.0.1.1"], "10.0.0.1": ["10.0.0.1"], "127.0.0.1": ["127.0.0.1"]}
    monkeypatch.setattr(command, "resolve", known.__getitem__)
    monkeypatch.setattr(command, "address_towards", lambda _: "10.0.0.1")
    assert command.node_options("first") == ["--local-addr=10.0.0.1", "--rdzv-conf=is_host=1"]
    assert command.node_options("10.0.0.1") == ["--local-addr=10.0.0.1", "--rdzv-conf=is_host=1"]
    monkeypatch.setattr(command, "address_towards", lambda _: "10.0.0.2")
    assert command.node_options("first") == ["--local-addr=10.0.0.2", "--rdzv-conf=is_host=0"]
    monkeypatch.setattr(command, "address_towards", lambda _: "127.0.0.1")
    assert command.node_options("debian") == ["--local-addr=debian", "--rdzv-conf=is_host=1"]
    assert command.node_options("127.0.0.1") == [], "several nodes on one machine: torchrun decides who serves"


@pytest.mark.parametrize("option", ["--rdzv-conf=join_timeout=9", "--rdzv_endpoint", "--rdzv-backend=static"])
def test_an_option_that_the_command_sets_itself_is_refused(option):
    with pytest.raises(UserError, match=f"{option.partition('=')[0]}.*: this command sets it itself"):
        command.run_torchrun("127.0.0.1:1", [option])


def test_a_first_node_that_never_serves_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command, "_SAY_SECONDS", (0.0, 60.0))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        expected = rf"\(127.0.0.1 on lo\) cannot connect to the first node at 127.0.0.1:{port}"
        with pytest.raises(MachineFailed, match=expected):
            command.wait_for_first_node("127.0.0.1", port, seconds=0.7)
    assert capsys.readouterr().err.count("Still trying") == 1


def test_the_command_becomes_torchrun_with_these_options():
    """In a process of its own: `exec` replaces it."""
    done = run_python("""
        import json, os, sys
        from qlora_dist.commands import invoke

        store = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
        os.environ.pop(store, None)
        os.execv = lambda file, words: print(json.dumps([os.environ[store], *words[1:]]))
        invoke(["torchrun", "127.0.0.1:1234", "--nnodes=2", "--nproc-per-node", "4", "-m", "qlora_dist", "train", "c"])
    """)
    expected = ["1", "-m", "qlora_dist.cluster.agent", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1234"]
    expected += ["--nnodes=2", "--nproc-per-node", "4", "-m", "qlora_dist", "train", "c"]
    assert json.loads(done.stdout) == expected
    assert "torch" not in run_python("import sys, qlora_dist.commands.torchrun; print(*sys.modules)").stdout.split()


@pytest.mark.launched
def test_torchrun_keeps_the_signals_that_its_shell_ignores(tmp_path):
    """The sbatch file has torchrun ignore the stop signals: its workers save, and it ends when they have."""
    (tmp_path / "show.py").write_text("import os; print(open(f'/proc/{os.getppid()}/status').read())")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = f"{sys.executable} -m qlora_dist torchrun localhost:{port} --signals-to-handle=SIGQUIT show.py"
    done = subprocess.run(
        ["bash", "-c", f"trap '' USR1 TERM; exec {launch}"],
        capture_output=True, text=True, timeout=120, env=clean_environment(), cwd=tmp_path,
    )  # fmt: skip
    ignored = int(re.search(r"SigIgn:\s*(\w+)", done.stdout)[1], 16)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        assert ignored & (1 << (number - 1)), done.stdout + done.stderr
