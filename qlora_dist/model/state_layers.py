"""Layers that carry state along a row (linear attention, Mamba, short convolutions), computed for each packed document
as if it were alone.

Such a mixer projects its input, runs a convolution and often a scan over time, and projects the result. Only the two
functions in the middle know of time: transformers calls them by name, so that kernels can take their place. Here the
mixer's own forward pass is bound to functions that respect the borders of documents. Projections, gates and norms stay
as they are and see the whole row at once: each weight is dequantized once, each adapter applied once.

    kernel   on CUDA, where flash-linear-attention, causal-conv1d or mamba-ssm are installed, one call with borders;
             used when it gave, on the first row, what one call for each group of documents gave, gradients included
    groups   anywhere: documents of like length share one call as a batch. What is appended to the shorter ones comes
             after their last token, where no result of theirs can depend on it, and less than doubles them

Nothing is taken on trust here: `check_head` compares packed documents with documents alone on the loaded model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UserError
from .attention import PackedDocuments

log = logging.getLogger(__name__)

CHUNK = 64  # tokens: of the gated delta rule, which does not name it
LEAST_CHUNK = 16  # of matrix products in kernels
TOLERANCE = 0.03  # of a kernel against the groups: what 16-bit rounding explains, as a part of the largest value


@dataclass
class _Current:
    """What the mixers of one model share."""

    documents: PackedDocuments | None = None  # of the decoder layer that runs, also while it is recomputed
    has_kernel: dict[str, bool] = field(default_factory=dict)  # function -> whether one call with borders is exact
    num_calls: int = 0  # of functions with borders


def state_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that carry state and whose functions over time are known, by name."""
    return {name: module for name, module in model.named_modules() if _functions_of(module)}


