"""The nodes of a run connect to each other before gloo or NCCL has to: who cannot reach whom is said within seconds.

gloo listens on what the node's own name resolves to, which is a loopback address on Debian and nothing where names do
not resolve; NCCL on the first interface that looks like one. Here each node uses the interface on its route to the
store, unless the user names another, and tries it: its first rank listens, and that of the previous node connects.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

from ..errors import MachineFailed, UserError
from .bounded import within
from .launcher import Ranks, meeting_place
from .own_address import address_towards, described_interfaces, interface_of, interfaces, is_loopback, network_id

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 8.0  # of another node, once all ranks have joined
_NAMED_FAILURES = 4  # in a message
_KEY = "qlora_dist/nodes"


class Store(Protocol):
    """The needed part of torch's key-value store."""

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def add(self, key: str, amount: int) -> int: ...


class Node(NamedTuple):
    """A rank's node, as it publishes it."""

    rank: int
    host: str
    network: str
    address: str  # on the route to the store

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


def connect_nodes(store: Store, ranks: Ranks, has_cuda: bool) -> None:
    """With ranks on several nodes: chooses this node's interface for gloo and NCCL, and tries it. Called by all ranks.

    Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where the user has not. Raises MachineFailed on all ranks when a node
    cannot reach another, and UserError when the user's interface does not exist.
    """
    master = meeting_place()[0]
    try:
        here = Node(ranks.rank, socket.gethostname(), network_id(), address_towards(master))
    except OSError as error:
        raise MachineFailed(
            f"rank {ranks.rank} ({socket.gethostname()}) has no route to MASTER_ADDR={master}: {error}"
        ) from error
    store.set(f"{_KEY}/of/{ranks.rank}", json.dumps(here))
    published = store.multi_get([f"{_KEY}/of/{rank}" for rank in range(ranks.size)])
    nodes: dict[str, Node] = {}  # network -> its first rank
    for node in (Node(*json.loads(value)) for value in published):
        nodes.setdefault(node.network, node)
    if len(nodes) == 1:
        return
    firsts = list(nodes.values())
    interface = _choose_interface(here, firsts, "NCCL_SOCKET_IFNAME" if has_cuda else "GLOO_SOCKET_IFNAME")
    address = interfaces()[interface][0]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # exactly this one, not those that begin with its name
    if here in firsts:
        # not only rank 0: each node has its own
        logger.log(
            logging.INFO if ranks.rank == 0 else logging.DEBUG,
            "%d nodes; this one (%s) connects to the others from %s on %s", len(firsts), here.host, address, interface,
        )  # fmt: skip
        _try_next(store, firsts, firsts.index(here), address, interface)
    _require_links(store, firsts, ranks)


def _choose_interface(here: Node, nodes: Sequence[Node], variable: str) -> str:
    """The user's, or the one that holds this node's address as the others see it."""
    if wanted := os.environ.get(variable):
        named = _first_named(wanted if variable.startswith("NCCL") else f"={wanted}")
        if named is None:
            raise UserError(
                f"{here}: {variable}={wanted} names no interface with an address; "
                f"this node has {described_interfaces()}"
            )
        return named
    address = here.address
    if is_loopback(address):
        # rank 0's node, whose own name is a loopback address: the route to any other node tells
        others = [node.address for node in nodes if not is_loopback(node.address)]
        if not others:
            raise MachineFailed(
                f"{len(nodes)} nodes, and each reaches the store at {here.address}, an address of every node itself "
                f"(MASTER_ADDR={meeting_place()[0]}): give MASTER_ADDR, or torchrun's and accelerate's options for it, "
                f"as the first node's address in the network of the nodes. This node ({here.host}) has "
                f"{described_interfaces()}"
            )
        address = address_towards(others[0])
    interface = interface_of(address)
    if interface is None:
        raise MachineFailed(
            f"{here}: no interface holds this node's address {address}; it has {described_interfaces()}. Set {variable}"
        )
    return interface


def _first_named(pattern: str) -> str | None:
    """The first interface that a value of NCCL_SOCKET_IFNAME means: prefixes, after = whole names, after ^ others."""
    is_excluding, pattern = pattern.startswith("^"), pattern.removeprefix("^")
    is_exact, names = pattern.startswith("="), pattern.removeprefix("=").split(",")
    for interface in interfaces():
        is_named = interface in names if is_exact else any(interface.startswith(name) for name in names)
        if is_named != is_excluding:
            return interface
    return None


def _try_next(store: Store, nodes: Sequence[Node], index: int, address: str, interface: str) -> None:
    """Listens for the previous node, connects to the next one, and publishes how that went, until all have."""
    here, other = nodes[index], nodes[(index + 1) % len(nodes)]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    link, failure = f"{_KEY}/link/{here.rank}", ""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((address, 0))
            listener.listen(16)
            port = listener.getsockname()[1]
            store.set(f"{_KEY}/listens/{here.rank}", json.dumps([address, port, interface, described_interfaces()]))
            store.wait([f"{_KEY}/listens/{other.rank}"], timedelta(seconds=ANSWER_SECONDS))
            there, port, its_interface, its_interfaces = json.loads(store.get(f"{_KEY}/listens/{other.rank}"))
            try:
                socket.create_connection((there, port), CONNECT_SECONDS).close()
            except OSError as error:
                failure = (
                    f"{here} at {address} on {interface} cannot connect to {other} at {there} on {its_interface}: "
                    f"{error.strerror or error}. {here.host} has {described_interfaces()}; "
                    f"{other.host} has {its_interfaces}"
                )
            store.set(link, failure)
            # the previous node may still be about to connect
            with suppress(RuntimeError):
                store.wait([f"{_KEY}/link/{nodes[index - 1].rank}"], timedelta(seconds=ANSWER_SECONDS))
    except OSError as error:
        store.set(link, f"{here} cannot listen at {address} on {interface}: {error.strerror or error}")
    except RuntimeError:  # of the store: `_require_links` names who gave no answer
        pass


def _require_links(store: Store, nodes: Sequence[Node], ranks: Ranks) -> None:
    keys = [f"{_KEY}/link/{node.rank}" for node in nodes]
    try:
        store.wait(keys, timedelta(seconds=ANSWER_SECONDS + CONNECT_SECONDS))
        failures = [text.decode() for text in store.multi_get(keys) if text]
    except RuntimeError:
        failures = [f"no answer from {', '.join(map(str, _silent(store, nodes)))}, which had joined"]
    if not failures:
        return
    with suppress(RuntimeError):  # rank 0 may hold the store: the others read first
        within(CONNECT_SECONDS, lambda: _read_by_all(store, ranks))
    raise MachineFailed(
        f"the nodes cannot work together: {'; '.join(failures[:_NAMED_FAILURES])}. Let TCP pass between these "
        "addresses, on all ports (a firewall?). If it is the wrong network, set GLOO_SOCKET_IFNAME (with GPUs "
        "NCCL_SOCKET_IFNAME) on every node to the interface of the right one, or start the nodes with its addresses "
        "(MASTER_ADDR, torchrun --local-addr)"
    )


def _silent(store: Store, nodes: Sequence[Node]) -> list[Node]:
    found = []
    for node in nodes:
        try:
            store.wait([f"{_KEY}/link/{node.rank}"], timedelta(seconds=0.1))
        except RuntimeError:
            found.append(node)
    return found


def _read_by_all(store: Store, ranks: Ranks) -> None:
    store.add(f"{_KEY}/read", 1)
    while ranks.rank == 0 and store.add(f"{_KEY}/read", 0) < ranks.size:
        time.sleep(0.05)
