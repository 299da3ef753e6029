"""Whole training runs of a tiny model, each with one thing changed, and the commands that use a trained model.

Every run takes three steps over the same four full rows. A run that computes the same thing in another way is compared
with the plain run; a run that computes something else must start near the plain run's loss and learn.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from qlora_dist import commands as cli
from qlora_dist.cluster.launcher import child_environment
from qlora_dist.commands.merge import merge
from qlora_dist.config import parse_config
from qlora_dist.errors import UserError
from qlora_dist.train import setup_model, train

from ..dataset import write_tokenizer
from ..provenance import ROOT
from ..shapes import Shape, write_model
from .smoke_checks import BF16, Bench, Case, Check, Skip

STEPS = 3
# head size 64, as attention kernels require; on CUDA a layer's input is 1 MiB, the smallest tensor that is offloaded
ON_CUDA, ON_CPU = (Shape(512, 1024, 3, 8, 2, 2048), 512), (Shape(128, 256, 2, 2, 1, 512), 64)  # and tokens per row
# mean over N labels of the error in a logit from rounding hidden states to bf16: 2^-8 x the logits' standard deviation
# (about 0.5) x the square root of the number of roundings (a few dozen) is 0.01 for one label, and 0.01 / sqrt(N) for
# the mean, with N above 200. A wrong mask, scale or weight moves it by more than 0.05
LOSS = (5e-3, "bf16: one label's logit is off by about 0.01, the mean over all labels by a fraction of it")
NORM = (4 * BF16, "bf16, relative: a norm over all gradients averages their rounding errors")
EXACT = (0.0, "the same operations in the same order")
# bases in another format: every matrix is off by up to a tenth, a loss near ln(vocabulary) by a few thousandths. That
# would not reveal a base of zeros; the norm of the gradients, which pass through every matrix, does
NEAR = (0.03, "the same weights in another format")
NEAR_NORM = (0.2, "relative: every matrix is off by up to a tenth")


@dataclass(frozen=True)
class Run:
    """A run's results."""

    folder: Path
    losses: list[float]
    norms: list[float]
    num_moved: int = 0  # tensors offloaded to host memory

    @property
    def fall(self) -> float:
        return self.losses[0] - self.losses[-1]


