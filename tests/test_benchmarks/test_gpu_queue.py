"""The GPU queue, run on a CPU with its own list of items: order, time limits, isolated failures, finished items."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from helpers.ranks import ROOT, clean_environment

from benchmarks import provenance, throughput
from benchmarks.gpu import machine, queue
from benchmarks.gpu.items import ITEMS, LATER, PART_SECONDS, Item
from benchmarks.gpu.pack import LARGEST_LOG_BYTES, pack


def item(name, code, seconds=30, **options):
    return Item(name, f'python -c "{code}" {{out}}', seconds, "a test", needs=(), device="cpu", **options)


WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1], 'raw.json').write_text('[]')"


def states(items, out):
    return {name: state for name, state, _ in queue.status(items, out)}


@pytest.mark.launched
def test_items_run_in_order_in_isolation_and_only_once(tmp_path):
    items = [
        item("good", WRITE),
        item("broken", "raise SystemExit(3)"),
        item("endless", "import time; print(7, flush=True); time.sleep(600)", seconds=2),
        item("after", "print(8)"),
    ]
    assert set(states(items, tmp_path).values()) == {"unmeasured"}
    results = queue.run(items, tmp_path)
    assert [result["name"] for result in results] == ["good", "broken", "endless", "after"]
    assert states(items, tmp_path) == {"good": "done", "broken": "failed", "endless": "timeout", "after": "done"}
    good, broken, endless, _ = results
    assert good["files"] == ["good/raw.json"] and broken["exit_code"] == 3
    assert endless["seconds"] < 600 and endless["tail"].strip() == "7"  # its output before its time was up
    assert all(name in good["provenance"] for name in provenance.FIELDS)
    assert queue.run(items, tmp_path) == []
    assert [result["name"] for result in queue.run(items[1:2], tmp_path, retry=True)] == ["broken"]


def test_a_result_from_other_code_or_another_command_does_not_count(tmp_path):
    items = [item("one", WRITE)]
    queue.run(items, tmp_path)
    assert queue.run(items, tmp_path) == []
    path = tmp_path / "one.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"code_hash": "other"}))
    assert states(items, tmp_path) == {"one": "unmeasured"}
    assert "has a result from other code" in queue.status(items, tmp_path)[0][2]
    assert len(queue.run(items, tmp_path)) == 1
    assert states([item("one", "print(1)")], tmp_path) == {"one": "unmeasured"}


def test_an_item_that_can_resume_is_run_again_until_it_is_done(tmp_path):
    resuming = (
        "import sys, time, pathlib; p = pathlib.Path(sys.argv[1], 'first'); old = p.exists(); p.touch(); "
        "time.sleep(0 if old else 600)"
    )
    items = [item("long", resuming, seconds=3, resumes=True), item("fresh", "print(1)")]
    queue.run(items, tmp_path)
    assert states(items, tmp_path) == {"long": "timeout", "fresh": "done"}
    queue.run(items, tmp_path)
    assert states(items, tmp_path) == {"long": "done", "fresh": "done"}


def test_an_item_is_skipped_with_what_the_machine_lacks(tmp_path, capsys):
    lacking = Item("lacking", "python -c 0", 10, "a test", needs=("no_such_module",), device="cpu")
    needs_gpus = Item("many", "python -c 0", 10, "a test", needs=(), gpus=99)
    unknown = Item("unknown", "python -m benchmarks.no_such_script", 10, "a test", needs=(), device="cpu")
    assert queue.run([lacking, needs_gpus, unknown], tmp_path) == []
    output = capsys.readouterr().out
    assert "lacks the modules no_such_module" in output and "benchmarks.no_such_script is not part" in output
    assert "needs a CUDA device" in output or "needs 99 GPUs" in output


def test_an_item_does_not_start_with_less_than_half_of_its_time_left(tmp_path, capsys):
    long, short = item("long", WRITE, seconds=1000), item("short", WRITE, seconds=10)
    assert [result["name"] for result in queue.run([long, short], tmp_path, seconds=queue.MARGIN_SECONDS + 60)] == [
        "short"
    ]
    assert "long: left for another run" in capsys.readouterr().out


def test_the_parts_are_in_order_of_value_and_each_fits_into_one_command():
    parts = {part: [one for one in ITEMS if one.part == part] for part in (1, 2, 3)}
    assert [one.name for one in parts[1]] == ["smoke", "repro-65b", "pytest-gpu"]
    assert [one.name for one in parts[2]] == ["ceilings", "fair-8b-8l"]
    assert [one.name for one in parts[3]] == ["depth-8b", "peaks-1b"]
    assert [one.part for one in ITEMS] == sorted(one.part for one in ITEMS)
    assert {one.part for one in ITEMS} == {1, 2, 3, LATER} and len({one.name for one in ITEMS}) == len(ITEMS)
    for part in parts.values():
        assert sum(one.seconds for one in part) + queue.MARGIN_SECONDS <= PART_SECONDS
        # the estimates leave a margin for their error
        assert 0 < sum(one.estimate for one in part) <= 0.85 * PART_SECONDS
        assert all(one.gpus == 1 and 0 < one.estimate <= one.seconds for one in part)
    assert all(one.seconds <= 600 for one in ITEMS if one.gpus == 1)


def test_items_request_no_more_managed_memory_than_is_free_and_keep_what_they_wrote():
    commands = {one.name: one.command for one in ITEMS}
    assert "--crowd" not in commands["repro-65b"] and "--steps 3" in commands["repro-65b"]
    for one in ITEMS:
        assert "{out}" in one.command
        if "benchmarks.throughput" in one.command:
            assert one.resumes and "--resume" in one.command and "--scratch {scratch}" in one.command


def test_the_queue_itself_never_touches_cuda(tmp_path, monkeypatch):
    """A context in the queue's process would take half a GiB from every item."""
    machine.machine.cache_clear()

    def touched(*arguments, **options):
        raise AssertionError("the queue's own process used CUDA")

    names = ("is_available", "device_count", "mem_get_info", "get_device_name", "get_device_properties", "init")
    for name in names:
        monkeypatch.setattr(torch.cuda, name, touched)
    items = [item("good", WRITE), Item("on-a-gpu", "python -c 0", 10, "a test", needs=(), gpus=99, device_gib=1)]
    results = queue.run(items, tmp_path)
    assert [result["status"] for result in results] == ["done"]
    queue.status(items, tmp_path)
    # and the facts are known: another process queried them
    assert results[0]["provenance"]["hardware"]["num_cpus"] and results[0]["provenance"]["versions"]["torch"]
    assert not torch.cuda.is_initialized()


