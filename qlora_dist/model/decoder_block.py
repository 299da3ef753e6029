"""The decoder layer of the Llama family as three autograd functions around the attention kernel.

    Queries      x -> q, k, v                    norm, one product, norms of heads, rotary embedding
    attention    q, k, v -> attended             `attention.packed_attention`, any backend
    _Gate        attended, x -> opened           output product, residual, norm, one product for gate and up, SwiGLU
    _Down        opened -> y                     down product, residual; saves nothing

What a function keeps for its backward pass is chosen by hand: products' inputs that an elementwise kernel can compute
again (both norms' results, SwiGLU's) are not kept, so a layer that is not recomputed holds about a third of what
transformers' layer does. What the last product needs is saved by `_Gate`: torch's checkpoint, which runs a layer again
until every saved tensor exists, never repeats that product.

Legend: T tokens, H hidden, F inner width, Hq and Hk query and key heads, D head dimension.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config.joint_products import BLOCK_FAMILIES
from ..config.quantization import BLOCK
from .attention import packed_attention
from .bitsandbytes_import import bitsandbytes
from .forward import decoder_layers, unwrap
from .gate_gradients import gate_gradients, is_joint
from .kernels import (
    copy_lower,
    rms_norm,
    rms_norm_backward,
    rotate_heads,
    rotate_heads_backward,
    swiglu,
    swiglu_backward,
    swiglu_lower,
)
from .products import SharedInput
from .raised_gradients import raise_with_grad_b, widened, with_room

log = logging.getLogger(__name__)


@dataclass
class Block:
    """One decoder layer's weights, in the order in which they are used."""

    input_norm: Tensor  # (H,)
    post_norm: Tensor  # (H,)
    eps: float
    queries: SharedInput  # q, k, v
    output: SharedInput
    gate: SharedInput  # gate, up
    down: SharedInput
    num_q: int
    num_kv: int
    head_dim: int
    q_norm: Tensor | None = None  # (D,), norms of heads
    k_norm: Tensor | None = None
    residual_factor: float = 1.0  # Granite: of both branches


def use_decoder_blocks(model: nn.Module) -> int:
    """Replaces the forward pass of every decoder layer of this form; returns how many were replaced.

    A layer of another form, with dropout or with several adapters keeps its own. The last norm is replaced with them.
    """
    layers = decoder_layers(model)
    found = [layer for layer in layers if fits(layer)]
    for layer in found:
        kind: Any = type(layer)
        layer.__class__ = _block_class(kind)
    if found and len(found) == len(layers):
        norm: Any = unwrap(model).base_model.norm
        norm.forward = partial(_norm_forward, norm, layers[-1])
    log.info(
        "decoder layers: %d of %d are computed as blocks, others one linear layer at a time", len(found), len(layers)
    )
    return len(found)


@lru_cache
def _block_class(kind: Any) -> Any:
    """A subclass with `_forward`. Not an attribute of each layer: transformers wraps the forward pass of its layers'
    classes to recompute it."""
    return type(kind.__name__, (kind,), {"forward": _forward, "plain_class": kind})


def fits(layer: Any) -> bool:
    """Whether a layer has the form x + m * attention(norm(x)), then x + m * down(silu(gate) * up)(norm(x))."""
    config: Any = getattr(getattr(layer, "self_attn", None), "config", None)
    if hasattr(layer, "plain_class") or getattr(config, "model_type", None) not in BLOCK_FAMILIES:
        return False
    linears = _linears(layer)
    return (
        config.hidden_act == "silu"
        and all(_is_supported(one) for one in linears)
        and all(getattr(one, "base_layer", one).bias is None for one in linears[3:])
    )


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


def _is_supported(layer: Any) -> bool:
    """A frozen matrix in 4 bits or unquantized, with at most one plain adapter without dropout."""
    base = getattr(layer, "base_layer", layer)
    if not isinstance(base, nn.Linear) or isinstance(base, bitsandbytes.nn.Linear8bitLt) or base.weight.requires_grad:
        return False
    if isinstance(base, bitsandbytes.nn.Linear4bit) and base.in_features % BLOCK:
        return False
    if base is layer:
        return True
    return (
        len(layer.lora_A) == 1
        and not layer.lora_variant
        and not any(isinstance(one, nn.Module) and getattr(one, "p", 0) for one in layer.lora_dropout.values())
    )


