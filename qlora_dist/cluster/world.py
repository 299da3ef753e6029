"""World: this process among the ranks, and the few things ranks do together.

One implementation serves 1..N processes: `world.size > 1` is tested here and nowhere else.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import DeviceMesh

from ..errors import RunFailed, UserError, pack_error, unpack_error
from .heartbeat import Heartbeat
from .shard_group import ShardGroup
from .stop_signal import StopRequested, StopSignal

TIMEOUT_SECONDS = 600.0
WAIT_FACTOR = 3  # outside of steps: ranks load, evaluate and save at different speeds
# torch's own timeout comes last: it ends a process without naming the others
_BACKEND_MARGIN_SECONDS = 120.0
GATHER_BYTES = 256 * 2**20  # of all ranks together, on rank 0's device while a tensor is gathered
BUILD_TIMEOUT_SECONDS = 24 * 3600.0  # tokenizing a large corpus takes hours; its launcher notices a dead builder


def own_device(device: torch.device | None = None) -> torch.device:
    """The device of this process, a CUDA device with its index; None: the current CUDA device, or the CPU.

    Without a launcher Accelerate's device is `cuda`, which `torch.cuda.set_device` refuses and which equals no tensor's
    device (`cuda:0`): code that compares devices would silently do nothing.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _backend_timeout(timeout_seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=WAIT_FACTOR * timeout_seconds + _BACKEND_MARGIN_SECONDS)


