"""All ranks find each other within two minutes, or each says how many came, where it waited and what to check.

The limit is independent of `strategy.timeout_seconds`: joining is connecting, before anything is read.
"""

from __future__ import annotations

import datetime
import socket
import time

import torch.distributed as dist

from ..errors import MachineFailed
from .bounded import within
from .heartbeat import NAMED_RANKS
from .launcher import Ranks, meeting_place
from .own_address import resolve

JOIN_SECONDS = 120.0
NAME_SECONDS = 6.0  # until a name that does not resolve is given up: a name server may be busy
_POLL_SECONDS = 0.05


def join_store(ranks: Ranks, seconds: float = JOIN_SECONDS) -> dist.Store:
    """The job's store, after all ranks have come to it. Raises MachineFailed after `seconds`, when the port is used, or
    when the store's name does not resolve.

    The ranks are counted here and not by torch, which knows their number on rank 0 only.
    """
    address, port, is_served = meeting_place()
    _require_name(ranks, address)
    place = f"{address}:{port} (MASTER_ADDR:MASTER_PORT)"
    keys = [f"qlora_dist/joined/{rank}" for rank in range(ranks.size)]
    limit = datetime.timedelta(seconds=seconds)
    absent: list[int] | None = None  # unknown before the store answers
    deadline, margin = time.monotonic() + seconds, min(seconds, 5.0)

    def connect() -> dist.Store:
        return dist.TCPStore(
            address,
            port,
            ranks.size,
            is_master=ranks.rank == 0 and not is_served,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )

    def absent_ranks() -> list[int]:
        return [] if store.check(keys) else [rank for rank, key in enumerate(keys) if not store.check([key])]

    try:
        store = within(seconds + margin, connect)  # whoever else listens there may never answer
        within(margin, lambda: store.set(keys[ranks.rank], socket.gethostname()))
        while absent := within(margin, absent_ranks):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s")
            time.sleep(_POLL_SECONDS)
    except (RuntimeError, OSError) as error:
        raise MachineFailed(_explain(ranks, place, port, seconds, absent, error)) from error
    return store


def _require_name(ranks: Ranks, address: str) -> None:
    """torch would look for it until the end of its own limit."""
    deadline = time.monotonic() + NAME_SECONDS
    while True:
        try:
            resolve(address)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise MachineFailed(
                    f"rank {ranks.rank} ({socket.gethostname()}): MASTER_ADDR={address}, where the ranks meet, does "
                    f"not resolve on this node ({error.strerror or error}). Start every node with `qlora-dist torchrun "
                    "FIRST_NODE:PORT ...`, which uses addresses, or give addresses yourself (torchrun --local-addr, "
                    "accelerate launch --main_process_ip)"
                ) from None
        time.sleep(10 * _POLL_SECONDS)


def _explain(
    ranks: Ranks, place: str, port: int, seconds: float, absent: list[int] | None, error: RuntimeError | OSError
) -> str:
    who = f"rank {ranks.rank} ({socket.gethostname()})"
    cause = (str(error).strip() or repr(error)).splitlines()[0]
    if "eaddrinuse" in str(error).lower() or "address already in use" in str(error).lower():
        return (
            f"{who} cannot listen on port {port}: another program, perhaps another job, uses it. Set another "
            "MASTER_PORT (torchrun --master-port, accelerate launch --main_process_port), the same on all nodes, and "
            f"start again. It reported: {cause}"
        )
    if absent is None:
        found = f"found no store at {place} within {seconds:.0f} s: rank 0 has not started there, or is not reachable"
    else:
        names = ", ".join(map(str, absent[:NAMED_RANKS])) + (", ..." if len(absent) > NAMED_RANKS else "")
        came = f"{ranks.size - len(absent)} of {ranks.size} ranks joined at {place} within {seconds:.0f} s"
        found = f"{came}; without rank {names}" if absent else came
    return (
        f"{who}: {found}. Check that every node runs its processes with the same MASTER_ADDR, MASTER_PORT and "
        f"WORLD_SIZE, what their own output says, and that a firewall lets them connect. It reported: {cause}"
    )
