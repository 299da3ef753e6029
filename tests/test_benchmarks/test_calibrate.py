"""Calibration: recovers the constants that raw files were generated from, and refuses files of other origins."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from benchmarks import ours, repro_65b
from benchmarks.cells import Cell
from benchmarks.gpu import queue
from benchmarks.gpu.calibrate import calibrate, gpu_named
from benchmarks.shapes import config_json, shape_of
from qlora_dist.config import load_config
from qlora_dist.errors import UserError
from qlora_dist.memory import constants, gpus, plan_memory, shapes_from_config

CONTEXT, SHARE, WORKSPACE, EFFICIENCY, DEQUANT = 450_000_000, 0.031, 48 * 2**20, 0.52, 0.63  # none is the package's
TRUE_GPU = dataclasses.replace(
    gpus.GPUS["h100"],
    efficiency=EFFICIENCY,
    memory_rate=gpus.GPUS["h100"].memory_rate * DEQUANT / gpus.DEQUANT_EFFICIENCY,
)
ORIGIN = {
    "commit": "0" * 40, "code_hash": "c", "command": "x", "date": "2026-01-01", "device": "NVIDIA H100 80GB HBM3",
    "hardware": {"gpus": [{"name": "NVIDIA H100 80GB HBM3", "bytes": 85_017_493_504}]}, "driver": "580.1",
    "versions": {},
}  # fmt: skip
BASE = Cell("ours", "nf4-dq", "8b", 2048, data="full", rows_per_step=4, micro_rows=4)
CELLS = (
    BASE,
    dataclasses.replace(BASE, recompute="none"),
    dataclasses.replace(BASE, micro_rows=1, rows_per_step=1),
    dataclasses.replace(BASE, shape="1b"),
    dataclasses.replace(BASE, shape="13b", layers=8),
    dataclasses.replace(BASE, shape="1b", method="lora-bf16"),
)


def measured(config, model):
    """(allocated bytes, tokens per second) on a GPU with the true constants."""
    shapes = shapes_from_config(model)
    plan = plan_memory(config, shapes, world_size=1, device_bytes=None)
    speed = gpus.estimate_speed(config, shapes, plan, TRUE_GPU)
    return plan.tensor_bytes - constants.WORKSPACE_BYTES + WORKSPACE, speed.tokens_per_second


def memory_of(allocated):
    return {"allocated_bytes": allocated, "reserved_bytes": round(allocated * (1 + SHARE)), "context_bytes": CONTEXT}


def raw_cell(cell, **changes):
    config = ours.config_of(cell, Path("m"), Path("d"), Path("s"))
    allocated, rate = measured(config, config_json(shape_of(cell.shape, cell.layers)))
    return {
        "cell": cell.as_dict(), "name": cell.name, "status": "ok", "provenance": ORIGIN, "memory": memory_of(allocated),
        "figures": {"tokens_per_second": {"median": rate}}, **changes,
    }  # fmt: skip


def raw_ceilings(**changes):
    rate = DEQUANT * gpus.GPUS["h100"].memory_rate / 1e9
    results = [{"what": "dequantize nf4", "case": f"4096 x 4096{end}", "value": value, "unit": "GB/s"}
               for end, value in (("", 0.9 * rate), (", double", rate), (", double", None))]  # fmt: skip
    return {"benchmark": "ceilings", "provenance": ORIGIN, "results": results, **changes}


def raw_repro(**changes):
    config = load_config(repro_65b.RECIPE, ("train.eval_every=null",))
    allocated, rate = measured(config, repro_65b.llama_65b())
    memory = memory_of(allocated)
    return {
        "benchmark": "repro_65b", "provenance": ORIGIN, "is_full_size": True, "config": config.model_dump(mode="json"),
        "peak_bytes": memory.pop("allocated_bytes"), **memory, "tokens_per_second": rate, **changes,
    }  # fmt: skip


def write(out, **contents):
    for name, content in contents.items():
        path = out / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(content))


@pytest.fixture
def run(tmp_path):
    """What a queue writes: cells below their item, the items' results next to them, and files of peers and failures."""
    out = tmp_path / "gpu"
    for index, cell in enumerate(CELLS):
        write(out, **{f"fair-8b-8l__cell{index}": raw_cell(cell)})
    peer = {"cell": dataclasses.replace(BASE, engine="trl", variant="best").as_dict(), "status": "ok"}
    failed = raw_cell(BASE) | {"status": "failed", "memory": {}}
    write(out, ceilings__ceilings=raw_ceilings(), repro__repro_65b=raw_repro(), fair__peer=peer, fair__broken=failed)
    write(out, smoke={"name": "smoke", "status": "done"}, smoke__smoke={"benchmark": "smoke", "cases": []})
    return out


def found(result):
    return {one["name"]: one for one in result["constants"]}


def after(result):
    return {name: one["after"] for name, one in found(result).items()}