def _functions_of(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """The functions over time that a module with a convolution calls by name: transformers decorates them, so that a
    kernel can take their place."""
    if not any(isinstance(child, nn.Conv1d) for child in module.children()):
        return {}
    forward = inspect.unwrap(type(module).forward)
    scope = forward.__globals__
    named = {name: scope.get(name) for name in forward.__code__.co_names}
    return {name: one for name, one in named.items() if callable(one) and hasattr(one, "__wrapped__")}


def separate_documents(model: Any) -> None:
    """Lets every mixer of `model` compute packed documents apart. Layers receive the keyword `packed`."""
    current = _Current()

    def remember(_layer: nn.Module, _args: Any, keywords: dict[str, Any]) -> None:
        current.documents = keywords.get("packed")

    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        mixers = state_mixers(layer)
        for mixer in mixers.values():
            _bind(mixer, current)
        if mixers:
            layer.register_forward_pre_hook(remember, with_kwargs=True)
    model.state_calls = current


def _bind(mixer: nn.Module, current: _Current) -> None:
    """The mixer's own forward pass, with its functions over time exchanged. Its class is left as it is."""
    forward = inspect.unwrap(type(mixer).forward)
    exchanged = {name: _Apart(one, name, mixer, current) for name, one in _functions_of(mixer).items()}
    own = FunctionType(
        forward.__code__,
        {**forward.__globals__, **exchanged},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    mixer.forward = MethodType(own, mixer)


def num_apart(model: Any) -> int:
    """How often functions over time were called with borders since the documents of `model` were separated."""
    current: _Current = model.state_calls
    return current.num_calls


class _Apart:
    """A function over time, called by its mixer for a row of packed documents."""

    def __init__(self, function: Callable[..., Any], name: str, mixer: nn.Module, current: _Current) -> None:
        self.function, self.name, self.mixer, self.current = function, name, mixer, current
        self.takes_chunk = "chunk_size" in inspect.signature(function).parameters
        self.axis = 2 if "conv1d" in name else 1  # of time: convolutions take (1, C, T), scans (1, T, ...)

    def __call__(self, *args: Any, packed: object = None, **keywords: Any) -> Any:
        if self._reads_projection([*args, *keywords.values()]):
            return None  # a kernel for the whole mixer: its codes would be read as weights, its adapter passed over
        documents = self.current.documents
        if documents is None:
            raise RuntimeError(f"{type(self.mixer).__name__} was called without document boundaries")
        self.current.num_calls += 1
        if len(documents.lengths) == 1:
            return self.function(*args, **keywords)
        has_kernel = self.current.has_kernel
        if self.name not in has_kernel:
            has_kernel[self.name] = args[0].is_cuda and self._is_kernel_exact(args, keywords, documents)
        if has_kernel[self.name]:
            return self.function(*args, **keywords, **_borders(documents))
        return self._by_group(args, keywords, documents)

    def _reads_projection(self, values: list[Any]) -> bool:
        linears = [module for module in self.mixer.modules() if isinstance(module, nn.Linear)]
        return any(value is linear.weight for value in values if isinstance(value, Tensor) for linear in linears)

    def _by_group(self, args: Any, keywords: dict[str, Any], documents: PackedDocuments) -> Any:
        """One call for each group; what it returns beside the result (a final state) is not defined for a row."""
        groups, order, inverse = _groups(documents, args[0].device)
        num_tokens = sum(documents.lengths)
        split = [self._split(value, num_tokens, groups, order) for value in [*args, *keywords.values()]]
        results = []
        for (_, longest), own in zip(groups, zip(*split, strict=True), strict=True):
            named = dict(zip(keywords, own[len(args) :], strict=True))
            if self.takes_chunk:  # a scan appends to whole chunks, by itself
                named["chunk_size"] = min(named.get("chunk_size", CHUNK), max(LEAST_CHUNK, _power(longest)))
            results.append(self.function(*own[: len(args)], **named))
        firsts = [result[0] if isinstance(result, tuple) else result for result in results]
        flat = [first.transpose(self.axis, 1).flatten(0, 1) for first in firsts]
        whole = (flat[0] if len(flat) == 1 else torch.cat(flat))[None]
        whole = (whole if inverse is None else whole.index_select(1, inverse)).transpose(self.axis, 1)
        return (whole, *(None for _ in results[0][1:])) if isinstance(results[0], tuple) else whole

    def _split(self, value: Any, num_tokens: int, groups: _Shapes, order: Tensor | None) -> list[Any]:
        """An argument for each group: (1, T, ...) -> (documents, longest, ...); others unchanged."""
        is_row = isinstance(value, Tensor) and value.ndim >= 3 and value.shape[self.axis] == num_tokens
        if not is_row:
            return [value] * len(groups)
        row = value.transpose(self.axis, 1)
        row = (row if order is None else row.index_select(1, order)).squeeze(0)
        parts = row.split([count * longest for count, longest in groups])
        return [part.unflatten(0, group).transpose(self.axis, 1) for part, group in zip(parts, groups, strict=True)]

    def _is_kernel_exact(self, args: Any, keywords: dict[str, Any], documents: PackedDocuments) -> bool:
        """Whether one call with borders gives what the groups give, forward and backward. The answer is logged."""
        reason = ""
        try:
            found = _with_gradients(self.function, args, {**keywords, **_borders(documents)})
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0][:160]
        else:
            expected = _with_gradients(lambda *a, **k: self._by_group(a, k, documents), args, keywords)
            gap = max(_gap(one, other) for one, other in zip(found, expected, strict=True))
            if not gap <= TOLERANCE:
                reason = f"its kernel differs by {gap:.2g} of the largest value from documents alone"
        log.info("%s: %s", self.name, f"one call for each group of documents: {reason}" if reason else "one kernel")
        return not reason


def _with_gradients(function: Callable[..., Any], args: Any, keywords: dict[str, Any]) -> list[Tensor]:
    """The result, and the gradients of its weighted sum with respect to every argument that has one."""
    copies = [
        value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in [*args, *keywords.values()]
    ]
    with torch.enable_grad():
        result = function(*copies[: len(args)], **dict(zip(keywords, copies[len(args) :], strict=True)))
        first: Tensor = result[0] if isinstance(result, tuple) else result
        weights = torch.linspace(-1, 1, first.numel(), device=first.device).view(first.shape)
        inputs = [one for one in copies if isinstance(one, Tensor) and one.requires_grad]
        gradients = torch.autograd.grad((first.float() * weights).sum(), inputs, allow_unused=True)
    zeros = (torch.zeros_like(one) if gradient is None else gradient for one, gradient in zip(inputs, gradients))
    return [first.detach(), *zeros]


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6))


