"""Disk, shared memory, the hub's cache, limits, network, Slurm."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from ...cluster.own_address import described_interfaces, interfaces, is_loopback, resolve
from ...files import GIB, format_bytes
from .finding import Finding

MIN_DISK_BYTES = 20 * GIB  # a 7B base in 16 bit is 13 GiB to download, a checkpoint with its optimizer state about 2
MIN_SHM_BYTES = GIB  # NCCL keeps its buffers there; a container's default is 64 MiB
MIN_OPEN_FILES = 4096  # sharded weights, sockets and dataset files of several ranks


def check_machine() -> Iterator[Finding]:
    yield _check_space("disk here", Path.cwd(), MIN_DISK_BYTES, "models and checkpoints need more")
    shm = Path("/dev/shm")
    if shm.is_dir():
        yield _check_space("/dev/shm", shm, MIN_SHM_BYTES, "in a container: docker run --shm-size=8g")
    if sys.platform != "win32":
        yield _check_open_files()
    yield Finding("ok", "Slurm", shutil.which("sbatch") or "not here (only clusters need it)")


def _check_space(subject: str, path: Path, least: int, advice: str) -> Finding:
    usage = shutil.disk_usage(path)
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)} ({path})"
    if usage.free < least:
        return Finding("warn", subject, f"{found}, less than {format_bytes(least)}", advice)
    return Finding("ok", subject, found)


def check_network() -> Iterator[Finding]:
    """Matters to runs on several nodes only, so it never blocks."""
    name = socket.gethostname()
    advice = "on several nodes start with qlora-dist torchrun, or give addresses: --local-addr, --main_process_ip"
    try:
        found = resolve(name)
    except OSError as error:
        yield Finding("warn", "host name", f"{name} does not resolve ({error.strerror or error})", advice)
    else:
        is_own_only = all(map(is_loopback, found))
        why = ", an address of every node itself" if is_own_only else ""
        yield Finding(
            "warn" if is_own_only else "ok",
            "host name", f"{name} is {', '.join(found)}{why}", advice if is_own_only else "",
        )  # fmt: skip
    rule = "ranks on several nodes use the one on the route to the first node"
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen is not None:
        rule = f"GLOO_SOCKET_IFNAME={chosen} chooses"
        if chosen.split(",")[0] not in interfaces():
            yield Finding("warn", "network", described_interfaces(), f"{rule} none of them: unset it")
            return
    yield Finding("ok", "network", described_interfaces(), rule)


def check_hub() -> Iterator[Finding]:
    import huggingface_hub

    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    yield _check_space("Hugging Face cache", existing, MIN_DISK_BYTES, f"set HF_HOME to a larger disk (now {cache})")
    if huggingface_hub.get_token() is None:  # whether there is one; never what it is
        yield Finding("ok", "Hugging Face token", "none", "for gated models: hf auth login")
    else:
        yield Finding("ok", "Hugging Face token", "present")


def _check_open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        return Finding("warn", "open files", f"limit {soft:,}, less than {MIN_OPEN_FILES:,}", f"ulimit -n {hard}")
    return Finding("ok", "open files", "no limit" if soft == resource.RLIM_INFINITY else f"limit {soft:,}")
