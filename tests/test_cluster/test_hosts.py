"""Ranks on two hosts meet whatever their names resolve to; where they cannot, the start says within seconds why.

Two sets of namespaces stand in for the hosts.
"""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
from helpers import slow_cable
from helpers.crew import Crew
from helpers.ranks import outcome
from helpers.slurm_cluster import wait_for
from helpers.tiny_run import losses_of, make_inputs, write_config
from helpers.two_hosts import ADDRESSES, NAMES, PORT, Hosts, why_not

from qlora_dist.cluster import node_links, rendezvous
from qlora_dist.cluster.launcher import launched_ranks
from qlora_dist.cluster.world import World
from qlora_dist.commands.doctor.machine import check_network
from qlora_dist.config import load_config

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
SECONDS = 10.0  # within which a start that cannot work says so
OTHER_NETWORK = (
    "ip link add other0 type veth peer name other1; ip address add 10.88.0.2/24 dev other0; "
    "ip link set other0 up; ip link set other1 up"
)


SLOW_CABLE = pytest.param(
    ("debian, own name only", 0.05, 0.02),  # 50 ms each way, 2 % of packets lost
    marks=pytest.mark.skipif(bool(slow_cable.why_not()), reason=slow_cable.why_not()),
    id="slow cable",
)


@pytest.fixture
def hosts(tmp_path, request):
    """`request.param`: the hosts' names, or names, latency and loss."""
    with Hosts(tmp_path, *([request.param] if isinstance(request.param, str) else request.param)) as hosts:
        yield hosts


def _sum():
    world = World.init()
    total = world.sum(torch.tensor([world.rank + 1.0])).item()
    world.close()
    return total, os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]


def _init(connect_seconds=node_links.CONNECT_SECONDS):
    started, node_links.CONNECT_SECONDS = time.monotonic(), connect_seconds
    return *outcome(World.init), time.monotonic() - started


@pytest.mark.parametrize("hosts", NAMES, indirect=True)
def test_ranks_that_know_an_address_of_the_first_host_work_together_whatever_the_names_are(hosts):
    assert hosts.call(_sum) == [(3.0, "eth0", "=eth0")] * 2


@pytest.mark.parametrize("hosts", ["debian"], indirect=True)
def test_the_first_host_may_be_a_loopback_address_to_itself(hosts):
    assert hosts.call(_sum, master="hosta") == [(3.0, "eth0", "=eth0")] * 2


@pytest.mark.parametrize("hosts", ["none"], indirect=True)
def test_hosts_of_an_ipv6_network_work_together(hosts):
    for number in range(2):
        hosts.inside(number, f"ip address flush dev eth0; ip address add fd77::{number + 1}/64 dev eth0 nodad")
    assert hosts.call(_sum, master="fd77::1") == [(3.0, "eth0", "=eth0")] * 2


@pytest.mark.parametrize("hosts", ["none"], indirect=True)
def test_who_cannot_reach_whom_is_said_by_all_ranks_within_seconds(hosts):
    """The second host uses a network that the first has no way into."""
    hosts.inside(1, OTHER_NETWORK)
    results = hosts.call(_init, variables=({}, {"GLOO_SOCKET_IFNAME": "other0"}))
    for kind, text, seconds in results:
        assert kind == "MachineFailed" and seconds < SECONDS
        assert (
            "rank 0 (hosta) at 10.77.0.1 on eth0 cannot connect to rank 1 (hostb) at 10.88.0.2 on other0: "
            "Network is unreachable. hosta has lo 127.0.0.1, eth0 10.77.0.1; hostb has lo 127.0.0.1, eth0 10.77.0.2, "
            "other0 10.88.0.2"
        ) in text
        assert "GLOO_SOCKET_IFNAME" in text and "--local-addr" in text and "firewall" in text


@pytest.mark.parametrize("hosts", ["none"], indirect=True)
def test_packets_that_are_dropped_are_named_within_seconds(hosts):
    """As by a firewall: what the first host sends to the other network of the second reaches nobody."""
    hosts.inside(1, OTHER_NETWORK)
    hosts.inside(0, "ip route add 10.88.0.0/24 dev eth0")
    hosts.inside(0, "ip neighbour add 10.88.0.2 lladdr 02:00:00:00:00:99 dev eth0 nud permanent")
    for kind, text, seconds in hosts.call(_init, 1.0, variables=({}, {"GLOO_SOCKET_IFNAME": "other0"})):
        assert kind == "MachineFailed" and seconds < SECONDS
        assert "cannot connect to rank 1 (hostb) at 10.88.0.2 on other0: timed out" in text


