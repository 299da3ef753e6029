"""Which kernels an operation launches on a GPU, and what each of them reads, writes and computes. For `roofline`.

- Kernels: views, allocations and metadata launch nothing. Everything else is one kernel, unless `_COMPOSED` says of
  which kernels it consists. An operation that this file does not know is one kernel over its inputs and outputs.
- Bytes: every tensor that an operation reads counts once and every one that it writes once, at the size of its real
  storage: a dimension that `expand` repeats is one row. Look-ups count the elements that they touch.
- FLOPs: of products and attention; whatever else computes is bound by its bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PRODUCTS, ATTENTION, DEQUANTIZATION, MEMORY_BOUND = "products", "attention", "dequantization", "memory-bound"
KINDS = (PRODUCTS, ATTENTION, DEQUANTIZATION, MEMORY_BOUND)


@dataclass(frozen=True)
class Kernel:
    """One launch. `compute` and `memory` name the `Rates` that bound it."""

    kind: str
    num_bytes: float
    flops: float = 0.0
    compute: str = "product_flops"
    memory: str = "bandwidth"


def real_bytes(tensor: Tensor) -> int:
    """Bytes of memory that reading the whole tensor touches: repeated dimensions have stride 0 and count once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    elements = math.prod(size for size, stride in pairs if stride != 0 or size == 0)
    return min(elements * tensor.element_size(), tensor.untyped_storage().nbytes())


@dataclass(frozen=True)
class Call:
    """One operation with what it was given and what it returned. `lengths`: of the documents, for attention."""

    name: str  # namespace.operation, without overload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    function: Any
    lengths: tuple[int, ...] = ()

    def argument(self, index: int, name: str) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name)

    @property
    def all_arguments(self) -> list[Any]:
        """In the order of the schema, with defaults."""
        given = [*self.args]
        for argument in self.function._schema.arguments[len(given) :]:
            given.append(self.kwargs.get(argument.name, argument.default_value))
        return given

    @property
    def inputs(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def written(self) -> list[Tensor]:
        """Arguments that the operation writes into, and results with memory of their own."""
        given = {_storage(tensor) for tensor in self.inputs}
        return [*self._mutated(), *(one for one in _tensors(self.result) if _storage(one) not in given)]

    @property
    def read(self) -> list[Tensor]:
        """Arguments whose values are needed, each once."""
        overwritten = {id(one) for one in self._mutated(only_overwritten=True)}
        if self.name in _FIRST_IS_NOT_READ and self.args:
            overwritten |= {id(one) for one in _tensors(self.args[0])}
        return [one for one in self.inputs if id(one) not in overwritten]

    @property
    def launches_nothing(self) -> bool:
        namespace = self.name.partition(".")[0]
        if namespace != "aten":
            return namespace in _FREE_NAMESPACES
        if self.name in _FREE or torch.Tag.inplace_view in self.function.tags:
            return True
        if not self.function._schema.is_mutable and not _tensors(self.result):
            return False  # it reads tensors and gives back something else
        return sum(one.numel() for one in self.written) == 0

    def _mutated(self, *, only_overwritten: bool = False) -> Iterable[Tensor]:
        """Tensors that the schema marks as written. Those named `out` are overwritten: their values are not read."""
        for index, argument in enumerate(self.function._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if only_overwritten and argument.name != "out" and not argument.is_out:
                continue
            yield from _tensors(self.argument(index, argument.name))


def moved(call: Call) -> int:
    """Bytes read and written by an operation that reads its inputs and writes its outputs."""
    return sum(map(real_bytes, _distinct(call.read))) + sum(map(real_bytes, _distinct(call.written)))


def kernels_of(call: Call) -> list[Kernel]:
    """The kernels that an operation launches on a GPU."""
    if call.launches_nothing:
        return []
    namespace, _, name = call.name.partition(".")
    if namespace == "qlora_dist":
        return [_own_kernel(call, name)]
    composed = _COMPOSED.get(call.name)
    if composed is not None:
        return composed(call)
    factor = _FIRST_FACTOR.get(name.removesuffix("_")) if namespace == "aten" else None
    if factor is None:
        return [Kernel(MEMORY_BOUND, moved(call))]
    left, right = call.args[factor], call.args[factor + 1]
    return [_product(left, 2.0 * left.numel() * right.shape[-1], moved(call))]


def _product(left: Tensor, flops: float, num_bytes: float) -> Kernel:
    return Kernel(PRODUCTS, num_bytes, flops, "product_flops" if left.element_size() <= 2 else "wide_product_flops")


def _own_kernel(call: Call, name: str) -> Kernel:
    """A kernel of this package, bound by its bytes: inputs and outputs, unless `kernels.traffic` knows better."""
    num_bytes: float = moved(call)
    num_flops = 0.0
    known = _own_traffic()
    if known is not None:
        bytes_moved, flops = known
        with suppress(KeyError):  # an operation that `traffic` does not list
            num_bytes = bytes_moved(name, call.all_arguments)
        num_flops = flops(name, call.all_arguments)
    return Kernel(DEQUANTIZATION if name.startswith("dequantize") else MEMORY_BOUND, num_bytes, num_flops)


@lru_cache(maxsize=1)
def _own_traffic() -> tuple[Callable[[str, Sequence[Any]], float], Callable[[str, Sequence[Any]], float]] | None:
    """`bytes_moved` and `flops` of the package's kernels; None where the package has no kernels, or they do not say."""
    package = "qlora_dist.model.kernels"
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(f"{package}.traffic") is None:
        return None
    module = importlib.import_module(f"{package}.traffic")
    return module.bytes_moved, module.flops


# --- operations that are not one kernel over their inputs and outputs -------------------------------------------------

_FREE_NAMESPACES = ("prim", "profiler")
# allocations and questions; views are recognized by their storage
_FREE = frozenset(
    f"aten.{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
        *("set_", "resize_", "is_same_size", "_assert_tensor_metadata"),
        *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset"),
    )
)
# the first argument gives the shape, or is overwritten
_FIRST_IS_NOT_READ = frozenset(
    f"aten.{name}"
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero_", "fill_", "copy_")
)
# index of the left factor among the arguments of matrix products; in-place and `out` forms are the same
_FIRST_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}