def test_the_machine_is_queried_once_and_a_device_that_cannot_be_queried_is_an_error(monkeypatch):
    machine.machine.cache_clear()
    monkeypatch.setattr(machine, "_QUERY", """print("a library's line"); print('{"gpu_bytes": [7], "origin": {}}')""")
    assert machine.machine() is machine.machine() and machine.machine().gpu_bytes == (7,)
    machine.machine.cache_clear()
    monkeypatch.setattr(machine, "_QUERY", "raise SystemExit('no driver')")
    with pytest.raises(RuntimeError, match="cannot be queried: no driver"):
        machine.machine()
    machine.machine.cache_clear()


# --- cut --------------------------------------------------------------------------------------------------------------

CUT = """
import sys
from pathlib import Path
from benchmarks.gpu import queue
from benchmarks.gpu.items import Item
from benchmarks.gpu.machine import Machine

queue.machine = lambda: Machine((), {})  # querying takes seconds
write = "import sys, time, pathlib; pathlib.Path(sys.argv[1], 'raw.json').write_text('[1]'); "
here = {"needs": (), "device": "cpu", "part": 1}
queue.ITEMS = (
    Item("first", f'python -c "{write}" {{out}}', 30, "a test", **here),
    # its file comes last: who sees it has the output as well
    Item("second", f'python -c "print(5, flush=True); {write} time.sleep(float(sys.argv[2]))" {{out}} 600', 900,
         "a test", **here),
    Item("third", f'python -c "{write}" {{out}}', 30, "a test", **here),
    Item("later", f'python -c "{write}" {{out}}', 30, "a test", **here | {"part": 4}),
)
queue.main(sys.argv[1:])
"""