def read_block(layer: Any) -> Block:
    """The weights of a layer that `fits`."""
    attention, mlp = layer.self_attn, layer.mlp
    q_norm = getattr(attention, "q_norm", None)
    return Block(
        input_norm=layer.input_layernorm.weight,
        post_norm=layer.post_attention_layernorm.weight,
        eps=layer.input_layernorm.variance_epsilon,
        queries=SharedInput([attention.q_proj, attention.k_proj, attention.v_proj]),
        output=SharedInput([attention.o_proj]),
        gate=SharedInput([mlp.gate_proj, mlp.up_proj]),
        down=SharedInput([mlp.down_proj]),
        num_q=attention.q_proj.out_features // attention.head_dim,
        num_kv=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if q_norm is None else attention.k_norm.weight,
        residual_factor=getattr(layer, "residual_multiplier", 1.0),
    )


def _forward(
    layer: Any,
    hidden_states: Tensor,  # (1, T, H)
    *args: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    packed: Any = None,
    **keywords: Any,
) -> Tensor:
    """As the layer's own forward pass, which is used for what is not a packed batch with one active adapter."""
    if packed is None or position_embeddings is None or not _is_active(layer, hidden_states):
        given = {"position_embeddings": position_embeddings, **({} if packed is None else {"packed": packed})}
        return layer.plain_class.forward(layer, hidden_states, *args, **given, **keywords)
    attention = layer.self_attn
    block = read_block(layer)
    # squeeze, not [0]: the gradient of an index is written into zeros
    x = hidden_states.squeeze(0)
    cos, sin = (table.squeeze(0) for table in position_embeddings)
    if not getattr(attention, "use_rope", True):  # SmolLM 3: some layers have no positions
        cos, sin = cos[:, :0], sin[:, :0]
    q, k, v, x = _Queries.apply(x, cos, sin, block, *block.queries.parameters)
    query, key, value = (heads[None].transpose(1, 2) for heads in (q, k, v))
    # of the layer where layers differ, else of the whole model
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    attended, _ = packed_attention(
        attention, query, key, value, None, scaling=attention.scaling, sliding_window=window, packed=packed
    )
    adapters = [*block.output.parameters, *block.gate.parameters, *block.down.parameters]
    token, middle, opened = _Gate.apply(attended.squeeze(0).flatten(1), x, block, *adapters)
    return _Down.apply(token, middle, opened, block)[None]


def _is_active(layer: Any, hidden_states: Tensor) -> bool:
    """Whether the layer's adapters are on and of one scale, and nothing casts types on the way."""
    if torch.is_autocast_enabled(hidden_states.device.type) or hidden_states.shape[0] != 1:
        return False
    scales = set()
    for one in _linears(layer):
        if hasattr(one, "base_layer"):
            if one.disable_adapters or one.merged or len(one.active_adapters) != 1:
                return False
            scales |= {one.scaling[name] for name in one.active_adapters if name in one.lora_A}
    return len(scales) <= 1


