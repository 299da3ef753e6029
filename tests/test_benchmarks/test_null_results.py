"""The kept results of the null device: what they show, and that the report never mixes them with measured ones."""

from __future__ import annotations

import json

import pytest

from benchmarks import provenance, report
from benchmarks.null import sections

FOLDER = provenance.ROOT / "benchmarks" / "results" / "null"


def raw(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_the_plan_is_within_one_percent_of_every_peak_of_the_grid():
    content = raw("plan")
    errors = {one["name"]: one["plan_error"] for one in content["points"]}
    assert len(errors) >= 25 and max(map(abs, errors.values())) <= 0.01
    assert content["largest_error"] == max(errors.values(), key=abs) == errors[content["largest_error_at"]]


def test_65b_is_loaded_trained_and_saved_on_a_card_of_48_gb():
    content = raw("repro_65b")
    assert content["is_full_size"] and content["weights"] == "sparse files of zeros"
    assert content["cap_bytes"] == int(47.54 * 2**30) == content["provenance"]["hardware"]["gpus"][0]["bytes"]
    assert content["device_used_bytes"] <= content["cap_bytes"] and content["fits_cap_without_paging"]


def test_host_seconds_are_those_of_three_engines_with_the_same_settings():
    cells = raw("host")["cells"]
    groups = {group: [one for one in cells if one["group"] == group] for group in {one["group"] for one in cells}}
    assert {one["cell"]["shape"] for one in cells} == {"1b", "8b"}
    for members in groups.values():
        assert [one["cell"]["engine"] for one in members] == ["ours", "trl", "trainer"]
        assert all(one["status"] == "ok" and one["cpu_seconds"] > 0 for one in members)
        settings = [{k: v for k, v in one["cell"].items() if k not in ("engine", "variant")} for one in members]
        assert settings[0] == settings[1] == settings[2]


def test_every_section_on_the_null_device_says_so_and_no_other_section_uses_its_results():
    found = next(one for one in report.read_results(FOLDER.parent) if one.name == "null")
    marked = [section(found) for section in sections.ALL]
    assert all(one is not None and one.text.startswith("Null device:") for one in marked)
    others = [one for section in report.sections.ALL if (one := section(found)) is not None]
    assert [one.title for one in others] == ["null: what was run"]


@pytest.mark.parametrize("name", ["RESULTS.md", "results.html"])
def test_the_report_shows_the_largest_error_of_the_plan_marked(name):
    text = (FOLDER.parents[1] / name).read_text()
    line = next(line for line in text.splitlines() if "Largest error of the plan" in line)
    assert "Null device:" in line and f"{raw('plan')['largest_error']:+.2%}" in line
