"""The port of rank 0's store: torchrun's agent chooses it, and holds it until rank 0 listens there seconds later.

torchrun itself asks the kernel for a free port, closes it again and publishes its number. Until rank 0 has done its
imports, the kernel may give that port to any other program, and the run ends before it has begun. A socket that stays
bound with SO_REUSEADDR, and does not listen, keeps the port: the kernel gives it to nobody who asks for any port, nor
as the source of a connection, and refuses it by number. Servers, torch's too, set that option and may listen there: of
other programs only one that was told this very number.
"""

from __future__ import annotations

import socket


def hold_free_port(held: list[socket.socket]) -> int:
    """A port that is free on all addresses of this node, held by the socket that replaces those in `held`. Raises
    OSError.
    """
    has_both = socket.has_dualstack_ipv6()
    holder = socket.socket(socket.AF_INET6 if has_both else socket.AF_INET)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if has_both:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    holder.bind(("", 0))
    for before in held:  # closed after the choice, which is another one: its ranks may still have connections
        before.close()
    held[:] = [holder]
    return int(holder.getsockname()[1])
