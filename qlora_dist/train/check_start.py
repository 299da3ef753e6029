"""Before the model is read: do all ranks run the same code, on devices of one kind, on one run directory, with enough
disk space?

The facts of all ranks are gathered, and every rank reaches the same verdict from the same facts: they stop together,
with a message that names host and rank, after seconds and not after loading. The verdicts are pure functions of the
gathered facts.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch

from ..cluster.own_address import network_id
from ..cluster.provenance import code_digest, device_name
from ..cluster.world import World
from ..config import RunConfig, dump_yaml
from ..config.run_dir import RunDir
from ..data.accumulation import derive_accumulation
from ..errors import RunFailed, UserError, os_errors
from ..files import GIB, format_bytes
from ..memory import MemoryPlan
from ..memory.constants import state_bytes
from ..memory.gpus import without_bfloat16
from ..model import ModelFacts, check_config
from .strategy import check_update

log = logging.getLogger(__name__)
SHARED_PATIENCE_SECONDS = 60.0  # NFS: a new file appears on other nodes when their directory cache expires


@dataclass(frozen=True)
class Facts:
    """The facts of one rank."""

    host: str
    network: str  # equal for the ranks of one node; two nodes may have the same host name
    device: str  # name of the GPU, or the processor kind
    device_type: str  # cuda or cpu
    device_bytes: int  # memory of the GPU, 0 on a CPU
    collective_sum: float  # of 1..N over the ranks
    collective_seconds: float
    sees_run_dir: bool


def check_run(config: RunConfig, world: World, run_dir: RunDir, plan: MemoryPlan) -> str:
    """Checks everything that can be known before data or weights are read: same config and code on all ranks, batch,
    model, target modules, devices, network, disk. Returns the line that says where the run starts."""
    check_same_config(world.gather((socket.gethostname(), dump_yaml(config))))
    derive_accumulation(config.batch.rows_per_step, config.batch.resolved_micro_rows, world.size)
    check_update(config, world)
    check_model(config, world)
    if config.model.compute_dtype == "bfloat16" and world.is_main and is_before_bfloat16(world.device):
        log.warning("%s", without_bfloat16(device_name(world.device)))
    return check_start(
        world,
        run_dir.path,
        checkpoint_bytes=checkpoint_bytes(plan.trainable_parameters, config.optim.name),
        keep=config.train.keep,
        allow_mixed=config.strategy.mixed_devices,
    )


def is_before_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU that does not compute in bfloat16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def check_model(config: RunConfig, world: World) -> ModelFacts:
    """What config.json alone tells about the model. Raises UserError when it cannot be trained as configured."""
    return check_config(
        config.model.name,
        revision=config.model.revision,
        quantization=config.model.quantization,
        target_modules="all-linear" if config.lora is None else config.lora.target_modules,
        experts="shared" if config.lora is None else config.lora.experts,
        row_tokens=config.data.row_tokens,
        device_type=world.device.type,
        weights=config.model.weights,
    )


def check_start(
    world: World,
    run_dir: Path,
    *,
    checkpoint_bytes: int,
    keep: int,
    allow_mixed: bool = False,
    patience_seconds: float = SHARED_PATIENCE_SECONDS,
) -> str:
    """Checks what all ranks need before the model is read; returns the line to print.

    Raises UserError (devices, run directory, disk) or RunFailed (code, collective) on all ranks together.
    """
    code = f"code {code_digest()}, torch {torch.__version__}"
    check_code(world.gather((socket.gethostname(), code)))  # first, as text: other code has other facts
    facts = world.gather(own_facts(world, run_dir, patience_seconds))
    check_collective(facts)
    check_devices(facts, allow_mixed)
    check_shared(facts, run_dir)
    free_bytes = world.from_main(lambda: _require_disk(run_dir, checkpoint_bytes, keep))
    return f"{describe_start(facts, free_bytes)}; {code}"


def own_facts(world: World, run_dir: Path, patience_seconds: float) -> Facts:
    """This rank's facts. Every rank calls it: it looks for rank 0's token and takes part in a sum."""
    on_cuda = world.device.type == "cuda"
    sees_run_dir = _sees_token(world, run_dir, patience_seconds)
    total, seconds = time_collective(world)
    return Facts(
        host=socket.gethostname(),
        network=network_id(),
        device=device_name(world.device),
        device_type=world.device.type,
        device_bytes=torch.cuda.get_device_properties(world.device).total_memory if on_cuda else 0,
        collective_sum=total,
        collective_seconds=seconds,
        sees_run_dir=sees_run_dir,
    )


def _sees_token(world: World, run_dir: Path, patience_seconds: float) -> bool:
    """Whether this rank's run directory is rank 0's: a file with a new unique name must appear here too."""
    token: str = world.from_main(lambda: _write_token(run_dir))
    path, deadline = run_dir / token, time.monotonic() + patience_seconds
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    world.any(not seen)  # rank 0 removes the token after all have looked
    if world.is_main:
        with suppress(OSError):  # a later start removes it
            path.unlink()
    return seen


def _write_token(run_dir: Path) -> str:
    name = f".seen-{uuid.uuid4().hex}"
    with os_errors(f"run_dir {run_dir}: cannot be written", "Nothing that was saved there has changed"):
        (run_dir / name).touch()
    return name


def time_collective(world: World) -> tuple[float, float]:
    """(sum of 1..N over the ranks, seconds) of the second of two small sums: the first one opens connections."""
    own = torch.full((), world.rank + 1.0, dtype=torch.float64, device=world.device)
    world.sum(own).item()
    started = time.perf_counter()
    total = world.sum(own).item()
    return total, time.perf_counter() - started


# --- verdicts ---------------------------------------------------------------------------------------------------------


def check_same_config(configs: Sequence[tuple[str, str]]) -> None:
    """Raises RunFailed, naming the first line that differs, unless all ranks read the same config. `configs`: (host,
    the resolved config) by rank."""
    for rank, (host, text) in enumerate(configs):
        for first, other in zip_longest(configs[0][1].splitlines(), text.splitlines(), fillvalue="nothing"):
            if first != other:
                raise RunFailed(
                    f"the resolved config differs between rank 0 and rank {rank} ({host}); it must be equal on all "
                    f"ranks. Rank 0 ({configs[0][0]}) has `{first.strip()}`, this one `{other.strip()}`. Start all "
                    "ranks with the same file, in the same working directory, where the same files exist"
                )


def check_code(codes: Sequence[tuple[str, str]]) -> None:
    """Raises RunFailed when ranks run different code or another torch. `codes`: (host, code and torch) by rank."""
    odd = _unlike(codes)
    if odd:
        raise RunFailed(
            f"the ranks do not run the same code: rank 0 ({codes[0][0]}) has {codes[0][1]}, but {odd}. Install "
            "the same commit in the same environment on every node"
        )


def check_collective(facts: Sequence[Facts]) -> None:
    """Raises RunFailed when a sum over the ranks is wrong on any of them."""
    expected = len(facts) * (len(facts) + 1) / 2
    wrong = [
        f"rank {rank} ({fact.host}) got {fact.collective_sum:g}"
        for rank, fact in enumerate(facts)
        if fact.collective_sum != expected
    ]
    if wrong:
        raise RunFailed(
            f"a sum over the {len(facts)} ranks should be {expected:g}, but {'; '.join(wrong)}: gradients would be "
            "wrong too. Check the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and that host's driver"
        )


def check_devices(facts: Sequence[Facts], allow_mixed: bool) -> None:
    """Raises UserError when ranks have different devices: the slowest sets the speed, the smallest the memory.

    A rank without a GPU among ranks with one is always an error: they cannot communicate.
    """
    without = [f"rank {rank} ({fact.host})" for rank, fact in enumerate(facts) if fact.device_type == "cpu"]
    if without and len(without) < len(facts):
        raise UserError(
            f"{', '.join(without)} find no GPU, the other ranks do; check the driver (nvidia-smi), "
            "CUDA_VISIBLE_DEVICES and the allocation on these hosts"
        )
    # drivers report a few MiB more or less for the same model
    kinds = [f"{fact.device} {round(fact.device_bytes / GIB)} GiB" for fact in facts]
    odd = _unlike([(fact.host, kind) for fact, kind in zip(facts, kinds, strict=True)])
    if odd and not without and not allow_mixed:
        raise UserError(
            f"the GPUs are of different kinds: rank 0 ({facts[0].host}) has {kinds[0]}, but {odd}. Every step "
            "would wait for the slowest, and the smallest memory decides; ask for one kind (Slurm: --gres=gpu:KIND:N, "
            "--constraint), or set strategy.mixed_devices=true"
        )


def check_shared(facts: Sequence[Facts], run_dir: Path) -> None:
    """Raises UserError when a rank does not see the run directory that rank 0 writes to."""
    blind = [f"rank {rank} ({fact.host})" for rank, fact in enumerate(facts) if not fact.sees_run_dir]
    if blind:
        raise UserError(
            f"run_dir {run_dir} on {', '.join(blind)} is not the one that rank 0 ({facts[0].host}) writes to: a "
            "resume would find other checkpoints there, or none. Choose a run_dir on a file system that all nodes share"
        )


def check_disk(run_dir: Path, free_bytes: int, checkpoint_bytes: int, keep: int, num_there: int) -> None:
    """Raises UserError when the checkpoints that this run keeps, plus one being written, do not fit on the disk."""
    num_more = max(2, keep + 1 - num_there)  # at least the one being written, and the export
    needed = num_more * checkpoint_bytes
    if free_bytes < needed:
        raise UserError(
            f"run_dir {run_dir}: {format_bytes(free_bytes)} are free, {format_bytes(needed)} are needed for {num_more} "
            f"checkpoints of {format_bytes(checkpoint_bytes)} (train.keep {keep}, plus one being written); free "
            "space, lower train.keep, or choose a run_dir on another disk"
        )


def _require_disk(run_dir: Path, checkpoint_bytes: int, keep: int) -> int:
    with os_errors(f"run_dir {run_dir}: its disk does not answer"):
        free_bytes = shutil.disk_usage(run_dir).free
    check_disk(run_dir, free_bytes, checkpoint_bytes, keep, len(list(run_dir.glob("checkpoints/step-*"))))
    return free_bytes


def _unlike(values: Sequence[tuple[str, str]]) -> str:
    """Ranks whose value differs from rank 0's, as text; empty when there are none. `values`: (host, value) by rank."""
    odd = [f"rank {rank} ({host}) has {value}" for rank, (host, value) in enumerate(values) if value != values[0][1]]
    return "; ".join(odd[:4]) + (f"; and {len(odd) - 4} more" if len(odd) > 4 else "")


# --- sizes and texts --------------------------------------------------------------------------------------------------


def checkpoint_bytes(num_trainable: int, optimizer: str) -> int:
    """Bytes of one checkpoint: fp32 weights, optimizer states, and 1 MiB for the JSON files."""
    return 4 * num_trainable + sum(state_bytes(optimizer, num_trainable)) + 2**20


def describe_start(facts: Sequence[Facts], free_bytes: int) -> str:
    """One line: ranks, nodes, devices, time of a collective, disk."""
    nodes = len({fact.network for fact in facts})
    kinds = Counter(fact.device for fact in facts)
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    slowest_ms = 1000 * max(fact.collective_seconds for fact in facts)
    return (
        f"{len(facts)} {'rank' if len(facts) == 1 else 'ranks'} on {nodes} {'node' if nodes == 1 else 'nodes'}: "
        f"{devices}; all-reduce {slowest_ms:.2f} ms; {format_bytes(free_bytes)} free for checkpoints"
    )
