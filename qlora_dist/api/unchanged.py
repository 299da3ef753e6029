"""What a call of the API leaves as it was: the process around it is a notebook, not a command that ends."""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from ..cluster.quiet import quiet_libraries, same_environment
from ..errors import RunFailed, UserError


@contextmanager
def unchanged() -> Iterator[None]:
    """Around work that sets what belongs to the whole process: environment, random numbers, threads, warnings.
    Libraries are quiet inside.

    An error that is the user's or the run's keeps no frame alive: a notebook keeps the last error, and with its frames
    the model would stay in memory.
    """
    with ExitStack() as undo:
        undo.enter_context(same_environment())
        undo.enter_context(quiet_libraries())
        # of the device that is used: of all, torch would warn on a machine with several
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        undo.enter_context(torch.random.fork_rng(devices))
        undo.enter_context(warnings.catch_warnings())
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        undo.callback(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
        try:
            yield
        except (UserError, RunFailed) as error:
            one: BaseException | None = error
            while one is not None:
                traceback.clear_frames(one.__traceback__)
                one = one.__cause__ or one.__context__
            raise
