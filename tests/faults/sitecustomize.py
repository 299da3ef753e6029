"""Faults for real runs, injected from outside the package: Python imports this module if its folder is on PYTHONPATH.

FAULTS holds a JSON list of {"do": ..., "at": ..., "rank": ..., "step": ..., "once": file}.
do    sleep (with "seconds"), wait (until "file" exists), be seen (until the signs of life of all ranks say what this
      one does; in a step), exit, disk full, out of memory, wrong clock, or the name of a signal that the process sends
      to itself ("times" times)
at    a key of PLACES: before each call of that function; or import: before the trainer is imported
rank  only on this rank; step (0-based): only in this step; nth: only at this call, from 1; without them on all ranks,
      at each call
once  a file: only if it does not exist yet
"""

import importlib.abc
import importlib.machinery
import json
import os
import resource
import signal
import sys
import time

# place -> (calling module, function name there)
PLACES = {
    "step": ("qlora_dist.train", "train_step"),
    "save": ("qlora_dist.train.checkpoint", "write_json"),
    "data": ("qlora_dist.data.from_config", "build_documents"),
    "load": ("qlora_dist.train.setup_model", "load_base"),
    "loss": ("qlora_dist.train.step", "nll_sum"),
    "evaluate": ("qlora_dist.train.evaluation", "evaluate"),
}


def wrap(fault, function):
    """The function with a fault before it."""
    num_calls = 0

    def wrapped(*arguments, **options):
        nonlocal num_calls
        num_calls += 1
        rank = int(os.environ.get("RANK", 0))
        found = {"rank": rank, "step": options.get("step"), "nth": num_calls}
        if all(fault.get(key, value) == value for key, value in found.items()) and is_first(fault):
            strike(fault, *arguments)
        return function(*arguments, **options)

    return wrapped


def is_first(fault):
    if "once" not in fault:
        return True
    try:
        os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def strike(fault, *arguments):
    print(f"fault: {fault['do']} at {fault['at']}", flush=True)
    if fault["do"] == "sleep":
        time.sleep(fault["seconds"])
    elif fault["do"] == "wait":
        while not os.path.exists(fault["file"]):
            time.sleep(0.05)
    elif fault["do"] == "be seen":
        world = arguments[0]
        for rank in range(world.size):
            while json.loads(world._store.get(f"heartbeat/{rank}"))["what"] != world._heartbeat.what:
                time.sleep(0.05)
    elif fault["do"] == "exit":
        os._exit(3)
    elif fault["do"] == "disk full":  # writes beyond the first bytes fail
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
    elif fault["do"] == "out of memory":
        raise sys.modules["torch"].OutOfMemoryError("CUDA out of memory. Tried to allocate 1.20 GiB.")
    elif fault["do"] == "wrong clock":
        right = time.time
        time.time = lambda: right() - 1e7
    else:
        for _ in range(fault.get("times", 1)):
            os.kill(os.getpid(), getattr(signal, fault["do"]))


def apply(module, faults):
    for fault in faults:
        where, name = PLACES.get(fault["at"], ("", ""))
        if where == module.__name__:
            setattr(module, name, wrap(fault, getattr(module, name)))


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules as usual, and wraps their functions after they are executed."""

    def __init__(self, faults):
        self.faults = faults

    def find_spec(self, name, path, target=None):
        if all(name != module for module, _ in PLACES.values()):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            for fault in self.faults if name == "qlora_dist.train" else ():
                if fault["at"] == "import":
                    strike(fault)
            execute(module)
            apply(module, self.faults)

        spec.loader.exec_module = exec_module
        return spec


if "FAULTS" in os.environ:
    sys.meta_path.insert(0, Finder(json.loads(os.environ["FAULTS"])))
