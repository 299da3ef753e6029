"""How much memory a run needs, before it starts: config + config.json -> bytes per rank, item by item.

    read_shapes  where config.json comes from; shapes by arithmetic (families), or measured (measured_shapes)
    tape         lifetimes of tensors in a forward and backward pass, as sizes; layers: a decoder layer on a tape
    strategies   what each strategy keeps on a rank
    resident     what stays for a whole run
    step_peak    what comes and goes within a step
    plan         plan_memory: everything added up at the largest moment
    choosing     choose: the recompute level, micro-batch, row length and strategy that fit
    gpus         GPUs by name, and a rough speed
    table        the plan as text

Nothing here but measured_shapes imports torch. `commands.plan.simulate` runs the real code under fake tensors and is
what this is held against.
"""

from .choosing import choose, largest_micro_rows, largest_row_tokens
from .families import shapes_from_config
from .plan import MemoryPlan, plan_memory
from .shapes import ModelShapes

__all__ = [
    "MemoryPlan",
    "ModelShapes",
    "choose",
    "largest_micro_rows",
    "largest_row_tokens",
    "plan_memory",
    "shapes_from_config",
]
