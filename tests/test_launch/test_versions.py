"""The versions that the project is tested with."""

from __future__ import annotations

from helpers.ranks import ROOT


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_fast_part_of_test_oldest_has_all_oldest_versions_but_torch():
    """`make test-oldest-fast` installs transformers alone beside the versions of constraints.txt."""
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    assert oldest.keys() <= newest.keys()
    assert {name for name in oldest if oldest[name] != newest[name]} == {"torch", "transformers"}
