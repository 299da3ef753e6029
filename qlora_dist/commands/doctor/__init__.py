"""`qlora-dist doctor`: what this machine has, what is missing, and what to do about it.

    packages   Python and libraries: versions against the supported range, and whether they can be imported
    devices    GPUs and CPU: driver, NCCL, bitsandbytes, a 4-bit round trip on each device, paged memory, attention
    machine    disk, shared memory, the hub's cache, limits, host name and interfaces, Slurm

The checks really run: a tensor is quantized to 4 bits and back on each device, paged memory is written by the GPU and
read by the CPU. Libraries are imported inside the checks, so that a missing one is a line of the report.
"""

from __future__ import annotations

import contextlib

from .devices import check_attention, check_bitsandbytes, check_cuda, check_devices, check_paged_memory
from .finding import Finding, guarded
from .machine import check_hub, check_machine, check_network
from .packages import check_packages, check_python

__all__ = ["Finding", "doctor"]

CHECKS = (
    check_python,
    check_packages,
    check_cuda,
    check_bitsandbytes,
    check_devices,
    check_paged_memory,
    check_attention,
    check_machine,
    check_network,
    check_hub,
)


def doctor() -> int:
    """Prints one line per check. Returns 0 when training can run here on some device, else 1."""
    with contextlib.suppress(Exception):  # failed imports are reported below
        import qlora_dist.model  # noqa: F401  (before peft or transformers import bitsandbytes: see `bitsandbytes_import`)
    findings = []
    for check in CHECKS:
        for finding in guarded(check):
            print(finding, flush=True)
            findings.append(finding)
    blocking = [finding.subject for finding in findings if finding.blocks]
    devices = [finding.subject.removeprefix("4-bit on ") for finding in findings if finding.can_train]
    if blocking:
        print(f"\nTraining cannot run here; missing: {', '.join(blocking)}.")
    elif not devices:
        print("\nTraining cannot run here: 4-bit weights work on no device.")
    else:
        print(f"\nTraining can run here, on: {', '.join(devices)}.")
    return 0 if devices and not blocking else 1
