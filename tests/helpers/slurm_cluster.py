"""A temporary two-node Slurm cluster from Debian's packages: munged, slurmctld, two slurmd. Root or not on 127.0.0.1;
as root on two hosts of helpers.two_hosts, with slurmctld on the first one.

All daemons are children of this process (-D, --foreground), all files are below one folder in /tmp (the path of a munge
socket must be short), all ports are free ones. Debian's build supports several slurmd per host (`slurmd -N name`).
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from helpers.ranks import ROOT, clean_environment, python_path
from helpers.two_hosts import ADDRESSES, Hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("vnode1", "vnode2")
GPUS = 8  # fake ones, per node
GRACE_SECONDS = 30  # before a preemption in partition low
PACKAGES = "slurm-wlm munge"


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    """PATH with this interpreter first, as in an activated environment, and with the daemons' folders."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """Started by `start`; `stop` leaves no process behind."""

    def __init__(self, hosts: Hosts | None = None) -> None:
        self._hosts = hosts
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **clean_environment(),
            "PATH": _path(),
            "SLURM_CONF": str(self.root / "slurm.conf"),
        }
        if hosts is None:
            self.environment["GLOO_SOCKET_IFNAME"] = "lo"

    # --- daemons ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        root = self.root
        root.chmod(0o755)
        for name in ("munge", "state", "log", "spool", "dev"):
            (root / name).mkdir(mode=0o755)
        for i in range(GPUS):  # Slurm requires a character device for a GPU; it follows links
            (root / "dev" / f"nvidia{i}").symlink_to("/dev/null")
        key = root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (root / "slurm.conf").write_text(_slurm_conf(root, _places(self._hosts is not None)))
        (root / "gres.conf").write_text(
            "".join(f"NodeName={n} Name=gpu Type=fake File={root}/dev/nvidia[0-{GPUS - 1}]\n" for n in NODES)
        )
        munge = root / "munge"
        self._daemon(
            "munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}", f"--socket={munge}/sock",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        wait_for(lambda: (munge / "sock").exists(), 20, "munged's socket")
        conf = str(root / "slurm.conf")
        self._daemon("slurmctld", "-D", "-c", "-f", conf)
        for number in range(len(NODES)):
            self.start_node(number)
        wait_for(self._is_ready, 60, "two idle nodes", self.logs)

    def start_node(self, number: int) -> None:
        """The node's daemon, at first or after its host failed."""
        self._daemons = [daemon for daemon in self._daemons if daemon.poll() is None]
        self._daemon("slurmd", "-D", "-N", NODES[number], "-f", str(self.root / "slurm.conf"), host=number)

    def _daemon(self, *command: str, host: int = 0) -> None:
        with open(self.root / "log" / f"{command[0]}.out", "ab") as log:
            process = subprocess.Popen(
                self._on_host(host, *command),
                env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._daemons.append(process)

    def _on_host(self, number: int, *command: str) -> list[str]:
        return [*command] if self._hosts is None else self._hosts.command(number, *command)

    def _is_ready(self) -> bool:
        for daemon in self._daemons:
            assert daemon.poll() is None, f"{daemon.args} exited with {daemon.returncode}\n{self.logs()}"
        shown = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()
        return shown == ["idle"] * len(NODES)

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in (self.root / "log").iterdir())

    def stop(self) -> list[str]:
        """Ends jobs and daemons; returns the processes that had to be killed (ideally none)."""
        self.cancel_all()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        deadline = time.monotonic() + 15
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.25)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)
        return [f"{pid}: {command}" for pid, command in left.items()]

    def processes(self, of_jobs: bool = False) -> dict[int, str]:
        """Live processes of this cluster, which have its SLURM_CONF; those of jobs also have a job id."""
        mark, found = f"SLURM_CONF={self.root}/slurm.conf".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            is_of_job = "slurmstepd" in command or any(v.startswith(b"SLURM_JOB_ID=") for v in variables)
            if command and mark in variables and (is_of_job or not of_jobs):  # no command: a zombie
                found[int(folder.name)] = command
        return found

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """A Slurm command, run in the checkout."""
        done = subprocess.run(
            self._on_host(0, *command),
            env={**self.environment, **environment}, capture_output=True, text=True, timeout=60, cwd=ROOT,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *arguments: str, log: Path, **environment: str) -> str:
        """sbatch; returns the job's id. Its output goes to `log`."""
        return self.run("sbatch", "--parsable", f"--output={log}", *arguments, **environment).stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job_id).stdout.splitlines()[0]
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def wait_for_state(self, job_id: str, *states: str, timeout: float = 250, log: Path | None = None) -> str:
        """Waits for one of the states; polls, because `sbatch --wait` checks only every ten seconds."""
        wait_for(
            lambda: self.job(job_id)["JobState"] in states,
            timeout,
            f"job {job_id} to be {' or '.join(states)}",
            lambda: f"{self.job(job_id)}\n{log.read_text() if log is not None and log.exists() else ''}",
        )
        return self.job(job_id)["JobState"]

    def cancel_all(self) -> None:
        """Ends all jobs and waits until the nodes are idle."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        wait_for(lambda: not self.run("squeue", "-h", check=False).stdout.strip(), 60, "all jobs to end")


def wait_for(condition: Callable[[], Any], timeout: float, what: str, explain: Callable[[], str] = lambda: "") -> None:
    """Polls until the condition is true; AssertionError with an explanation after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s for {what}\n{explain()}")
        time.sleep(0.25)


def faults(*faults: dict[str, object]) -> dict[str, str]:
    """Environment for a job whose processes suffer these faults (tests/faults/sitecustomize.py)."""
    return {"FAULTS": json.dumps(faults), "PYTHONPATH": f"{ROOT / 'tests' / 'faults'}:{python_path()}"}


class Place(NamedTuple):
    """Where a daemon listens."""

    host: str
    address: str
    port: int


def _places(is_on_hosts: bool) -> list[Place]:
    """Of slurmctld, and of each node."""
    if is_on_hosts:  # networks of their own: all ports are free
        places = [Place(f"host{letter}", address, 6818) for letter, address in zip("ab", ADDRESSES)]
        return [places[0]._replace(port=6817), *places]
    return [Place("localhost", "127.0.0.1", port) for port in _free_ports(1 + len(NODES))]


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _slurm_conf(root: Path, places: list[Place]) -> str:
    user = getpass.getuser()
    is_one_machine = places[0].host == "localhost"
    # what a host's own name resolves to need not be its address
    listens = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if is_one_machine else ""
    lost_seconds = 30 if is_one_machine else 60  # ranks say first who is lost
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={place.host} NodeAddr={place.address} Port={place.port} CPUs=8 RealMemory=4000 "
        f"Gres=gpu:fake:{GPUS} State=UNKNOWN"
        for node, place in zip(NODES, places[1:])
    )
    return f"""
ClusterName=qlora_test
SlurmctldHost={places[0].host}({places[0].address})
SlurmctldPort={places[0].port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (120 s by default, at least 5)
AuthInfo=socket={root}/munge/sock,cred_expire=5
{listens}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout={lost_seconds}
InactiveLimit=0
KillWait=8
UnkillableStepTimeout=30
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=2-0 PriorityTier=10 State=UP
PartitionName=low Nodes=ALL MaxTime=2-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_SECONDS} State=UP
PartitionName=high Nodes=ALL MaxTime=2-0 PriorityTier=100 PreemptMode=OFF State=UP
"""