class World:
    """This process among `size` ranks. Created once, by `World.init`."""

    _has_group_of_one = False

    def __init__(self, state: PartialState, stop: StopSignal, timeout_seconds: float) -> None:
        self._stop = stop
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.local_rank: int = state.local_process_index
        self.local_size: int = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))  # ranks on this node
        self.device: torch.device = own_device(state.device)
        self.is_main: bool = self.rank == 0
        self._builds = 0
        self._has_stepped = False
        store = dist.distributed_c10d._get_default_store().clone() if self.size > 1 else None  # type: ignore[attr-defined]
        self._heartbeat = Heartbeat(
            store, self.rank, self.size, socket.gethostname(), stop, WAIT_FACTOR * timeout_seconds
        )
        self._timeout_seconds = timeout_seconds

    @classmethod
    def init(cls, stop: StopSignal | None = None, timeout_seconds: float = TIMEOUT_SECONDS) -> World:
        """Joins the process group that the launcher (accelerate, torchrun, srun, none) describes.

        `stop` can interrupt the `stoppable` parts. `timeout_seconds` limits a wait within a training step, three times
        that any other wait. Raises UserError when the launcher's variables contradict the machine.
        """
        has_cuda = torch.cuda.is_available()
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if has_cuda and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{socket.gethostname()}: local rank {local_rank} was started but only {torch.cuda.device_count()} "
                "GPUs are visible; start one process per GPU (num_processes, --nproc-per-node), or check "
                "CUDA_VISIBLE_DEVICES"
            )
        state = PartialState(cpu=not has_cuda, timeout=_backend_timeout(timeout_seconds))
        if has_cuda:
            torch.cuda.set_device(own_device(state.device))
        return cls(state, stop if stop is not None else StopSignal(), timeout_seconds)

    def close(self) -> None:
        """Leaves the process group. Not called after a failure: the launcher ends the other ranks."""
        with self.waiting():
            self.any(False)  # together: a rank that leaves early breaks connections that others still use
        self._heartbeat.close()
        if dist.is_initialized() and not World._has_group_of_one:
            dist.destroy_process_group()

    # --- heartbeat ------------------------------------------------------------------------------------------------

    def set_status(self, what: str, limit_seconds: float | None = None) -> None:
        """What this rank does from now on, for the others' error messages, and how long it, or a wait in it, may last.

        Without `limit_seconds` only waiting for the others is limited, to three times the limit of a step.
        """
        self._heartbeat.set_status(what, limit_seconds)

    def begin_step(self, step: int) -> None:
        """This rank begins a training step. The first step of a process may compile, so it has no step limit."""
        self.set_status(f"step {step}", self._timeout_seconds if self._has_stepped else None)
        self._has_stepped = True

    def restart_limit(self) -> None:
        """This rank makes progress: its time limit starts again."""
        self._heartbeat.set_status()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever completes only when all ranks have reached it."""
        self._heartbeat.set_status(is_waiting=True)
        yield
        self._heartbeat.set_status()

    def explain(self, error: RuntimeError) -> RuntimeError:
        """The error itself, or for that of a collective a RunFailed naming the rank that was lost. Takes seconds."""
        is_of_collective = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if self.size == 1 or not is_of_collective:
            return error
        cause = str(error).strip().splitlines()[0]
        return RunFailed(
            f"the connection to another rank was lost; {self._heartbeat.who_is_missing()}. Checkpoints are intact: "
            f"start the same command again to resume from the newest. The collective reported: {cause}"
        )

    # --- collectives --------------------------------------------------------------------------------------------------

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over ranks; returns a new tensor, equal on all ranks."""
        values = values.clone()
        if self.size > 1:
            with self.waiting():
                dist.all_reduce(values)
        return values

    def max(self, value: float) -> float:
        """The largest value of any rank."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        with self.waiting():
            if self.size > 1:
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return tensor.item()

    def any(self, flag: bool) -> bool:
        """True on all ranks when it is true on any."""
        return self.max(float(flag)) > 0

    def first(self, value: str | None) -> str:
        """The first value in rank order that is not None; at least one rank must have one."""
        return next(found for found in self.gather(value) if found is not None)

    @contextmanager
    def stoppable(self, what: str, has_collectives: bool = False) -> Iterator[None]:
        """A long part of the start that a stop signal to any rank ends on all of them: at once, or at the end of the
        block when it contains collectives, which no rank may leave early.

        Raises StopRequested on all ranks after the block.
        """
        self.set_status(what)
        with suppress(StopRequested), nullcontext() if has_collectives else self._stop.interrupting():
            yield
        if self.any(self._stop.requested):
            raise StopRequested

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain-data value, in rank order, on every rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            with self.waiting():
                dist.all_gather_object(values, value)
        return values

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's tensor (all of one shape), in rank order, in rank 0's host memory; None on the other ranks.

        In pieces: rank 0's device need not hold the tensors of all ranks.
        """
        if self.size == 1:
            return [tensor.cpu()]
        flat = tensor.reshape(-1)
        piece = max(1, GATHER_BYTES // (self.size * tensor.element_size()))
        found: list[list[torch.Tensor]] = [[] for _ in range(self.size)]
        for own in flat.split(piece):
            mine = own.to(self.device).contiguous()  # NCCL moves device memory only
            parts = [torch.empty_like(mine) for _ in range(self.size)] if self.is_main else None
            dist.gather(mine, parts)
            for rank, part in enumerate(parts or ()):
                found[rank].append(part.cpu())
        return [torch.cat(one).view(tensor.shape) for one in found] if self.is_main else None

    def require_group(self) -> None:
        """Creates a process group of one where there is no launcher: DeepSpeed always needs a group."""
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))  # DeepSpeed's stage 3 reads it
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            World._has_group_of_one = True  # until the process exits: DeepSpeed keeps groups derived from it

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Runs a function on rank 0 only and returns its plain-data result on all ranks.

        When it raises, every rank raises: UserError and RunFailed with the same text, anything else as RunFailed on
        the other ranks. The function must not contain a collective.
        """
        outcome: list[Any] = [None, None, None]  # kind of failure, text, result
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome[2] = function()
            except Exception as error:
                failure = error
                outcome = [*pack_error(error), None]
        if self.size > 1:
            with self.waiting():
                dist.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        kind, text, result = outcome
        if kind is not None:
            raise unpack_error(kind, text)
        return result

    def require_equal(self, value: str, what: str) -> None:
        """Raises RunFailed on all ranks unless the value is the same everywhere, naming the ranks that differ."""
        values = self.gather((value, socket.gethostname()))
        odd = [f"rank {rank} ({host})" for rank, (other, host) in enumerate(values) if other != values[0][0]]
        if odd:
            raise RunFailed(f"{what} differs between rank 0 and {', '.join(odd)}; it must be equal on all ranks")

    @contextmanager
    def local_main_first(self, what: str) -> Iterator[None]:
        """The first process of each node runs the block alone, then the node's other processes run it.

        They wait on the store, not in a collective: preparing data can outlast any collective's timeout. When the
        first process fails, they fail at once.
        """
        if self.size == 1:
            yield
            return
        store = dist.distributed_c10d._get_default_store()
        self._builds += 1
        node = self.rank - self.local_rank  # rank of the node's first process
        key = f"qlora_dist/build/{self._builds}/{node}"
        if self.local_rank == 0:
            try:
                yield
            except BaseException as error:
                is_stop = isinstance(error, StopRequested)
                kind, text = ("stop", "") if is_stop else pack_error(error)
                store.set(key, f"{kind} failed: {text}")
                if is_stop:
                    raise  # the other ranks received it too; all agree on it after the block
                # the store lives in rank 0: the others must read this before it exits
                others, deadline = self.local_size - 1, time.monotonic() + 10
                while store.add(f"{key}/seen", 0) < others and time.monotonic() < deadline:
                    time.sleep(0.05)
                raise
            store.set(key, "done")
            return
        started = time.monotonic()
        while not store.check([key]):
            if time.monotonic() - started > BUILD_TIMEOUT_SECONDS:
                raise RunFailed(f"{what}: rank {node} has not finished within {BUILD_TIMEOUT_SECONDS / 3600:.0f} hours")
            time.sleep(0.05)
        state = store.get(key).decode()
        store.add(f"{key}/seen", 1)
        if state != "done":
            kind, _, text = state.partition(" ")
            if kind == "stop":
                raise StopRequested
            raise unpack_error(kind, f"{what}: rank {node} of this node {text}")
        yield

    def shard_group(self) -> ShardGroup | None:
        """All ranks as the group over which a base is sharded; None with one rank. Called by all ranks.

        A process group of its own: layers are gathered while gradients are summed, and on one group the order of the
        two would have to be the same on every rank.
        """
        if self.size == 1:
            return None
        group = dist.new_group(timeout=_backend_timeout(self._timeout_seconds))
        mesh = DeviceMesh.from_group(group, self.device.type)
        return ShardGroup(mesh, self.rank, self.size, self.device)