def _looked_up(call: Call) -> list[Kernel]:
    """result = source[index]: the index, and every element of the result read and written."""
    source = _storage(call.args[0])
    index = sum(real_bytes(one) for one in _distinct(call.inputs) if _storage(one) != source)
    return [Kernel(MEMORY_BOUND, index + 2 * sum(map(real_bytes, _tensors(call.result))))]


def _scattered(call: Call) -> list[Kernel]:
    """self[index] += values, in place: index and values, and every touched element read and written."""
    into, others = call.args[0], _distinct(_tensors((call.args[1:], call.kwargs)))
    touched = max(one.numel() for one in others) * into.element_size()
    return [Kernel(MEMORY_BOUND, sum(map(real_bytes, others)) + 2 * touched)]


def _filled_then_copied(call: Call) -> list[Kernel]:
    """A result of zeros, with the input copied into a part of it."""
    copied = real_bytes(call.args[0])
    return [Kernel(MEMORY_BOUND, real_bytes(call.result)), Kernel(MEMORY_BOUND, 2 * copied)]


def _nll_loss(call: Call) -> list[Kernel]:
    """(N, V) log-probabilities, of which one per target is read."""
    log_probabilities, target = call.args[:2]
    return [Kernel(MEMORY_BOUND, real_bytes(target) + target.numel() * log_probabilities.element_size())]


def _nll_loss_backward(call: Call) -> list[Kernel]:
    """Zeros (N, V), then one value per target."""
    target = call.args[2]
    written = target.numel() * call.result.element_size()
    return [Kernel(MEMORY_BOUND, real_bytes(call.result)), Kernel(MEMORY_BOUND, real_bytes(target) + written)]


def _logsumexp(call: Call) -> list[Kernel]:
    """amax; x - max; exp in place; sum; and five kernels on one value per row (infinities masked, log, + max)."""
    whole, rows = real_bytes(call.args[0]), real_bytes(call.result)
    large = [whole + rows, 2 * whole + rows, 2 * whole, whole + rows]
    return [Kernel(MEMORY_BOUND, size) for size in (*large, *[2 * rows] * 5)]


def _dequantization(num_bytes: float) -> Kernel:
    return Kernel(DEQUANTIZATION, num_bytes, memory="dequantization_bandwidth")


def _bitsandbytes_dequantize(call: Call) -> list[Kernel]:
    return [_dequantization(moved(call))]


