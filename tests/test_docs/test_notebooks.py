"""The notebooks in docs/examples run as they stand, and what they show is what comes out."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

from qlora_dist import api

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


@pytest.mark.parametrize("name", ["plan_65b", "data", "train", "compare"])
def test_a_notebook_shows_what_its_cells_give(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    num_shown = 0
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        printed, value = _run(source, names)
        shown = _shown(cell)
        if "train(" not in source or "redirect_stdout" in source:  # what a run prints depends on the machine
            assert _words(printed) == _words(shown["stream"]), source
        if value is not None:
            _assert_like(_plain(value), shown["text/plain"], source)
            num_shown += 1
        assert "error" not in shown and ("text/html" in shown) == hasattr(value, "_repr_html_"), source
    assert num_shown >= 3


def _run(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """(what was printed, the value of the last line), as a notebook has them."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<cell>", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return printed.getvalue(), value


def _plain(value: Any) -> str:
    with pandas.option_context("display.width", 80, "display.max_columns", 20):
        return repr(value)


def _shown(cell: dict[str, Any]) -> dict[str, str]:
    shown = {"stream": ""}
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            assert output["name"] == "stdout", f"a notice in the notebook: {output['text']}"
            shown["stream"] += "".join(output["text"])
        else:
            shown |= {kind: "".join(text) for kind, text in output.get("data", {"error": ""}).items()}
    return shown


def _words(text: str) -> list[str]:
    """Without numbers and folders, and whatever the width of the lines."""
    text = re.sub(r"\S*/qlora_dist-", "/tmp/qlora_dist-", text)
    return NUMBER.sub("0", text).replace("'", "").split()


def _assert_like(found: str, shown: str, where: str) -> None:
    """The same words; numbers that are near: versions and processors round differently. Rates are the machine's."""
    found, shown = (re.sub(r"tokens/s [\d,]+", "", re.sub(r"\S*/qlora_dist-", "", text)) for text in (found, shown))
    assert "".join(_words(found)) == "".join(_words(shown)), where
    pairs = zip(NUMBER.findall(found), NUMBER.findall(shown), strict=True)
    for one, other in ((float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs):
        assert one == pytest.approx(other, rel=0.1, abs=0.02), (where, found)


def test_the_page_of_the_api_names_what_there_is() -> None:
    """Every name in the tables of docs/api.md is an attribute of what its table is about."""
    import qlora_dist

    assert api.__doc__
    text = (EXAMPLES.parent / "api.md").read_text(encoding="utf-8")
    for kind in ("Plan", "BuiltData", "Run", "TrainedModel"):
        table = re.search(rf"^\| `{kind}` \|.*?\n\n", text, re.M | re.S)
        assert table is not None, kind
        cells = [line.split("|")[1] for line in table[0].strip().splitlines()[2:]]
        found = [word for cell in cells for word in re.findall(r"`(\w+)", cell)]
        slots = set(dir(getattr(qlora_dist, kind))) | {
            "documents",
            "rows",
            "held_out",
            "directory",
            "stopped_by",
            "data",
        }
        assert len(found) >= 3 and set(found) <= slots, set(found) - slots
    functions = set(re.findall(r"^## (\w+)$", text, re.M)) - {"Errors"}
    assert functions == {"plan", "build_data", "train", "load_trained"} <= set(qlora_dist.__all__)
