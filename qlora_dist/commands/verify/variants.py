"""The user's config -> small variants of it: few rows and steps, a temporary run directory, otherwise unchanged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...config import RunConfig, dump_yaml, parse_config
from .report import Tolerances, tolerances_of

DOCUMENTS_PER_ROW = 32  # documents read per trained row: more than most rows hold
SMALL_PARAMETERS = 300_000_000  # largest model whose ranks run on the CPU if there are too few GPUs


@dataclass(frozen=True)
class Plan:
    """What to run, on what."""

    config: RunConfig
    folder: Path
    steps: int
    ranks: int
    num_gpus: int

    @property
    def tolerances(self) -> Tolerances:
        """Differences that rounding explains for this config's types."""
        return tolerances_of(self.config.model.compute_dtype, self.config.model.quantization)

    @property
    def rows_per_step(self) -> int:
        """Two micro-steps on every rank, so that both accumulation and reduction happen."""
        return 2 * self.micro_rows * self.ranks

    @property
    def micro_rows(self) -> int:
        """The user's, or 1 for auto: these steps are small."""
        rows = self.config.batch.micro_rows
        return 1 if rows == "auto" else rows

    @cached_property
    def single(self) -> RunConfig:
        """For the checks on one process: strategy ddp, whatever the user's is."""
        config = self.variant("single", strategy="ddp")
        # gradients are compared: clipping would hide a difference in scale
        return config.model_copy(update={"optim": config.optim.model_copy(update={"max_grad_norm": None})})

    def variant(self, name: str, *, strategy: str | None = None, on_cpu: bool = False) -> RunConfig:
        """The user's config, reduced, with its run directory in the temporary folder. Dropout stays on."""
        raw: dict[str, Any] = json.loads(self.config.model_dump_json())
        raw["run_dir"] = str(self.folder / name)
        raw["data"] |= {
            "train": [self._cut(source) for source in raw["data"]["train"]],
            "eval": [],
            "cache_dir": str(self.folder / "data"),
        }
        raw["batch"] |= {"rows_per_step": self.rows_per_step, "micro_rows": self.micro_rows}
        raw["train"] |= {
            "steps": self.steps,
            "epochs": None,
            "eval_every": None,
            "save_every": self.half,
            "keep": 2 + self.steps // self.half,
        }
        raw["logging"]["trackers"] = []
        if strategy is not None and strategy != self.config.strategy.name:
            # the options of the user's strategy are not ddp's
            raw["strategy"] = {"name": strategy, "mixed_devices": self.config.strategy.mixed_devices}
        if on_cpu:
            raw["model"]["attention"] = "auto"
        return parse_config(raw, f"verify's variant {name!r}")

    @property
    def half(self) -> int:
        """The step after which the run is interrupted."""
        return self.steps // 2

    def write(self, config: RunConfig) -> Path:
        """The variant as a file for `qlora-dist train`."""
        path = Path(config.run_dir).with_suffix(".yaml")
        path.write_text(dump_yaml(config), encoding="utf-8")
        return path

    def _cut(self, source: dict[str, Any]) -> dict[str, Any]:
        """The first records of a source, as many as the steps can use, with none held out."""
        needed = self.steps * self.rows_per_step * DOCUMENTS_PER_ROW
        limit = min(needed, source["max_examples"] or needed)
        return {**source, "max_examples": limit, "shuffle": False, "hold_out": None, "part": "all", "weight": 1.0}