def _bitsandbytes_product(call: Call) -> list[Kernel]:
    """x W^T for 4-bit W: above 1,536 rows (fewer on most cards) bitsandbytes writes W in 16 bits and calls F.linear.

    In the backward pass its parts are operations of their own; there the addition of the offset counts as memory-bound.
    """
    x, codes, (outputs, inputs), constants = call.args[:4]
    bias, nested = call.argument(6, "bias"), call.argument(7, "absmax_8bit")
    found = []
    if nested is None:
        num_constant_bytes = real_bytes(constants)
    else:  # the constants are quantized too: looked up in a table of 256 values, then the offset is added
        num_constant_bytes = 4 * nested.numel()
        table = real_bytes(constants) + real_bytes(call.argument(8, "absmax_code"))
        found.append(_dequantization(real_bytes(nested) + table + num_constant_bytes))
        found.append(_dequantization(2 * num_constant_bytes))
    matrix = outputs * inputs * x.element_size()
    found.append(_dequantization(real_bytes(codes) + num_constant_bytes + matrix))
    num_bytes = real_bytes(x) + matrix + real_bytes(call.result) + (0 if bias is None else real_bytes(bias))
    return [*found, _product(x, 2.0 * x.numel() * outputs, num_bytes)]


def attention_flops(num_heads: int, head_dim: int, lengths: Iterable[int]) -> float:
    """Of the forward pass: scores and values, 2 each per pair; a token attends to itself and those before it."""
    return 4.0 * num_heads * head_dim * sum(n * (n + 1) / 2 for n in lengths)


def _attention(call: Call) -> list[Kernel]:
    """Flash attention over packed documents, and the zeros of a random state that nothing uses."""
    *results, state = call.result
    query = call.args[0]
    num_bytes = sum(map(real_bytes, (*_distinct(call.inputs), *results)))
    flops = attention_flops(query.shape[1], query.shape[2], _lengths(call, query))
    return [Kernel(ATTENTION, num_bytes, flops, "attention_flops"), Kernel(ATTENTION, real_bytes(state))]


def _attention_backward(call: Call) -> list[Kernel]:
    """sum(out * grad) per row; the gradients (five products where the forward pass has two), those of the queries
    summed in fp32; these cast. With grouped heads keys and values get a gradient per query head, summed afterwards."""
    gradient, query, key, value, out, statistics = call.args[:6]
    summed = 4 * query.numel()
    per_head = query.nbytes if key.shape[1] != query.shape[1] else 0
    written = (per_head or real_bytes(key)) + (per_head or real_bytes(value))
    read = sum(map(real_bytes, (gradient, query, key, value))) + 2 * real_bytes(statistics)
    flops = 2.5 * attention_flops(query.shape[1], query.shape[2], _lengths(call, query))
    return [
        Kernel(ATTENTION, real_bytes(gradient) + real_bytes(out) + real_bytes(statistics) + summed),
        Kernel(ATTENTION, read + 2 * summed + written, flops, "attention_backward_flops"),
        Kernel(ATTENTION, summed + real_bytes(query)),
        *(Kernel(ATTENTION, per_head + real_bytes(one)) for one in (key, value) if per_head),
    ]


def _lengths(call: Call, query: Tensor) -> tuple[int, ...]:
    """Of the documents. Raises ValueError if they are not those of the tokens."""
    if sum(call.lengths) != query.shape[0]:
        raise ValueError(
            f"attention over {query.shape[0]} tokens, but the documents' lengths sum to {sum(call.lengths)}; "
            "give Roofline the lengths of the batch"
        )
    return call.lengths


_COMPOSED: dict[str, Callable[[Call], list[Kernel]]] = {
    **{f"aten.{name}": _looked_up for name in ("embedding", "gather", "index_select", "index")},
    **{f"aten.{name}": _scattered for name in ("scatter_", "scatter_add_", "index_add_", "index_copy_", "index_put_")},
    **{f"aten.{name}": _filled_then_copied for name in ("slice_backward", "select_backward", "constant_pad_nd")},
    "aten.nll_loss_forward": _nll_loss,
    "aten.nll_loss_backward": _nll_loss_backward,
    "aten.logsumexp": _logsumexp,
    "bitsandbytes.dequantize_blockwise": _bitsandbytes_dequantize,
    "bitsandbytes.dequantize_4bit": _bitsandbytes_dequantize,
    "bitsandbytes.gemm_4bit": _bitsandbytes_product,
    "torch_attn._varlen_attn": _attention,
    "torch_attn._varlen_attn_backward": _attention_backward,
}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One of each: the same elements given twice are read once."""
    keys = {(_storage(one), one.storage_offset(), one.shape, one.stride()): one for one in tensors}
    return list(keys.values())
