"""This node's address as other nodes see it, and the interface that holds it. Asks the kernel; no packet is sent.

A host's name does not tell it: it may not resolve, on this node or on the others, it may resolve to a loopback address
(Debian's /etc/hosts has 127.0.1.1), and two hosts may have the same one. The route towards another node does.
"""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from .bounded import NoAnswer, within

RESOLVE_SECONDS = 5.0  # a name server that cannot be reached may take longer to say so
_ANY_PORT = 9  # no packet is sent there


def resolve(host: str) -> list[str]:
    """Addresses of a host name, or of an address itself. Raises OSError, after seconds, when it does not resolve."""
    try:
        found = within(RESOLVE_SECONDS, lambda: socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM))
    except NoAnswer as error:
        raise TimeoutError(f"the name server gives {error}") from None
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def address_towards(host: str) -> str:
    """This node's address on the route to a host. Raises OSError when it does not resolve or there is no route."""
    refused: OSError | None = None
    for address in resolve(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, _ANY_PORT))  # chooses a route, and with it the source address
                return str(probe.getsockname()[0])
        except OSError as error:
            refused = error
    raise refused or OSError(f"{host} has no address")


def is_loopback(address: str) -> bool:
    """Whether an address names every node itself."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interfaces() -> dict[str, list[str]]:
    """Addresses of each interface that has one, in the order in which gloo looks for them."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def interface_of(address: str) -> str | None:
    """The interface that holds an address of this node."""
    wanted = address.partition("%")[0]
    if is_loopback(wanted):
        wanted = "::1" if ":" in wanted else "127.0.0.1"  # 127.0.1.1 is an address of lo that no list names
    return next((name for name, held in interfaces().items() if wanted in held), None)


def network_id() -> str:
    """Equal for processes on one network stack: a host, or a container with a network of its own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()


def described_interfaces() -> str:
    """For messages: `eth0 10.0.0.1, lo 127.0.0.1`."""
    return ", ".join(f"{name} {held[0]}" for name, held in interfaces().items()) or "none"
