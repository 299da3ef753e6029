"""The queue of GPU work, run on a CPU with a list of its own: order, time limits, failures alone, what is done."""

import json
import sys

import torch

from benchmarks import provenance
from benchmarks.gpu import queue
from benchmarks.gpu.items import ITEMS, Item


def item(name, code, seconds=30, **options):
    return Item(name, f'python -c "{code}" {{out}}', seconds, "a test", needs=(), device="cpu", **options)


WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1], 'raw.json').write_text('[]')"


def states(items, out):
    return {name: state for name, state, _ in queue.status(items, out)}


def test_items_run_in_order_and_end_alone_and_are_not_run_again(tmp_path):
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
    assert endless["seconds"] < 60 and endless["tail"].strip() == "7"  # what it said before its time was up
    assert all(name in good["provenance"] for name in provenance.FIELDS)
    assert queue.run(items, tmp_path) == []
    assert [result["name"] for result in queue.run(items[1:2], tmp_path, retry=True)] == ["broken"]


def test_a_result_of_other_code_or_another_command_does_not_count(tmp_path):
    items = [item("one", WRITE)]
    queue.run(items, tmp_path)
    assert queue.run(items, tmp_path) == []
    path = tmp_path / "one.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"code_hash": "of other code"}))
    assert states(items, tmp_path) == {"one": "unmeasured"}
    assert "has a result of other code" in queue.status(items, tmp_path)[0][2]
    assert len(queue.run(items, tmp_path)) == 1
    assert states([item("one", "print(1)")], tmp_path) == {"one": "unmeasured"}


def test_an_item_that_can_go_on_is_run_again_until_it_is_done(tmp_path):
    going_on = (
        "import sys, time, pathlib; p = pathlib.Path(sys.argv[1], 'first'); old = p.exists(); p.touch(); "
        "time.sleep(0 if old else 600)"
    )
    items = [item("long", going_on, seconds=3, resumes=True), item("fresh", "print(1)")]
    queue.run(items, tmp_path)
    assert states(items, tmp_path) == {"long": "timeout", "fresh": "done"}
    queue.run(items, tmp_path)
    assert states(items, tmp_path) == {"long": "done", "fresh": "done"}


def test_what_the_machine_lacks_is_named_and_skipped(tmp_path, capsys):
    lacking = Item("lacking", "python -c 0", 10, "a test", needs=("no_such_module",), device="cpu")
    needs_gpus = Item("many", "python -c 0", 10, "a test", needs=(), gpus=99)
    unknown = Item("unknown", "python -m benchmarks.no_such_script", 10, "a test", needs=(), device="cpu")
    assert queue.run([lacking, needs_gpus, unknown], tmp_path) == []
    said = capsys.readouterr().out
    assert "lacks the modules no_such_module" in said and "benchmarks.no_such_script is not part" in said
    assert "needs a CUDA device" in said or "needs 99 GPUs" in said


def test_no_item_starts_that_would_be_cut_to_less_than_half_of_its_time(tmp_path, capsys):
    long, short = item("long", WRITE, seconds=1000), item("short", WRITE, seconds=10)
    assert [result["name"] for result in queue.run([long, short], tmp_path, seconds=queue.MARGIN_SECONDS + 60)] == [
        "short"
    ]
    assert "long: left for another run" in capsys.readouterr().out


def test_ceilings_and_gpu_tests_come_first_and_every_item_fits_into_a_loan():
    assert [one.name for one in ITEMS[:2]] == ["ceilings", "pytest-gpu"]
    assert len({one.name for one in ITEMS}) == len(ITEMS)
    assert all(one.seconds <= 600 for one in ITEMS if one.gpus == 1)
    assert any("repro_65b" in one.command for one in ITEMS)


def test_ceilings_run_on_a_cpu_at_tiny_sizes(tmp_path, monkeypatch):
    from benchmarks.gpu import ceilings

    out = tmp_path / "ceilings.json"
    monkeypatch.setattr(sys, "argv", ["ceilings", "--tiny", "--allow-dirty", "--out", str(out)])
    ceilings.main()
    content = json.loads(out.read_text())
    values = {(entry["what"], entry["case"]): entry["value"] for entry in content["results"]}
    kinds = {what for what, _ in values}
    assert {"gemm bf16", "copy", "dequantize nf4", "attention sdpa forward + backward", "launch"} <= kinds
    assert all(value > 0 for (what, _), value in values.items() if what.startswith(("gemm", "copy", "deq", "launch")))
    if not torch.cuda.is_available():
        assert values["attention flash-attn forward", "1 x 32, 4/2 heads of 16"] is None  # said, not dropped
