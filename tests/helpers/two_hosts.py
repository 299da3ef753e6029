"""Two hosts on one machine: network, host name, /etc/hosts and processes of their own, and a cable between them.

Each is a set of Linux namespaces that a sleeping process holds; when that process ends, everything of the host does:
its processes, its end of the cable, its files. Nothing is created in the machine's own namespaces.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from helpers import slow_cable
from helpers.ranks import ROOT, clean_environment, on_ranks

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29511  # of the hosts' own networks: it is free
LIFE_SECONDS = 1800  # of hosts that nobody ends
NAMES = {
    "names": (("hosta", "10.77.0.1 hosta\n10.77.0.2 hostb"), ("hostb", "10.77.0.1 hosta\n10.77.0.2 hostb")),
    "same name": (("host", "10.77.0.1 host"), ("host", "10.77.0.1 host")),
    "own name only": (("hosta", "10.77.0.1 hosta"), ("hostb", "10.77.0.2 hostb")),
    "debian": (("hosta", "127.0.1.1 hosta\n10.77.0.2 hostb"), ("hostb", "127.0.1.1 hostb\n10.77.0.1 hosta")),
    "debian, own name only": (("hosta", "127.0.1.1 hosta"), ("hostb", "127.0.1.1 hostb")),
    "none": (("hosta", ""), ("hostb", "")),
}  # what /etc/hosts says on each host


def why_not() -> str:
    """Why there can be no hosts here; empty if there can."""
    if missing := [
        name for name in ("unshare", "setpriv", "nsenter", "ip", "mount", "hostname") if shutil.which(name) is None
    ]:
        return f"two hosts need {', '.join(missing)} (util-linux, iproute2, hostname)"
    if os.geteuid():
        return "two hosts need root, for network namespaces"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return f"no namespaces here: {tried.stderr.decode().strip()}" if tried.returncode else ""


class Hosts:
    """Context manager. `names`: a key of NAMES; `folder`: for the hosts' own files. `latency_seconds` (one way) and
    `loss` (of packets): of the cable, which needs `slow_cable.why_not` to be empty.
    """

    def __init__(self, folder: Path, names: str, latency_seconds: float = 0.0, loss: float = 0.0) -> None:
        self._folder, self._names = folder, NAMES[names]
        self._slowness = [str(latency_seconds), str(loss)] if latency_seconds or loss else []
        self._holders: list[subprocess.Popen[bytes]] = []
        self._started: list[subprocess.Popen[str]] = []
        self.pids: list[int] = []  # of each host's first process

    def __enter__(self) -> Hosts:
        try:
            for _ in ADDRESSES:
                self.pids.append(self._hold())
            self._lay_cable()
            for number, (name, known) in enumerate(self._names):
                file = self._folder / f"hosts-{number}"
                file.write_text(f"127.0.0.1 localhost\n{known}\n")
                self.inside(
                    number,
                    f"mount --bind {file} /etc/hosts; mount --bind /dev/null /etc/resolv.conf; hostname {name}; "
                    f"ip link set lo up; ip address add {ADDRESSES[number]}/24 dev eth0; ip link set eth0 up",
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(len(self.pids)):
            self.kill(number)
        for holder in reversed(self._holders):
            holder.kill()
            holder.wait()
        for process in self._started:
            process.wait(30)

    def _lay_cable(self) -> None:
        if not self._slowness:
            self.inside(0, f"ip link add eth0 type veth peer name eth0 netns {self.pids[1]}", "--net")
            return
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-S", slow_cable.__file__]
        relay = subprocess.Popen([*command, *map(str, self.pids), *self._slowness], stdout=subprocess.PIPE)
        self._holders.append(relay)
        assert relay.stdout is not None
        with relay.stdout as said:
            assert said.readline() == b"ready\n", "the cable was not laid"

    def _hold(self) -> int:
        command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        command = ["setpriv", "--pdeathsig", "KILL", *command]  # it ends with these tests, however they end
        holder = subprocess.Popen([*command, "sleep", str(LIFE_SECONDS)], stderr=subprocess.DEVNULL)
        self._holders.append(holder)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if (found := children.read_text().split()) and Path(f"/proc/{found[0]}/comm").read_text() == "sleep\n":
                return int(found[0])  # after exec: its namespaces are complete
            time.sleep(0.01)
        raise AssertionError("a host did not start")

    def inside(self, number: int, script: str, namespaces: str = "--all") -> str:
        """Runs a shell script on a host; returns its output."""
        command = ["nsenter", "--target", str(self.pids[number]), namespaces, "sh", "-ec", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    def start(self, number: int, *words: str, **variables: str) -> subprocess.Popen[str]:
        """Starts `python WORDS` on a host, in the checkout."""
        log = self._folder / f"output-{len(self._started)}"
        enter = ["nsenter", "--target", str(self.pids[number]), "--all", f"--wd={ROOT}"]
        enter += ["unshare", "--mount", "sh", "-c", 'mount -t proc proc /proc; exec "$@"', "on a host"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*enter, sys.executable, *words],
                env={**clean_environment(), **variables}, stdout=file, stderr=file, stdin=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def output(self, process: subprocess.Popen[str]) -> str:
        """What a process of `start` has written so far."""
        return (self._folder / f"output-{self._started.index(process)}").read_text()

    def processes(self, number: int) -> dict[int, str]:
        """What runs on a host, by process id: command lines of all that has its network, but not of what holds it."""
        network = os.stat(f"/proc/{self.pids[number]}/ns/net").st_ino
        held = {holder.pid for holder in self._holders} | set(self.pids)
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if int(folder.name) not in held and os.stat(folder / "ns/net").st_ino == network:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def command(self, number: int, *words: str) -> list[str]:
        """A command line that runs `words` on a host, in the checkout, under the process id that it is started with."""
        spaces = ("--net", "--uts", "--mount")  # a process id namespace would take a fork
        return ["nsenter", "--target", str(self.pids[number]), *spaces, f"--wd={ROOT}", *words]

    def kill(self, number: int) -> None:
        """The host is gone, with all its processes."""
        with suppress(ProcessLookupError):
            os.kill(self.pids[number], signal.SIGKILL)

    def fail(self, number: int) -> None:
        """The host loses power: nobody hears of it. `plug` brings it back, with nothing running on it."""
        self.plug(False)
        while left := self.processes(number):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def plug(self, is_up: bool) -> None:
        """The cable between the hosts."""
        for number in range(len(self.pids)):
            self.inside(number, f"ip link set eth0 {'up' if is_up else 'down'}", "--net")

    def call(
        self, function: Callable[..., Any], *arguments: Any, master: str = ADDRESSES[0], variables: Any = ({}, {})
    ) -> list[Any]:
        """Calls a module-level function on one rank per host; see `on_ranks`. `variables`: of each host."""
        launched = {"MASTER_ADDR": master, "MASTER_PORT": str(PORT), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return on_ranks(_on_host, len(self.pids), self.pids, launched, variables, function, *arguments)


def _on_host(
    pids: list[int], launched: dict[str, str], variables: Any, function: Callable[..., Any], *arguments: Any
) -> Any:
    rank = int(os.environ["RANK"])
    enter_host(pids[rank])
    os.environ |= {**launched, **variables[rank]}
    return function(*arguments)


def enter_host(pid: int) -> None:
    """Moves this process, which has one thread, to the host whose first process is `pid`; it keeps its process id."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts", "mnt"):
        with open(f"/proc/{pid}/ns/{kind}") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")
