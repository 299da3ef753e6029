"""Python and libraries: versions against the supported range, and whether they can be imported."""

from __future__ import annotations

import importlib
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .finding import Finding, reason

CHECKOUT = Path(__file__).parents[3]

# The extras' packages that a run can use; the others are tools for developing this package.
OPTIONAL = {
    "deepspeed": "deepspeed",
    "flash-attn": "flash",
}
# deepspeed prints and probes compilers on import; its version is enough here
NOT_IMPORTED = frozenset({"deepspeed"})
IMPORT_NAMES = {"pyyaml": "yaml", "flash-attn": "flash_attn"}


def check_python() -> Iterator[Finding]:
    found = platform.python_version()
    needed = requires_python()
    if needed is None:
        yield Finding("ok", "python", f"{found} ({sys.executable})")
    elif _is_in_range(found, needed):
        yield Finding("ok", "python", f"{found}, needs {needed} ({sys.executable})")
    else:
        yield Finding("warn", "python", found, f"this package is tested with {needed}")


def check_packages(requirements: Sequence[str] | None = None) -> Iterator[Finding]:
    """The packages in `requirements` (PEP 508; None: this package's own): version against range, and import."""
    tested = tested_versions()
    for text in requires() if requirements is None else requirements:
        name, needed, extra = _split_requirement(text)
        if extra is not None and OPTIONAL.get(name) != extra:  # only once, even if another extra also lists it
            continue
        yield _check_package(name, needed, is_optional=extra is not None, tested=tested.get(name))


def _check_package(name: str, needed: str, *, is_optional: bool, tested: str | None) -> Finding:
    install = f"pip install 'qlora-dist[{OPTIONAL[name]}]'" if is_optional else f"pip install '{name}{needed}'"
    try:
        found = metadata.version(name)
        if name not in NOT_IMPORTED:
            importlib.import_module(IMPORT_NAMES.get(name, name))
    except metadata.PackageNotFoundError:
        if is_optional:
            return Finding("missing", name, "not installed", f"optional: {install}")
        return Finding("missing", name, "not installed", install, blocks=True)
    except Exception as error:  # a library built for another torch or CUDA fails in many ways
        advice = f"it is installed but cannot be imported; reinstall it: {install}"
        return Finding("missing", name, reason(error), advice, blocks=not is_optional)
    versions = f"{found}, needs {needed or 'any version'}" + (f", tested with {tested}" if tested else "")
    if _is_in_range(found, needed):
        return Finding("ok", name, versions)
    return Finding("warn", name, versions, f"outside of the supported range: {install}")


def requires() -> list[str]:
    """This package's requirements, from its installation, or from pyproject.toml in a checkout."""
    project = _pyproject()
    if project is None:
        return metadata.requires("qlora-dist") or []
    optional = project.get("optional-dependencies", {})
    return [
        *project["dependencies"],
        *(f"{text} ; extra == '{extra}'" for extra, texts in optional.items() for text in texts),
    ]


def requires_python() -> str | None:
    project = _pyproject()
    if project is None:
        return metadata.metadata("qlora-dist")["Requires-Python"]
    return project.get("requires-python")


def tested_versions() -> dict[str, str]:
    """constraints.txt of a checkout: name -> tested version; empty when installed."""
    path = CHECKOUT / "constraints.txt"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def _pyproject() -> dict[str, Any] | None:
    """[project] of a checkout; None when installed, or on Python 3.10, which cannot read TOML."""
    path = CHECKOUT / "pyproject.toml"
    if not path.is_file() or sys.version_info < (3, 11):
        return None
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]


def _split_requirement(text: str) -> tuple[str, str, str | None]:
    """`torch>=2.10 ; extra == 'x'` -> (`torch`, `>=2.10`, `x`)."""
    requirement = text.partition(";")[0]
    match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[.*?\])?\s*\(?([^)]*)\)?", requirement)
    assert match is not None, text
    extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", text)
    return match[1].lower().replace("_", "-"), match[2].strip(), extra[1] if extra else None


def _is_in_range(version: str, needed: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(needed).contains(version, prereleases=True)
