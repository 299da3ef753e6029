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

from ..errors import MachineFailed, RunFailed, UserError
from .bounded import within
from .heartbeat import NAMED_RANKS
from .launcher import Ranks, meeting_place
from .own_address import address_towards, described_interfaces, interface_of, interfaces, is_loopback, network_id

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0  # of another node, once all ranks have joined: a busy machine may be slow
_NAMED_FAILURES = 4  # in a message
_KEY = "qlora_dist/nodes"


class Store(Protocol):
    """The needed part of torch's key-value store."""

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

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
    try:
        _connect_nodes(store, ranks, has_cuda)
    except RunFailed:
        raise
    except RuntimeError as error:
        cause = (str(error).strip() or repr(error)).splitlines()[0]
        raise MachineFailed(
            f"rank {ranks.rank} ({socket.gethostname()}): all {ranks.size} ranks joined, but rank 0's store no longer "
            f"answers: it has exited, or its host or the network to it is lost. It reported: {cause}"
        ) from error


def _connect_nodes(store: Store, ranks: Ranks, has_cuda: bool) -> None:
    here = Node(ranks.rank, socket.gethostname(), network_id(), _address_towards_store(ranks))
    store.set(f"{_KEY}/of/{ranks.rank}", json.dumps(here))
    published = store.multi_get([f"{_KEY}/of/{rank}" for rank in range(ranks.size)])
    firsts: dict[str, Node] = {}  # network -> its first rank
    for node in (Node(*json.loads(value)) for value in published):
        firsts.setdefault(node.network, node)
    nodes = list(firsts.values())
    if len(nodes) == 1:
        return
    interface, refused = "", None
    try:
        interface = _choose_interface(here, nodes, "NCCL_SOCKET_IFNAME" if has_cuda else "GLOO_SOCKET_IFNAME")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # exactly this one, not all that begin so
    except (UserError, MachineFailed) as error:  # the other nodes hear of it
        refused = error
    if here in nodes:
        if refused is not None:
            store.set(f"{_KEY}/listens/{here.rank}", "")
            store.set(f"{_KEY}/link/{here.rank}", str(refused))
        else:
            _try_next(store, nodes, nodes.index(here), interface)
    failures = _failures(store, nodes, ranks)
    if refused is not None:
        raise refused
    if failures:
        raise MachineFailed(
            f"the nodes cannot work together: {'; '.join(failures[:_NAMED_FAILURES])}. Let TCP pass between these "
            "addresses, on all ports (a firewall?). If it is the wrong network, set GLOO_SOCKET_IFNAME (with GPUs "
            "NCCL_SOCKET_IFNAME) on every node to the interface of the right one, or start the nodes with its "
            "addresses (MASTER_ADDR, torchrun --local-addr)"
        )


def _address_towards_store(ranks: Ranks) -> str:
    master = meeting_place()[0]
    try:
        return address_towards(master)
    except OSError as error:
        raise MachineFailed(
            f"rank {ranks.rank} ({socket.gethostname()}) has no route to MASTER_ADDR={master}: {error}"
        ) from error


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
        try:
            address = address_towards(others[0])
        except OSError as error:
            raise MachineFailed(f"{here} has no route to {others[0]}, another node of the run: {error}") from error
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


def _try_next(store: Store, nodes: Sequence[Node], index: int, interface: str) -> None:
    """Listens for the previous node, connects to the next one, and publishes how that went, until all have."""
    here, before, after = nodes[index], nodes[index - 1], nodes[(index + 1) % len(nodes)]
    address = interfaces()[interface][0]
    logger.log(
        logging.INFO if here.rank == 0 else logging.DEBUG,
        "%d nodes; this one (%s) connects to the others from %s on %s", len(nodes), here.host, address, interface,
    )  # fmt: skip
    link, patience = f"{_KEY}/link/{here.rank}", timedelta(seconds=ANSWER_SECONDS)
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
            listener.bind((address, 0))
            listener.listen()
            own = [address, listener.getsockname()[1], interface, described_interfaces()]
            store.set(f"{_KEY}/listens/{here.rank}", json.dumps(own))
            store.wait([f"{_KEY}/listens/{after.rank}"], patience)
            there = store.get(f"{_KEY}/listens/{after.rank}").decode()
            store.set(link, _connect(f"{here} at {address} on {interface}", here, after, there) if there else "")
            with suppress(RuntimeError):  # the previous node may still be about to connect
                store.wait([f"{_KEY}/link/{before.rank}"], patience)
    except OSError as error:
        store.set(f"{_KEY}/listens/{here.rank}", "")
        store.set(link, f"{here} cannot listen at {address} on {interface}: {error.strerror or error}")
    except RuntimeError:  # no answer from another node: `_failures` names it
        store.set(link, "")


def _connect(own: str, here: Node, other: Node, listens: str) -> str:
    """Tries one connection; why it failed, or nothing."""
    address, port, interface, held = json.loads(listens)
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
        return ""
    except OSError as error:
        return (
            f"{own} cannot connect to {other} at {address} on {interface}: {error.strerror or error}. "
            f"{here.host} has {described_interfaces()}; {other.host} has {held}"
        )


def _failures(store: Store, nodes: Sequence[Node], ranks: Ranks) -> list[str]:
    """What each node has published, or who has not. When there is any, returns once all ranks have read it."""
    keys = [f"{_KEY}/link/{node.rank}" for node in nodes]
    try:
        store.wait(keys, timedelta(seconds=ANSWER_SECONDS + CONNECT_SECONDS))
        failures = [text.decode() for text in store.multi_get(keys) if text]
    except RuntimeError:
        silent = [str(node) for node, key in zip(nodes, keys) if not store.check([key])]
        failures = [f"no answer from {', '.join(silent[:NAMED_RANKS])}, which had joined"]
    if failures:
        with suppress(RuntimeError):  # rank 0 may hold the store: the others read first
            within(CONNECT_SECONDS, lambda: _read_by_all(store, ranks))
    return failures


def _read_by_all(store: Store, ranks: Ranks) -> None:
    store.add(f"{_KEY}/read", 1)
    while ranks.rank == 0 and store.add(f"{_KEY}/read", 0) < ranks.size:
        time.sleep(0.05)