@pytest.mark.parametrize("hosts", ["none"], indirect=True)
def test_an_interface_that_does_not_exist_is_the_users_mistake(hosts):
    (first, text, seconds), (second, own_text, _) = hosts.call(_init, variables=({}, {"GLOO_SOCKET_IFNAME": "eth7"}))
    assert (first, second) == ("MachineFailed", "UserError") and seconds < SECONDS, "the other host hears of it"
    expected = "rank 1 (hostb): GLOO_SOCKET_IFNAME=eth7 names no interface with an address; this node has lo 127.0.0.1"
    assert expected in own_text and expected in text


@pytest.mark.parametrize("hosts", ["own name only"], indirect=True)
def test_a_meeting_place_whose_name_does_not_resolve_is_named_within_seconds(hosts):
    """As torchrun publishes it without the addresses that `qlora-dist torchrun` adds."""
    started = time.monotonic()
    first, second = hosts.call(_joins_briefly, master="hosta")
    assert second[0] == "MachineFailed" and "rank 1 (hostb): MASTER_ADDR=hosta, where the ranks meet" in second[1]
    assert "does not resolve on this node" in second[1] and "qlora-dist torchrun" in second[1]
    assert first[0] == "MachineFailed" and "without rank 1" in first[1] and time.monotonic() - started < 20


def _joins_briefly():
    rendezvous.NAME_SECONDS = 0.5
    return outcome(rendezvous.join_store, launched_ranks(), 3.0)


# --- the launchers ----------------------------------------------------------------------------------------------------

SUM = """
import torch
from qlora_dist.cluster.world import World

world = World.init()
total = world.sum(torch.tensor([world.rank + 1.0])).item()
print(f"rank {world.rank}: sum {total}", flush=True)
world.close()
"""


def _torchrun(first_node: str, *words: str, nodes: int = 2) -> list[str]:
    return ["-m", "qlora_dist", "torchrun", first_node, f"--nnodes={nodes}", "--nproc-per-node=1", *words]


def _launched(hosts, commands, timeout=270.0):
    """Starts a command on each host and waits; returns (exit code, output) of each."""
    processes = [hosts.start(number, *command) for number, command in enumerate(commands)]
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        outputs = [hosts.output(process) for process in processes]
        assert time.monotonic() < deadline, "\n==\n".join(outputs)
        time.sleep(0.1)
    return [(process.returncode, hosts.output(process)) for process in processes]


def _require_sums(hosts, commands):
    ends = _launched(hosts, commands)
    assert [code for code, _ in ends] == [0, 0], ends
    found = sorted(re.findall(r"rank \d: sum [\d.]+", ends[0][1] + ends[1][1]))
    assert found == ["rank 0: sum 3.0", "rank 1: sum 3.0"], ends


@pytest.fixture
def script(tmp_path):
    (tmp_path / "sum.py").write_text(SUM)
    return str(tmp_path / "sum.py")


@pytest.mark.parametrize("hosts", ["debian, own name only"], indirect=True)
@pytest.mark.launched
def test_torchrun_gives_the_ranks_an_address_though_own_names_are_loopback_addresses(hosts, tmp_path):
    """What ranks do with it is tested above, and with torchrun itself below."""
    (tmp_path / "show.py").write_text(
        "from os import environ as e; print('rank', e['RANK'], 'meets', e['MASTER_ADDR'])"
    )
    ends = _launched(hosts, [_torchrun(f"{ADDRESSES[0]}:{PORT}", str(tmp_path / "show.py"))] * 2)
    found = re.findall(r"rank (\d) meets (\S+)", ends[0][1] + ends[1][1])
    assert [code for code, _ in ends] == [0, 0] and sorted(rank for rank, _ in found) == ["0", "1"], ends
    assert len({address for _, address in found}) == 1 and found[0][1] in ADDRESSES, ends


@pytest.mark.hosts
@pytest.mark.parametrize("hosts", NAMES, indirect=True)
def test_torchrun_works_in_every_situation(hosts, script):
    _require_sums(hosts, [_torchrun(f"{ADDRESSES[0]}:{PORT}", script)] * 2)


