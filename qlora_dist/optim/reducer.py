"""Sums gradients over ranks, in fixed buckets of flat buffers (`flat.FlatParameters`).

torch's DistributedDataParallel rebuilds its buckets after its first iteration, so the first step after each start of a
job sums in another order and a resumed run differs in the last bits on 4 or more ranks; fixed buckets keep a resumed
run bit-identical, and the reduction still overlaps with the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .flat import Span

BUCKET_BYTES = 32 * 2**20  # large enough for full link bandwidth, small enough to start before the backward pass ends


class GradientReducer:
    """Sums flat gradient buffers over ranks in fixed buckets, while the backward pass still runs.

    Buckets are filled from the end of the buffers, since the last layer's gradients arrive first. A bucket is sent once
    all of its gradients have arrived and all buckets before it have been sent, so every rank sends in the same order
    whatever order its gradients arrive in; `finish` sends the rest, so a rank whose rows gave no gradient to some
    weight still takes part in every sum.
    """

    def __init__(self, num_ranks: int, flat_grads: Sequence[torch.Tensor], spans: Sequence[Sequence[Span]]) -> None:
        self._buckets: list[torch.Tensor] = []
        self._bucket_of: dict[torch.nn.Parameter, int] = {}
        self._num_parameters: list[int] = []
        for flat, group in zip(flat_grads, spans, strict=True):
            limit = BUCKET_BYTES // flat.element_size()
            stop = flat.numel()
            members: list[torch.nn.Parameter] = []
            for span in reversed(group):
                members.append(span.parameter)
                if stop - span.start >= limit or span is group[0]:
                    start = 0 if span is group[0] else span.start
                    self._bucket_of.update(dict.fromkeys(members, len(self._buckets)))
                    self._num_parameters.append(len(members))
                    self._buckets.append(flat[start:stop])
                    stop, members = start, []
        self._num_ranks = num_ranks
        self._missing: list[int] = []
        self._works: list[dist.Work] = []
        self.own_are_finite = torch.ones((), dtype=torch.bool)  # this rank's gradients, before the last sum
        if num_ranks > 1:
            for parameter in self._bucket_of:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def arm(self) -> None:
        """Before the last micro-step's backward pass: from now on full buckets are sent."""
        if self._num_ranks == 1:
            return
        self._missing = list(self._num_parameters)
        self._works = []
        self.own_are_finite = torch.ones((), dtype=torch.bool, device=self._buckets[0].device)

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        if not self._missing:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while len(self._works) < len(self._buckets) and self._missing[len(self._works)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._works)]
        self.own_are_finite &= bucket.isfinite().all()  # after the sum, the source is unknown
        work = dist.all_reduce(bucket, async_op=True)
        assert work is not None
        self._works.append(work)

    def finish(self) -> None:
        """After the last micro-step: all buckets are summed when it returns (on CUDA: in stream order)."""
        if self._num_ranks == 1:
            return
        while len(self._works) < len(self._buckets):
            self._send()
        for work in self._works:
            work.wait()
        self._missing = []
