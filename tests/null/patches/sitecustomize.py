"""Plausible values from a CUDA device that computes nothing: Python imports this if its folder is on PYTHONPATH.

On such a device memory, launches, copies and synchronizations are real, and kernels leave their outputs unchanged. A
run stops at the first value that it checks: the number of computed labels, a sum over ranks, weights that must have
changed. Exactly these checks get the values that a real device would return; everything else runs unmodified. The
comparisons patched here are the ones that such a dry run cannot test.
"""

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import sys


def patching_finder(patches):
    """A finder that runs patches[name](module) after a module is executed."""

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
    """The four numbers that a step reads follow from its rows: a loss of 1 per label, no stop, all labels, norm 1."""
    import torch

    real, tolist, current_rows = module.train_step, torch.Tensor.tolist, []
    counted = os.environ.get("NULL_GPU_STEPS")  # a file for the device calls of each step
    library = ctypes.CDLL(os.environ["NULL_GPU_LIB"])
    counts = []

    def read(tensor):
        found = tolist(tensor)
        if current_rows and tensor.is_cuda and tensor.dtype == torch.float64 and tensor.shape == (4,):
            labels = float(current_rows[-1].num_labels)
            return [labels, 0.0, labels, 1.0]
        return found

    def train_step(world, model, rows, **options):
        current_rows.append(rows)
        if counted:
            library.null_reset()
        try:
            return real(world, model, rows, **options)
        finally:
            current_rows.pop()
            if counted:
                library.null_dump(f"{counted}.step".encode())
                with open(f"{counted}.step") as file:
                    calls = dict(line.rstrip("\n").split("\t")[::-1] for line in file)
                counts.append({name: int(number) for name, number in calls.items()})
                with open(counted, "w") as file:
                    json.dump(counts, file)

    torch.Tensor.tolist = read
    module.train_step = train_step


def reports_equal_bits(module):
    """Types and shapes are compared, values are not."""
    same = module.same_bits
    module.same_bits = lambda left, right: same(left, right) or (left.dtype, left.shape) == (right.dtype, right.shape)


def sums_to_one_value(module):
    """A checksum is computed on the device: read back, it is whatever lies there."""
    checksum = module.base_checksum
    module.base_checksum = lambda model: (checksum(model), "0" * 64)[1]


def reports_equal(module):
    differ = module.differ
    module.differ = lambda *values: (differ(*values), False)[1]


def accepts_zeros(module):
    verify = module.verify_adapter_file
    module.verify_adapter_file = lambda model, folder, **options: verify(model, folder)


def without_cudnn(module):
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # the null device has none: flash attention is the next choice


def finds_one_document(module):
    """Where transformers looks for several documents in a row: read from the device, any answer could come back."""
    module.find_packed_sequence_indices = lambda position_ids: None


def scores_every_position(module):
    """As TRL does off NVIDIA: otherwise the number of labels, read from the device, is the size of a tensor."""
    module._use_triton = lambda device: False


def finds_no_overflow(module):
    """DeepSpeed reads every gradient's sum from the device, and its norm."""
    optimizers = [one for one in vars(module).values() if isinstance(one, type) and "has_overflow" in vars(one)]
    assert optimizers, f"{module.__name__} has changed: nothing checks for an overflow"
    for optimizer in optimizers:
        optimizer.has_overflow = _then_false(optimizer.has_overflow)
    module.is_invalid_grad_norm = _then_false(module.is_invalid_grad_norm)


def _then_false(check):
    return lambda *arguments, **options: (check(*arguments, **options), False)[1]


def accepts(name):
    return lambda module: setattr(module, name, lambda *arguments, **options: None)


if "NULL_GPU_LIB" in os.environ:
    sys.meta_path.insert(
        0,
        patching_finder(
            {
                "qlora_dist.train.step": step,
                "qlora_dist.model.base_weights": sums_to_one_value,
                "qlora_dist.model.forward": reports_equal,
                "qlora_dist.model.weights.original": reports_equal_bits,
                "qlora_dist.model.lora_files": accepts_zeros,
                "qlora_dist.train.checks.learning": accepts("check_first_update"),
                "qlora_dist.train.checks.base": accepts("check_base_unchanged"),
                "qlora_dist.train.check_start": accepts("check_collective"),
                "deepspeed.runtime.zero.stage_1_and_2": finds_no_overflow,
                "deepspeed.runtime.zero.stage3": finds_no_overflow,
                "trl.trainer.utils": scores_every_position,
                "transformers.masking_utils": finds_one_document,
                "transformers.integrations.sdpa_attention": without_cudnn,
            }
        ),
    )
