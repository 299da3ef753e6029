"""The benchmark suite at small size: cells in turns, peers of the same work, isolated failures, provenance, report."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.browser import CUT, chromium

from benchmarks import cells, faults, figures, inputs, profiling, provenance, report, throughput, work, worker
from benchmarks.cells import Cell, Group, Preset
from benchmarks.shapes import SHAPES
from qlora_dist.data.loader import Loader
from qlora_dist.data.packing import pack_best_fit
from qlora_dist.errors import UserError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small real run: two methods of this package and a stock Trainer, in turns."""
    out = tmp_path_factory.mktemp("results") / "cpu"
    scratch = tmp_path_factory.mktemp("scratch")
    preset = dataclasses.replace(cells.tiny(), profile_steps=2)
    results = throughput.run(preset, out, command="python -m benchmarks.throughput --preset tiny", scratch=scratch)
    return {result["name"]: result for result in results}, out, scratch


def by_engine(measured, engine, method="nf4-dq"):
    found = [r for r in measured[0].values() if r["cell"]["engine"] == engine and r["cell"]["method"] == method]
    assert len(found) == 1
    return found[0]


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.mark.launched
def test_every_cell_has_all_its_samples_and_results(measured):
    for result in measured[0].values():
        assert result["status"] == "ok", result["reason"]
        assert len(result["samples"]) >= 20
        values = result["figures"]["tokens_per_second"]
        assert 0 < values["least"] <= values["quartile_low"] <= values["median"] <= values["quartile_high"]
        assert result["figures"]["label_tokens_per_second"]["median"] < values["median"]
        assert result["memory"]["steps_peak_rss_bytes"] > result["memory"]["peak_bytes"] > 0
        assert result["startup_seconds"] > 0
        # random weights with small logits: the loss of a uniform guess, ln 512
        assert result["first_loss"] == pytest.approx(math.log(512), abs=0.15)
        parts = sum(result["phases"][name] for name in ("data", "forward", "backward", "communication", "optimizer"))
        assert parts + result["phases"]["other"] == pytest.approx(result["phases"]["total"], rel=0.05)
        assert result["phases"]["forward"] > 0 and result["phases"]["backward"] > 0


