"""The smoke test of every CUDA path, on a CPU: cases run and agree, can disagree, and do not affect each other."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.ranks import ROOT, clean_environment

from benchmarks.gpu import smoke, smoke_kernels, smoke_runs
from benchmarks.gpu.smoke_checks import Bench, Check, Skip
from benchmarks.provenance import FIELDS
from qlora_dist.errors import UserError
from qlora_dist.model.activation_offload import ActivationOffload


@pytest.fixture
def bench(tmp_path):
    return Bench(torch.device("cpu"), tmp_path)


def run_smoke(out, *cases, timeout=250):
    environment = clean_environment() | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.smoke", str(out), *cases],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    content = json.loads(out.read_text())
    return done, content, {case["name"]: case for case in content["cases"]}


@pytest.mark.timeout(900)  # a minute on two idle cores; two dozen runs on busy ones
@pytest.mark.launched
def test_every_case_runs_and_agrees_on_a_cpu(tmp_path):
    done, content, cases = run_smoke(tmp_path / "smoke.json", "--case-seconds", "600", timeout=800)
    assert done.returncode == 0, done.stdout
    assert list(cases) == list(smoke.all_cases()) and all(name in content["provenance"] for name in FIELDS)
    skipped = {name: cases.pop(name) for name in ("attention-flash", "attention-varlen", "graph")}
    for case in skipped.values():
        assert (case["status"], case["agrees"]) == ("skipped", None) and "CUDA" in case["reason"]
    for case in cases.values():
        assert (case["status"], case["ran"], case["agrees"]) == ("ok", True, True), case
        assert case["checks"] and all(check["why"] for check in case["checks"])
    assert f"{len(cases)} ok, 3 skipped" in done.stdout


# --- wrong results are detected ---------------------------------------------------------------------------------------


def status_of(case, bench, name="case"):
    found = smoke.run_case(name, case, bench)
    assert found["ran"], found
    return found["agrees"], found["reason"]


def test_attention_across_documents_is_detected(bench, monkeypatch):
    real = smoke_kernels.packed_attention
    whole = lambda *a, packed: real(*a, packed=SimpleNamespace(**vars(packed) | {"lengths": (sum(packed.lengths),)}))  # noqa: E731
    monkeypatch.setattr(smoke_kernels, "packed_attention", whole)
    agrees, reason = status_of(smoke_kernels.CASES["attention-sdpa"], bench)
    assert agrees is False and "output" in reason


def test_a_wrong_loss_a_wrong_update_and_a_wrong_code_are_detected(bench, monkeypatch):
    import bitsandbytes.functional as bnb

    cases = smoke_kernels.CASES
    nll_sum, lowrank, dequantize = smoke_kernels.nll_sum, smoke_kernels.lowrank_forward, bnb.dequantize_4bit
    monkeypatch.setattr(smoke_kernels, "nll_sum", lambda h, head, p, labels, chunk: nll_sum(h, head, p, labels.roll(1)))
    monkeypatch.setattr(
        smoke_kernels, "lowrank_forward", lambda f, x, us: lowrank(f, x, [(u[0], u[1], u[2], u[3] * 1.05) for u in us])
    )
    monkeypatch.setattr(bnb, "dequantize_4bit", lambda codes, state: dequantize(codes, state) * 1.02)
    for name in ("loss", "lowrank", "codes-nf4", "codes-nf4-nested", "codes-fp4"):
        assert status_of(cases[name], bench)[0] is False, name


def test_an_offload_that_moves_nothing_is_detected_although_its_losses_are_right(bench, monkeypatch):
    assert status_of(smoke_runs.CASES["offload"], bench) == (True, "")
    monkeypatch.setattr(ActivationOffload, "_should_move", lambda self, tensor: False)
    bench = Bench(bench.device, bench.work / "again")
    bench.work.mkdir()
    agrees, reason = status_of(smoke_runs.CASES["offload"], bench)
    assert agrees is False and "tensors moved to host memory: 0" in reason


def run_of(losses, norms):
    return smoke_runs.Run(Path(), losses, norms)


@pytest.mark.parametrize(
    ("losses", "norms", "agree"),
    [
        ([6.0, 5.9, 5.8], [1.0, 1.0, 1.0], [True, True]),
        ([6.001, 5.9, 5.8], [1.001, 1.0, 1.0], [True, True]),
        ([6.0, 5.9, 5.81], [1.0, 1.0, 1.0], [False, True]),
        ([6.0, 5.9, 5.8], [1.0, 1.1, 1.0], [True, False]),
        ([math.nan, 5.9, 5.8], [1.0, 1.0, 1.0], [False, True]),
        ([6.0, math.nan, 5.8], [1.0, 1.0, math.nan], [False, False]),
    ],
)
def test_runs_agree_within_bf16_rounding_and_never_with_a_nan(losses, norms, agree):
    checks = smoke_runs.same(run_of(losses, norms), run_of([6.0, 5.9, 5.8], [1.0, 1.0, 1.0]))
    assert [check.agrees for check in checks] == agree
    json.dumps([check.to_json() for check in checks], allow_nan=False)


def test_runs_of_the_same_operations_agree_only_bit_for_bit():
    plain = run_of([6.0, 5.9], [1.0, 1.0])
    assert all(check.agrees for check in smoke_runs.same(plain, plain, is_exact=True))
    assert not all(c.agrees for c in smoke_runs.same(run_of([6.0, 5.9 + 1e-6], [1.0, 1.0]), plain, is_exact=True))


def test_running_and_agreeing_are_reported_separately(bench):
    def wrong(_):
        return [Check("value", 2.0, 1.0, "a test")]

    def fails(_):
        raise ValueError("no kernel image")

    def leaves(_):
        sys.exit("a library gave up")

    def lacks(_):
        raise Skip("needs two")

    found = [smoke.run_case("case", case, bench) for case in (wrong, fails, leaves, lacks, lambda _: [])]
    assert [(one["status"], one["ran"], one["agrees"]) for one in found] == [
        ("failed", True, False),
        ("failed", False, None),
        ("failed", False, None),
        ("skipped", False, None),
        ("ok", True, None),
    ]
    text = smoke.summary(found)
    assert "1 ok, 3 failed, 1 skipped" in text and "ValueError: no kernel image" in text
    assert "value: 2, at most 1" in text and "in fails" in text  # where it was raised
    advice = {**found[1], "reason": "AcceleratorError: CUDA error: out of resources\nFor debugging consider ..."}
    assert "out of resources" in smoke.summary([advice]) and "debugging" not in smoke.summary([advice])


# --- failures are isolated --------------------------------------------------------------------------------------------

FAKE = """
import os, sys, time
from unittest.mock import MagicMock

