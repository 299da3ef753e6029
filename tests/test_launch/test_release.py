"""What is released agrees with itself: version, date, citation, container file, what the demo of a wheel needs."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest
import yaml
from helpers.ranks import ROOT

from qlora_dist import __version__
from qlora_dist.commands import invoke
from qlora_dist.config import load_config

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_changelog_and_citation_have_this_version_and_one_date() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    heads = re.findall(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert heads[0] == ("Unreleased", "")
    assert heads[1] == (__version__, cited["date-released"]) and cited["version"] == __version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", cited["date-released"])


def test_the_citation_has_what_its_schema_requires_and_the_authors_of_the_package() -> None:
    """Citation File Format 1.2.0: required keys, and no key outside of the schema."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    optional = {"type", "abstract", "version", "date-released", "license", "keywords"}
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited.keys() - {"cff-version", "message", "title", "authors"} <= optional
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["authors"] == PROJECT["project"]["authors"] == [{"name": "The qlora_dist authors"}]
    assert cited["license"] in PROJECT["project"]["license"]


# --- the container file -----------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments, with continued lines joined."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


def test_the_container_file_copies_all_that_the_wheel_is_built_from() -> None:
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ARG", "USER", "ENV", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions()} <= known
    copied = [words.split()[:-1] for name, words in instructions() if name == "COPY" and not words.startswith("--from")]
    sources = {PurePosixPath(source) for found in copied for source in found}
    assert sources and all((ROOT / source).exists() for source in sources)
    project = PROJECT["project"]
    data = [glob for globs in PROJECT["tool"]["setuptools"]["data-files"].values() for glob in globs]
    for needed in (*data, "pyproject.toml", project["readme"], *project["license-files"], "qlora_dist/__init__.py"):
        path = PurePosixPath(needed)
        assert sources & {path, *path.parents}, f"{needed} is not copied"


def test_the_container_runs_the_command_as_a_user_who_is_not_root_and_has_a_compiler_for_triton() -> None:
    found = instructions()
    last = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    stages = [words.split(" AS ")[1] for name, words in found[:last] if name == "FROM"]
    final = found[last:]
    taken = re.findall(r"--from=(\w+)", " ".join(words for _, words in final))
    assert taken and set(taken) <= set(stages)
    (user,) = [words for name, words in final if name == "USER"]
    assert user != "root" and any(f" {user}" in words for name, words in final if name == "RUN" and "useradd" in words)
    assert max(i for i, (name, _) in enumerate(final) if name == "RUN") < final.index(("USER", user))
    assert ("ENTRYPOINT", '["qlora-dist"]') in final and "qlora-dist" in PROJECT["project"]["scripts"]
    assert any("gcc" in words for name, words in final if name == "RUN")


def test_the_python_of_the_container_is_a_supported_one() -> None:
    versions = {words.split(":")[1].split("-")[0] for name, words in instructions() if name == "FROM"}
    (version,) = versions
    low, high = re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    assert int(low) <= int(version.split(".")[1]) < int(high)


# --- the demo of an installed package ---------------------------------------------------------------------------------


def test_the_demo_is_written_with_the_commands_that_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(["init", "--demo", "--recipe", "demo"]) == 2
    assert "--demo writes files as they are" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert invoke(["init", "--demo"]) == 0
    commands = [line.strip() for line in capsys.readouterr().out.splitlines()[1:]]
    scripts = {path.name for path in (ROOT / "launch" / "demo").glob("*.py")}
    assert {path.name for path in Path("demo").iterdir()} == {*scripts, "demo.yaml"}
    for name in scripts:
        assert (Path("demo") / name).read_bytes() == (ROOT / "launch" / "demo" / name).read_bytes()
    # the same steps as the Makefile's, with the same run
    assert [words.split()[:2] for words in commands] == [
        ["python", "demo/make_data.py"], ["python", "demo/make_base.py"], ["qlora-dist", "train"],
        ["qlora-dist", "merge"], ["python", "demo/report.py"],
    ]  # fmt: skip
    assert load_config("demo/demo.yaml") == load_config(ROOT / "launch" / "recipes" / "demo.yaml")
    assert invoke(["init", "--demo"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
