"""All trainable weights in one storage, all of their gradients in another.

Adapters are hundreds of small tensors. As one tensor they cost one optimizer kernel, one norm, one zeroing and few
collectives per step, and bitsandbytes' optimizers, which synchronize the device once per tensor and page only tensors
of at least 100,000 elements, synchronize once and page everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 256  # elements: bitsandbytes quantizes optimizer states in blocks of 256, which then never span two weights


@dataclass(frozen=True)
class Span:
    """Position of one weight's gradient in the flat buffer, in elements."""

    parameter: torch.nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """Position of one weight in its group's storage, in elements."""

    name: str
    start: int
    shape: tuple[int, ...]


class ParameterGroup:
    """Weights of one optimizer group, and their positions in the group's flat form of `size` elements."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decays: bool) -> None:
        self.decays = decays
        self.parameters = parameters
        self.placements: list[Placement] = []
        self.size = 0
        for name, parameter in parameters.items():
            assert parameter.dtype == torch.float32, (
                f"{name}: trainable weights must be fp32 masters, found {parameter.dtype}"
            )
            self.placements.append(Placement(name, self.size, tuple(parameter.shape)))
            self.size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT

    @property
    def optimized(self) -> list[torch.nn.Parameter]:
        """The parameters passed to the optimizer."""
        return list(self.parameters.values())


class FlatGroup(ParameterGroup):
    """A group in one storage. `weight` is the parameter that the optimizer sees; `weight.grad` its gradient."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decays: bool) -> None:
        super().__init__(parameters, decays)
        device = next(iter(parameters.values())).device
        self.weight = torch.nn.Parameter(torch.zeros(self.size, device=device))
        for placement, parameter in zip(self.placements, parameters.values()):
            view = self.view(self.weight.data, placement)
            view.copy_(parameter.data)
            parameter.data = view
        # only now that the weights' old storages are free: setup must not peak above a step
        self.weight.grad = torch.zeros(self.size, device=device)
        for placement, parameter in zip(self.placements, parameters.values()):
            parameter.grad = self.view(self.weight.grad, placement)  # autograd then accumulates in place

    @property
    def optimized(self) -> list[torch.nn.Parameter]:
        return [self.weight]

    def spans(self) -> list[Span]:
        """Position of each weight's gradient, in storage order."""
        return [
            Span(parameter, placement.start, placement.start + parameter.numel())
            for placement, parameter in zip(self.placements, self.parameters.values())
        ]

    @staticmethod
    def view(storage: torch.Tensor, placement: Placement) -> torch.Tensor:
        """The part of a flat tensor that belongs to one weight, in its shape."""
        stop = placement.start + torch.Size(placement.shape).numel()
        return storage[placement.start : stop].view(placement.shape)


def digest_of(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of weights, whatever storage they are in."""
    digest = hashlib.sha256()
    for _, weight in weights:
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


Decays = Callable[[torch.nn.Parameter], bool]


class ParameterGroups:
    """The trainable weights in at most two groups, with and without weight decay; neither is empty."""

    groups: Sequence[ParameterGroup]

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decays: Decays) -> None:
        self.groups = [ParameterGroup(members, decay) for decay, members in _split(parameters, decays)]

    def layout(self) -> list[list[list[object]]]:
        """Plain data that must be equal in two runs to exchange optimizer states: name, start, shape of each weight."""
        return [[[p.name, p.start, list(p.shape)] for p in group.placements] for group in self.groups]

    def each_weight(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """All weights with their names, in this layout's order."""
        for group in self.groups:
            yield from group.parameters.items()


class FlatParameters(ParameterGroups):
    """The same, with the weights of a group in one storage and their gradients in another.

    Moves the weights' data into flat storages: create it once the model is on its device, and do not move it again.
    """

    groups: list[FlatGroup]

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decays: Decays) -> None:
        self.groups = [FlatGroup(members, decay) for decay, members in _split(parameters, decays)]

    @property
    def grads(self) -> list[torch.Tensor]:
        """Flat gradient of each group."""
        return [group.weight.grad for group in self.groups if group.weight.grad is not None]

    def zero_grad(self) -> None:
        """Zeroes in place: the weights' `.grad` stay views."""
        for grad in self.grads:
            grad.zero_()

    def grad_norm(self) -> torch.Tensor:
        """() fp32, global L2 norm of all gradients, on the device."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in self.grads]))

    def scale_grads(self, factor: float) -> None:
        """Multiplies all gradients."""
        for grad in self.grads:
            grad.mul_(factor)


def _split(
    parameters: dict[str, torch.nn.Parameter], decays: Decays
) -> list[tuple[bool, dict[str, torch.nn.Parameter]]]:
    split: dict[bool, dict[str, torch.nn.Parameter]] = {True: {}, False: {}}
    for name, parameter in parameters.items():
        split[decays(parameter)][name] = parameter
    return [(decay, members) for decay, members in split.items() if members]
