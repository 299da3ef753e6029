"""Runs a function on several real processes over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch

from helpers.renderer import stand_by

ROOT = Path(__file__).resolve().parents[2]
FORK_SERVER = "QLORA_DIST_FORK_SERVER"  # the address of the one that `share_fork_server` has started


def python_path() -> str:
    """PYTHONPATH of child interpreters: the project, its tests, and what was on it already (libraries, on some
    machines)."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([str(ROOT), str(ROOT / "tests"), *filter(None, before)]))


def process_context() -> multiprocessing.context.BaseContext:
    """How tests start processes: forked from a server that has done the imports, or spawned if there is a CUDA device,
    which those imports initialize and which a forked process could not use."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.warm"])
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if FORK_SERVER in os.environ and server._forkserver_address is None:
        # the library has no call to join a server; this is all that it knows of its own
        server._forkserver_address = os.environ[FORK_SERVER]
        server._forkserver_alive_fd = os.pipe()[1]
        server.ensure_running = resource_tracker.ensure_running
    return context


def share_fork_server() -> None:
    """Starts the server here, for this process's children: its imports take six seconds, and so once, not in each."""
    process_context()
    before = [os.dup(number) for number in (1, 2)]
    try:
        with open(os.devnull, "w") as nowhere:  # what ranks print belongs to their tests, not on the terminal
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            forkserver.ensure_running()
    finally:
        for number, copy in zip((1, 2), before):
            os.dup2(copy, number)
            os.close(copy)
    os.environ[FORK_SERVER] = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]


def leave_fork_server() -> None:
    """In a fork of the process that has called `share_fork_server`: this one is not the server's parent, and joins it
    as any other."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address = server._forkserver_pid = None


def clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher around the tests may have set."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "COVERAGE_PROCESS")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": python_path(),
    }


def run_python(
    code: str, *arguments: str, timeout: float = 120, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter. With `check`, a failure shows the child's output."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_forked(code: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """As `run_python` without `check`, in a process forked from the server that has done the imports: for code that
    needs a process of its own, but not a fresh interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("out", "err")]
        process = process_context().Process(target=_forked_main, args=(code, arguments, *files), daemon=True)
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"not finished after {timeout} s\n{Path(files[1]).read_text()}")
        out, err = (Path(file).read_text() for file in files)
    return subprocess.CompletedProcess([code, *arguments], process.exitcode or 0, out, err)


def _forked_main(code: str, arguments: tuple[str, ...], *files: str) -> None:
    redirect(*files)
    torch.set_num_threads(1)
    stand_by()
    sys.argv = ["-c", *arguments]
    ended = 0
    try:
        exec(compile(textwrap.dedent(code), "<forked>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        ended = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        ended = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)


def redirect(out: str, err: str) -> None:
    """Sends what this process prints to files, from here on."""
    for number, file in ((1, out), (2, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def on_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Calls a module-level function on `num_ranks` real processes joined over gloo; returns each rank's result.

    The processes are forked from a server that has done the heavy imports, so a call takes about a second. If a rank
    raises, AssertionError shows every traceback; if one hangs, all are killed after `timeout` seconds. To return an
    exception instead, see `outcome`.
    """
    context = process_context()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        context.Process(target=_rank_main, args=(rank, num_ranks, port, pipe[1], function, arguments), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes):
        process.start()
        sender.close()
    deadline = time.monotonic() + timeout
    results: list[Any] = []
    failures = []
    for rank, (receiver, _) in enumerate(pipes):
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            failures.append(f"rank {rank}: nothing after {timeout} s")
            continue
        try:
            ok, value = receiver.recv()
        except EOFError:
            processes[rank].join(5)
            failures.append(f"rank {rank}: died with exit code {processes[rank].exitcode}")
            continue
        if ok:
            results.append(value)
        else:
            failures.append(f"rank {rank}:\n{value}")
            deadline = min(deadline, time.monotonic() + 5)  # the others may now wait for it forever
    for process in processes:
        process.join(0.1 if failures else 10)
        if process.is_alive():
            process.kill()
    if failures:
        raise AssertionError("\n".join(failures))
    return results


def _rank_main(
    rank: int, num_ranks: int, port: int, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    if rank == 0:
        stand_by()
    try:
        sender.send((True, function(*arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    sender.close()
    sys.stdout.flush()
    os._exit(0)  # a broken process group must not keep the process alive


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
    """(class name, text) of the exception that a call raises, or ("", ""), in a form that `on_ranks` can return."""
    try:
        function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def torchrun(num_ranks: int) -> list[str]:
    """Start of a torchrun command line on this machine, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]


def run_command(command: list[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Runs a command in the clean environment and captures its output; a timeout kills its children too."""
    with subprocess.Popen(
        command,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, err = process.communicate()
            raise AssertionError(f"not finished after {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
