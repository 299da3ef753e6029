"""Where a number comes from: commit, code, command, machine, versions, date. Goes into every raw file."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qlora_dist import provenance
from qlora_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# every raw file has these; `report` refuses one that lacks any
FIELDS = ("commit", "code_hash", "command", "date", "device", "hardware", "driver", "versions")
RESULTS = ("benchmarks/results", "benchmarks/RESULTS.md", "benchmarks/results.html")  # what the suite itself writes
PEERS = ("trl", "unsloth", "deepspeed", "flash-attn", "triton", "liger-kernel", "numpy")


def collect(command: str, device: torch.device) -> dict[str, Any]:
    """The provenance of numbers measured now, on this machine."""
    return {
        "commit": commit(),
        "code_hash": code_hash(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_label(device),
        "hardware": hardware(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "versions": {**provenance.versions(), **_peer_versions()},
    }


def require_clean(allow_dirty: bool) -> None:
    """Raises UserError where the numbers could not be traced to a commit."""
    found_commit = commit()
    if allow_dirty or (found_commit is not None and not found_commit.endswith("-dirty")):
        return
    found = "this is no git checkout" if found_commit is None else f"files differ from commit {found_commit[:12]}"
    raise UserError(
        f"{found}: its numbers could not be traced to code; commit first, or give --allow-dirty, which marks them"
    )


def commit() -> str | None:
    """Commit of the checkout, with `-dirty` when a file other than a result differs from it; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in RESULTS))
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def code_hash() -> str:
    """SHA-256 over the package's and the suite's sources: names the code also where there is no git."""
    digest = hashlib.sha256()
    for folder in ("qlora_dist", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".sh"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def this_command(module: str, arguments: list[str] | None = None) -> str:
    """The command line of a module of the suite, as it can be typed again."""
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
    """The processor's name as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None where nvidia-smi does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def energy_joules(index: int = 0) -> float | None:
    """Energy that the GPU has used since its driver was loaded, joules; None where NVML does not say.

    Through the driver's own library: no Python package is needed for one call.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return None if failed else millijoules.value / 1000


def _peer_versions() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
