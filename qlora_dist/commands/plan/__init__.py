"""`qlora-dist plan`: what a run needs, before it starts. config -> config.json -> plan -> table, JSON, simulation.

    command     the plan of a config, as text or JSON
    simulate    the same step run by the real code under fake tensors
    roofline    predicted time of such a step: its kernels (`launches`) at the rates of a card

Imports torch only for `--simulate` and for families that `memory.families` does not list.
"""

from .command import run_plan_command

__all__ = ["run_plan_command"]