class _Queries(torch.autograd.Function):
    """x -> rotated q (T, Hq, D) and k (T, Hk, D), v (T, Hk, D), and x itself.

    x goes through, so that the gradient of the residual stream is added where the norm's is written.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, block: Block, *adapters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layers = block.queries
        scales = _scales(x)
        joined, low = layers.normed_input(x, block.input_norm, block.eps, scales)
        columns = layers.product(joined)
        rotated_width = (block.num_q + block.num_kv) * block.head_dim
        unrotated = columns[:, :rotated_width]
        rotated = (
            unrotated if block.q_norm is None else torch.empty_like(unrotated, memory_format=torch.contiguous_format)
        )
        rotate_heads(unrotated, block.q_norm, block.k_norm, block.eps, cos, sin, block.num_q, block.head_dim, rotated)
        ctx.save_for_backward(x, scales, cos, sin, low, None if block.q_norm is None else columns)
        ctx.block = block
        heads = rotated.unflatten(1, (-1, block.head_dim))
        v = columns[:, rotated_width:].unflatten(1, (-1, block.head_dim))
        return heads[:, : block.num_q], heads[:, block.num_q :], v, x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, cos, sin, low, columns = ctx.saved_tensors
        block: Block = ctx.block
        layers = block.queries
        grad_q, grad_k, grad_v, grad_x = grads
        joined, grad = layers.gradient_buffer(x)
        unrotated = None if columns is None else columns[:, : (block.num_q + block.num_kv) * block.head_dim]
        rotate_heads_backward(grad_q, grad_k, grad_v, unrotated, block.q_norm, block.k_norm, block.eps, cos, sin, grad)
        of_adapters, raised = raise_with_grad_b(layers, joined, low, scales)
        if low is not None:
            of_adapters = layers.grad_a(raised, x, block.input_norm) + of_adapters
        del raised
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = layers.grad_input(joined, with_room(x, block.down.columns))
            rms_norm_backward(of_x, x, block.input_norm, block.eps, grad_x, of_x)
        return of_x, None, None, None, *of_adapters


class _Gate(torch.autograd.Function):
    """From the attention's output to SwiGLU's.

    Returns a token that represents the layer's output in the graph, as `lora_forward` does, and the two operands of
    the last product: the residual stream (T, H) and [opened | low] (T, F + R).
    """

    @staticmethod
    def forward(
        ctx: Any, attended: Tensor, x: Tensor, block: Block, *adapters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined, low_output = block.output.filled_input(x, attended, _copy, copy_lower)
        middle = block.output.product(joined, residual=x, factor=block.residual_factor)
        del joined  # each buffer before the next
        scales = _scales(x)
        joined, low_gate = block.gate.normed_input(middle, block.post_norm, block.eps, scales)
        both, grown = block.gate.gradient_buffer(x)  # the backward pass writes the gradient in place
        block.gate.product(joined, out=grown)
        del joined
        joined, low_down = block.down.filled_input(x, both, swiglu, swiglu_lower)
        ctx.save_for_backward(attended, low_output, middle, scales, low_gate, both, low_down)
        ctx.block = block
        ctx.mark_non_differentiable(middle, joined)
        ctx.set_materialize_grads(False)
        return x.new_empty(()).expand(x.shape), middle, joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        attended, low_output, middle, scales, low_gate, both, low_down = ctx.saved_tensors
        block: Block = ctx.block
        grad = grads[0]

        joined = _gradient_of_down(block, grad)
        of_down_b, raised = raise_with_grad_b(block.down, joined, low_down)
        opened = block.down.grad_input(joined)
        of_gate: list[Tensor | None] = []
        if low_gate is not None and is_joint(block.gate, block.down, opened):
            of_down, of_gate_b, raised = gate_gradients(block.gate, block.down, opened, raised, both, low_gate, scales)
        else:
            swiglu_backward(opened, both)  # both: gradients of gate and up; opened: the product's input again
            of_down = [] if low_down is None else block.down.grad_a(raised, opened)
            of_gate_b, raised = raise_with_grad_b(block.gate, both, low_gate, scales)
        of_down += of_down_b
        del joined, opened
        if low_gate is not None:
            of_gate = block.gate.grad_a(raised, middle, block.post_norm) + of_gate_b
        del raised

        of_normed = block.gate.grad_input(both)
        joined, of_middle = block.output.gradient_buffer(grad)
        rms_norm_backward(of_normed, middle, block.post_norm, block.eps, grad, of_middle)
        del of_normed
        if block.residual_factor != 1.0:
            joined, copied = block.output.gradient_buffer(grad)
            torch.mul(of_middle, block.residual_factor, out=copied)
        of_output_b, raised = raise_with_grad_b(block.output, joined, low_output)
        of_output = [] if low_output is None else block.output.grad_a(raised, attended) + of_output_b
        of_attended = block.output.grad_input(joined)
        return of_attended, of_middle, None, *of_output, *of_gate, *of_down


def _scales(x: Tensor) -> Tensor:
    """(T,), for what the norm multiplies each row by; fp64 for fp64."""
    return x.new_empty(len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _copy(source: Tensor, out: Tensor) -> None:
    out.copy_(source)


def _gradient_of_down(block: Block, grad: Tensor) -> Tensor:
    """[G | G'] of the last product from the gradient of the layer's output, whose memory it shares if that has room."""
    joined = widened(grad, block.down.columns) if block.residual_factor == 1.0 else None
    if joined is None:
        joined, copied = block.down.gradient_buffer(grad)
        torch.mul(grad, block.residual_factor, out=copied) if block.residual_factor != 1.0 else copied.copy_(grad)
    return joined


class _Down(torch.autograd.Function):
    """The layer's output (T, H). Its gradient goes to `_Gate` unchanged."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, middle: Tensor, opened: Tensor, block: Block) -> Tensor:
        return block.down.product(opened, residual=middle, factor=block.residual_factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None


class _Norm(torch.autograd.Function):
    """x (T, H) -> the same, normed. Saves x, and nothing in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, room: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps, ctx.room = weight, eps, room
        out = torch.empty_like(x)
        rms_norm(x, weight, eps, None, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        out = with_room(x, ctx.room)
        rms_norm_backward(grads[0], x, ctx.weight, ctx.eps, None, out)
        return out, None, None, None


def _norm_forward(norm: Any, last_layer: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.shape[0] != 1 or torch.is_autocast_enabled(hidden_states.device.type):
        return type(norm).forward(norm, hidden_states)
    room = SharedInput([last_layer.mlp.down_proj]).columns if _is_active(last_layer, hidden_states) else 0
    return _Norm.apply(hidden_states.squeeze(0), norm.weight, norm.variance_epsilon, room)[None]
