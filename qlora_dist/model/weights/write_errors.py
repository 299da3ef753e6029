"""Errors of the disk while safetensors are written: the library raises its own, with the system's number as text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ...errors import os_errors


@contextmanager
def write_errors(doing: str, kept: str = "") -> Iterator[None]:
    """As `errors.os_errors`, for a block that also writes safetensors."""
    with os_errors(doing, kept):
        try:
            yield
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise OSError(str(error)) from error
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
