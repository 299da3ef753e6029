"""The update under ddp: what is clipped and divided, and what reaches the sum over ranks when."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_dist.optim import reducer
from qlora_dist.optim.adamw import build_optimizer, decays
from qlora_dist.optim.flat import FlatParameters
from qlora_dist.optim.reducer import GradientReducer
from qlora_dist.optim.replicated import ReplicatedUpdate

SHAPES = {"a.weight": (40, 30), "b.weight": (25, 20), "b.bias": (25,), "c.weight": (30, 20), "d.weight": (64, 10)}


def flat_parameters() -> FlatParameters:
    generator = torch.Generator().manual_seed(0)
    return FlatParameters(
        {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}, decays
    )


def update_of(max_grad_norm: float | None, is_main: bool = True) -> tuple[ReplicatedUpdate, FlatParameters]:
    """One of one rank, with gradients of norm 5 in the sum."""
    flat = flat_parameters()
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    world: Any = SimpleNamespace(size=1, is_main=is_main, restart_limit=lambda: None, waiting=nullcontext)
    update = ReplicatedUpdate(world, flat, build_optimizer(flat, name="adamw", **options), max_grad_norm)
    for grad in flat.grads:
        grad.copy_(torch.randn(grad.shape, generator=torch.Generator().manual_seed(1)))
    flat.scale_grads(5.0 / flat.grad_norm().item())
    return update, flat


@pytest.mark.parametrize("num_labels", [1, 10])
@pytest.mark.parametrize("limit", [None, 0.1, 1e6])
def test_the_sum_is_divided_by_the_labels_and_clipped_never_scaled_up(num_labels: int, limit: float | None) -> None:
    update, flat = update_of(limit)
    norm = 5.0 / num_labels
    update.clip_and_step(1e-2, num_labels, norm)
    assert flat.grad_norm().item() == pytest.approx(min(norm, limit or norm), rel=1e-4)
    if limit != 0.1:
        unlimited, expected = update_of(None)
        unlimited.clip_and_step(1e-2, num_labels, norm)
        assert all(torch.equal(mine.weight, other.weight) for mine, other in zip(flat.groups, expected.groups))


def test_the_norm_is_that_of_all_groups_together_and_zeroing_reaches_all() -> None:
    _, flat = update_of(None)
    assert len(flat.groups) == 2
    for grad, norm in zip(flat.grads, (4.0, 3.0), strict=True):
        grad.mul_(norm / grad.norm())
    assert flat.grad_norm().item() == pytest.approx(5.0)
    flat.zero_grad()
    assert not any(grad.any() for grad in flat.grads)


def test_only_rank_0_copies_the_states() -> None:
    for is_main in (True, False):
        update, _ = update_of(None, is_main)
        update.clip_and_step(1e-2, 1, 5.0)
        tensors, _ = update.state()
        assert bool(tensors) == is_main


# --- the sum over ranks, as a rank sees it ----------------------------------------------------------------------------


class Sums:
    """In place of the collective: another rank with the same gradients. Sums when it is sent, or when it is awaited."""

    def __init__(self, when: str) -> None:
        self.when, self.sent = when, []

    def __call__(self, bucket: torch.Tensor, async_op: bool) -> Any:
        assert async_op
        self.sent.append(bucket.data_ptr())
        if self.when == "sent":
            bucket.mul_(2)
        return SimpleNamespace(wait=lambda: bucket.mul_(2) if self.when == "awaited" else None)


def reduced(monkeypatch: pytest.MonkeyPatch, when: str, order: list[str], poisoned: str = "") -> Any:
    """(gradients after finish, sums, the reducer, number of sums before finish), gradients arriving in an order."""
    monkeypatch.setattr(reducer, "BUCKET_BYTES", 4096)
    sums = Sums(when)
    monkeypatch.setattr(reducer.dist, "all_reduce", sums)
    flat = flat_parameters()
    made = GradientReducer(2, flat.grads, [group.spans() for group in flat.groups])
    parameters = {name: parameter for group in flat.groups for name, parameter in group.parameters.items()}
    made.arm()
    for place, name in enumerate(order):  # one after another: autograd's own order would be another
        factor = float("inf") if name == poisoned else place + 1.0
        (parameters[name] * factor).sum().backward()
    early = len(sums.sent)
    made.finish()
    return {name: parameter.grad for name, parameter in parameters.items()}, sums, made, early


@pytest.mark.parametrize("when", ["sent", "awaited"])
@pytest.mark.parametrize("order", [list(SHAPES), list(SHAPES)[::-1], ["c.weight", "a.weight", "b.bias"]], ids=len)
def test_a_sum_has_every_gradient_of_its_bucket_and_is_awaited(
    monkeypatch: pytest.MonkeyPatch, when: str, order: list[str]
) -> None:
    grads, sums, _, early = reduced(monkeypatch, when, order)
    for name, grad in grads.items():
        expected = 2.0 * (order.index(name) + 1) if name in order else 0.0
        assert grad.eq(expected).all(), name
    assert len(sums.sent) == len(set(sums.sent)) >= 3, "each bucket once"
    if len(order) == len(SHAPES):
        assert early == len(sums.sent), "what is complete is sent while the backward pass runs"


def test_buckets_are_sent_in_one_order_whatever_order_gradients_arrive_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def order_sent(order: list[str]) -> list[int]:
        _, sums, made, _ = reduced(monkeypatch, "sent", order)
        places = [bucket.data_ptr() for bucket in made._buckets]
        return [places.index(place) for place in sums.sent]

    first = order_sent(list(SHAPES))
    assert all(order_sent(order) == first for order in (list(SHAPES)[::-1], ["d.weight", "a.weight"], []))


@pytest.mark.parametrize("poisoned", ["", *SHAPES])
def test_a_value_that_is_not_finite_is_this_ranks_in_whatever_bucket(
    monkeypatch: pytest.MonkeyPatch, poisoned: str
) -> None:
    _, _, made, _ = reduced(monkeypatch, "awaited", list(SHAPES), poisoned)
    assert bool(made.own_are_finite) == (poisoned == "")
