"""The low-rank update: correct derivatives, and nothing saved after the base's product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dist.model.lora_forward import lowrank_forward

INPUTS, OUTPUTS, RANK = 5, 4, 2


class Ops(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def parts(num_updates: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """x, the base's weight, and (A, B) of each update."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    return (
        draw(1, 3, INPUTS),
        draw(OUTPUTS, INPUTS).detach(),
        [(draw(RANK, INPUTS), draw(OUTPUTS, RANK)) for _ in range(num_updates)],
    )


@pytest.mark.parametrize("num_updates", [1, 2])
@pytest.mark.parametrize("is_view", [False, True])
def test_value_and_derivatives_match_the_formula(num_updates: int, is_view: bool) -> None:
    x, weight, pairs = parts(num_updates)

    def base(states: Tensor) -> Tensor:
        y = nn.functional.linear(states, weight)
        return y.view(1, 3, 2, 2).view(1, 3, OUTPUTS) if is_view else y

    def ours(states: Tensor, *flat: Tensor) -> Tensor:
        return lowrank_forward(base, states, [(states, a, b, 0.7) for a, b in zip(flat[::2], flat[1::2], strict=True)])

    flat = [matrix for pair in pairs for matrix in pair]
    expected = x @ weight.t() + sum(0.7 * (x @ a.t()) @ b.t() for a, b in pairs)
    torch.testing.assert_close(ours(x, *flat), expected)
    assert torch.autograd.gradcheck(ours, (x, *flat))


def test_adapters_get_gradients_when_the_input_needs_none() -> None:
    x, weight, [(a, b)] = parts(1)
    y = lowrank_forward(lambda states: states @ weight.t(), x.detach(), [(x.detach(), a, b, 1.0)])
    y.sum().backward()
    assert a.grad is not None and a.grad.any() and b.grad is not None and b.grad.any()


def test_everything_is_saved_before_the_base_product_and_masters_are_saved_uncast() -> None:
    x, weight, [(a, b)] = parts(1, torch.float32)
    events: list[Any] = []

    def base(states: Tensor) -> Tensor:
        events.append("base")
        return (states.detach() @ weight.bfloat16().t()).requires_grad_().clone()

    narrow = x.detach().bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: events.append(saved) or saved, lambda saved: saved):
        y = lowrank_forward(base, narrow, [(narrow, a, b, 1.0)])
    assert events[-1] == "base" and len(events) == 5
    saved = [one for one in events if isinstance(one, Tensor)]
    assert {one.data_ptr() for one in saved} >= {narrow.data_ptr(), a.data_ptr(), b.data_ptr()}
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32


def test_the_backward_pass_allocates_no_zeros_for_outputs_without_a_gradient() -> None:
    """Autograd would, for `low`, in every layer of every micro-step: one launch and T x r elements each."""
    x, weight, [(a, b)] = parts(1, torch.float32)
    y = lowrank_forward(lambda states: states @ weight.t(), x, [(x, a, b, 1.0)])
    with Ops() as ops:
        y.backward(torch.ones_like(y))
    assert ops.names and not [name for name in ops.names if "zeros" in name]
