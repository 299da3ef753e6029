"""`qlora-dist train --ranks N`: becomes torchrun with N processes of this command on this machine."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..cluster.device import visible_gpus, why_no_cuda
from ..cluster.launcher import launched_ranks
from ..errors import UserError

MOST = 1024


def number_of_ranks(wanted: str, device: str) -> int:
    """N, or for auto one for each visible GPU, and one without a GPU. Raises UserError."""
    if launched_ranks().size > 1:
        raise UserError(
            f"--ranks {wanted} starts processes, but this one was started by a launcher as one of "
            f"{launched_ranks().size}: leave out --ranks, or the launcher"
        )
    if wanted == "auto":
        return 1 if device == "cpu" or why_no_cuda() is not None else _num_gpus()
    if not re.fullmatch("[1-9][0-9]{0,3}", wanted) or int(wanted) > MOST:
        raise UserError(f"--ranks {wanted}: expected auto or a number of processes from 1 to {MOST}")
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
    """Replaces this process by torchrun, which starts `python -m qlora_dist WORDS` as many times. They share the cores:
    torchrun would leave each a single one."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    command = [
        sys.executable, "-m", "qlora_dist.cluster.agent", "--standalone", "--local-addr=127.0.0.1",
        f"--nproc-per-node={ranks}", "--max-restarts=0", "--signals-to-handle=SIGQUIT", "-m", "qlora_dist", *words,
    ]  # fmt: skip
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)  # the same process: signals reach torchrun
