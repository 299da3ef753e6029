"""plan: what a run needs, before it is launched."""

from __future__ import annotations

from typing import Any

from ..memory.planned import Plan, make_plan
from .configs import ConfigLike, load_config


def plan(config: ConfigLike, gpu: str | None = None, ranks: int = 1, nodes: int = 1, **overrides: Any) -> Plan:
    """What a run of this config needs, from the config and the model's config.json alone, in about a second.

    `gpu`: a name (a6000, h100, rtx4090, ...) or an amount of memory (48GiB); with one, `auto` settings become those
    that fit best. `ranks`: GPUs over all `nodes`. `overrides`: as for `load_config`. Raises UserError.

        plan("run.yaml", gpu="a6000").fits()
    """
    return make_plan(load_config(config, **overrides), gpu, ranks, nodes=nodes)
