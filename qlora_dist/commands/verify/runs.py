"""Real training runs, each in its own processes, compared by their metrics and adapters."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...cluster.launcher import child_environment
from ...config import RunConfig
from ...config.run_dir import RunDir, read_metrics
from .report import Proof, failed, not_checked, relative_difference
from .variants import SMALL_PARAMETERS, Plan

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 3600.0  # of one run: a run that hangs fails its claim


class RunDied(Exception):
    """A training process failed; the text is its last message."""


@dataclass(frozen=True)
class Place:
    """Where ranks can run."""

    num_ranks: int
    on_cpu: bool
    reason: str = ""  # why there are fewer ranks than requested

    def __str__(self) -> str:
        return f"{self.num_ranks} {'rank' if self.num_ranks == 1 else 'ranks'} on {'CPU' if self.on_cpu else 'GPU'}"


def choose_place(ranks: int, num_gpus: int, num_parameters: int) -> Place:
    """A GPU for each rank; else the CPU if the model is small or there is no GPU; else one rank on a GPU."""
    if num_gpus >= ranks:
        return Place(ranks, on_cpu=False)
    if num_gpus == 0 or num_parameters <= SMALL_PARAMETERS:
        return Place(ranks, on_cpu=True)
    return Place(
        1,
        on_cpu=False,
        reason=f"{ranks} ranks need {ranks} GPUs, found {num_gpus}; {num_parameters / 1e9:.1f} G weights are too many "
        "for the CPU",
    )


def prove_runs(plan: Plan, num_parameters: int) -> list[Proof]:
    """N ranks = 1 rank, this strategy = ddp, interrupted and resumed = uninterrupted."""
    place = choose_place(plan.ranks, plan.num_gpus, num_parameters)
    name = "ddp" if place.reason else plan.config.strategy.name
    claims = (f"{plan.ranks} ranks = 1 rank", f"strategy {plan.config.strategy.name} = ddp", "resumed = uninterrupted")
    tolerance = plan.tolerances.steps
    try:
        whole = run(plan, plan.variant("whole", strategy=name, on_cpu=place.on_cpu), place)
        ddp = whole if name == "ddp" else run(plan, plan.variant("ddp", strategy="ddp", on_cpu=place.on_cpu), place)
        proofs = []
        if place.reason:
            proofs.append(not_checked(claims[0], place.reason))
        elif place.num_ranks > 1:
            one = run(plan, plan.variant("one", strategy="ddp", on_cpu=place.on_cpu), Place(1, place.on_cpu))
            proofs.append(compare_runs(claims[0], one, ddp, tolerance, str(place)))
        if ddp is not whole:
            proofs.append(compare_runs(claims[1], ddp, whole, tolerance, str(place)))
        elif plan.config.strategy.name != "ddp":
            proofs.append(not_checked(claims[1], place.reason))
        resumed = resume(plan, whole, plan.variant("resumed", strategy=name, on_cpu=place.on_cpu), place)
    except RunDied as error:
        return [failed(claim, str(error)) for claim in claims if claim != "strategy ddp = ddp"]
    # kernels on a GPU may sum in any order; on a CPU a resumed run is bit-identical
    exactly = 0.0 if place.on_cpu else tolerance
    return [*proofs, compare_runs(claims[2], whole, resumed, exactly, f"after step {plan.half}, {place}")]


def run(plan: Plan, config: RunConfig, place: Place) -> RunDir:
    """Trains a variant to the end on this machine. Raises RunDied."""
    log.info("verify: run %s, strategy %s, %s", Path(config.run_dir).name, config.strategy.name, place)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={place.num_ranks}"]
    launcher.append(f"--log-dir={plan.folder / 'torchrun'}")  # or it leaves a folder behind
    command = [
        sys.executable,
        *(launcher if place.num_ranks > 1 else []),
        *("-m", "qlora_dist", "train", str(plan.write(config))),
    ]
    with subprocess.Popen(
        command,
        env=child_environment(hide_gpus=place.on_cpu),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        except BaseException as error:
            process.terminate()  # torchrun ends its workers on this signal
            output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            output += f"\nerror: not finished after {TIMEOUT_SECONDS:.0f} s"
    if process.returncode:
        errors = [line for line in output.splitlines() if "error: " in line] or output.strip().splitlines()[-1:]
        raise RunDied(f"run {Path(config.run_dir).name} ended with code {process.returncode}: {' '.join(errors[:1])}")
    return RunDir(Path(config.run_dir))


def resume(plan: Plan, whole: RunDir, config: RunConfig, place: Place) -> RunDir:
    """A resumed run: the folder as it was after half of the steps, trained to the end by new processes."""
    folder = RunDir(Path(config.run_dir))
    checkpoint = f"step-{plan.half:08d}"
    folder.checkpoints.mkdir(parents=True)
    shutil.copytree(whole.checkpoints / checkpoint, folder.checkpoints / checkpoint)
    for path in (whole.config, whole.metrics):
        shutil.copy(path, folder.path)
    return run(plan, config, place)


def compare_runs(claim: str, expected: RunDir, found: RunDir, tolerance: float, note: str) -> Proof:
    """Two runs of the same steps: rows must be equal; losses, norms and weights equal within `tolerance`."""
    left, right = list(read_metrics(expected.metrics)), list(read_metrics(found.metrics))
    for key in ("step", "tokens", "num_labels"):
        seen = [[line[key] for line in lines] for lines in (left, right)]
        if seen[0] != seen[1]:
            return failed(claim, f"{key} by step: {seen[0]} and {seen[1]}: they trained on different rows")
    differences = {
        key: max(abs(b[key] - a[key]) / max(abs(a[key]), 1e-12) for a, b in zip(left, right, strict=True))
        for key in ("loss", "grad_norm")
    }
    differences["weights"] = compare_weights(expected, found)
    if tolerance == 0 and not any(differences.values()) and _digests(expected) != _digests(found):
        return failed(claim, "the last checkpoints differ in their optimizer states")
    # weights after a few updates differ most: Adam turns a gradient of rounding size into a full step
    worst = max(differences, key=lambda key: differences[key])
    return Proof(claim, differences[worst], tolerance, f"{note}; largest in {worst}")


def compare_weights(expected: RunDir, found: RunDir) -> float:
    """Relative L2 difference of the trained weights of two runs, in their last checkpoints."""
    states: list[dict[str, Any]] = [_trained(folder) for folder in (expected, found)]
    if states[0].keys() != states[1].keys():
        return float("inf")
    left, right = (torch.cat([state[key].flatten() for key in sorted(state)]) for state in states)
    return relative_difference(right, left)


def _last(folder: RunDir) -> Path:
    return max(folder.checkpoints.glob("step-*"))


def _trained(folder: RunDir) -> dict[str, torch.Tensor]:
    last = _last(folder)
    path = next(path for path in sorted(last.glob("*.safetensors")) if path.name != "optimizer.safetensors")
    return load_file(path)


def _digests(folder: RunDir) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(_last(folder).glob("*.safetensors"))]