def inputs(bench: Bench) -> Path:
    """The folder with model and rows, created once."""
    shape, row_tokens = ON_CUDA if bench.is_cuda else ON_CPU
    folder = bench.work / "inputs"
    if not (folder / "rows.jsonl").exists():
        write_model(folder / "model", shape)
        write_tokenizer(folder / "model", shape.vocabulary)
        generator = np.random.default_rng(0)
        lengths = [row_tokens, *[row_tokens // 2] * 3, *[row_tokens // 4] * 6]  # fill four rows, with boundaries inside
        lines = []
        for length in lengths:
            ids = [*generator.integers(3, shape.vocabulary, length - 1).tolist(), 2]  # the end token is learned
            lines.append(json.dumps({"input_ids": ids}))
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def raw_config(bench: Bench, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The plain run's config with changed sections; None replaces a section."""
    folder, row_tokens = inputs(bench), (ON_CUDA if bench.is_cuda else ON_CPU)[1]
    raw: dict[str, Any] = {
        "run_dir": str(bench.work / name),
        "model": {"name": str(folder / "model")},
        "lora": {"rank": 8, "alpha": 16},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl"), "format": "tokens"}],
            "row_tokens": row_tokens,
            "cache_dir": str(bench.work / "cache"),
            "num_workers": 1,
        },
        "batch": {"rows_per_step": 4, "micro_rows": 2},
        "optim": {"name": "adamw", "lr": 5e-3},
        "train": {"steps": STEPS},
        "memory": {"recompute": "full"},
        "logging": {"trackers": []},
    }
    for key, value in changes.items():
        raw[key] = {**(raw.get(key) or {}), **value} if isinstance(value, dict) else value
    return raw


def trained(bench: Bench, name: str, changes: dict[str, Any], resume: str = "auto") -> Run:
    """Trains; resumes an earlier run of this name."""
    with _recorded_offloads() as offloads:
        train(parse_config(raw_config(bench, name, changes)), resume)
    return read_run(bench.work / name, sum(one.num_offloaded for one in offloads))


def read_run(folder: Path, num_moved: int = 0) -> Run:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(folder, [line["loss"] for line in lines], [line["grad_norm"] for line in lines], num_moved)


@contextlib.contextmanager
def _recorded_offloads() -> Iterator[list[Any]]:
    """The offload objects that a run creates, which the trainer does not expose."""
    offloads: list[Any] = []
    real = setup_model.ActivationOffload

    class Recorded(real):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            offloads.append(self)

    setup_model.ActivationOffload = Recorded  # type: ignore[misc]
    try:
        yield offloads
    finally:
        setup_model.ActivationOffload = real  # type: ignore[misc]


def plain_run(bench: Bench, name: str = "plain") -> Run:
    """The run that others are compared with; trained once, even if its case was not requested."""
    if (bench.work / name / "completed").exists():
        return read_run(bench.work / name)
    rows = {"path": str(inputs(bench) / "rows.jsonl"), "format": "tokens"}
    shutil.rmtree(bench.work / name, ignore_errors=True)
    data = raw_config(bench, name, {})["data"] | {"eval": [rows]}
    return trained(bench, name, {"data": data, "train": {"steps": STEPS, "save_every": 2, "eval_every": STEPS}})


def same(run: Run, other: Run, steps: slice = slice(None), is_exact: bool = False) -> list[Check]:
    """Losses and gradient norms of two runs, step by step; the largest difference of each."""
    losses = [abs(a - b) for a, b in zip(run.losses[steps], other.losses[steps], strict=True)]
    norms = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(run.norms[steps], other.norms[steps], strict=True)]
    return [
        Check("loss, against the plain run", _worst(losses), *(EXACT if is_exact else LOSS)),
        Check("gradient norm, against the plain run", _worst(norms), *(EXACT if is_exact else NORM)),
    ]


def _worst(values: list[float]) -> float:
    """The largest value; NaN if one is NaN (with `max` it would depend on the order)."""
    return float(np.max(values)) if values else float("nan")


# --- runs -------------------------------------------------------------------------------------------------------------


def plain(bench: Bench) -> list[Check]:
    """Starts at the loss of a model with random weights, and learns."""
    run = plain_run(bench)
    shape = (ON_CUDA if bench.is_cuda else ON_CPU)[0]
    # the loss must fall by far more than the tolerance of comparisons, or other runs would agree whatever they did
    return [
        Check("loss of the first step minus ln(vocabulary)", abs(run.losses[0] - float(np.log(shape.vocabulary))), 0.5,
              "random weights: logits have a standard deviation of about 0.5"),
        Check("fall of the loss", run.fall, 10.0, "at least ten times the tolerance between two runs", 10 * LOSS[0]),
    ]  # fmt: skip


def as_plain(bench: Bench, changes: dict[str, Any], name: str, exact_on_cpu: bool = False) -> list[Check]:
    """The same computation in another way. Bit for bit on a CPU if the operations are the same; on CUDA the order of
    additions in attention's backward pass varies."""
    run = trained(bench, name, changes)
    checks = same(run, plain_run(bench), is_exact=exact_on_cpu and not bench.is_cuda)
    if changes.get("memory", {}).get("offload_activations"):
        checks.append(Check("tensors moved to host memory", run.num_moved, float(10**9), "at least one must move", 1))
    return checks


def learns(bench: Bench, changes: dict[str, Any], name: str, starts_as_plain: bool = False) -> list[Check]:
    """A different computation: starts near the plain run (B is zero: adapters change nothing yet), and learns."""
    run, other = trained(bench, name, changes), plain_run(bench)
    start = Check("loss of the first step, against the plain run", abs(run.losses[0] - other.losses[0]),
                  *(LOSS if starts_as_plain else NEAR))  # fmt: skip
    checks = [start, Check("fall of the loss", run.fall, 10.0, "it must learn", 10 * LOSS[0])]
    if "lora" not in changes:  # the same weights are trained
        checks.append(Check("gradient norm of the first step, against the plain run",
                            abs(run.norms[0] - other.norms[0]) / max(other.norms[0], 1e-30), *NEAR_NORM))  # fmt: skip
    return checks


def eight_bit(bench: Bench, name: str, optimizer: str) -> list[Check]:
    """8-bit states: the same first step, then updates that are off by a few percent."""
    run, other = trained(bench, name, {"optim": {"name": optimizer}}), plain_run(bench)
    fall = run.fall / other.fall if other.fall else float("nan")
    share = Check("fall of the loss, relative to the plain run's", fall, 1.1,
                  "8-bit states: 256 weights share a scale, an update is off by a few percent", 0.9)  # fmt: skip
    return [*same(run, other, slice(0, 1)), share]


def resumed(bench: Bench) -> list[Check]:
    """Stopped after two steps and resumed from its checkpoint: equals the uninterrupted run."""
    for steps in (STEPS - 1, STEPS):
        run = trained(bench, "resume", {"train": {"steps": steps}})
    return same(run, plain_run(bench), is_exact=not bench.is_cuda)


# --- commands ---------------------------------------------------------------------------------------------------------


def _command(*words: str) -> str:
    """The output of a command of the package. Raises RuntimeError if it fails."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = cli.invoke(list(words))
    if code:
        raise RuntimeError(f"{words[0]}: exit code {code}: {output.getvalue()[-500:]}")
    return output.getvalue()


def evaluated(bench: Bench) -> list[Check]:
    """`evaluate` on the saved adapter gives the run's final loss."""
    run = plain_run(bench)
    line = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(_command("evaluate", str(run.folder), "--json").strip().splitlines()[-1])
    difference = abs(found["trained"]["held_out"]["loss"] - line["eval_loss"])
    return [Check("held-out loss, against the run's", difference, *LOSS)]


def generated(bench: Bench) -> list[Check]:
    """`generate` answers two prompts of different lengths in one call."""
    run, file = plain_run(bench), bench.work / "prompts.txt"
    file.write_text("w5 w6 w7\nw8 w9 w10 w11 w12\n")
    words = ("generate", str(run.folder), "--prompts", str(file), "--template", "raw", "--max-new-tokens", "8")
    lines = [line for line in _command(*words).splitlines() if line.startswith("{")]
    return [Check("answers", len(lines), 2, "two prompts", 2)]


def merged(bench: Bench) -> list[Check]:
    """`merge` onto the dequantized base: a 16-bit model with the trained model's logits."""
    out = bench.work / "merged"
    shutil.rmtree(out, ignore_errors=True)
    report = merge(plain_run(bench).folder, out, onto="dequantized", device=bench.device)
    gap = report.gaps["dequantized"] / report.logit_range
    return [Check("largest difference of a logit, relative to the largest logit", gap, 16 * BF16,
                  "bf16: every merged weight and every activation is rounded; worst case over all logits")]  # fmt: skip


def two_ranks(bench: Bench) -> list[Check]:
    """fsdp on two ranks through a launcher: two GPUs, or two CPU processes."""
    if bench.is_cuda and torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    file = bench.work / "two.yaml"
    changes = {"strategy": {"name": "fsdp"}}
    file.write_text(yaml.safe_dump(raw_config(bench, "two", changes)))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qlora_dist", "train"]
    done = subprocess.run(
        [sys.executable, *words, str(file)], cwd=ROOT, env=child_environment(hide_gpus=not bench.is_cuda),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip())[-1500:])
    return same(read_run(bench.work / "two"), plain_run(bench))


