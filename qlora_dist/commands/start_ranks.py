"""`qlora-dist train --ranks N`, and `train(config, ranks=N)`: torchrun with N processes of this command here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..cluster.device import visible_gpus, why_no_cuda
from ..cluster.launcher import launched_ranks
from ..errors import UserError

MOST = 1024


def number_of_ranks(wanted: str, device: str, option: str = "--ranks ") -> int:
    """N, or for auto one for each visible GPU, and one without a GPU. Raises UserError."""
    if launched_ranks().size > 1:
        raise UserError(
            f"{option}{wanted} starts processes, but this one was started by a launcher as one of "
            f"{launched_ranks().size}: leave out {option.rstrip(' =')}, or the launcher"
        )
    if wanted == "auto":
        return 1 if device == "cpu" or why_no_cuda() is not None else _num_gpus()
    if not re.fullmatch("[1-9][0-9]{0,3}", wanted) or int(wanted) > MOST:
        raise UserError(f"{option}{wanted}: expected auto or a number of processes from 1 to {MOST}")
    gpus = None if device == "cpu" or why_no_cuda() is not None else visible_gpus()
    if gpus is not None and int(wanted) > gpus:
        raise UserError(
            f"--ranks {wanted}: {gpus} GPUs are visible here, expected at least one for each rank. Use --ranks auto, "
            "or to train on the CPU on purpose --set device=cpu"
        )
    return int(wanted)


def _num_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def start_ranks(ranks: int, words: Sequence[str]) -> NoReturn:
    """Replaces this process by torchrun, which starts `python -m qlora_dist WORDS` as many times."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, _command(ranks, words), _environment(ranks))  # the same process: signals reach torchrun


def run_ranks(ranks: int, words: Sequence[str], say: Callable[[str], None]) -> int:
    """Starts the same as a child, gives its lines to `say` as they come, and returns its exit code.

    KeyboardInterrupt, as of a notebook's stop button, reaches the ranks like Ctrl-C on a terminal: they save and end. A
    second one kills them. Nothing that was started is left behind.
    """
    process = subprocess.Popen(
        _command(ranks, words), env=_environment(ranks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    is_interrupted = False
    try:
        while True:
            try:
                for line in process.stdout:
                    say(line.rstrip("\n"))
                return process.wait()
            except KeyboardInterrupt:
                if is_interrupted:
                    raise
                is_interrupted = True
                os.killpg(process.pid, signal.SIGINT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def _command(ranks: int, words: Sequence[str]) -> list[str]:
    return [
        sys.executable, "-m", "qlora_dist.cluster.agent", "--standalone", "--local-addr=127.0.0.1",
        f"--nproc-per-node={ranks}", "--max-restarts=0", "--signals-to-handle=SIGQUIT", "-m", "qlora_dist", *words,
    ]  # fmt: skip


def _environment(ranks: int) -> dict[str, str]:
    """The ranks share the cores: torchrun would leave each a single one."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))} | os.environ