@pytest.mark.launched
def test_every_cell_has_a_kernel_table_and_the_state_of_its_device(measured):
    for name, result in measured[0].items():
        raw = json.loads((measured[1] / f"{name}.json").read_text())
        table = raw["profile"]
        assert table["num_steps"] == 2 and table["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
        assert 0 < len(table["kernels"]) <= profiling.MAX_ROWS and table["busy_share"] > 0
        names = {row["name"] for row in table["kernels"]}
        assert torch.cuda.is_available() or names & {"aten::mm", "aten::addmm"}, names
        longest = [row["microseconds_per_step"] for row in table["kernels"]]
        assert longest == sorted(longest, reverse=True)
        assert len(result["phase_samples"]) == 1  # the instrumented step, apart from the profiled ones
        assert raw["device_state"].keys() == {"before", "after"}
        if torch.cuda.is_available():
            assert raw["device_state"]["after"]["reserved_peak_bytes"] >= raw["memory"]["allocated_bytes"]


def test_a_peer_that_is_not_installed_is_missing_before_its_inputs_are_created(tmp_path, monkeypatch):
    """On a machine without TRL its cells must not take minutes to create 16 GB of random weights."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(inputs, "prepare", lambda *_: pytest.fail("inputs were created"))
    preset = cells.depth()
    trl = tuple(cell for group in preset.groups for cell in group.cells if cell.engine == "trl")
    only = dataclasses.replace(preset, groups=(Group(trl, False, "a test"),))
    results = throughput.run(only, tmp_path / "out", command="a test", scratch=tmp_path / "scratch")
    assert [result["status"] for result in results] == ["missing"] and "pip install trl" in results[0]["reason"]


def test_an_interrupted_run_has_compared_what_it_measured(tmp_path, monkeypatch):
    """The raw file of each cell is complete before the next cell starts: a time limit may interrupt the list."""
    ours = Cell("ours", "nf4-dq", "tiny", 64)
    peer = dataclasses.replace(ours, engine="trainer", variant="best")

    def one_by_one(run, group):
        yield throughput._without_result(ours, "ok", "") | {"first_loss": 2.0}
        yield throughput._without_result(peer, "ok", "") | {"first_loss": 2.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput.Run, "_one_by_one", one_by_one)
    monkeypatch.setattr(throughput.Run, "_gradients", lambda run, name: {"a": torch.ones(4)})
    monkeypatch.setattr(figures, "one_line", lambda result: "")
    preset = Preset((Group((ours, peer), in_turns=False),), 1, 1, 1, 0, 60)
    with pytest.raises(KeyboardInterrupt):
        throughput.run(preset, tmp_path / "out", command="a test", scratch=tmp_path / "scratch")
    cut = json.loads((tmp_path / "out" / f"{peer.name}.json").read_text())
    assert cut["same_work"]["is_same"] is True and cut["same_work"]["reference"] == ours.name


@pytest.mark.launched
def test_a_stock_trainer_does_the_same_work_from_the_same_weights_and_tokens(measured):
    ours, theirs = by_engine(measured, "ours"), by_engine(measured, "trainer")
    assert theirs["same_work"]["reference"] == ours["name"]
    assert theirs["same_work"]["gradient_cosine"] > work.SAME_COSINE
    assert theirs["same_work"]["is_same"]
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-3)  # bf16 logits against fp32 sums
    assert [s["tokens"] for s in theirs["samples"]] == [s["tokens"] for s in ours["samples"]]
    assert [s["labels"] for s in theirs["samples"]] == [s["labels"] for s in ours["samples"]]
    assert theirs["items"]["base"] == ours["items"]["base"]


@pytest.mark.launched
def test_four_bit_weights_save_exactly_the_expected_bytes_over_sixteen_bit_ones(measured):
    shape = SHAPES["tiny"]
    linear = shape.linear_parameters - shape.vocabulary * shape.hidden
    saved = by_engine(measured, "ours", "lora-bf16")["items"]["base"] - by_engine(measured, "ours")["items"]["base"]
    # 2 bytes minus half a byte and one byte of constant per 64 weights; each of 14 matrices has tables of 16 and 256
    # fp32 codes, and a few more bytes
    assert saved == pytest.approx(linear * (2 - 0.5 - 1 / 64) - 14 * (64 + 1024), rel=0.001)


@pytest.mark.launched
def test_every_raw_file_has_its_provenance(measured):
    files = list(measured[1].glob("*.json"))
    assert len(files) == 3
    for path in files:
        origin = json.loads(path.read_text())["provenance"]
        assert all(name in origin for name in provenance.FIELDS)
        assert origin["code_hash"] == provenance.code_hash()
        # the version of a CUDA build has a suffix, 2.11.0+cu130; the package metadata may not
        assert origin["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert origin["commit_source"] == "git"
        assert origin["hardware"]["num_cpus"] >= 1


@pytest.mark.launched
def test_the_speed_of_nf4_against_sixteen_bits_is_about_what_was_recorded(measured):
    """A ratio, not seconds: the same on a fast and a slow machine. The tolerance is wide: both step in turns, but tiny
    steps on a busy machine vary by half."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "ratios.json").read_text())
    for name, ratio in figures.ratios(list(measured[0].values())).items():
        assert recorded[name] / 3 < ratio < recorded[name] * 3, name


@pytest.mark.launched
def test_a_resumed_run_keeps_what_this_code_has_measured(measured, tmp_path):
    results, out, _ = measured
    shutil.copytree(out, tmp_path / "out")
    one = Cell(**by_engine(measured, "ours")["cell"])
    preset = Preset((Group((one,), in_turns=False),), 1, 1, 1, 0, 0.01)  # a new measurement would run out of time
    again = throughput.run(preset, tmp_path / "out", command="", scratch=tmp_path / "scratch", resume=True)
    assert again[0]["samples"] == results[one.name]["samples"]


# --- cells that fail --------------------------------------------------------------------------------------------------


@pytest.mark.launched
def test_a_cell_that_does_not_fit_or_takes_too_long_is_recorded_and_does_not_affect_others(measured, tmp_path):
    scratch = measured[2]
    ours = Cell("ours", "nf4-dq", "tiny", 64, rank=4, data="drawn", threads=1)
    capped = dataclasses.replace(ours, cap_gib=0.001)
    absent = Cell("unsloth", "nf4-dq", "tiny", 64, variant="best", data="drawn")
    preset = Preset((Group((capped, absent), in_turns=False),), 1, 2, 1, 0, 240)
    out_of_memory, missing = throughput.run(preset, tmp_path, command="", scratch=scratch)
    assert out_of_memory["status"] == "oom", out_of_memory["reason"]
    assert "OOM at 0." in figures.one_line(out_of_memory) and ", planned " in figures.one_line(out_of_memory)
    if not torch.cuda.is_available():
        assert missing["status"] == "missing"
    hasty = Preset((Group((ours,), in_turns=True),), 1, 2, 1, 0, 0.3)
    (late,) = throughput.run(hasty, tmp_path, command="", scratch=scratch)
    assert late["status"] == "timeout"
    assert {path.stem for path in tmp_path.glob("*.json")} == {capped.name, absent.name, ours.name}


def test_a_cell_that_fails_keeps_its_reason(tmp_path):
    spec = {"cell": Cell("ours", "nf4-dq", "tiny", 64).as_dict(), "out": str(tmp_path / "result.json")}
    spec |= {"model": str(tmp_path / "nothing"), "data": str(tmp_path), "scratch": str(tmp_path)}
    result = worker.measure(spec | {"warmup_steps": 1, "steps": 1, "instrumented_steps": 0}, None, None)
    assert result["status"] == "failed" and "no such folder" in result["reason"]


def test_different_gradients_or_a_different_loss_are_not_the_same_work():
    gradients = {"a": torch.randn(100, generator=torch.Generator().manual_seed(0))}
    one = {"name": "one", "first_loss": 2.0}

    def verdict(loss, other):
        return work.compare(one, {"first_loss": loss}, gradients, other)["is_same"]

    assert verdict(2.0, gradients)
    assert verdict(2.001, {"a": gradients["a"] * 3})  # the scale does not matter: clipping differs
    assert not verdict(2.2, gradients)
    assert not verdict(2.0, {"a": gradients["a"] + 0.2 * torch.randn(100, generator=torch.Generator().manual_seed(1))})
    assert not verdict(2.0, {"b": gradients["a"]})
    assert verdict(2.0, {}) is None  # nothing to compare with


def test_measuring_changed_files_is_refused(tmp_path):
    """In a separate checkout: a clean one and a changed result are accepted, a changed source is not."""
    for name in ("benchmarks", "qlora_dist"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-C", str(tmp_path)]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True, timeout=60)
    script = (
        "from pathlib import Path\nfrom benchmarks import provenance as p\n"
        "p.require_clean(False); print(p.commit())\n"
        "Path('benchmarks/results/new.json').write_text('{}'); p.require_clean(False)\n"
        "before = p.code_hash(); Path('qlora_dist/extra.py').write_text('x = 1'); assert p.code_hash() != before\n"
        "try: p.require_clean(False)\nexcept Exception as error: print(error)\n"
        "p.require_clean(True); print(p.commit())\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    clean, refused, marked = done.stdout.splitlines()
    assert len(clean) == 40
    assert refused.startswith("files differ from commit") and "--allow-dirty" in refused
    assert marked == f"{clean}-dirty"


# --- report -----------------------------------------------------------------------------------------------------------


@pytest.mark.launched
def test_the_report_links_each_row_and_opens_in_a_browser_without_network(measured, tmp_path):
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(measured[1], results / "cpu")
    made = report.build(results)
    text, page = report.to_markdown(made), report.to_html(made)
    for name, result in measured[0].items():
        assert f"(results/cpu/{name}.json)" in text
        assert f"{result['figures']['tokens_per_second']['median']:,.0f}"[:2] in text
    assert "same |" in text and '<div class="bars">' in page and "<script" not in page
    file = tmp_path / "results.html"
    file.write_text(page)
    with chromium(tmp_path / "profile") as browser:
        for one, width, dark in ((file, 1000, True), (ROOT / "benchmarks" / "results.html", 400, False)):
            seen = browser.open(one, width=width, dark=dark, expressions={"cut": CUT})
            assert seen.overflow == 0 and seen.width <= width, (width, seen)
            assert (seen.reports, seen.requests, seen.values["cut"]) == ([], [], []), width


@pytest.mark.launched
def test_a_result_without_provenance_is_not_reported(measured, tmp_path):
    shutil.copytree(measured[1], tmp_path / "results" / "cpu")
    path = next((tmp_path / "results" / "cpu").glob("*.json"))
    content = json.loads(path.read_text())
    del content["provenance"]["commit"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{path.name}: no commit; a result without provenance is not reported"):
        report.build(tmp_path / "results")


@pytest.mark.launched
def test_a_stated_commit_is_reported_as_stated(measured, tmp_path):
    shutil.copytree(measured[1], tmp_path / "results" / "cpu")
    for path in (tmp_path / "results" / "cpu").glob("*.json"):
        content = json.loads(path.read_text())
        content["provenance"] |= {"commit": "ab" * 20, "commit_source": "stated"}
        path.write_text(json.dumps(content))
    assert "| ababababab" + "ab (stated) |" in report.to_markdown(report.build(tmp_path / "results"))


def test_the_committed_report_is_generated_from_the_committed_raw_files():
    made = report.build(ROOT / "benchmarks" / "results")
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == report.to_markdown(made)
    assert (ROOT / "benchmarks" / "results.html").read_text() == report.to_html(made)


def test_the_documented_faults_are_those_of_the_raw_file():
    rows = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "faults.json").read_text())["results"]
    table = (ROOT / "docs" / "faults.md").read_text()
    assert rows and all(f"\n{faults.line(row)}\n" in table for row in rows)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.launched
def test_peers_get_the_documents_of_this_packages_steps(measured):
    scratch = measured[2]
    cell = Cell("trainer", "nf4-dq", "tiny", 64, rows_per_step=4, micro_rows=2, variant="best", data="drawn", rank=4)
    spec = inputs.prepare(cell, scratch, 3)
    lengths = torch.tensor([len(d["input_ids"]) for d in work.read_documents(Path(spec["data"]))]).numpy()
    rows = pack_best_fit(lengths.astype("int32"), 64, 0)

    class Lengths:
        num_labels = lengths.astype("int32")

        def __len__(self):
            return len(lengths)

    documents = Lengths()
    documents.lengths = lengths.astype("int32")
    loader = Loader(documents, rows, rows_per_step=4, micro_rows=2, rank=0, world_size=1, seed=0)
    for step, groups in enumerate(spec["document_steps"]):
        expected = sorted(d for row in loader.rows_of_step(step).tolist() for d in rows[row].documents)
        assert len(groups) == 2 and sorted(d for group in groups for d in group) == expected
