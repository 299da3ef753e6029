"""Distributed QLoRA fine-tuning. Read `qlora_dist/train/__init__.py` first: it is the table of contents.

From Python (docs/api.md): `from qlora_dist import train, plan, build_data, load_trained`. What these need is imported
when they are first asked for, so that `import qlora_dist` and the command line start at once.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.2.0"

# name -> the module that defines it. `__init__.pyi` says the same to editors and type checkers
_API = {
    "BuiltData": "api.data",
    "MachineFailed": "errors",
    "Plan": "memory.planned",
    "Run": "api.runs",
    "RunConfig": "config",
    "RunFailed": "errors",
    "TrainedModel": "api.trained",
    "UserError": "errors",
    "build_data": "api.data",
    "compare": "api.runs",
    "load_config": "api.configs",
    "load_trained": "api.trained",
    "plan": "api.planning",
}
__all__ = ["__version__", "train", *_API]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with importlib.import_module(f"{__name__}.cluster.quiet").quiet_imports():
        if name == "train":
            return importlib.import_module(f"{__name__}.train")
        value = getattr(importlib.import_module(f"{__name__}.{_API[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _TrainPackage(ModuleType):
    """`qlora_dist.train` is both the subpackage and the function: importing the one must not hide the other."""

    def __call__(
        self, config: Any, *, ranks: Any = 1, resume: str = "auto", fresh: bool = False, **overrides: Any
    ) -> Any:
        """Trains; see `qlora_dist.api.training.train`, which this is."""
        train = importlib.import_module(f"{__name__}.api.training").train
        return train(config, ranks=ranks, resume=resume, fresh=fresh, **overrides)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and type(value) is ModuleType:  # its import has just ended
            value.__class__ = _TrainPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