def test_known_constants_are_recovered_and_leave_no_error(run, capsys):
    result = calibrate(run)
    assert after(result) == {
        "CONTEXT_BYTES": CONTEXT,
        "RESERVE_SHARE": pytest.approx(SHARE, rel=1e-6),
        "WORKSPACE_BYTES": pytest.approx(WORKSPACE, rel=1e-3),
        "Gpu.efficiency": pytest.approx(EFFICIENCY, rel=1e-6),
        "DEQUANT_EFFICIENCY": pytest.approx(DEQUANT, rel=1e-6),
    }
    before = {name: one["before"] for name, one in found(result).items()}
    assert before["CONTEXT_BYTES"] == constants.CONTEXT_BYTES and before["Gpu.efficiency"] == 0.40
    for kind, error in result["errors"].items():
        assert error["files"] == len(CELLS) + 1
        assert error["after"]["largest"] < 1e-3 < error["before"]["largest"], kind
    assert json.loads((run / "calibration.json").read_text()) == json.loads(json.dumps(result))
    output = capsys.readouterr().out
    assert "Gpu.efficiency              0.4000        0.5200" in output and "repro/repro_65b.json" in output
    assert calibrate(run)["constants"] == result["constants"], "its own result was read as a measurement"
    # 65B in micro-batches of 512 tokens does not determine a busy GPU's efficiency, but its error is shown
    assert not any("repro" in file or "cell2" in file for file in found(result)["Gpu.efficiency"]["files"])


def test_without_ceilings_cells_of_different_sizes_determine_dequantization(tmp_path):
    sizes = [(4, 2048), (8, 2048), (16, 2048), (4, 1024)]
    cells = [dataclasses.replace(BASE, micro_rows=rows, rows_per_step=rows, row_tokens=t) for rows, t in sizes]
    write(tmp_path, **{f"cell{index}": raw_cell(cell) for index, cell in enumerate(cells)})
    assert after(calibrate(tmp_path))["DEQUANT_EFFICIENCY"] == pytest.approx(DEQUANT, rel=1e-3)
    assert after(calibrate(tmp_path))["Gpu.efficiency"] == pytest.approx(EFFICIENCY, rel=1e-4)


def test_constants_that_files_do_not_determine_stay_with_a_reason(tmp_path):
    write(tmp_path, cell=raw_cell(BASE, memory={"allocated_bytes": 2 * 2**30}, figures={}))
    result = calibrate(tmp_path)
    assert set(after(result).values()) == {None}
    assert result["files"][0]["lacks"] == ["reserved_bytes", "context_bytes", "tokens_per_second"]
    notes = {name: one["note"] for name, one in found(result).items()}
    assert "needs 4 files of different sizes, found 1" in notes["WORKSPACE_BYTES"]
    assert "no cell of full rows" in notes["Gpu.efficiency"] and "no file" in notes["CONTEXT_BYTES"]


def test_a_workspace_smaller_than_other_errors_is_not_fitted(run):
    for index, path in enumerate(sorted(run.glob("fair-8b-8l/*.json"))):
        content = json.loads(path.read_text())
        content["memory"]["allocated_bytes"] = round(content["memory"]["allocated_bytes"] * (1 + 0.02 * (-1) ** index))
        path.write_text(json.dumps(content))
    workspace = found(calibrate(run))["WORKSPACE_BYTES"]
    assert workspace["after"] is None and "not determined" in workspace["note"]


def test_the_context_is_the_median_and_the_reserve_the_largest(run):
    contexts, shares = [], []
    for index, path in enumerate(sorted(run.glob("fair-8b-8l/*.json"))):
        content = json.loads(path.read_text())
        content["memory"]["context_bytes"] = CONTEXT + index * 10**6
        share = 0.01 + 0.005 * index
        content["memory"]["reserved_bytes"] = round(content["memory"]["allocated_bytes"] * (1 + share))
        contexts.append(CONTEXT + index * 10**6)
        shares += [share] if content["memory"]["allocated_bytes"] >= 2**30 else []
        path.write_text(json.dumps(content))
    values = after(calibrate(run))
    assert values["CONTEXT_BYTES"] == statistics.median([*contexts, CONTEXT])
    assert values["RESERVE_SHARE"] == pytest.approx(max([*shares, SHARE]), rel=1e-6)


def test_an_older_file_without_context_bytes_derives_them_from_device_used_bytes(tmp_path):
    content = raw_cell(BASE)
    memory = content["memory"]
    memory["device_used_bytes"] = memory["reserved_bytes"] + memory.pop("context_bytes")
    write(tmp_path, cell=content)
    result = calibrate(tmp_path)
    assert after(result)["CONTEXT_BYTES"] == CONTEXT
    assert result["files"][0]["lacks"] == ["context_bytes (derived from device_used_bytes)"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw_cell(BASE, provenance=ORIGIN | {"device": "a CPU", "hardware": {}, "driver": None}), "measured on a CPU"),
        (raw_ceilings(provenance=ORIGIN | {"driver": None}), "without a GPU and its driver"),
        ({"benchmark": "planned", "provenance": ORIGIN, "results": []}, "planned or simulated"),
        ({"benchmark": "plan_vs_simulation"}, "planned or simulated"),
        (raw_cell(BASE, provenance=ORIGIN | {"device": "NVIDIA H200"}), "several kinds of GPU"),
    ],
)
def test_files_not_measured_on_this_gpu_are_refused(content, message, run, capsys):
    write(run, other=content)
    with pytest.raises(UserError, match=message):
        calibrate(run)
    with pytest.raises(SystemExit) as end:
        queue.main(["calibrate", str(run)])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (run / "calibration.json").exists()


def test_nothing_to_calibrate_from_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no measured cell"):
        calibrate(tmp_path)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"), ("NVIDIA RTX A6000", "a6000"), ("NVIDIA L4", "l4"),
    ],
)  # fmt: skip
def test_a_devices_name_maps_to_its_entry(device, name):
    assert gpu_named(device).name == name


@pytest.mark.parametrize("device", ["NVIDIA L40", "NVIDIA RTX A4000", "AMD Instinct"])
def test_a_device_that_is_not_listed_is_an_error(device):
    with pytest.raises(UserError, match="not among the GPUs"):
        gpu_named(device)
