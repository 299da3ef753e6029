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
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from ..errors import MachineFailed, RunFailed, UserError, explain_os_error, pack_error, unpack_error
from .device import require_cuda, why_no_cuda
from .heartbeat import BEAT_SECONDS, LOOK_SECONDS, STORE_SECONDS, Heartbeat
from .launcher import launched_ranks, launcher_process
from .node_links import connect_nodes
from .rendezvous import join_store
from .shard_group import ShardGroup
from .stop_signal import StopRequested, StopSignal

TIMEOUT_SECONDS = 600.0
WAIT_FACTOR = 3  # outside of steps: ranks load, evaluate and save at different speeds
# torch's own timeout comes last: it ends a process without naming the others
_BACKEND_MARGIN_SECONDS = 120.0
GATHER_BYTES = 256 * 2**20  # of all ranks together, on rank 0's device while a tensor is gathered
_POLL_SECONDS = (0.02, 0.5)  # of the store: at first, and after a while


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


def _of_machine(what: str, error: Exception) -> Exception:
    """A fault of disk or memory as an error of one paragraph; any other error as it is."""
    if isinstance(error, OSError):
        return explain_os_error(what, error)
    return MachineFailed(f"{what}: host memory is used up") if isinstance(error, MemoryError) else error


def _connections() -> tuple[dist.Store, dist.Store]:
    """Two to the job's store: for the main thread, and for the heartbeat, whose calls end after seconds if they can."""
    default: Any = dist.distributed_c10d._get_default_store()
    own, heartbeat = default.clone(), default.clone()
    heartbeat.set_timeout(datetime.timedelta(seconds=STORE_SECONDS))
    return own, heartbeat


def _backend_timeout(timeout_seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=WAIT_FACTOR * timeout_seconds + _BACKEND_MARGIN_SECONDS)