@pytest.mark.hosts
@pytest.mark.parametrize("hosts", ["names", "debian"], indirect=True)
def test_torchrun_works_with_the_first_nodes_name(hosts, script):
    _require_sums(hosts, [_torchrun(f"hosta:{PORT}", script)] * 2)


@pytest.mark.hosts
@pytest.mark.parametrize("hosts", NAMES, indirect=True)
def test_accelerate_launch_works_in_every_situation(hosts, script):
    launch = ["-m", "accelerate.commands.launch", "--config_file=launch/accelerate/nodes-2.yaml", "--num_processes=2"]
    launch += [f"--main_process_ip={ADDRESSES[0]}", f"--main_process_port={PORT}"]
    _require_sums(hosts, [[*launch, f"--machine_rank={number}", script] for number in range(2)])


@pytest.mark.parametrize("hosts", ["own name only"], indirect=True)
def test_a_first_node_whose_name_does_not_resolve_is_a_users_mistake(hosts):
    process = hosts.start(1, *_torchrun(f"hosta:{PORT}", "absent.py"))
    assert process.wait(30) == 2
    text = hosts.output(process)
    assert "error: hostb finds no way to the first node, hosta: " in text
    assert "Give it as an address that all nodes reach. This node has lo 127.0.0.1, eth0 10.77.0.2" in text


@pytest.mark.parametrize("hosts", ["none"], indirect=True)
def test_a_node_that_waits_for_the_first_one_says_so_within_seconds(hosts):
    started = time.monotonic()
    process = hosts.start(1, *_torchrun(f"{ADDRESSES[0]}:{PORT}", "absent.py"))
    expected = f"hostb (10.77.0.2 on eth0) cannot connect to the first node at 10.77.0.1:{PORT}: Connection refused"
    while expected not in hosts.output(process):
        assert time.monotonic() - started < SECONDS + 10 and process.poll() is None, hosts.output(process)
        time.sleep(0.1)


SILENT = """
import socket

server = socket.create_server(("", {port}))
print("serves", flush=True)
connections = [server.accept() for _ in range(99)]
"""


@pytest.mark.hosts
@pytest.mark.parametrize("hosts", ["none"], indirect=True)
def test_another_program_on_the_port_of_the_first_node_is_named_by_both(hosts):
    """It accepts connections and never answers: torchrun would wait for that for good."""
    other = hosts.start(0, "-c", SILENT.format(port=PORT))
    wait_for(lambda: "serves" in hosts.output(other), 60, "the other program")
    (first, own_text), (second, text) = _launched(hosts, [_torchrun(f"{ADDRESSES[0]}:{PORT}", "absent.py")] * 2)
    assert (first, second) == (1, 1), own_text + text
    assert f"error: hosta, the first node, cannot serve the rendezvous on port {PORT}: Address already in" in own_text
    assert f"another program than torchrun listens at {ADDRESSES[0]}:{PORT}" in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("hosts", "status", "found"),
    [
        ("names", "ok", "hosta is 10.77.0.1"),
        ("none", "warn", "hosta does not resolve"),
        ("debian, own name only", "warn", "hosta is 127.0.1.1, an address of every node itself"),
    ],
    indirect=["hosts"],
)
def test_doctor_says_what_a_hosts_own_name_is_worth_and_names_its_interfaces(hosts, status, found):
    own, network = hosts.call(_network_findings)[0]
    assert own[0] == status and found in own[2], own
    assert network[2] == "lo 127.0.0.1, eth0 10.77.0.1", network


def _network_findings():
    return [(finding.status, finding.subject, finding.found) for finding in check_network()]


# --- a run over a bad cable, or that loses a host ---------------------------------------------------------------------

STEPS = 10
SLOW = {"do": "sleep", "seconds": 0.3, "at": "step"}


@pytest.fixture
def config(tmp_path):
    raw = make_inputs(tmp_path)
    changes = {"train__steps": STEPS, "train__save_every": 2, "strategy__timeout_seconds": 20}
    return write_config(tmp_path / "config.yaml", raw, **changes)


