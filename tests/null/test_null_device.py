"""The unmodified program, with torch's CUDA build, on a device that accepts every call and computes nothing.

Memory, launches, copies and synchronizations are real there and values are not (patches/sitecustomize.py says which
looks at values are answered). What ends here ends on a card: a rehearsal of what runs on borrowed minutes.
QLORA_DIST_NULL_PYTHON names the interpreter that sees such a device.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.ranks import ROOT, clean_environment
from helpers.tiny_run import changed, metrics_of

from benchmarks.repro_65b import write_inputs
from benchmarks.shapes import Shape, config_json

NULL_PYTHON = os.environ.get("QLORA_DIST_NULL_PYTHON")
PATCHES = Path(__file__).parent / "patches"
SHAPE = Shape(512, 1024, 3, 8, 2, 4096)  # heads of 64: what attention kernels take
GIB = 2**30

pytestmark = [
    pytest.mark.null,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(NULL_PYTHON is None, reason="needs a null CUDA device: set QLORA_DIST_NULL_PYTHON"),
]


def on_null(
    *words: str, timeout: float = 600, gib: float | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python WORDS` with the null device, of `gib` GiB."""
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
    """A run of four steps of two micro-steps, evaluated and saved."""
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


def train(raw: dict[str, Any], folder: Path) -> list[dict[str, int]]:
    """`qlora_dist train` without a launcher; the device's calls of each step, by name."""
    path, counted = folder / "run.yaml", folder / "steps.json"
    path.write_text(yaml.safe_dump(raw))
    require_success(on_null("-m", "qlora_dist", "train", str(path), NULL_GPU_STEPS=str(counted)))
    assert (Path(raw["run_dir"]) / "completed").exists()
    assert len(metrics_of(raw["run_dir"])) == raw["train"]["steps"]
    steps: list[dict[str, int]] = json.loads(counted.read_text())
    return steps


def calls(step: dict[str, int], *parts: str) -> int:
    return sum(number for name, number in step.items() if all(part in name for part in parts))


def test_a_run_without_a_launcher_has_one_host_synchronization_a_step(raw, tmp_path):
    for step in train(raw, tmp_path):
        assert calls(step, "synchronize") == 1
        assert calls(step, "memcpy pageable") == 0 and calls(step, "memcpy", "->pageable") == 1  # what is read
        assert sum(step.values()) > 1000, "nothing was counted"


def test_offload_moves_activations_there_and_back(raw, tmp_path):
    plain = train(raw, tmp_path)
    moved = train(changed(raw, run_dir=str(tmp_path / "moved"), memory__offload_activations=True), tmp_path)
    # of 1 MiB and more, a micro-step: the inputs of 3 recomputed layers and of the last norm
    assert calls(moved[-1], "memcpy d->pinned") - calls(plain[-1], "memcpy d->pinned") == 2 * 4
    assert calls(moved[-1], "memcpy pinned->d") - calls(plain[-1], "memcpy pinned->d") == 2 * 4
    assert calls(moved[-1], "synchronize") == 1


def test_grouped_keys_and_values_are_not_repeated(raw, tmp_path):
    """2 key heads of 8 query heads: repeated they would be written once a layer and micro-step, and kept."""
    for step in train(raw, tmp_path):
        assert calls(step, "repeat_interleave") == 0 and calls(step, "flash_fwd") > 0


@pytest.mark.parametrize("gib", [47.54])
def test_65b_fits_48_gb_with_its_optimizer_states(gib, tmp_path):
    """Full size, the card's size a hard limit: what the allocator reserves, the context and the paged states."""
    out = tmp_path / "65b.json"
    words = ("-m", "benchmarks.repro_65b", "--random-weights", "--steps", "1", "--cap-gib", str(gib))
    done = on_null(*words, "--work", str(tmp_path / "work"), "--out", str(out), gib=gib, timeout=900)
    require_success(done)
    found = json.loads(out.read_text())
    assert abs(found["plan_error"]) < 0.01
    assert found["fits_cap_without_paging"]
    held = found["reserved_bytes"] + found["context_bytes"] + found["paged_optimizer_bytes"]
    assert held < 46.5 * GIB < found["cap_bytes"]


def test_every_gpu_test_runs_up_to_its_first_look_at_values(tmp_path):
    """The tests marked gpu, on the device that has none: those that compare values fail, and only those."""
    report = tmp_path / "junit.xml"
    on_null("-m", "pytest", "-m", "gpu", "-q", "-p", "no:xdist", f"--junitxml={report}", timeout=900)
    failed = _failures(report)
    assert set(failed) <= VALUES_ARE_COMPARED, {name: failed[name] for name in set(failed) - VALUES_ARE_COMPARED}


VALUES_ARE_COMPARED: set[str] = set()


def _failures(report: Path) -> dict[str, str]:
    """Test name, without its parameters -> the first line of why."""
    from xml.etree import ElementTree

    cases = ElementTree.parse(report).getroot().iter("testcase")
    found = {}
    for case in cases:
        for problem in [*case.findall("failure"), *case.findall("error")]:
            found[case.attrib["name"].split("[")[0]] = problem.attrib.get("message", "")[:300]
    return found
