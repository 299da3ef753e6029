"""`qlora-dist torchrun`: torchrun with the options that differ from node to node, found out on each.

torchrun itself asks host names. It publishes the node's own name as the address where the ranks meet, and compares what
that name resolves to with the endpoint to know who serves the rendezvous: where names do not resolve, or the own name
is a loopback address (Debian's default), it ends with a traceback or waits for minutes. Given addresses it asks none.

Its ranks would meet in a store that the first node's agent keeps. Ranks that --max-restarts starts again would read
there what the previous ones wrote, and rank 0, which need not run on the first node, would be blamed for that node.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from ..cluster.own_address import address_towards, described_interfaces, interface_of, is_loopback, resolve
from ..errors import MachineFailed, UserError, printable

DEFAULT_PORT = 29400  # torchrun's
WAIT_SECONDS = 600.0  # for the first node, as torchrun waits for all to join
_TRY_SECONDS = 4.0  # for one connection
_SAY_SECONDS = (4.0, 60.0)  # until it is said that this node waits: at first, and again
_OWN_OPTIONS = ("--rdzv-endpoint", "--rdzv-backend", "--rdzv-conf")


def run_torchrun(endpoint: str, options: Sequence[str]) -> NoReturn:
    """Becomes torchrun. Raises UserError for an endpoint that does not resolve here, MachineFailed when this is the
    first node and its port is used, or when nobody serves it within ten minutes; what is wrong while it waits is said
    after seconds.
    """
    for option in options:
        if option.partition("=")[0].replace("_", "-") in _OWN_OPTIONS:
            raise UserError(f"{option}: this command sets it itself; leave it out, or start torchrun directly")
    host, port = split_endpoint(endpoint)
    own = node_options(host)
    if "--rdzv-conf=is_host=0" in own:
        wait_for_first_node(host, port)
    elif "--rdzv-conf=is_host=1" in own:
        require_free_port(port)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # rank 0 serves a store of its own
    command = ["-m", "qlora_dist.cluster.agent", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", *own, *options]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *command])  # the same process: signals reach torchrun, its parent stays


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT or [IPV6]:PORT. Raises UserError."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):
        host, port = endpoint, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if (
        not host
        or host[0] == "-"
        or (":" in host and "[" not in endpoint)
        or not (port.isascii() and port.isdigit() and len(port) < 6)
    ):
        raise UserError(f"{endpoint}: expected the first node as HOST:PORT, an IPv6 address as [ADDRESS]:PORT")
    return host, int(port)


def node_options(host: str) -> list[str]:
    """torchrun's options for this node of a run whose first node is `host`. Raises UserError without a way to it."""
    try:
        found, own = resolve(host), address_towards(host)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} finds no way to the first node, {host}: {error.strerror or error}. Give it as an "
            f"address that all nodes reach. This node has {described_interfaces()}"
        ) from None
    if host == "localhost" or (host in found and is_loopback(host)):
        return []  # all nodes are this machine, and torchrun lets the first one that comes serve
    if is_loopback(own):
        # the first node itself, under a name that means another address to the others: let them resolve it
        return [f"--local-addr={host}", "--rdzv-conf=is_host=1"]
    return [f"--local-addr={own}", f"--rdzv-conf=is_host={int(own in found)}"]


def require_free_port(port: int) -> None:
    """On the first node, which serves the rendezvous there. Raises MachineFailed: another port may be free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torchrun: a port that was just closed will do
        try:
            probe.bind(("", port))
        except OSError as error:
            raise MachineFailed(
                f"{socket.gethostname()}, the first node, cannot serve the rendezvous on port {port}: "
                f"{error.strerror or error}. Another program, perhaps another job, uses it: give another port, the "
                "same on all nodes"
            ) from None


def wait_for_first_node(host: str, port: int, seconds: float = WAIT_SECONDS) -> None:
    """Returns once the first node serves the rendezvous: it may start minutes later than this one.

    torchrun gives up after a minute, without a word before. Raises MachineFailed.
    """
    own = address_towards(host)
    started, silence = time.monotonic(), iter(_SAY_SECONDS)
    said, pause = started, next(silence)
    while True:
        try:
            socket.create_connection((host, port), _TRY_SECONDS).close()
            return
        except OSError as error:
            why = (
                f"{socket.gethostname()} ({own} on {interface_of(own)}) cannot connect to the first node at "
                f"{host}:{port}: {error.strerror or error}"
            )
        now = time.monotonic()
        if now - started > seconds:
            raise MachineFailed(f"{why}, for {seconds:.0f} s. Is torchrun running there? Does a firewall let TCP pass?")
        if now - said >= pause:
            print(
                printable(f"{why}. Still trying: it may not have started, or a firewall may be between them"),
                file=sys.stderr,
                flush=True,
            )
            said, pause = now, next(silence, pause)
        time.sleep(0.5)
