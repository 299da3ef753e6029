"""A decoder layer as a tape: what transformers' layers and this package's attention and LoRA save and allocate.

The layer models QLoRA: a frozen base, adapters cast to the compute type, RMS norms computed in fp32. It follows
transformers' `modeling_llama` (and its relatives), `model.lora_forward` and `model.attention` line by line;
`plan --simulate` runs that code itself, and a test compares the two.

Legend: T tokens, H hidden, F inner width, e bytes of the compute type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config.quantization import BLOCK, Quantization
from .shapes import Linear, ModelShapes
from .tape import Live, Tape, Value

Attention = Literal["flash", "sdpa"]


@dataclass(frozen=True)
class LayerSettings:
    """How a layer is run."""

    tokens: int
    compute_size: int = 2  # bytes of an activation
    rank: int = 0
    adapted: frozenset[str] = frozenset()
    dropout: float = 0.0
    is_lean: bool = True  # model.lora.lean_forward; False: PEFT's own
    is_block: bool = False  # model.decoder_block, for the families that have it
    quantization: Quantization = "nf4"
    double_quant: bool = True
    attention: Attention = "flash"  # flash includes varlen
    is_offloaded: bool = False  # saved activations go to the host
    longest: int = 0  # tokens in the longest document, for materialized scores; 0: a document may span all


@dataclass(frozen=True)
class LayerBytes:
    """Memory of one decoder layer."""

    saved: Live  # between forward and backward, without its input
    saved_sizes: tuple[int, ...]  # of the tensors in `saved`, in the order in which they are saved
    kept_input: int  # bytes of its input if an operation saves it unchanged; else 0
    forward_peak: Live  # during its forward pass, without its input
    recompute_peak: Live  # during recomputation in the backward pass, which stops before the last product
    backward_peak: Live  # during its backward pass, including everything saved


class LayerTape:
    """Records one layer on a tape."""

    def __init__(self, shapes: ModelShapes, settings: LayerSettings, has_grad_input: bool = True) -> None:
        self.shapes, self.settings = shapes, settings
        self.tape = Tape()
        self.has_grad_input = has_grad_input
        self.row = settings.tokens * shapes.hidden * settings.compute_size  # a (T, H) tensor
        self.start = self.tape.input(self.row, needs_grad=has_grad_input)
        self.before_last: Live | None = None  # peak up to the last product, where recomputation can stop there

    def measure(self) -> LayerBytes:
        """Forward, then backward."""
        tape = self.tape
        output = self._layer(self.start)
        forward = tape.peak.copy()
        # the output is counted by the next layer
        output.is_owned = False
        tape.live.activations -= output.size
        saved = tape.saved
        kept_input = self.row if self.start.refs > 1 else 0
        held = {id(value): value.size for operation in tape.operations for value in operation.saves if value.is_owned}
        recomputed = self.before_last or forward  # saved tensors of a recomputation stay on the device
        if self.settings.is_offloaded:
            again = type(self)(self.shapes, self.settings, self.has_grad_input)
            again.tape.is_offloaded = True
            again._layer(again.start)
            forward = again.tape.peak.copy()
        return LayerBytes(saved, tuple(held.values()), kept_input, forward, recomputed, tape.backward(output))

    # --- the layer ----------------------------------------------------------------------------------------------------

    def _layer(self, x: Value) -> Value:
        shapes, tape = self.shapes, self.tape
        if not shapes.is_exact:
            return self._unknown_layer(x)
        if shapes.is_parallel:
            normed = self._norm(x)
            attended = self._attention(normed)
            other = normed if shapes.shares_norm else self._norm(x)
            grown = self._mlp(other)
            tape.drop(normed, *([] if other is normed else [other]))
            partial = tape.op([attended, grown], self.row, shares=[attended, grown])
            tape.drop(attended, grown)
            out = tape.op([partial, x], self.row, shares=[partial, x])
            tape.drop(partial)
            return out
        middle = self._half(x, self._attention)
        out = self._half(middle, self._mlp)
        tape.drop(middle)
        return out

    def _unknown_layer(self, x: Value) -> Value:
        """An unlisted family: norms like Llama's, and every linear layer's input and output saved once."""
        tape = self.tape
        normed = self._norm(x)
        held = []
        for linear in self.shapes.linears:
            source = normed if linear.inputs == self.shapes.hidden else tape.op([normed], self._bytes_of(linear.inputs))
            held += [source] if source is not normed else []
            y = self._linear(source, linear)
            held.append(tape.op([y], y.size, saves=[y]))
            tape.drop(y)
        last = self._norm(x)
        if self.shapes.experts is not None:
            held.append(self._mlp(last))
        out = tape.op([*held, last, x], self.row, shares=[x])
        tape.drop(normed, last, *held)
        return out

    def _bytes_of(self, width: int) -> int:
        return self.settings.tokens * width * self.settings.compute_size

    def _half(self, x: Value, inner: object) -> Value:
        """x + inner(norm(x)), with the norm before, after, or on both sides."""
        tape, place = self.tape, self.shapes.norm_place
        assert callable(inner)
        normed = x if place == "post" else self._norm(x)
        y = inner(normed)
        if normed is not x:
            tape.drop(normed)
        if place != "pre":
            after = self._norm(y)
            tape.drop(y)
            y = after
        out = tape.op([x, y], self.row, shares=[x, y])
        tape.drop(y)
        return out

    def _norm(self, x: Value, heads: int = 1) -> Value:
        """RMS norm in fp32 (six kernels), torch's layer norm (one kernel), or Cohere's layer norm in fp32."""
        tape, tokens = self.tape, self.settings.tokens
        wide = x.size * 4 // self.settings.compute_size
        one = 4 * tokens * heads  # one scalar per normalized vector
        if self.shapes.norm == "layer":
            return tape.op([x], x.size, saves=[x, tape.extra(2 * one)])
        is_cast = self.settings.compute_size != 4
        x32 = tape.op([x], wide) if is_cast else x
        centered = x32
        if self.shapes.norm == "fp32_layer":
            # x - mean, once for the variance and once for the result
            centered = tape.op([x32], wide)
        # pow saves its input, and its backward pass allocates two more tensors of that size
        squared = tape.op([centered], wide, saves=[centered], back_work=2 * wide)
        mean = tape.op([squared], one)
        tape.drop(squared)
        scale = tape.op([mean], one, saves_output=True)
        if centered is not x32:
            tape.drop(centered)
            centered = tape.op([x32], wide)
        normed = tape.op([centered, scale], wide, saves=[centered, scale], back_work=wide)
        tape.drop(mean, scale)
        if is_cast:
            tape.drop(x32)
        if centered is not x32:
            tape.drop(centered)
        narrow = tape.op([normed], x.size) if is_cast else normed
        out = tape.op([narrow], x.size)
        tape.drop(normed)
        if is_cast:
            tape.drop(narrow)
        return out

    # --- linear layers ------------------------------------------------------------------------------------------------

    def _linear(self, x: Value, linear: Linear) -> Value:
        settings, tape = self.settings, self.tape
        size, tokens = settings.compute_size, settings.tokens
        weights = dequantized_bytes(linear, settings.quantization, settings.double_quant, size)
        is_adapted = linear.name in settings.adapted
        update = self._update(x, linear) if is_adapted and settings.is_lean else None
        if update is not None and linear is self.shapes.linears[-1]:
            self.before_last = tape.peak.copy()
        y = tape.op([x], tokens * linear.outputs * size, weights=weights)
        if update is not None:
            return self._add(y, update)
        return self._peft(x, y, linear) if is_adapted else y

    def _update(self, x: Value, linear: Linear) -> Value:
        """`model.lora_forward._Update`, before the base product. Masters are cast temporarily in both passes."""
        settings, tape = self.settings, self.tape
        size, rank = settings.compute_size, settings.rank
        sizes = (rank * linear.inputs, rank * linear.outputs)
        dropped = self._dropout(x)
        low = tape.op(
            [dropped, *(tape.parameter(4 * weights) for weights in sizes)],
            settings.tokens * rank * size,
            saves=[dropped],
            saves_output=True,
            weights=0 if size == 4 else sizes[0] * size,
            back_weights=0 if size == 4 else sum(sizes) * size,
            back_work=settings.tokens * rank * size,
        )
        if dropped is not x:
            tape.drop(dropped)
        return low

    def _add(self, y: Value, update: Value) -> Value:
        """`model.lora_forward._Add`, in place on the base output; the gradient is passed on unchanged."""
        out = self.tape.op([y, update], 0, shares=[y, update])
        out.size, y.size = y.size, 0
        self.tape.drop(y, update)
        return out

    def _peft(self, x: Value, y: Value, linear: Linear) -> Value:
        """PEFT's forward pass after the base layer: the input is cast up, B's output scaled, cast down and added."""
        settings, tape = self.settings, self.tape
        tokens, rank = settings.tokens, settings.rank
        copied = tape.op([y], y.size, shares=[y])
        tape.drop(y)
        x32 = x if settings.compute_size == 4 else tape.op([x], 4 * tokens * linear.inputs)
        dropped = self._dropout(x32)
        a, b = (tape.parameter(4 * rank * width) for width in (linear.inputs, linear.outputs))
        low = tape.op([dropped, a], 4 * tokens * rank, saves=[dropped])
        grown = tape.op([low, b], 4 * tokens * linear.outputs, saves=[low])
        tape.drop(low, *([] if dropped is x32 else [dropped]), *([] if x32 is x else [x32]))
        scaled = tape.op([grown], grown.size)
        tape.drop(grown)
        narrow = tape.op([scaled], y.size)
        tape.drop(scaled)
        out = tape.op([copied, narrow], y.size, shares=[copied, narrow])
        tape.drop(copied, narrow)
        return out

    def _dropout(self, x: Value) -> Value:
        if self.settings.dropout == 0:
            return x
        mask = self.tape.extra(x.size // (4 if self.settings.compute_size == 4 or not self.settings.is_lean else 2))
        return self.tape.op([x], x.size, saves=[mask])

    # --- attention ----------------------------------------------------------------------------------------------------

    def _attention(self, x: Value) -> Value:
        tape, shapes = self.tape, self.shapes
        size, tokens = self.settings.compute_size, self.settings.tokens
        queries = tokens * shapes.num_heads * shapes.head_dim * size
        keys = tokens * shapes.num_kv_heads * shapes.head_dim * size
        fused = shapes.named("c_attn", "query_key_value", "qkv_proj")
        if fused:
            # split into views: the fused output lives as long as any of them
            joined = self._linear(x, fused[0])
            q = k = v = joined
        else:
            q, k, v = (self._linear(x, shapes.named(name)[0]) for name in ("q_proj", "k_proj", "v_proj"))
        if shapes.qk_norm != "none":
            q_heads, k_heads = (shapes.num_heads, shapes.num_kv_heads) if shapes.qk_norm == "head" else (1, 1)
            q, k = self._replace(q, self._norm(q, q_heads)), self._replace(k, self._norm(k, k_heads))
        if shapes.rotary_dim:
            # both are computed before the originals are freed
            turned = self._rotary(q, queries), self._rotary(k, keys)
            if not fused:
                tape.drop(q, k)
            q, k = turned
        out = self._scores(q, k, v, queries, keys)
        tape.drop(*dict.fromkeys([q, k, v]))
        projected = self._linear(out, shapes.named("o_proj", "dense", "c_proj")[0])
        tape.drop(out)
        return projected

    def _replace(self, old: Value, new: Value) -> Value:
        self.tape.drop(old)
        return new

    def _rotary(self, x: Value, size: int) -> Value:
        """(x * cos) + (rotate_half(x) * sin). Does not save x: cos and sin have no gradient."""
        tape = self.tape
        cosine = tape.op([x], size)
        turned = tape.op([x], size, work=size // 2, back_work=3 * size)  # halves padded with zeros, then added
        sine = tape.op([turned], size)
        tape.drop(turned)
        out = tape.op([cosine, sine], size, shares=[cosine, sine])
        tape.drop(cosine, sine)
        return out

    def _scores(self, q: Value, k: Value, v: Value, queries: int, keys: int) -> Value:
        """Attention proper: one flash kernel for all documents, or SDPA per document with copies of its output."""
        tape, shapes, settings = self.tape, self.shapes, self.settings
        size, tokens, heads = settings.compute_size, settings.tokens, shapes.num_heads
        inputs = list(dict.fromkeys([q, k, v]))
        if shapes.has_softcap and settings.attention == "sdpa":
            return self._plain_scores(inputs, queries, keys)
        # backward accumulates query gradients in fp32, and allocates key and value gradients for every query head
        summed = 4 * queries // size + 4 * tokens * heads
        grouped = 2 * queries if shapes.num_kv_heads != heads else 0
        lse = tape.extra(4 * tokens * heads)
        out = tape.op(inputs, queries, saves=[*inputs, lse], saves_output=True, back_work=summed + grouped)
        if settings.attention == "flash" and not shapes.splits_rotary:
            return out
        if settings.attention == "flash":
            # rotated and unrotated parts are concatenated per head, so the output is laid out per head: rows are copied
            turned = tape.op([out], queries)
            tape.drop(out)
            return turned
        joined = tape.op([out], queries, shares=[out])  # concatenated documents
        tape.drop(out)
        turned = tape.op([joined], queries)  # (T, heads, width), contiguous
        tape.drop(joined)
        return turned

    def _plain_scores(self, inputs: list[Value], queries: int, keys: int) -> Value:
        """`model.attention._by_plain_math` for one document: materializes capped scores, in fp32 for the softmax."""
        tape, shapes, settings = self.tape, self.shapes, self.settings
        size, heads = settings.compute_size, shapes.num_heads
        longest = settings.longest or settings.tokens
        square = heads * longest * longest * size
        spread = tape.op(inputs, 2 * queries) if shapes.num_kv_heads != heads else None  # keys and values repeated
        operands = [*inputs, *([spread] if spread else [])]
        product = tape.op(operands, square, saves=operands)
        scores = tape.op([product], square)
        tape.drop(product)
        scaled = tape.op([scores], square)
        tanh = tape.op([scaled], square, saves_output=True)
        tape.drop(scaled)
        capped = tape.op([tanh], square)
        tape.drop(scores, tanh)
        masked = tape.op([capped], square)
        tape.drop(capped)
        wide = tape.op([masked], square * 4 // size)
        weights = tape.op([wide], square * 4 // size, saves_output=True)
        narrow = tape.op([weights], square)
        tape.drop(wide, weights)
        out = tape.op([narrow, *operands], queries, saves=[narrow, *operands])
        tape.drop(masked, narrow, *([spread] if spread else []))
        turned = tape.op([out], queries)
        tape.drop(out)
        return turned

    # --- MLP ----------------------------------------------------------------------------------------------------------

    def _mlp(self, x: Value) -> Value:
        tape, shapes = self.tape, self.shapes
        down = shapes.linears[-1]
        if not shapes.is_gated:
            up = self._linear(x, shapes.linears[-2])
            grown = self._activation(up)
            tape.drop(up)
            out = self._linear(grown, down)
            tape.drop(grown)
            return out
        if joined := shapes.named("gate_up_proj"):
            both = self._linear(x, joined[0])  # its halves are views
            half = tape.op([both], both.size // 2, saves=[both])
            product = tape.op([half, both], half.size, saves=[half, both])
            tape.drop(both, half)
            out = self._linear(product, down)
            tape.drop(product)
            return out
        gate = self._linear(x, shapes.named("gate_proj")[0])
        opened = self._activation(gate)
        tape.drop(gate)
        up = self._linear(x, shapes.named("up_proj")[0])
        product = tape.op([opened, up], up.size, saves=[opened, up])
        tape.drop(opened, up)
        out = self._linear(product, down)
        tape.drop(product)
        return out

    def _activation(self, x: Value) -> Value:
        tape, size = self.tape, x.size
        if self.shapes.activation == "one":
            return tape.op([x], size, saves=[x])
        # gelu_new consists of elementwise kernels: 0.5 * x * (1 + tanh(c * (x + 0.044715 * x ** 3)))
        half = tape.op([x], size)
        inner = tape.op([x], size, saves=[x], back_work=2 * size)
        for _ in range(3):  # times a constant, plus x, times a constant
            new = tape.op([inner], size)
            tape.drop(inner)
            inner = new
        tanh = tape.op([inner], size, saves_output=True)
        tape.drop(inner)
        opened = tape.op([tanh], size, shares=[tanh])
        tape.drop(tanh)
        out = tape.op([half, opened], size, saves=[half, opened])
        tape.drop(half, opened)
        return out


def dequantized_bytes(linear: Linear, quantization: str, double_quant: bool, compute_size: int) -> int:
    """Temporary bytes of a forward or backward product of a quantized layer: the matrix and its constants."""
    if quantization == "none":
        return 0
    constants = 4 * -(-linear.num_weights // BLOCK)
    # double quantization: scaling the constants, then adding their mean, briefly takes two tensors
    nested = constants if double_quant and quantization != "int8" else 0
    return linear.num_weights * compute_size + nested
