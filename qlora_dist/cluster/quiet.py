"""Keeps bars and notices of libraries off the screen: what they say stands between our lines, once for each rank."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

LIBRARIES = ("transformers", "huggingface_hub", "datasets")
# read when a library is imported
_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' as well
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, libraries report only errors and draw no bars; afterwards all is as before.

    A library that is first imported inside stays quiet until the process ends. What the user has set in the environment
    counts.
    """
    with ExitStack() as undo:
        for name, value in _ENVIRONMENT.items():
            if name not in os.environ:
                os.environ[name] = value
                undo.callback(os.environ.pop, name, None)
        for library in LIBRARIES:
            if library in sys.modules and f"{library}.utils" in sys.modules:
                logger = logging.getLogger(library)
                undo.callback(logger.setLevel, logger.level)
                logger.setLevel(max(logger.level, logging.ERROR))
        switches = [switch for switch in _bars() if switch[0]()]
        for _, disable, enable in switches:
            disable()
            undo.callback(enable)
        yield


def _bars() -> Iterator[tuple[Callable[[], bool], Callable[[], None], Callable[[], None]]]:
    """(whether they are drawn, off, on) of each library that is imported."""
    transformers: Any = sys.modules.get("transformers.utils.logging")
    if transformers is not None:
        yield (
            transformers.is_progress_bar_enabled, transformers.disable_progress_bar, transformers.enable_progress_bar
        )  # fmt: skip
    for name in ("huggingface_hub.utils", "datasets.utils"):
        module: Any = sys.modules.get(name)
        if hasattr(module, "are_progress_bars_disabled"):
            yield (
                lambda module=module: not module.are_progress_bars_disabled(),  # type: ignore[misc]
                module.disable_progress_bars,
                module.enable_progress_bars,
            )


@contextmanager
def same_environment() -> Iterator[None]:
    """Afterwards the environment is as before: launchers and DeepSpeed leave variables there."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Around the import of what needs transformers, which imports DeepSpeed wherever it is installed: it greets. tqdm
    misses its widgets in a notebook."""
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(_is_no_greeting)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="IProgress not found")
            yield
    finally:
        logger.removeFilter(_is_no_greeting)


def _is_no_greeting(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING
