"""Calls that may never return, such as those to a store whose host has vanished, with a limit on the wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class NoAnswer(RuntimeError):
    """A call did not return in time. A RuntimeError as every other failure of the store is."""


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """Runs `function` in a thread of its own and returns or raises what it does; NoAnswer when it takes longer."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="bounded call", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise NoAnswer(f"no answer within {seconds:.0f} s")
    return results[0]
