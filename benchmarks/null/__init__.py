"""Figures from the null device (tests/null): torch's CUDA build on a device that accepts every call, computes nothing.

    steps    one point: a few training steps of one configuration, counted, in its own process
    plan     the allocator's peak against the memory plan, over a grid of points
    host     seconds of a step in Python and dispatch, beside TRL and transformers' Trainer

Real there: bytes of PyTorch's CUDA allocator, launches, copies, synchronizations, FLOPs of matrix products, host time.
Not there: values, and time on the device.
"""
