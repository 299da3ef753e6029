"""A cable with latency and loss between two hosts, as tc netem makes one, which many kernels lack.

Run as a program (`python slow_cable.py PID PID SECONDS LOSS`): gives each host an interface eth0, and carries packets
between the two until it is killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from pathlib import Path

TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET = 65536


def why_not() -> str:
    """Why there can be no such cable here; empty if there can."""
    return "" if TUN.exists() else f"a slow cable needs {TUN}"


def _end_on(pid: int) -> int:
    """A new eth0 on the host whose first process is `pid`; returns the descriptor of what it sends and receives."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as namespace:
        if libc.setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns of process {pid}")
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _carry(ends: list[int], seconds: float, loss: float) -> None:
    chance = random.Random(0)
    on_the_way: list[tuple[float, int, bytes]] = []  # arrival, the end it goes to, packet
    while True:
        pause = max(on_the_way[0][0] - time.monotonic(), 0.0) if on_the_way else None
        for end in select.select(ends, [], [], pause)[0]:
            packet = os.read(end, _PACKET)
            if chance.random() >= loss:
                heapq.heappush(on_the_way, (time.monotonic() + seconds, ends[1 - ends.index(end)], packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, end, packet = heapq.heappop(on_the_way)
            try:
                os.write(end, packet)
            except OSError:  # that end is down: the packet is lost
                continue


if __name__ == "__main__":
    ends = [_end_on(int(pid)) for pid in sys.argv[1:3]]
    print("ready", flush=True)
    _carry(ends, *map(float, sys.argv[3:5]))
