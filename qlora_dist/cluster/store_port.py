"""The port of rank 0's store: torchrun's agent chooses it, and holds it until rank 0 listens there seconds later.

torchrun itself asks the kernel for a free port, closes it again and publishes its number. Until rank 0 has done its
imports, the kernel may give that port to any other program, and the run ends before it has begun. A socket that stays
bound with SO_REUSEPORT keeps the port: others get it neither by number nor by chance, but processes of the same user
that ask for it with the same option may listen there. The socket itself does not listen, so it gets no connections.
"""

from __future__ import annotations

import os
import socket

_HELD = "QLORA_DIST_HELD_PORT"  # from the agent to its ranks


def hold_free_port(held: list[socket.socket]) -> int:
    """A port that is free on all addresses of this node, held by the socket that replaces those in `held`, and known
    to processes that are started from here on. Raises OSError.
    """
    holder = _bound_socket(0)
    port = int(holder.getsockname()[1])
    for before in held:  # closed after the choice, which is another one: its ranks may still have connections
        before.close()
    held[:] = [holder]
    os.environ[_HELD] = str(port)
    return port


def is_port_held() -> bool:
    """Whether this process's launcher holds the port of its store, on which torch alone could not listen."""
    return _HELD in os.environ


def listen_on_held(port: int) -> int | None:
    """The descriptor of a socket that listens on the port, if this process's launcher holds it. Raises OSError."""
    if os.environ.get(_HELD) != str(port):
        return None  # with SO_REUSEPORT two runs that were given the same port would both get it
    listener = _bound_socket(port)
    listener.listen(socket.SOMAXCONN)
    return listener.detach()


def _bound_socket(port: int) -> socket.socket:
    has_both = socket.has_dualstack_ipv6()
    bound = socket.socket(socket.AF_INET6 if has_both else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if has_both:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(("", port))
    except OSError:
        bound.close()
        raise
    return bound
