"""What the functions take for a config: a YAML file, a dict or a RunConfig, with keyword overrides."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..config import RunConfig, parse_config
from ..config.reading import read_config, set_value
from ..errors import UserError, shortened

ConfigLike: TypeAlias = "str | Path | Mapping[str, Any] | RunConfig"


def load_config(config: ConfigLike, **overrides: Any) -> RunConfig:
    """The validated config. Raises UserError with one line per mistake.

    Overrides are sections, of which only the given keys change, or single keys with `__` between section and key:

        load_config("run.yaml", run_dir="runs/b", optim={"lr": 1e-4}, lora__rank=32, data__train__0__path="my.jsonl")
    """
    if isinstance(config, RunConfig) and not overrides:
        return config
    raw, origin = _plain(config)
    for name, value in overrides.items():
        for key, leaf in _leaves(name.replace("__", "."), value):
            set_value(raw, key, leaf, f"{name}={shortened(value)}")
    return parse_config(raw, origin)


def plain_config(config: RunConfig) -> dict[str, Any]:
    """As plain data from which the same config is parsed: what was not set stays so."""
    return config.model_dump(mode="json", exclude_unset=True)


def _plain(config: ConfigLike) -> tuple[dict[str, Any], str]:
    if isinstance(config, RunConfig):
        return plain_config(config), "config"
    if isinstance(config, str | Path):
        return read_config(config), str(config)
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config)), "config"
    raise UserError(
        f"config: expected the path of a YAML file, a dict or a RunConfig, found {shortened(config)} "
        f"({type(config).__name__})"
    )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each key that a section changes; other values, lists too, as they are."""
    if not isinstance(value, Mapping) or not value:
        yield key, str(value) if isinstance(value, Path) else value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)