def start_queue(*words):
    environment = clean_environment()
    return subprocess.Popen([sys.executable, "-c", CUT, *map(str, words)], env=environment, cwd=ROOT)


def wait_for(path, seconds=60):
    ends = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < ends, f"{path} did not appear"
        time.sleep(0.05)


def alive(out):
    """Live processes of this queue's item `second`."""
    found = []
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                words = Path(f"/proc/{folder}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            found += [folder] if str(out / "second") in words else []
    return found


@pytest.mark.launched
def test_a_stopped_queue_keeps_and_packs_what_it_wrote_and_continues_from_there(tmp_path):
    out, archive = tmp_path / "gpu", tmp_path / "home" / "gpu-part1.tgz"
    process = start_queue("run", out, "--part", 1, "--pack", archive)
    wait_for(out / "second" / "raw.json")
    wait_for(archive)  # after the first item, not only at the end
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not alive(out), "the item outlived its queue"
    assert json.loads((out / "first.json").read_text())["status"] == "done"
    cut = json.loads((out / "second.json").read_text())
    assert (cut["status"], cut["files"], cut["tail"].strip()) == ("cut", ["second/raw.json"], "5")
    assert not (out / "third.json").exists()

    # on another machine: the queue continues from the unpacked archive
    elsewhere = tmp_path / "elsewhere"
    with tarfile.open(archive) as tar:
        tar.extractall(elsewhere, filter="data")
    assert (elsewhere / "gpu" / "second" / "raw.json").read_text() == "[1]"
    (elsewhere / "gpu" / "second" / "raw.json").unlink()
    resumed = start_queue("run", elsewhere / "gpu", "--part", 1, "--seconds", 520)  # more than half of the second's
    wait_for(elsewhere / "gpu" / "second" / "raw.json")
    resumed.send_signal(signal.SIGTERM)
    assert resumed.wait(30) == 143
    dates = [
        json.loads((folder / "first.json").read_text())["provenance"]["date"] for folder in (out, elsewhere / "gpu")
    ]
    assert dates[0] == dates[1], "a finished item was run again"


@pytest.mark.launched
def test_an_item_dies_with_its_queue_even_if_that_is_killed(tmp_path):
    process = start_queue("run", tmp_path / "gpu", "--only", "second")
    wait_for(tmp_path / "gpu" / "second" / "raw.json")
    assert alive(tmp_path / "gpu")
    process.kill()
    process.wait()
    ends = time.monotonic() + 10
    while alive(tmp_path / "gpu"):
        assert time.monotonic() < ends, "the item is still running, and with it its GPU memory is taken"
        time.sleep(0.1)


@pytest.mark.launched
def test_an_item_that_had_less_than_its_full_time_runs_again(tmp_path):
    slow = item("slow", "import time; time.sleep(600)", seconds=2)
    (result,) = queue.run([slow], tmp_path, seconds=queue.MARGIN_SECONDS + 1.8)
    assert (result["status"], result["exit_code"]) == ("cut", None)
    (result,) = queue.run([slow], tmp_path)
    assert result["status"] == "timeout"  # it had its full time: not again
    assert queue.run([slow], tmp_path) == []


# --- packed -----------------------------------------------------------------------------------------------------------


def test_the_archive_stays_within_its_limit_and_small_results_go_first(tmp_path):
    out = tmp_path / "gpu"
    noise = random.Random(0).randbytes
    contents = {
        "smoke.json": b"{}",
        "smoke/smoke.json": noise(1000),
        "pytest-gpu/junit.xml": b"<x/>",
        "depth-8b/trace.json": noise(400_000),
        "depth-8b/larger.json": noise(900_000),
        "a.log": b"start" + bytes(3 * LARGEST_LOG_BYTES) + b"end",
        "repro/model.safetensors": noise(1000),
    }
    for name, content in contents.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    cell = tmp_path / "gpu-scratch" / "cells" / "8b_ours"
    cell.mkdir(parents=True)
    (cell / "log.txt").write_text("why a cell failed")
    archive = tmp_path / "home.tgz"
    assert pack(out, archive, 1_000_000) == ["depth-8b/larger.json"]
    assert archive.stat().st_size <= 1_000_000
    with tarfile.open(archive) as tar:
        found = {entry.name: tar.extractfile(entry).read() for entry in tar}
    assert set(found) == {
        "gpu/smoke.json", "gpu/smoke/smoke.json", "gpu/pytest-gpu/junit.xml", "gpu/depth-8b/trace.json", "gpu/a.log",
        "gpu/cells/8b_ours.log", "gpu/left_out.json",
    }  # fmt: skip
    assert found["gpu/smoke/smoke.json"] == contents["smoke/smoke.json"]
    assert found["gpu/a.log"].endswith(b"end") and len(found["gpu/a.log"]) == LARGEST_LOG_BYTES
    assert json.loads(found["gpu/left_out.json"]) == ["depth-8b/larger.json"]
    assert list(tmp_path.glob(".*.part")) == []


@pytest.mark.launched
def test_one_command_on_a_bare_machine_writes_one_archive_and_reports_what_it_lacks(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("would measure")
    variables = {"LENT_WHEELS": str(tmp_path / "none"), "LENT_SECONDS": "60", "QUEUE_PYTHON": sys.executable}
    work = tmp_path / "checkout"
    for name in ("benchmarks", "qlora_dist"):  # its results go to the checkout's build/gpu
        work.mkdir(exist_ok=True)
        (work / name).symlink_to(ROOT / name)
    environment = clean_environment() | variables
    script = (work / "benchmarks" / "gpu" / "lent.sh").read_text()
    assert 'cd "$(dirname' in script
    done = subprocess.run(
        ["bash", "benchmarks/gpu/lent.sh", "2", str(tmp_path / "home"), "--only", "ceilings"],
        cwd=work, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ceilings: skipped, needs a CUDA device" in done.stdout and "part 2" in done.stdout
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["gpu-part2.tgz"]


def test_ceilings_run_on_a_cpu_at_tiny_sizes(tmp_path, monkeypatch):
    from benchmarks.gpu import ceilings

    out = tmp_path / "ceilings.json"
    monkeypatch.setattr(sys, "argv", ["ceilings", "--tiny", "--allow-dirty", "--out", str(out)])
    ceilings.main()
    content = json.loads(out.read_text())
    assert content["part_seconds"].keys() == set(ceilings.PARTS) and content["l2_cache_bytes"] >= 0
    timed = [entry for entry in content["results"] if entry["value"]]
    assert all(entry["calls_per_sample"] >= 20 and entry["num_sets"] >= 1 for entry in timed)
    assert all(entry["num_sets"] >= 3 for entry in timed if entry["what"].startswith(("gemm", "deq", "attention")))
    values = {(entry["what"], entry["case"]): entry["value"] for entry in content["results"]}
    kinds = {what for what, _ in values}
    assert {"gemm bf16", "copy", "dequantize nf4", "attention sdpa forward + backward", "launch"} <= kinds
    assert all(value > 0 for (what, _), value in values.items() if what.startswith(("gemm", "copy", "deq", "launch")))
    if not torch.cuda.is_available():
        assert values["attention flash-attn forward", "1 x 32, 4/2 heads of 16"] is None  # recorded, not dropped


def test_every_preset_that_an_item_uses_exists():
    used = {words[words.index("--preset") + 1] for item in ITEMS if "--preset" in (words := item.command.split())}
    assert len(used) >= 4 and used <= set(throughput.PRESETS)
