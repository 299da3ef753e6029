"""Plausible values from a CUDA device that computes nothing: Python imports this where its folder is on PYTHONPATH.

On such a device memory, launches, copies and synchronizations are real and every kernel leaves its output as it was.
A run ends at the first value that it looks at: the number of labels that were computed, a sum over ranks, weights that
must have moved. Exactly those looks are made here to see what a real device would have shown; everything else runs as
it is. The comparisons that are answered here are the ones that such a rehearsal cannot prove.
"""

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import sys


def look(patches):
    """A finder that runs patches[name](module) once a module is executed."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name not in patches:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                patches[name](module)

            spec.loader.exec_module = exec_module
            return spec

    return Finder()


def step(module):
    """The four numbers that a step reads are those of its rows: loss 1 a label, no stop, all labels, norm 1."""
    import torch

    real, tolist, rows_now = module.train_step, torch.Tensor.tolist, []
    counted = os.environ.get("NULL_GPU_STEPS")  # a file: device calls of each step
    library = ctypes.CDLL(os.environ["NULL_GPU_LIB"])
    counts = []

    def read(tensor):
        found = tolist(tensor)
        if rows_now and tensor.is_cuda and tensor.dtype == torch.float64 and tensor.shape == (4,):
            labels = float(rows_now[-1].num_labels)
            return [labels, 0.0, labels, 1.0]
        return found

    def train_step(world, model, rows, **options):
        rows_now.append(rows)
        library.null_reset()
        try:
            return real(world, model, rows, **options)
        finally:
            rows_now.pop()
            if counted:
                library.null_dump(f"{counted}.step".encode())
                with open(f"{counted}.step") as file:
                    calls = dict(line.rstrip("\n").split("\t")[::-1] for line in file)
                counts.append({name: int(number) for name, number in calls.items()})
                with open(counted, "w") as file:
                    json.dump(counts, file)

    torch.Tensor.tolist = read
    module.train_step = train_step


def says_equal(module):
    differ = module._differ
    module._differ = lambda left, right: (differ(left, right), False)[1]


def accepts_zeros(module):
    verify = module.verify_adapter_file
    module.verify_adapter_file = lambda model, folder, **options: verify(model, folder)


def accepts(*names, answer=None):
    def patch(module):
        for name in names:
            setattr(module, name, lambda *arguments, **options: answer)

    return patch


if "NULL_GPU_LIB" in os.environ:
    sys.meta_path.insert(
        0,
        look(
            {
                "qlora_dist.train.step": step,
                "qlora_dist.model.forward": says_equal,
                "qlora_dist.model.lora_files": accepts_zeros,
                "qlora_dist.train.checks.learning": accepts("check_first_update"),
                "qlora_dist.train.checks.base": accepts(
                    "check_source_bits", "check_base_unchanged", answer="not compared on a null device"
                ),
                "qlora_dist.train.check_start": accepts("check_collective"),
            }
        ),
    )