def _num_steps(run_dir):
    return len(losses_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def _until_step(crew, run_dir, step):
    deadline = time.monotonic() + 120
    while _num_steps(run_dir) < step:
        assert time.monotonic() < deadline, crew.output()
        time.sleep(0.05)


@pytest.fixture
def undisturbed(config, tmp_path):
    """Losses of the same run on one host."""
    raw = load_config(config).model_dump(mode="json") | {"run_dir": str(tmp_path / "undisturbed")}
    with Crew(write_config(tmp_path / "undisturbed.yaml", raw), tmp_path / "undisturbed-logs") as crew:
        assert [end.code for end in crew.wait()] == [0, 0], crew.output()
    return losses_of(tmp_path / "undisturbed")


def _require_nothing_left(hosts):
    deadline = time.monotonic() + SECONDS  # what a rank has started ends a moment after it
    while left := {**hosts.processes(0), **hosts.processes(1)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.hosts
@pytest.mark.parametrize("hosts", ["same name", SLOW_CABLE], indirect=True)
def test_a_run_on_hosts_of_one_name_or_with_a_slow_cable_has_the_losses_of_one_host(
    hosts, config, tmp_path, undisturbed
):
    with Crew(config, tmp_path / "logs", hosts=hosts) as crew:
        assert [end.code for end in crew.wait()] == [0, 0], crew.output()
        assert "2 ranks on 2 nodes: " in crew.output()
    assert losses_of(tmp_path / "run") == undisturbed
    _require_nothing_left(hosts)


@pytest.mark.hosts
@pytest.mark.parametrize("hosts", ["debian, own name only"], indirect=True)
def test_a_cable_that_is_out_for_seconds_costs_nothing(hosts, config, tmp_path, undisturbed):
    patient = write_config(config, load_config(config).model_dump(mode="json"), strategy__timeout_seconds=60)
    with Crew(patient, tmp_path / "logs", SLOW, hosts=hosts) as crew:
        _until_step(crew, tmp_path / "run", 3)
        hosts.plug(False)
        time.sleep(5)  # what is tested
        hosts.plug(True)
        assert [end.code for end in crew.wait()] == [0, 0], crew.output()
    assert losses_of(tmp_path / "run") == undisturbed


@pytest.mark.hosts
@pytest.mark.parametrize("is_killed", [True, False])
@pytest.mark.parametrize("hosts", ["debian, own name only"], indirect=True)
def test_a_host_that_is_lost_is_named_the_cut_off_side_ends_too_and_nothing_is_lost(
    hosts, config, tmp_path, undisturbed, is_killed
):
    with Crew(config, tmp_path / "logs", SLOW, hosts=hosts) as crew:
        _until_step(crew, tmp_path / "run", 3)
        hosts.plug(False)
        lost = time.monotonic()
        if is_killed:
            crew.send(1, signal.SIGKILL)
        first, second = crew.wait()
    assert first.code == 1 and "rank 1 (hostb" in first.output and first.at - lost < 75, first
    if not is_killed:
        assert second.code and "rank 0 (hosta)" in second.output and second.at - lost < 75, second
    _require_nothing_left(hosts)
    hosts.plug(True)
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    with Crew(config, tmp_path / "again", hosts=hosts) as crew:
        assert [end.code for end in crew.wait()] == [0, 0], crew.output()
        assert f"resuming from {newest} " in crew.output(), "the last checkpoint is whole"
    assert losses_of(tmp_path / "run") == undisturbed


FAIL_WHEN_CUT_OFF = """
import os, pathlib, sys, time

folder = pathlib.Path(sys.argv[1])
(folder / f"started-{os.environ['RANK']}").touch()
while not (folder / "cut").exists():
    time.sleep(0.05)
time.sleep(2)  # torchrun looks for other nodes ten times a second
sys.exit(1)
"""


@pytest.mark.hosts
@pytest.mark.timeout(900)
@pytest.mark.parametrize("hosts", ["debian, own name only"], indirect=True)
def test_torchrun_leaves_no_process_on_either_side_of_a_cable_that_is_out_for_good(hosts, tmp_path):
    """Ranks end by themselves, as tested above; here they only exit."""
    (tmp_path / "fail.py").write_text(FAIL_WHEN_CUT_OFF)
    command = _torchrun(f"{ADDRESSES[0]}:{PORT}", str(tmp_path / "fail.py"), str(tmp_path))
    nodes = [hosts.start(number, *command) for number in range(2)]
    deadline = time.monotonic() + 600
    while len(list(tmp_path.glob("started-*"))) < 2:
        assert time.monotonic() < deadline, [hosts.output(node) for node in nodes]
        time.sleep(0.1)
    hosts.plug(False)
    (tmp_path / "cut").touch()
    assert [node.wait(200) for node in nodes] == [1, 1]
    assert "torchrun on hostb has not noticed" in hosts.output(nodes[1])
    _require_nothing_left(hosts)