def strategy(bench: Bench, name: str) -> list[Check]:
    try:
        return as_plain(bench, {"strategy": {"name": name}}, name)
    except UserError as error:
        if "DeepSpeed" in str(error):  # not installed
            raise Skip(str(error)) from None
        raise


def _cases() -> dict[str, Case]:
    """In order of value: a time limit cuts off the end."""
    exact = {"none": "none", "half": 1}
    cases: dict[str, Case] = {"plain": plain}
    cases |= {f"recompute-{key}": partial(as_plain, changes={"memory": {"recompute": value}}, name=f"recompute-{key}",
                                          exact_on_cpu=True) for key, value in exact.items()}  # fmt: skip
    same_work: dict[str, dict[str, Any]] = {
        "auto": {"memory": {"recompute": "auto"}, "batch": {"micro_rows": "auto"}},
        "attention-sdpa-run": {"model": {"attention": "sdpa"}},
        "kernels-off": {"model": {"kernels": "off"}},
        "paged-adamw-32bit": {"optim": {"name": "paged_adamw_32bit"}},
    }
    cases["offload"] = partial(
        as_plain, changes={"memory": {"offload_activations": True}}, name="offload", exact_on_cpu=True
    )
    cases |= {name: partial(as_plain, changes=changes, name=name) for name, changes in same_work.items()}
    cases |= {name.replace("_", "-"): partial(eight_bit, name=name, optimizer=name)
              for name in ("adamw_8bit", "paged_adamw_8bit")}  # fmt: skip
    cases |= {"resume": resumed, "evaluate": evaluated, "generate": generated, "merge": merged}
    cases |= {name: partial(strategy, name=name) for name in ("zero1", "zero2", "zero2_offload", "zero3", "fsdp")}
    other_work: dict[str, dict[str, Any]] = {
        "no-double-quant": {"model": {"double_quant": False}},
        "fp4": {"model": {"quantization": "fp4"}},
        "int8": {"model": {"quantization": "int8"}},
        "lora-16bit": {"model": {"quantization": "none"}},
        "fp32": {"model": {"compute_dtype": "float32"}},
        "full": {"lora": None, "model": {"quantization": "none"}, "optim": {"lr": 1e-3}},
        "drawn": {"model": {"weights": "random"}},
    }
    cases |= {name: partial(learns, changes=changes, name=name) for name, changes in other_work.items()}
    near = {"dropout": {"lora": {"dropout": 0.05}}, "dora": {"lora": {"variant": "dora"}}}
    cases |= {name: partial(learns, changes=changes, name=name, starts_as_plain=True) for name, changes in near.items()}
    return cases


CASES = _cases()
GROUPS: dict[str, Case] = {"fsdp-two-ranks": two_ranks}
