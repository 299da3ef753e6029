"""The first page of the results: each claim has its figure, its kind and its raw file, and figures are not mixed."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from helpers.browser import CUT, chromium
from helpers.ranks import ROOT

from benchmarks import claims, equal_runs, report
from qlora_dist.memory.gpus import GPUS

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def committed():
    return report.build(RESULTS)


def claim_of(made, raw_file: str) -> claims.Claim:
    (found,) = [one for one in made.claims if any(link.path.endswith(raw_file) for link in one.links)]
    return found


def changed(tmp_path: Path, raw_file: str, change) -> report.Report:
    """The report of the committed results, one file of which is another."""
    results = tmp_path / "results"
    shutil.copytree(RESULTS, results)
    content = json.loads((results / raw_file).read_text())
    change(content)
    (results / raw_file).write_text(json.dumps(content))
    return report.build(results)


def test_every_claim_has_a_figure_a_kind_and_raw_files_that_are_there(committed):
    assert len(committed.claims) == len(claims.ALL) == 9
    page, text = report.to_html(committed), report.to_markdown(committed)
    for one in committed.claims:
        assert one.kind in claims.KINDS and re.search(r"\d", one.figure) and one.links and one.proof
        for link in one.links:
            assert (ROOT / "benchmarks" / link.path).is_file()
            assert f'href="{link.path}"' in page and f"({link.path})" in text
    first = page.index("<h2")
    assert all(page.index(f">{one.kind}<") < first for one in committed.claims)
    # what was run is below, folded
    assert page.index("cpu: what was run") > first and page.count("<details") == len(committed.claims) + len(
        committed.parts
    )


def test_kinds_follow_the_folder_and_no_gpu_is_claimed_to_be_measured(committed):
    for one in committed.claims:
        folders = {link.path.split("/")[1] for link in one.links}
        assert folders == {{claims.NULL: "null", claims.TRACED: "traced"}.get(one.kind, "cpu")}
    kinds = {claim_of(committed, f"cpu/{name}.json").kind for name in ("planned", "plan_vs_simulation", "faults")}
    assert kinds == {claims.PLANNED, claims.SIMULATED, claims.MEASURED}
    assert "Nothing here was measured on a GPU" in report.to_markdown(committed)


def test_a_plan_made_for_a_gpu_is_no_error_on_a_cpu(committed):
    items = next(part for part in committed.parts if part.title == "cpu: memory by item")
    assert not any("plan" in name for table in items.tables for name in table.header)


def test_figures_are_those_of_the_raw_files(committed, tmp_path):
    raw = json.loads((RESULTS / "null/plan.json").read_text())
    assert claim_of(committed, "null/plan.json").figure.startswith(f"at most {abs(raw['largest_error']):.2%} off")
    other = changed(tmp_path, "cpu/plan_vs_simulation.json", lambda content: content.update(largest_error=0.0567))
    assert claim_of(other, "plan_vs_simulation.json").figure.startswith("at most 5.67% off")


def test_the_smallest_card_of_a_size_holds_all_of_it_and_the_next_smaller_one_does_not(committed):
    one = claim_of(committed, "cpu/planned.json")
    cards = {text: GPUS[gpu].device_bytes / 2**30 for text, gpu in claims.CARDS}
    assert [(mark.text, mark.value) for mark in one.charts[0].marks] == list(cards.items())
    rows = {row[0]: row[1:] for row in one.tables[0].rows}
    assert list(rows) == ["7B", "13B", "33B", "65B"]
    for peak, pageable, card, paged, *_ in rows.values():
        assert peak <= cards[card] and all(size < peak for size in cards.values() if size < cards[card])
        assert paged is None or peak - pageable <= cards[paged] < peak
    assert (rows["65B"][2], rows["33B"][3]) == ("48 GB", "24 GB")


def test_where_peers_need_less_memory_it_is_said(committed, tmp_path):
    one = next(one for one in committed.claims if "Trainer and TRL: speed" in one.claim)
    cells = {
        cell["name"]: cell for cell in report.read_results(RESULTS)[0].cells if (cell.get("group") or "") == "peers"
    }
    ours = {cell["cell"]["recompute"]: cell for cell in cells.values() if cell["cell"]["engine"] == "ours"}
    for recompute, own in ours.items():
        peers = [
            c
            for c in cells.values()
            if c["cell"]["recompute"] == recompute and c["cell"]["engine"] in ("trl", "trainer")
        ]
        more = [own["memory"]["peak_bytes"] > cell["memory"]["peak_bytes"] for cell in peers]
        assert all(more) or not any(more)
        (said,) = re.findall(rf"Recompute {recompute} .*?memory: (\w+) memory here", one.proof)
        assert said == ("MORE" if all(more) else "less")
    assert {"MORE", "less"} <= set(one.proof.split())  # both occur today


# --- equal runs -------------------------------------------------------------------------------------------------------


def test_the_equal_runs_are_equal_and_every_one_learns(committed):
    raw = json.loads((RESULTS / "cpu/equal_runs.json").read_text())
    curves = raw["losses"]
    alone, two, killed = (curves[name] for name in equal_runs.NAMES)
    assert len(alone) == len(two) == len(killed) == raw["steps"]
    assert killed == alone and raw["repeated_steps_are_equal"] and 0 < raw["resumed_from"] < raw["killed_after"]
    assert max(map(abs, (a - b for a, b in zip(alone, two)))) == raw["largest_difference"]["2 ranks"] < 1e-4
    assert alone[-1] < 0.9 * alone[0] and all(map(math.isfinite, alone))
    one = claim_of(committed, "equal_runs.json")
    assert "killed and started again: the same bits" in one.figure
    assert [run["name"] for run in one.curves["runs"]] == list(equal_runs.NAMES)


def test_a_run_that_goes_on_with_other_losses_is_not_called_the_same(tmp_path):
    def change(content):
        content["largest_difference"]["killed, started again"] = 3e-3

    assert "killed and started again: within 3.0e-03" in claim_of(changed(tmp_path, "cpu/equal_runs.json", change),
                                                                  "equal_runs.json").figure  # fmt: skip


def test_a_missing_or_repeated_step_is_noticed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert equal_runs.losses(tmp_path) == [2.0, 1.0]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n')
    with pytest.raises(AssertionError, match="missing or there twice"):
        equal_runs.losses(tmp_path)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_lines_of_cards_lie_where_their_memory_is(committed):
    chart = copy.deepcopy(claim_of(committed, "cpu/planned.json").charts[0])
    longest = max(sum(bar.parts) for bar in chart.bars)
    for (_, place), mark in zip(chart.lines, chart.marks, strict=True):
        assert place == pytest.approx(100 * mark.value / longest, abs=0.01)
    page = report.to_html(committed)
    assert page.count("<u style=") == 3 and page.count("<s style=") == 3 * len(chart.bars)


def test_the_page_of_the_results_fits_with_all_tables_open_and_draws_its_curves(tmp_path):
    expressions = {
        "opened": "document.querySelectorAll('details').forEach((one) => one.open = true); document.body.scrollWidth",
        "overflow": "document.documentElement.scrollWidth - document.documentElement.clientWidth",
        "cut": CUT,
        "drawn": "document.documentElement.dataset.drawn",
        "lines": "document.querySelectorAll('.u-legend .u-series').length",
    }
    with chromium(tmp_path / "profile") as browser:
        for width, dark in ((1000, False), (1000, True), (400, False), (400, True)):
            seen = browser.open(ROOT / "benchmarks" / "results.html", width=width, dark=dark, expressions=expressions)
            assert (seen.overflow, seen.values["overflow"], seen.values["cut"]) == (0, 0, []), (width, dark)
            assert (seen.values["drawn"], seen.values["lines"]) == ("1", 4)  # the axis and three runs
            assert (seen.reports, seen.requests) == ([], [])
