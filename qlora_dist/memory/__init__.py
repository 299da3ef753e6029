"""How much memory a run needs, before it starts: config + config.json -> bytes per rank, item by item.

    read_shapes  finds config.json; shapes are computed (families) or measured (measured_shapes)
    tape         tensor lifetimes in a forward and backward pass, as sizes; layers: a decoder layer on a tape
    strategies   what each strategy keeps on a rank
    resident     what stays in memory for the whole run
    step_peak    what comes and goes within a step
    plan         plan_memory: everything added up at the peak
    choosing     choose: the recompute level, micro-batch, row length and strategy that fit
    gpus         GPUs by name, and a rough speed estimate
    table        the plan as text; planned: what `plan` says, for the command line and for Python

Only measured_shapes imports torch. Plans are checked against `commands.plan.simulate`, which runs the real code under
fake tensors.
"""

from .choosing import choose, largest_micro_rows, largest_row_tokens, with_shards
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
    "with_shards",
]