class World:
    """This process among `size` ranks. Created once, by `World.init`."""

    _has_group_of_one = False
    # of this process: keys of an earlier World may still be in the store
    _num_meetings = 0
    _num_closed = 0

    def __init__(self, state: PartialState, stop: StopSignal, timeout_seconds: float) -> None:
        self._stop = stop
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.local_rank: int = state.local_process_index
        self.local_size: int = launched_ranks().local_size
        self.device: torch.device = own_device(state.device)
        self.is_main: bool = self.rank == 0
        self._has_stepped = False
        self._store: dist.Store | None = None  # None: one process
        store: dist.Store | None = None
        if self.size > 1:
            self._store, store = _connections()
        self._heartbeat = Heartbeat(
            store,
            self.rank,
            self.size,
            socket.gethostname(),
            stop,
            WAIT_FACTOR * timeout_seconds,
            launcher_process(),
        )
        self._timeout_seconds = timeout_seconds

    @classmethod
    def init(
        cls, stop: StopSignal | None = None, timeout_seconds: float = TIMEOUT_SECONDS, device: str = "auto"
    ) -> World:
        """Joins the process group that the launcher (accelerate, torchrun, srun, none) describes.

        `stop` can interrupt the `stoppable` parts. `timeout_seconds` limits a wait within a training step, three times
        that any other wait. `device`: auto (a GPU if there is one), cuda or cpu.

        Raises UserError when the launcher's variables contradict each other or the machine, or without the GPU that
        `device` asks for, and MachineFailed when not all ranks have come within two minutes, or when nodes cannot reach
        each other.
        """
        has_cuda = device != "cpu" and torch.cuda.is_available()
        require_cuda(device, None if has_cuda else why_no_cuda() or "torch finds none (torch.cuda.is_available())")
        ranks = launched_ranks()
        local_rank = ranks.local_rank
        if has_cuda and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{socket.gethostname()}: local rank {local_rank} was started but only {torch.cuda.device_count()} "
                "GPUs are visible; start one process per GPU (num_processes, --nproc-per-node), or check "
                "CUDA_VISIBLE_DEVICES"
            )
        timeout = _backend_timeout(timeout_seconds)
        joined: dict[str, Any] = {}
        if ranks.size > 1 and not dist.is_initialized():
            store = join_store(ranks)
            connect_nodes(store, ranks, has_cuda)
            store.set_timeout(timeout)
            store = dist.PrefixStore("default_pg", store)  # as torch does for a store that it creates
            joined = {"store": store, "rank": ranks.rank, "world_size": ranks.size}
        try:
            state = PartialState(cpu=not has_cuda, timeout=timeout, **joined)
        except RuntimeError as error:
            if not joined:
                raise
            cause = str(error).strip().splitlines()[0]
            raise MachineFailed(
                f"rank {ranks.rank} ({socket.gethostname()}): all {ranks.size} ranks joined, but could not connect to "
                "each other: check that the nodes reach each other on every port (GLOO_SOCKET_IFNAME and "
                f"NCCL_SOCKET_IFNAME name the interface). It reported: {cause}"
            ) from error
        if has_cuda:
            torch.cuda.set_device(own_device(state.device))
        return cls(state, stop if stop is not None else StopSignal(), timeout_seconds)

    def close(self) -> None:
        """Leaves the process group. Not called after a failure: the launcher ends the other ranks.

        Waits on the store first, without a limit: another rank may still send its results to a tracker.
        """
        World._num_closed += 1
        # without the store (its launcher has ended) the collective alone decides
        with suppress(dist.DistError):
            self._meet(f"qlora_dist/closed/{World._num_closed}", "the end")
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

    @property
    def status(self) -> str:
        """What this rank is doing."""
        return self._heartbeat.what

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

    def fail(self, error: Exception) -> Exception:
        """The error with which this rank ends after `error`, once the other ranks know of it. Takes seconds.

        They end with its text. When `error` is only that this rank lost another, the other's own error is returned.
        """
        ended = self.explain(_of_machine(self._heartbeat.what, error))
        self._heartbeat.publish_failure(ended)
        return ended

    def explain(self, error: Exception) -> Exception:
        """The error itself, or for that of a collective one that says why another rank was lost. Takes seconds."""
        is_of_collective = isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and "gloo" in str(error).lower()
        )
        if self.size == 1 or not is_of_collective:
            return error
        if self._heartbeat.failure is not None:
            return self._heartbeat.failure.error()
        cause = str(error).strip().splitlines()[0]
        return RunFailed(
            f"the connection to another rank was lost; {self._heartbeat.who_is_missing()}. Checkpoints are intact: "
            f"start the same command again to resume from the newest. The collective reported: {cause}"
        )

    # --- on the store: work that no limit is known for ----------------------------------------------------------------

    def _meet(self, key: str, what: str, until_stop: bool = False) -> None:
        """Waits until all ranks have come, without a limit: one node may download for hours what another has.

        Raises when a rank fails or its heartbeat stops. `until_stop`: returns once any rank was asked to stop.
        """
        if self._store is None:
            return
        store, amounts = self._store, chain([1], repeat(0))  # this rank counts once
        self.set_status(f"waiting for the other ranks after {what}")
        with suppress(StopRequested):
            self._wait(lambda: store.add(key, next(amounts)) >= self.size, until_stop)

    def _wait(self, is_done: Callable[[], bool], until_stop: bool) -> None:
        """Raises StopRequested when any rank was asked to stop, if `until_stop`."""
        pause, longest = _POLL_SECONDS
        looked = time.monotonic()
        try:
            while not is_done():
                if until_stop and (self._stop.requested or self._heartbeat.is_stop_announced):
                    raise StopRequested
                if self._heartbeat.failure is not None or time.monotonic() - looked > LOOK_SECONDS:
                    self._heartbeat.require_alive()
                    looked = time.monotonic()
                time.sleep(pause)
                pause = min(1.5 * pause, longest)
        except dist.DistError:
            time.sleep(2 * BEAT_SECONDS)  # a launcher that ends takes its store with it: this process will hear of it
            if until_stop and self._stop.requested:
                raise StopRequested from None
            raise

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
        if self.size == 1:
            return float(value)
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        with self.waiting():
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

        After the block each rank waits on the store for the others, however long they take. Raises StopRequested on
        all ranks.
        """
        World._num_meetings += 1
        key = f"qlora_dist/meeting/{World._num_meetings}"
        self.set_status(what)
        with suppress(StopRequested), nullcontext() if has_collectives else self._stop.interrupting():
            yield
        self._meet(key, what, until_stop=True)
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

        When it raises, every rank raises: UserError and RunFailed with the same text, faults of disk and memory as
        MachineFailed, anything else as RunFailed on the other ranks. The function must not contain a collective.
        """
        outcome: list[Any] = [None, None, None]  # kind of failure, text, result
        failure: Exception | None = None
        if self.is_main:
            try:
                outcome[2] = function()
            except Exception as error:
                failure = _of_machine(self._heartbeat.what, error)
                outcome = [*pack_error(failure), None]
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

        They wait on the store, not in a collective, and at its end for all nodes: preparing data can outlast any
        collective's timeout. When a process fails, all fail at once. Inside of `stoppable`.
        """
        if self.size == 1:
            yield
            return
        assert self._store is not None
        store = self._store
        World._num_meetings += 1
        key = f"qlora_dist/meeting/{World._num_meetings}"
        built = f"{key}/{self.rank - self.local_rank}"  # by the node's first process
        try:
            if self.local_rank != 0:
                self._wait(lambda: store.check([built]), until_stop=True)
            yield
        except Exception as error:
            if (ended := self.fail(error)) is error:
                raise
            raise ended from error
        if self.local_rank == 0:
            store.set(built, "done")
        self._meet(key, what, until_stop=True)

    def node_ranks(self) -> int | None:
        """How many ranks each node has; None: not the same everywhere. Called by all ranks."""
        is_alike = len(set(self.gather(self.local_size))) == 1 and self.size % self.local_size == 0
        return self.local_size if is_alike else None

    def shard_group(self, ranks: int | None = None) -> ShardGroup | None:
        """This rank's group of so many consecutive ranks (None: all), over which a base is sharded; None for a group of
        one. Called by all ranks.

        A process group of its own: layers are gathered while gradients are summed, and on one group the order of the
        two would have to be the same on every rank.
        """
        each, timeout = ranks or self.size, _backend_timeout(self._timeout_seconds)
        return ShardGroup.create(self.rank, self.size, each, self.device, timeout)
