"""Templates -> one HTML file that needs nothing else. The only module that imports jinja2.

Text from outside (names, configs, prompts, answers, errors) passes `printable` and is escaped: autoescape is on in all
templates. Besides, each page carries a content security policy that lets only this package's scripts run, by their
hashes, and nothing be fetched: what slipped through would still not be executed.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..errors import printable

HERE = Path(__file__).parent
SCRIPTS = ("uPlot.iife.min.js", "charts.js")


def render(template: str, *, scripts: tuple[str, ...] = (), folder: Path | None = None, **values: Any) -> str:
    """The page of a template in templates/ (or in `folder`), with these of the package's scripts inside."""
    texts = [_asset(name) for name in scripts]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {_sources(hashes)}"
    # scripts and styles are this package's own files
    return (
        _environment(folder)
        .get_template(template)
        .render(
            policy=policy,
            style=Markup(_asset("look.css") + (_asset("uPlot.min.css") if scripts else "")),
            scripts=[Markup(text) for text in texts],
            **values,
        )
    )


def _sources(hashes: list[str]) -> str:
    return " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"


@functools.cache
def _asset(name: str) -> str:
    return (HERE / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def _environment(folder: Path | None) -> Environment:
    return Environment(
        loader=FileSystemLoader([HERE / "templates", *([] if folder is None else [folder])]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )


def _shown(value: Any) -> Any:
    """Without control characters, and what HTML cannot hold (NUL, lone surrogates)."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
