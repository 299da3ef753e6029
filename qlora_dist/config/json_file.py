"""JSON files from outside, of any form: their content, or one error that names the file. Does not import torch."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import UserError, shortened

MAX_BYTES = 2**28  # the largest that are read, indices of weights, have megabytes


def read_json(path: Path, where: str, advice: str = "") -> Any:
    """Plain data of a JSON file. Raises UserError, whose text starts with `where` and ends with `advice`."""
    ending = f"; {advice}" if advice else ""
    try:
        return json.loads(regular_bytes(path, MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or error}){ending}") from None
    except RecursionError:
        raise UserError(f"{where} cannot be read (not valid JSON: nested too deeply){ending}") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise UserError(f"{where} cannot be read (not valid JSON: {shortened(str(error))[1:-1]}){ending}") from None


def read_json_object(path: Path, where: str, advice: str = "") -> dict[str, Any]:
    """The same of a file that holds an object."""
    content = read_json(path, where, advice)
    if not isinstance(content, dict):
        ending = f"; {advice}" if advice else ""
        raise UserError(f"{where} is not a JSON object: found {shortened(content)}{ending}")
    return content


def regular_bytes(path: str | Path, limit: int) -> bytes:
    """Content of a file. Raises OSError also for what is no regular file, and for more than `limit` bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for its writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise OSError(f"larger than {limit:,} bytes; is it the right file?")
    return content
