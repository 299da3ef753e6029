"""Experts of a mixture in 4 bits: transformers stacks them into 3-D parameters, which bitsandbytes leaves in 16 bits.

Each expert's matrix is quantized by itself, as bitsandbytes quantizes a linear layer. The forward pass sorts tokens by
expert and dequantizes only the experts that have tokens, a few at a time; the backward pass does so again, and saves no
weight. Where a family stores the matrices (I, O) (gpt-oss), they are quantized transposed, (O, I): blocks of 64 run
along the inputs of an output, as in every linear layer. Biases stay in the compute type. It is arranged as in
`lora_forward`, so that a recomputed layer stops before the last product:

    _Enter    x, routing weights -> gate and up of every slot, and a token in the graph   (saves order, gate and up)
    _Leave    token -> the weighted sum of each token's experts                           (saves nothing)

With adapters (`expert_updates`) `_Enter` also saves x and A x of gate and up; of down it computes both again.

Legend: T tokens, k experts per token, S = T k slots, E experts, H hidden, F inner width, O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..config.joint_products import LARGEST_MATRIX
from ..config.quantization import BLOCK, NESTED_BLOCK
from .bitsandbytes_import import bitsandbytes
from .expert_updates import Update, add_products, gradients, products
from .forward import plain_name

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # in the order in which transformers' modules hold them
BIASES = ("gate_up_proj_bias", "down_proj_bias")


class PackedExperts(nn.Module):
    """One matrix (O, I) for each expert, in 4 bits.

    codes         (E, O I / 2) uint8
    absmax        (E, O I / 64) constants: bytes with double quantization, else fp32
    nested_absmax (E, O I / 64 / 256) fp32, offset (E, 1) fp32: of the second level, if there is one
    """

    shape: torch.Size  # (E, O, I)
    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    code: Tensor  # the values of the 4-bit type
    nested_code: Tensor  # ... and of the constants' 8-bit type

    def __init__(self, shape: torch.Size, quant_type: str, is_nested: bool, is_transposed: bool = False) -> None:
        """`shape` (E, O, I); `is_transposed`: the parameter that this replaces has (E, I, O)."""
        super().__init__()
        self.shape, self.quant_type, self.is_nested, self.is_transposed = shape, quant_type, is_nested, is_transposed
        num_experts, self.num_blocks = shape[0], shape[1:].numel() // BLOCK
        widths = {"codes": shape[1:].numel() // 2, "absmax": self.num_blocks}
        if is_nested:
            widths |= {"nested_absmax": -(-self.num_blocks // NESTED_BLOCK), "offset": 1}
        for name, width in widths.items():
            is_bytes = name == "codes" or (name == "absmax" and is_nested)
            dtype = torch.uint8 if is_bytes else torch.float32
            empty = torch.empty(num_experts, width, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_buffer("code", torch.empty(16), persistent=False)
        if is_nested:
            self.register_buffer("nested_code", torch.empty(256), persistent=False)

    def set_part(self, name: str, part: Any) -> None:
        """Puts codes or constants in place: a tensor, or this rank's part of one."""
        parameter = part if isinstance(part, nn.Parameter) else nn.Parameter(part, requires_grad=False)
        # how many weights these bytes represent (`base_weights.num_weights`)
        parameter.num_weights = self.shape.numel() if name == "codes" else 0  # type: ignore[attr-defined]
        self._parameters[name] = parameter

    def constants(self, first: int, last: int) -> Tensor:
        """(last - first, blocks) fp32: of the experts first to last - 1, with the bits that bitsandbytes computes."""
        absmax = self.absmax[first:last]
        if not self.is_nested:
            return absmax
        scales = self.nested_absmax[first:last].repeat_interleave(NESTED_BLOCK, dim=1)[:, : self.num_blocks]
        return self.nested_code[absmax.int()].mul_(scales).add_(self.offset[first:last])

    def dequantized(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """(last - first, O, I): the matrices of the experts first to last - 1."""
        _, outputs, inputs = self.shape
        state = bitsandbytes.functional.QuantState(
            absmax=self.constants(first, last).view(-1),
            shape=torch.Size(((last - first) * outputs, inputs)),
            dtype=dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32,
            blocksize=BLOCK,
            code=self.code,
            quant_type=self.quant_type,
        )
        matrices = bitsandbytes.functional.dequantize_4bit(self.codes[first:last].view(-1, 1), state)
        return matrices.to(dtype).view(last - first, outputs, inputs)

    def product(self, rows: Tensor, counts: list[int], bias: Tensor | None = None) -> Tensor:
        """(S, O) from (S, I) sorted by expert: each expert's rows times its matrix, transposed, plus its bias."""
        return self._product(rows, counts, is_backward=False, bias=bias)

    def product_backward(self, grad: Tensor, counts: list[int]) -> Tensor:
        """(S, I) from (S, O): the gradient of `product`'s rows."""
        return self._product(grad, counts, is_backward=True)

    def _product(self, rows: Tensor, counts: list[int], is_backward: bool, bias: Tensor | None = None) -> Tensor:
        _, outputs, inputs = self.shape
        result = rows.new_empty(len(rows), inputs if is_backward else outputs)
        ends = list(accumulate(counts))
        for first, last in runs(counts, max(1, LARGEST_MATRIX // (outputs * inputs))):
            matrices = self.dequantized(first, last, rows.dtype)
            for expert, matrix in enumerate(matrices, first):
                own = slice(ends[expert] - counts[expert], ends[expert])
                factor = matrix if is_backward else matrix.t()
                if bias is None:
                    torch.mm(rows[own], factor, out=result[own])
                else:
                    torch.addmm(bias[expert], rows[own], factor, out=result[own])
            del matrices, matrix, factor  # before the next ones
        return result


def runs(counts: list[int], longest: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of neighbouring experts that all have tokens, at most `longest` of them."""
    first = None
    for index, count in enumerate([*counts, 0]):
        if first is not None and (count == 0 or index - first == longest):
            yield first, index
            first = None
        if first is None and count > 0:
            first = index


class Experts4bit(nn.Module):
    """A layer's experts, in the place of transformers' module and called like it."""

    gate_up_proj: PackedExperts
    down_proj: PackedExperts
    gate_up_proj_bias: nn.Parameter | None  # (E, 2 F)
    down_proj_bias: nn.Parameter | None  # (E, H)

    def __init__(self, experts: Any, quant_type: str, is_nested: bool) -> None:
        super().__init__()
        self.num_experts = len(experts.gate_up_proj)
        is_transposed = bool(getattr(experts, "is_transposed", False))
        for name in EXPERT_WEIGHTS:
            shape = linear_shape(getattr(experts, name), is_transposed)
            setattr(self, name, PackedExperts(shape, quant_type, is_nested, is_transposed))
        for name in BIASES:
            self.register_parameter(name, getattr(experts, name, None))
        self.apply_gate = experts._apply_gate  # (S, 2 F) -> (S, F)
        self.num_slots = [0] * self.num_experts  # of each expert, in training since `take_slots`

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        updates: Mapping[str, Update] = MappingProxyType({}),
    ) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H). `updates`: of gate_up_proj and down_proj, by name."""
        up, down = (updates.get(name) for name in EXPERT_WEIGHTS)
        factors = [tensor for one in (up, down) for tensor in ((None, None) if one is None else one[:2])]
        scales = [1.0 if one is None else one.scale for one in (up, down)]
        token, grown, order, counts = _Enter.apply(hidden_states, top_k_weights, top_k_index, self, scales, *factors)
        if self.training:  # a recomputation has ended by now
            self.num_slots = [sum(pair) for pair in zip(self.num_slots, counts, strict=True)]
        return _Leave.apply(token, grown, top_k_weights.detach(), order, counts, self, down)


class _Enter(torch.autograd.Function):
    """The graph node of all experts and their adapters: it receives the gradient of their sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, experts: Experts4bit, scales: list[float], *factors: Any
    ) -> tuple[Any, ...]:
        order, counts = _by_expert(index, experts.num_experts)
        up, _ = _updates(factors, scales)
        rows, low = x[order // index.shape[1]], None
        grown = experts.gate_up_proj.product(rows, counts, experts.gate_up_proj_bias)  # (S, 2 F)
        if up is not None:
            a, b = up.factors(experts.num_experts, x.dtype)
            low = products(rows, a.mT, counts)  # (S, r)
            add_products(grown, low, b.mT, counts, up.scale)
        del rows
        # the masters are saved, not their casts: saving parameters is free
        ctx.save_for_backward(weights, order, grown, None if up is None else x, low, *factors)
        ctx.mark_non_differentiable(grown, order)
        ctx.set_materialize_grads(False)
        ctx.experts, ctx.counts, ctx.scales = experts, counts, scales
        token = x.new_empty(()).expand(x.shape)  # the result's shape without its memory
        return token, grown, order, counts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        weights, order, grown, x, low, *factors = ctx.saved_tensors
        experts, counts = ctx.experts, ctx.counts
        up, down = _updates(factors, ctx.scales)
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        top_k = weights.shape[1]
        grad_rows = grads[0][order // top_k]  # (S, H)
        # of W_down act, before it is weighted
        grad_act = experts.down_proj.product_backward(grad_rows, counts)  # (S, F)
        if down is None:
            del grad_rows
        with torch.enable_grad():
            inner = grown.detach().requires_grad_()
            act = experts.apply_gate(inner)
        of_down: tuple[Tensor | None, Tensor | None] = (None, None)
        of_up: tuple[Tensor | None, Tensor | None] = (None, None)
        if down is not None:
            weighted = act.detach() * weights.reshape(-1)[order][:, None]
            of_down = _through_down(down, weighted, grad_rows, grad_act, counts)
            del grad_rows, weighted
        grad_weights = grad_x = None
        if needs_weights:  # the router is frozen, but what it reads is not
            of_slots = torch.linalg.vecdot(grad_act, act.detach())
            if experts.down_proj_bias is not None:
                of_slots += (grads[0] @ experts.down_proj_bias.t())[_places(order, counts, top_k)]
            of_slots = of_slots.to(weights.dtype)
            grad_weights = torch.empty_like(of_slots).index_copy_(0, order, of_slots).view(weights.shape)
        if needs_x or up is not None:
            grad_act.mul_(weights.reshape(-1)[order][:, None])
            (grad_grown,) = torch.autograd.grad(act, inner, grad_act)
        del act, inner, grad_act
        if up is not None:
            a, b = up.factors(len(counts), grad_grown.dtype)
            grad_low = products(grad_grown, b, counts).mul_(up.scale)
            of_up = gradients(up, x[order // top_k], low, grad_grown, grad_low, counts)
            del b
        if needs_x:
            of_rows = experts.gate_up_proj.product_backward(grad_grown, counts)
            del grad_grown
            if up is not None:
                add_products(of_rows, grad_low, a, counts)
                del a, grad_low
            grad_x = _sum_by_token(of_rows, order, top_k)
        return grad_x, grad_weights, None, None, None, *of_up, *of_down


def _updates(factors: Sequence[Any], scales: Sequence[float]) -> tuple[Update | None, Update | None]:
    """Of gate and up, and of down."""
    pairs = (factors[:2], factors[2:])
    up, down = (None if a is None else Update(a, b, scale) for (a, b), scale in zip(pairs, scales, strict=True))
    return up, down


def _through_down(
    down: Update, weighted: Tensor, grad_rows: Tensor, grad_act: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of down's A and B, whose input is `weighted` (S, F); adds to `grad_act` what comes through them."""
    a, b = down.factors(len(counts), weighted.dtype)
    grad_low = products(grad_rows, b, counts).mul_(down.scale)  # (S, r)
    add_products(grad_act, grad_low, a, counts)
    return gradients(down, weighted, products(weighted, a.mT, counts), grad_rows, grad_low, counts)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        grown: Tensor,
        weights: Tensor,
        order: Tensor,
        counts: list[int],
        experts: Experts4bit,
        down: Update | None,
    ) -> Tensor:
        act = experts.apply_gate(grown)
        act = act.mul_(weights.reshape(-1)[order][:, None])  # before the product: F wide instead of H
        rows = experts.down_proj.product(act, counts)
        if down is not None:
            a, b = down.factors(len(counts), act.dtype)
            add_products(rows, products(act, a.mT, counts), b.mT, counts, down.scale)
        del act
        out = _sum_by_token(rows, order, weights.shape[1])
        if experts.down_proj_bias is not None:
            routing = weights.new_zeros(len(weights), len(counts), dtype=out.dtype)  # (T, E)
            routing[_places(order, counts, weights.shape[1])] = weights.reshape(-1)[order].to(out.dtype)
            out.addmm_(routing, experts.down_proj_bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None, None, None


def _by_expert(index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """(S,): slots sorted by expert, in the order of their tokens within each; and the slots of each expert.

    Waits for the device once: which experts have tokens decides what is dequantized.
    """
    slots = index.reshape(-1)
    of_slots, order = torch.sort(slots, stable=True)
    if isinstance(slots, torch._subclasses.fake_tensor.FakeTensor):  # without values: all experts alike
        return order, [len(slots) // num_experts + (one < len(slots) % num_experts) for one in range(num_experts)]
    experts = torch.arange(num_experts, device=index.device)
    ends = torch.searchsorted(of_slots, experts, right=True).tolist()
    return order, [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _places(order: Tensor, counts: list[int], top_k: int) -> tuple[Tensor, Tensor]:
    """(token, expert) of the slots sorted by expert. A token has each of its experts once."""
    experts = torch.arange(len(counts), device=order.device)
    repeats = torch.tensor(counts, device=order.device)
    return order // top_k, experts.repeat_interleave(repeats, output_size=len(order))


def _sum_by_token(rows: Tensor, order: Tensor, top_k: int) -> Tensor:
    """(T, H) from the rows (S, H) of all slots sorted by expert. Not by atomic additions: they sum in any order."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return rows[place].view(-1, top_k, rows.shape[1]).sum(1)


# --- finding them -----------------------------------------------------------------------------------------------------


def stacked_experts(model: nn.Module) -> dict[str, Any]:
    """Modules of stacked experts that `pack_experts` replaces, by name: two matrices with a gate, each with a bias or
    both without."""
    return {name: module for name, module in model.named_modules() if _has_known_form(module)}


def _has_known_form(module: Any) -> bool:
    own = dict(module.named_parameters(recurse=False))
    has_bias = bool(getattr(module, "has_bias", False))
    if own.keys() != {*EXPERT_WEIGHTS, *(BIASES if has_bias else ())} or not hasattr(module, "_apply_gate"):
        return False
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", False):
        return False
    if any(own[name].ndim != 3 for name in EXPERT_WEIGHTS):
        return False
    up, down = (linear_shape(own[name], bool(getattr(module, "is_transposed", False))) for name in EXPERT_WEIGHTS)
    are_biases = not has_bias or all(
        own[bias].shape == shape[:2] for bias, shape in zip(BIASES, (up, down), strict=True)
    )
    return are_biases and up == (down[0], 2 * down[2], down[1])


def expert_matrices(module: Any) -> list[tuple[nn.Parameter, bool]]:
    """(stacked matrices, whether they are (E, I, O)) of one of `stacked_experts`."""
    is_transposed = bool(getattr(module, "is_transposed", False))
    return [(getattr(module, name), is_transposed) for name in EXPERT_WEIGHTS]


def linear_shape(matrices: Tensor, is_transposed: bool) -> torch.Size:
    """(E, O, I) of stacked matrices, as those of linear layers."""
    num_experts, outputs, inputs = matrices.shape
    return torch.Size((num_experts, inputs, outputs) if is_transposed else (num_experts, outputs, inputs))


def pack_experts(model: nn.Module, quant_type: str, is_nested: bool) -> None:
    """Replaces every module of stacked experts by one that holds them in 4 bits, without storage."""
    for name, module in stacked_experts(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Experts4bit(module, quant_type, is_nested))


def packed_experts(model: nn.Module) -> dict[str, PackedExperts]:
    """Experts in 4 bits, by the name of the parameter that they replace: in the base alone, whatever is around them."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def take_slots(model: nn.Module) -> dict[str, list[int]]:
    """How many slots each expert got on this rank in training since the last call, by the name of the experts. Known on
    the host anyway."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts4bit):
            found[re.sub(r"(\.base_layer)+$", "", plain_name(name))] = module.num_slots
            module.num_slots = [0] * module.num_experts
    return found
