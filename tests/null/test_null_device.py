"""The unmodified program, with torch's CUDA build, on a device that accepts every call and computes nothing.

Memory, launches, copies and synchronizations are real there, values are not (patches/sitecustomize.py patches the
checks of values). What fails here fails on a real card: a dry run for limited GPU time. QLORA_DIST_NULL_PYTHON is the
interpreter that sees such a device.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from helpers.ranks import ROOT, clean_environment
from helpers.tiny_run import changed, metrics_of

from benchmarks.gpu.items import ITEMS
from benchmarks.repro_65b import write_inputs
from benchmarks.shapes import Shape, config_json
from benchmarks.sparse import write_sparse_weights

NULL_PYTHON = os.environ.get("QLORA_DIST_NULL_PYTHON")
PATCHES = Path(__file__).parent / "patches"
SHAPE = Shape(512, 1024, 3, 8, 2, 4096)  # head size 64, as attention kernels require
GIB = 2**30

pytestmark = [
    pytest.mark.null,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(NULL_PYTHON is None, reason="needs a null CUDA device: set QLORA_DIST_NULL_PYTHON"),
]


def on_null(
    *words: str, timeout: float = 600, gib: float | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python WORDS` with a null device of `gib` GiB."""
    assert NULL_PYTHON is not None
    paths = os.pathsep.join([str(PATCHES), str(ROOT)])
    variables = clean_environment() | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "0"} | environment
    if gib is not None:
        variables["NULL_GPU_GIB"] = str(gib)
    return subprocess.run(
        [NULL_PYTHON, *words], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def require_success(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A run of four steps with two micro-steps each, evaluated and saved."""
    write_inputs(tmp_path, config_json(SHAPE), 512, 32)
    rows = {"path": str(tmp_path / "rows.jsonl"), "format": "tokens"}
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"name": str(tmp_path / "model"), "weights": "random"},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"train": [rows], "eval": [rows], "row_tokens": 512, "cache_dir": str(tmp_path / "cache")},
        "batch": {"rows_per_step": 4, "micro_rows": 2},
        "optim": {"name": "adamw"},
        "train": {"steps": 4, "save_every": 2, "eval_every": 4},
        "memory": {"recompute": "full"},
        "logging": {"trackers": []},
    }


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")


def train(raw: dict[str, Any], folder: Path, launcher: tuple[str, ...] = ()) -> list[dict[str, int]]:
    """`qlora_dist train`; returns the device calls of each step, by name."""
    path, counted = folder / "run.yaml", folder / "steps.json"
    path.write_text(yaml.safe_dump(raw))
    require_success(on_null(*launcher, "-m", "qlora_dist", "train", str(path), NULL_GPU_STEPS=str(counted)))
    assert (Path(raw["run_dir"]) / "completed").exists()
    assert len(metrics_of(raw["run_dir"])) == raw["train"]["steps"]
    steps: list[dict[str, int]] = json.loads(counted.read_text())
    return steps


def calls(step: dict[str, int], *parts: str) -> int:
    return sum(number for name, number in step.items() if all(part in name for part in parts))


@pytest.mark.parametrize(
    ("changes", "launcher", "of_library"),
    [
        ({}, (), 0),
        # bitsandbytes waits for the device once in each update, and once more for its pages
        ({"optim__name": "adamw_8bit"}, (), 1),
        ({"optim__name": "paged_adamw_32bit"}, (), 2),
        ({"optim__name": "paged_adamw_8bit"}, (), 2),
        ({}, LAUNCHER, 0),
        ({"strategy__name": "fsdp"}, LAUNCHER, 0),
    ],
    ids=["adamw", "8bit", "paged-32bit", "paged-8bit", "ddp-launched", "fsdp-launched"],
)
def test_a_step_has_one_host_synchronization_and_no_pageable_copy(changes, launcher, of_library, raw, tmp_path):
    first, *others = train(changed(raw, **changes), tmp_path, launcher)
    is_alone = not of_library  # otherwise bitsandbytes creates its states and tables in the first step
    for step in [first, *others] if is_alone else others:
        assert calls(step, "stream synchronize") == 1
        assert calls(step, "synchronize") == 1 + of_library
        assert calls(step, "memcpy pageable") == 0 and calls(step, "memcpy", "->pageable") == 1  # the step's results
        assert sum(step.values()) > 500, "nothing was counted"


def test_offload_moves_activations_there_and_back(raw, tmp_path):
    plain = train(raw, tmp_path)
    moved = train(changed(raw, run_dir=str(tmp_path / "moved"), memory__offload_activations=True), tmp_path)
    # tensors of at least 1 MiB per micro-step: the inputs of 3 recomputed layers and of the last norm
    assert calls(moved[-1], "memcpy d->pinned") - calls(plain[-1], "memcpy d->pinned") == 2 * 4
    assert calls(moved[-1], "memcpy pinned->d") - calls(plain[-1], "memcpy pinned->d") == 2 * 4
    assert calls(moved[-1], "synchronize") == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero2_offload", "zero3"])
def test_every_strategy_trains_evaluates_and_saves_on_one_rank(strategy, raw, tmp_path):
    steps = train(changed(raw, strategy__name=strategy), tmp_path, LAUNCHER)
    assert all(sum(step.values()) > 500 for step in steps), "nothing was counted"
    run = Path(raw["run_dir"])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 1 and (run / "adapter" / "adapter_model.safetensors").exists()


def test_what_was_trained_is_evaluated_and_merged(raw, tmp_path):
    """From files: what is evaluated and merged reads the weights again."""
    write_sparse_weights(tmp_path / "model", tmp_path / "files")
    raw = changed(raw, model={"name": str(tmp_path / "model")})
    train(raw, tmp_path)
    done = on_null("-m", "qlora_dist", "evaluate", raw["run_dir"], "--with-base")
    require_success(done)
    assert "trained: held-out loss" in done.stdout and "base: held-out loss" in done.stdout
    for onto in ("base", "dequantized"):
        merged = tmp_path / onto
        require_success(on_null("-m", "qlora_dist", "merge", raw["run_dir"], str(merged), "--onto", onto))
        weights = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
        assert weights == pytest.approx(2 * SHAPE.parameters, rel=0.01)


def test_grouped_keys_and_values_are_not_repeated(raw, tmp_path):
    """2 key heads for 8 query heads: repeated, they would be written once per layer and micro-step, and kept."""
    for step in train(raw, tmp_path):
        assert calls(step, "repeat_interleave") == 0 and calls(step, "flash_fwd") > 0


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """On a tmpfs, where holes in files are read at the speed of memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="null-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("gib", [47.54])
def test_65b_is_read_trained_and_saved_within_48_gb(gib, tmp_path, memory_folder):
    """All 130 GB of files, with the card's size as a hard limit for reserved memory, the context and paged states."""
    out, work = tmp_path / "65b.json", tmp_path / "work"
    words = ("-m", "benchmarks.repro_65b", "--sparse-weights", str(memory_folder / "65b"), "--steps", "1")
    done = on_null(*words, "--cap-gib", str(gib), "--work", str(work), "--out", str(out), gib=gib, timeout=1200)
    require_success(done)
    found = json.loads(out.read_text())
    assert (found["weights"], found["base_parameters"]) == ("sparse files of zeros", 65_285_660_672)
    assert "is bit-equal to its quantized source" in done.stdout + done.stderr, "the files were not read"
    assert abs(found["plan_error"]) < 0.01
    assert found["fits_cap_without_paging"]
    held = found["reserved_bytes"] + found["context_bytes"] + found["paged_optimizer_bytes"]
    assert held < 46.5 * GIB < found["cap_bytes"]
    assert found["build_peak_bytes"] <= found["peak_bytes"] < found["device_used_bytes"] <= found["cap_bytes"]
    states = work / "run" / "checkpoints" / "step-00000001" / "optimizer.safetensors"
    adapter = work / "run" / "adapter" / "adapter_model.safetensors"
    assert states.stat().st_size > found["paged_optimizer_bytes"]
    assert adapter.stat().st_size > 2 * found["trainable_parameters"]


def test_host_seconds_are_measured_beside_a_stock_trainer_in_turns(tmp_path):
    """Two layers of the 1B shape; TRL may be missing where the tests run."""
    words = ("-m", "benchmarks.null.host", "--shapes", "1b:2", "--only", "none", "--allow-dirty")
    require_success(on_null(*words, "--out", str(tmp_path), timeout=900))
    raw = json.loads((tmp_path / "host.json").read_text())
    cells = {cell["cell"]["engine"]: cell for cell in raw["cells"]}
    assert {name: cell["status"] for name, cell in cells.items() if name != "trl"} == {"ours": "ok", "trainer": "ok"}
    assert cells["trl"]["status"] in ("ok", "missing"), cells["trl"]["reason"]
    for cell in (cells["ours"], cells["trainer"]):
        assert len(cell["turns"]) >= 5 and all(turn["cpu_seconds"] > 0 for turn in cell["turns"])
    assert cells["ours"]["launches"] < cells["trainer"]["launches"]
    assert cells["ours"]["synchronizations"] <= 1.5  # one per step, one more at the end of a turn
    assert cells["ours"]["cpu_seconds_over_ours"] == 1.0 and cells["trainer"]["cpu_seconds_over_ours"] > 0


# Tests and cases that check values midway, by name. Everything else must run to completion
COMPARES_VALUES = {
    "test_kernels_equal_sdpa_with_gradients",
    "test_on_a_gpu_the_kernel_gives_what_the_reference_gives",
    "test_each_gpu_does_the_round_trip_and_reports_paged_memory",
    "test_on_a_gpu_every_claim_of_one_process_is_proved",
    "test_cuda_gathers_every_bit_pattern_in_codes_and_constants_unchanged",
}
ENDS_AT_VALUES = {
    "int8": "",  # any end: bitsandbytes counts outliers
    "graph": "API call is not supported",  # the null device has no graphs
    "fsdp-gather": "",  # any end: the size of a pickled object is copied by a kernel
}


def test_every_gpu_test_runs_up_to_its_first_check_of_values(tmp_path):
    """The tests marked gpu on a device that computes nothing: only those that compare values fail."""
    report = tmp_path / "junit.xml"
    on_null("-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", timeout=900)
    failed = failures(report)
    assert set(failed) <= COMPARES_VALUES, {name: failed[name] for name in set(failed) - COMPARES_VALUES}


def failures(report: Path) -> dict[str, str]:
    """Test name without parameters -> why it failed."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            found[case.attrib["name"].split("[")[0]] = problem.attrib.get("message", "")[:300]
    assert next(ElementTree.parse(report).getroot().iter("testcase"), None) is not None, "no test ran"
    return found


def test_every_smoke_case_runs_to_completion_or_to_a_check_of_values(tmp_path):
    out = tmp_path / "smoke.json"
    on_null("-m", "benchmarks.gpu.smoke", str(out), timeout=600)
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) >= 35
    ended = {case["name"]: case["reason"] for case in cases if not case["ran"] and case["status"] != "skipped"}
    assert set(ended) <= set(ENDS_AT_VALUES), {name: ended[name] for name in set(ended) - set(ENDS_AT_VALUES)}
    assert all(ENDS_AT_VALUES[name] in reason for name, reason in ended.items()), ended
    assert {case["name"] for case in cases if case["ran"]} >= {"plain", "resume", "fsdp", "zero1", "zero2", "zero3"}


@pytest.mark.parametrize("part", [1, 2, 3])
def test_each_command_on_a_bare_machine_finishes_in_time_with_its_files(part, tmp_path):
    """The three commands as given there, except for the interpreter; a GPU machine has more cores than this one."""
    queue = tmp_path / "project"
    shutil.copytree(ROOT, queue, ignore=shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", ".whl"))
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "benchmarks/gpu/lent.sh", str(part), str(tmp_path / "out")],
        cwd=queue, capture_output=True, text=True, timeout=700,
        env=clean_environment()
        | {"PYTHONPATH": str(PATCHES), "QUEUE_PYTHON": str(NULL_PYTHON), "QLORA_DIST_COMMIT": "ab" * 20},
    )  # fmt: skip
    assert time.monotonic() - started < 600
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]  # 1: an item failed on its values
    files = list((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"gpu-part{part}.tgz"]
    assert files[0].stat().st_size < 16 * 2**20
    with tarfile.open(files[0]) as archive:
        names = archive.getnames()
        for item in [item for item in ITEMS if item.part == part]:
            member = archive.extractfile(f"gpu/{item.name}.json")
            assert member is not None
            result = json.loads(member.read())
            assert result["status"] != "timeout" or item.resumes, f"{item.name}: {result['tail'][-500:]}"
            assert result["provenance"]["commit"] == "ab" * 20
            assert [name for name in names if name.startswith(f"gpu/{item.name}/")], f"{item.name} wrote nothing"
