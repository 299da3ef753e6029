"""`qlora-dist verify`: checks on the user's own model, data and strategy that the mathematics is right.

    variants     the user's config -> small variants of it in a temporary folder
    one_process  packed = alone, accumulation = one batch, loss = transformers', saved = reloaded = stock PEFT
    runs         real `qlora-dist train` processes: N ranks = 1 rank, strategy = ddp, resumed = uninterrupted
    report       tolerances, table, JSON

A defect in training shows as a difference between two ways of computing the same thing. The runs use the very command
that the user will start, with few rows and steps; nothing is written outside of the temporary folder.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from ...cluster.world import World
from ...config import RunConfig
from ...errors import UserError
from ...train.check_start import check_model
from .one_process import prove_on_one_process
from .report import Proof, Report
from .runs import prove_runs
from .variants import Plan

__all__ = ["Plan", "Proof", "Report", "prove"]


def prove(config: RunConfig, *, steps: int = 4, ranks: int = 2) -> Report:
    """Checks every claim about a config. Raises UserError for what must be fixed before anything can be checked."""
    started = time.perf_counter()
    if steps < 2 or ranks < 1:
        raise UserError(
            f"--steps {steps} --ranks {ranks}: expected at least 2 steps, one to interrupt after, and 1 rank"
        )
    with tempfile.TemporaryDirectory(prefix="qlora-dist-verify-") as folder:
        plan = Plan(config, Path(folder), steps, ranks, num_gpus=torch.cuda.device_count())
        world = World.init()
        if world.size != 1:
            raise UserError(
                f"verify starts its own ranks, but was launched on {world.size} ranks; start it as a plain command"
            )
        facts = check_model(plan.single, world)
        proofs = prove_on_one_process(plan, world)
        world.close()
        proofs += prove_runs(plan, facts.num_parameters)
    subject = f"{config.model.name}, strategy {config.strategy.name}, {ranks} ranks, {steps} steps"
    return Report(subject, proofs, time.perf_counter() - started)
