"""How the rows of a step are shared out in number. Does not import torch."""

from __future__ import annotations

from ..errors import UserError


def derive_accumulation(rows_per_step: int, micro_rows: int, world_size: int) -> int:
    """Micro-steps per optimizer step. Raises UserError with the nearest valid row counts."""
    unit = micro_rows * world_size
    if rows_per_step % unit == 0:
        return rows_per_step // unit
    below = rows_per_step // unit * unit
    near = f"{below} or {below + unit}" if below else f"{unit}"
    raise UserError(
        f"batch.rows_per_step is {rows_per_step}, which is not a multiple of batch.micro_rows {micro_rows} x "
        f"{world_size} ranks = {unit}; nearest multiples: {near}"
    )
