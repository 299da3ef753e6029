"""Faults for real runs, from outside the package: Python imports this module where its folder is on PYTHONPATH.

FAULTS holds a JSON list of {"do": ..., "at": ..., "rank": ..., "step": ..., "once": file}.
do    sleep (with "seconds"), exit, or the name of a signal that the process sends to itself
at    where: a key of PLACES
rank  only there, step (0-based): only then; without them on all ranks, at each step
once  a file: not again once it exists
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time

FAULTS = json.loads(os.environ.get("FAULTS", "[]"))

# where -> (module, function), before each call of which it happens
PLACES = {
    "step": ("qlora_dist.trainer.step", "train_step"),
    "save": ("qlora_dist.checkpoint", "_write_text"),
    "data": ("qlora_dist.examples.build", "build_documents"),
    "load": ("qlora_dist.model.loading", "load_base"),
    "evaluate": ("qlora_dist.evaluate", "evaluate"),
}


def strike(place, step):
    for fault in FAULTS:
        if fault["at"] != place or fault.get("rank", int(os.environ.get("RANK", 0))) != int(os.environ.get("RANK", 0)):
            continue
        if fault.get("step", step) != step:
            continue
        if "once" in fault:
            try:
                os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
        if fault["do"] == "sleep":
            time.sleep(fault["seconds"])
        elif fault["do"] == "exit":
            os._exit(3)
        else:
            os.kill(os.getpid(), getattr(signal, fault["do"]))


def wrap(place, function):
    def wrapped(*arguments, **options):
        strike(place, options.get("step"))
        return function(*arguments, **options)

    return wrapped


class Finder(importlib.abc.MetaPathFinder):
    """Finds as the others do, and wraps a function of the module once it is executed."""

    def find_spec(self, name, path, target=None):
        places = [place for place, (module, _) in PLACES.items() if module == name]
        if not places:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for place in places:
                function_name = PLACES[place][1]
                setattr(module, function_name, wrap(place, getattr(module, function_name)))

        spec.loader.exec_module = exec_module
        return spec


if FAULTS:
    sys.meta_path.insert(0, Finder())