def _borders(documents: PackedDocuments) -> dict[str, Tensor]:
    """Borders as the kernels take them: those of flash-linear-attention by offsets, the others by numbers."""
    if "numbers" not in documents.windows:
        counts = torch.tensor(documents.lengths)
        numbers = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)[None]
        documents.windows["numbers"] = numbers.to(documents.cu_seqlens.device)
    return {"cu_seqlens": documents.cu_seqlens, "seq_idx": documents.windows["numbers"]}


_Shapes = tuple[tuple[int, int], ...]  # (documents, tokens of the longest) of each group


def _groups(documents: PackedDocuments, device: torch.device) -> tuple[_Shapes, Tensor | None, Tensor | None]:
    """(groups, where their tokens are in the row, where the row's tokens are in the groups). No index where the row is
    one group already. Kept for the other layers of this batch."""
    groups, order, inverse = _grouped(documents.lengths)
    if order is None or inverse is None:
        return groups, None, None
    if "order" not in documents.windows:
        documents.windows["order"], documents.windows["inverse"] = order.to(device), inverse.to(device)
    return groups, documents.windows["order"], documents.windows["inverse"]


def _power(length: int) -> int:
    """The next power of two."""
    return 1 << (length - 1).bit_length()


@lru_cache(maxsize=32)
def _grouped(lengths: tuple[int, ...]) -> tuple[_Shapes, Tensor | None, Tensor | None]:
    alike: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        whole = _power(length) if length < CHUNK else -(-length // CHUNK) * CHUNK
        alike.setdefault(whole, []).append(index)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    inverse = torch.empty(sum(lengths), dtype=torch.int64)
    groups, parts, offset = [], [], 0
    for _, members in sorted(alike.items()):
        longest = max(lengths[index] for index in members)
        for index in members:
            own = torch.arange(longest).clamp(max=lengths[index] - 1) + starts[index]
            inverse[starts[index] : starts[index] + lengths[index]] = torch.arange(lengths[index]) + offset
            parts.append(own)
            offset += longest
        groups.append((len(members), longest))
    order = torch.cat(parts)
    if len(groups) == 1 and len(order) == len(inverse):
        return tuple(groups), None, None
    return tuple(groups), order, inverse


# --- what the check on the loaded model needs -------------------------------------------------------------------------


def lengths_to_check(model: nn.Module) -> tuple[int, int] | None:
    """Two documents, both longer than every convolution's kernel and every scan's chunk; None without state."""
    mixers = state_mixers(model)
    if not mixers:
        return None
    sizes = [CHUNK]
    for mixer in mixers.values():
        sizes += [value for name, value in vars(mixer).items() if "chunk_size" in name and isinstance(value, int)]
        sizes += [child.kernel_size[0] for child in mixer.children() if isinstance(child, nn.Conv1d)]
    return max(sizes) + 3, max(sizes) + 1


@contextmanager
def requires_calls(model: nn.Module, what: str) -> Iterator[None]:
    """Raises UserError if inside a mixer's projection is not called as a module: its 4-bit form and its adapter live in
    that call."""
    expected = {
        f"{name}.{key}": module
        for name, mixer in state_mixers(model).items()
        for key, module in mixer.named_children()
        if any(isinstance(part, nn.Linear) for part in module.modules())
    }
    called: set[int] = set()
    hooks = [one.register_forward_hook(lambda module, *_: called.add(id(module))) for one in expected.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    passed_over = [name for name, module in expected.items() if id(module) not in called]
    if passed_over:
        raise UserError(
            f"{what}: {passed_over[0]} is not called as a module ({len(passed_over)} of {len(expected)} projections of "
            "layers with state): its weight is read directly, which works neither in 4 bits nor with an adapter; use "
            "another base model"
        )
