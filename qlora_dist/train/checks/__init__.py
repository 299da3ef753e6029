"""The run's own checks: each failure that is silent elsewhere ends a run here, with its name.

    learning   before the model is read: is there a label in every step, does the data teach to stop? After the first
               update: has every adapter moved?
    base       after load: does this rank hold the bytes that its strategy promises, are the bits those of the files?
               At each save: is the base still what was loaded?

Nothing here runs between the first step and the next save, so the checks cost a training step nothing. What is compared
between ranks is gathered by the caller, which has the World.
"""

from .base import (
    BaseBytes,
    check_base_bytes,
    check_base_unchanged,
    check_source_bits,
    promised_base_bytes,
)
from .learning import check_ends_are_learned, check_every_step_has_labels, check_first_update

__all__ = [
    "BaseBytes",
    "check_base_bytes",
    "check_base_unchanged",
    "check_ends_are_learned",
    "check_every_step_has_labels",
    "check_first_update",
    "check_source_bits",
    "promised_base_bytes",
]
