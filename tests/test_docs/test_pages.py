"""The pages are true to the code: their generated parts are current, and what they name exists."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest
import yaml
from helpers.ranks import ROOT
from helpers.snippets import pages

from docs.generate import PARTS, named_parts, with_parts
from qlora_dist.commands import PIPE_CODE
from qlora_dist.commands.supervise import NO_PROGRESS_CODE, TERMINATED_CODE

OUTSIDE = ("http:", "https:")
FOLDERS = ("tests/", "launch/", "slurm/", "benchmarks/", "ds_configs/", "qlora_dist/", "docs/", ".ci/")


def test_generated_parts_are_current_and_each_has_its_place():
    for page, text in pages().items():
        assert with_parts(text) == text, f"{page} is not what the code says now: python -m docs.generate"
    placed = [name for text in pages().values() for name in named_parts(text)]
    assert sorted(placed) == sorted(PARTS)


def test_every_key_of_the_config_and_every_command_is_described():
    """No empty cell of meaning: a field without a docstring, an option without help."""
    for row in re.findall(r"^\| .*\|$", pages()["docs/config.md"], re.MULTILINE):
        assert not row.endswith("|  |"), row


def test_exit_codes_are_those_of_the_code():
    table = re.findall(r"^\| `(\d+)` \|", pages()["docs/exit-codes.md"], re.MULTILINE)
    assert list(map(int, table)) == [0, 1, 2, NO_PROGRESS_CODE, 130, PIPE_CODE, TERMINATED_CODE]


def test_readme_is_one_screen():
    assert len(pages()["README.md"].splitlines()) <= 100


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_pages_and_headings_and_files_that_are_named_exist(page):
    text = re.sub(r"^```.*?^```$", "", pages()[page], flags=re.MULTILINE | re.DOTALL)
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(OUTSIDE):
            continue
        name, _, heading = link.partition("#")
        target = folder / name if name else ROOT / page
        assert target.is_file(), f"{page}: {link}"
        if page.startswith("docs/"):  # the site has only what is there
            assert ROOT / "docs" in target.parents, f"{page}: {link} leads out of the site"
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}, (
                link
            )
    for span in re.findall(r"`([^`\n]+)`", text):
        path = span.split("::")[0].rstrip("/")
        if path.startswith(FOLDERS) and not re.search(r"[ <*{]", path):
            assert (ROOT / path).exists(), f"{page}: {span}"


def test_every_page_has_a_place_in_the_site():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = re.findall(r"[\w-]+\.md", str(nav))
    assert {f"docs/{name}" for name in named} == {page for page in pages() if page.startswith("docs/")}
    assert len(named) == len(set(named))


def test_every_law_names_a_test_that_exists():
    rows = re.findall(r"`(tests/\S+\.py)`: `(test_\w+)`", pages()["docs/laws.md"])
    assert len(rows) > 40
    for file, name in rows:
        assert f"def {name}(" in (ROOT / file).read_text(), name


@cache
def _texts() -> str:
    """All texts of the package but docstrings, an f-string's parts apart."""
    texts = []
    for path in (ROOT / "qlora_dist").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(one.value) if isinstance(one, ast.Constant) else "\n" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                texts.append(node.value)
    return "\n\n".join(texts)


def test_what_troubleshooting_explains_is_said_somewhere():
    """Of the table of what is refused each row is provoked in tests/test_commands/test_refusals.py."""
    page = pages()["docs/troubleshooting.md"]
    rows = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(rows) > 20
    for said in rows:
        assert said in _texts(), said