sys.modules["torch"] = MagicMock()  # the real one takes seconds to import, in each of the processes
from benchmarks.gpu import smoke
from benchmarks.gpu.smoke_checks import Check

broken = []

def good(bench):
    return [Check("what is broken in this process", float(len(broken)), 0.0, "a test")]

def dies(bench):
    print("why it died", flush=True)
    os._exit(7)

smoke._is_usable = lambda device: not broken
smoke.all_cases = lambda: {
    "first": good, "dies": dies, "second": good, "hangs": lambda bench: time.sleep(600), "third": good,
    "breaks": lambda bench: broken.append(1) or 1 / 0, "fourth": good,
}
smoke.provenance.collect = lambda command, device: {"command": command}
smoke.main()
"""


@pytest.mark.launched
def test_a_case_that_dies_hangs_or_breaks_the_device_fails_alone(tmp_path, capsys):
    out = tmp_path / "smoke.json"
    cases = ["first", "dies", "second", "hangs", "third", "breaks", "fourth"]
    results = smoke.Smoke(out, cases, case_seconds=5, program=(sys.executable, "-c", FAKE)).run()
    assert [result["name"] for result in results] == cases
    states = {result["name"]: result["status"] for result in results}
    assert {name for name, state in states.items() if state != "ok"} == {"dies", "hangs", "breaks"}
    reasons = {result["name"]: result["reason"] for result in results}
    assert "exited with code 7: " in reasons["dies"] and "why it died" in reasons["dies"]
    assert "did not finish in 5 s" in reasons["hangs"] and "ZeroDivisionError" in reasons["breaks"]
    assert json.loads(out.read_text())["cases"] == results
    assert "hangs" in smoke.summary(results)
    with pytest.raises(UserError, match="no case unheard-of"):
        smoke.Smoke(out, ["unheard-of"], program=(sys.executable, "-c", FAKE)).run()
    (gone,) = smoke.Smoke(out, [], program=(sys.executable, "-c", "print('no module'); raise SystemExit(4)")).run()
    assert (gone["name"], gone["status"]) == ("start", "failed") and "code 4: no module" in gone["reason"]


def test_cases_without_time_left_are_listed_and_the_result_is_complete(tmp_path):
    out = tmp_path / "smoke.json"
    program = (sys.executable, "-c", FAKE)
    results = smoke.Smoke(out, ["first", "hangs", "third"], seconds=6, case_seconds=600, program=program).run()
    assert [(one["name"], one["status"]) for one in results] == [
        ("first", "ok"), ("hangs", "failed"), ("third", "not run"),
    ]  # fmt: skip
    assert len(json.loads(out.read_text())["cases"]) == 3
