"""Where a result comes from: commit, code, command, machine, versions, date. Part of every raw file."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qlora_dist.cluster import provenance
from qlora_dist.errors import UserError

from . import nvml

ROOT = Path(__file__).resolve().parents[1]
# every raw file has these fields; `report` refuses one that lacks any
FIELDS = ("commit", "code_hash", "command", "date", "device", "hardware", "driver", "versions")
RESULTS = ("benchmarks/results", "benchmarks/RESULTS.md", "benchmarks/results.html")  # what the suite itself writes
STATED_BY, STATED_IN = "QLORA_DIST_COMMIT", "build/COMMIT"  # for a copy without .git
PEERS = ("trl", "unsloth", "deepspeed", "flash-attn", "triton", "liger-kernel", "numpy")


def collect(command: str, device: torch.device) -> dict[str, Any]:
    """The provenance of results measured now, on this machine."""
    known, source = commit_and_source()
    return {
        "commit": known,
        "commit_source": source,
        "code_hash": code_hash(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_label(device),
        "hardware": hardware(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "versions": {**provenance.versions(), **_peer_versions()},
    }


def require_clean(allow_dirty: bool) -> None:
    """Raises UserError if the results could not be traced to a commit."""
    found_commit, _ = commit_and_source()
    if allow_dirty or (found_commit is not None and not found_commit.endswith("-dirty")):
        return
    found = (
        f"this is not a git checkout, and neither {STATED_BY} nor {STATED_IN} gives its commit"
        if found_commit is None
        else f"files differ from commit {found_commit[:12]}"
    )
    raise UserError(
        f"{found}, so results could not be traced to a commit; commit first, or give --allow-dirty, which marks them"
    )


def commit() -> str | None:
    """Commit of the checkout, with `-dirty` if a file other than a result differs from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in RESULTS))
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def commit_and_source() -> tuple[str | None, str]:
    """The commit and its source: `git`; `stated`, by the environment or build/COMMIT, where there is no .git (a copy on
    another machine: only the code hash checks it); or `none`. Raises UserError if the stated value is not a commit."""
    known = commit()
    if known is not None:
        return known, "git"
    file = ROOT / STATED_IN
    stated = os.environ.get(STATED_BY, "").strip() or (file.read_text().strip() if file.exists() else "")
    if not stated:
        return None, "none"
    if not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", stated):
        raise UserError(
            f"{STATED_BY} or {STATED_IN} is {stated[:60]!r}, not a commit of 40 hex digits (or those and -dirty); "
            f"write one with: git rev-parse HEAD > {STATED_IN}"
        )
    return stated, "stated"


def code_hash() -> str:
    """SHA-256 over the sources of package and suite: identifies the code even without git."""
    digest = hashlib.sha256()
    for folder in ("qlora_dist", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def this_command(module: str, arguments: list[str] | None = None) -> str:
    """The command line of a module of the suite, ready to be run again."""
    return " ".join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, and the GPUs that a run can see."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": list(os.getloadavg()),
    }
    if device.type == "cuda":
        facts["gpus"] = [
            {"name": torch.cuda.get_device_name(i), "bytes": torch.cuda.get_device_properties(i).total_memory}
            for i in range(torch.cuda.device_count())
        ]
        facts["cuda"] = torch.version.cuda
    return facts


def device_label(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name as reported by the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None if nvidia-smi fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def device_state(device: torch.device) -> dict[str, float | None] | None:
    """The GPU's memory, clocks and power at this moment; None on a CPU. Read before and after a measurement.

    Bytes: `allocated_bytes` and `reserved_bytes` of PyTorch's allocator now, `allocated_peak_bytes` and
    `reserved_peak_bytes` since their last reset, `device_used_bytes` of the whole card (all processes), and
    `context_bytes`: what is in use outside the allocator. Before anything is loaded, that is the CUDA context (and
    other processes); later it includes kernels, libraries and managed memory. Then the `nvml.READINGS`: clocks right
    after a measurement reflect the load, power is the driver's mean over up to a second.
    """
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device)
    try:
        free, total = torch.cuda.mem_get_info(device)
        used = total - free
    except RuntimeError:  # a kernel has failed and the device no longer responds; that result must still be written
        used = None
    return {
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": reserved,
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device),
        "device_used_bytes": used,
        "context_bytes": None if used is None else used - reserved,
        **nvml.readings(device.index or 0),
    }


def _peer_versions() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
