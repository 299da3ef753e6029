"""Which tensors are alive when: a forward and backward pass recorded as sizes, without tensors.

PyTorch's memory rules:
- a tensor lives while a Python variable references it or an operation has saved it for its backward pass;
- backward runs the operations in reverse order; each frees what it saved after it has run;
- gradients of the same tensor are added in place if nothing else references the first, else into a new tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .constants import OFFLOAD_IN_FLIGHT, OFFLOAD_LEAST_BYTES


@dataclass(eq=False)
class Value:
    """A tensor of the forward pass."""

    size: int  # bytes
    is_weight: bool = False  # a copy of a weight, not an activation
    is_owned: bool = True  # False: it belongs to the caller (the input of the layer) and is counted there
    needs_grad: bool = True
    refs: int = 1


@dataclass(eq=False)
class Gradient:
    """The gradient of one or several tensors (a sum passes the same one to all of its terms)."""

    size: int
    refs: int = 1


@dataclass
class Live:
    """Bytes alive at one moment."""

    activations: int = 0  # tensors of the forward pass
    gradients: int = 0  # gradients of activations
    weights: int = 0  # copies of weights (dequantized, cast) and gradients of weights in transit

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.weights

    def copy(self) -> Live:
        return Live(self.activations, self.gradients, self.weights)


@dataclass(eq=False)
class Operation:
    output: Value
    inputs: Sequence[Value]
    saves: Sequence[Value]
    shares: Sequence[Value]  # inputs whose gradient is the output's own: no new tensor
    back_weights: int
    back_work: int


@dataclass
class Tape:
    """Record the forward pass with `op` and `drop`, then read `saved` and run `backward`."""

    live: Live = field(default_factory=Live)
    peak: Live = field(default_factory=Live)
    operations: list[Operation] = field(default_factory=list)
    is_offloaded: bool = False  # saved tensors go to the host: a forward pass alone
    in_flight: deque[Value] = field(default_factory=deque)  # whose copies may still run

    # --- forward ------------------------------------------------------------------------------------------------------

    def input(self, size: int, needs_grad: bool = True) -> Value:
        """A tensor that the caller owns."""
        return Value(size, is_owned=False, needs_grad=needs_grad)

    def parameter(self, size: int) -> Value:
        """A trained weight, owned elsewhere; its gradient has `size` bytes and is accumulated elsewhere."""
        return Value(size, is_weight=True, is_owned=False)

    def extra(self, size: int) -> Value:
        """Something that an operation saves besides its inputs and output: a dropout mask, a log-sum-exp."""
        value = Value(size, needs_grad=False, refs=0)  # `op` adds the reference; without a gradient it is freed
        self._allocate(value)
        return value

    def op(
        self,
        inputs: Sequence[Value],
        size: int,
        *,
        saves: Sequence[Value] = (),
        saves_output: bool = False,
        shares: Sequence[Value] = (),
        weights: int = 0,  # temporary bytes of weight copies in forward and backward
        back_weights: int | None = None,  # ... in backward only
        work: int = 0,  # other temporary bytes in forward
        back_work: int = 0,
    ) -> Value:
        """One operation of the forward pass."""
        needs_grad = any(value.needs_grad for value in inputs)
        out = Value(size, needs_grad=needs_grad)
        self._allocate(out)
        self._note(weights=weights, activations=work)
        kept = [] if not needs_grad else [*saves, out] if saves_output else list(saves)
        for value in kept:
            self._save(value)
        if not kept:
            for value in saves:
                if value.refs == 0:  # an unused extra
                    self._free(value)
        self.operations.append(
            Operation(out, inputs, kept, shares, weights if back_weights is None else back_weights, back_work)
        )
        return out

    def _save(self, value: Value) -> None:
        if self.is_offloaded and value.size >= OFFLOAD_LEAST_BYTES:
            if value in self.in_flight:
                return
            self.in_flight.append(value)
        value.refs += 1
        if len(self.in_flight) > OFFLOAD_IN_FLIGHT:
            self.drop(self.in_flight.popleft())

    def drop(self, *values: Value) -> None:
        """Python variables that go out of scope."""
        for value in values:
            value.refs -= 1
            if value.refs == 0 and value.is_owned:
                self._free(value)

    @property
    def saved(self) -> Live:
        """What is alive now: after the forward pass, what backward will need."""
        return self.live.copy()

    # --- backward -----------------------------------------------------------------------------------------------------

    def backward(self, output: Value) -> Live:
        """Runs backward from `output`, whose gradient exists already; returns what was alive at the peak."""
        self.peak = Live()
        grads: dict[int, Gradient] = {id(output): self._new_gradient(output.size)}
        self._note()
        for operation in reversed(self.operations):
            grad = grads.pop(id(operation.output), None)
            if grad is None:
                continue
            new = {}
            for value in operation.inputs:
                if value.needs_grad and value not in operation.shares:
                    new[id(value)] = self._new_gradient(value.size)
                elif value.needs_grad:
                    new[id(value)] = grad
                    grad.refs += 1
            self._note(weights=operation.back_weights, gradients=operation.back_work)
            self._release(grad)
            self.drop(*operation.saves)
            for value in operation.inputs:
                if value.needs_grad:
                    self._add(grads, value, new[id(value)])
        return self.peak

    def _add(self, grads: dict[int, Gradient], value: Value, new: Gradient) -> None:
        old = grads.get(id(value))
        if old is None:
            grads[id(value)] = new
            return
        if old.refs > 1:
            total = self._new_gradient(value.size)
            self._note()
            self._release(old)
            grads[id(value)] = total
        self._release(new)

    def _new_gradient(self, size: int) -> Gradient:
        self.live.gradients += size
        return Gradient(size)

    def _release(self, grad: Gradient) -> None:
        grad.refs -= 1
        if grad.refs == 0:
            self.live.gradients -= grad.size

    # --- counting -----------------------------------------------------------------------------------------------------

    def _allocate(self, value: Value) -> None:
        if value.is_weight:
            self.live.weights += value.size
        else:
            self.live.activations += value.size
        self._note()

    def _free(self, value: Value) -> None:
        if value.is_weight:
            self.live.weights -= value.size
        else:
            self.live.activations -= value.size

    def _note(self, weights: int = 0, activations: int = 0, gradients: int = 0) -> None:
        if self.live.total + weights + activations + gradients > self.peak.total:
            self.peak = Live(
                self.live.activations + activations, self.live.gradients + gradients, self.live.weights + weights
            )
