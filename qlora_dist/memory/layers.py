"""A decoder layer and the loss as tapes: what transformers' layers, our attention, LoRA and loss save and need.

The layer is written for the QLoRA case: a frozen base, adapters that are cast to the compute type, RMS norms that
compute in fp32. Line by line it follows transformers' `modeling_llama` (and its relatives), `adapters.lean_forward`,
`attention` and `loss`; `plan --simulate` runs these themselves, and a test compares the two.

Legend: T tokens, H hidden, F inner width, e bytes of the compute type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .shapes import Linear, ModelShapes
from .tape import Live, Tape, Value

BLOCK = 64  # weights that share one quantization constant
NESTED_BLOCK = 256  # constants that share one constant of the second quantization
CHUNK_BYTES = 512 * 2**20  # loss.CHUNK_BYTES["cuda"]

Attention = Literal["flash", "sdpa"]


@dataclass(frozen=True)
class LayerSettings:
    """How a layer is run."""

    tokens: int
    compute_size: int = 2  # bytes of an activation
    rank: int = 0
    adapted: frozenset[str] = frozenset()
    dropout: float = 0.0
    is_lean: bool = True  # adapters.lean_forward; False: PEFT's own
    quantization: str = "nf4"
    double_quant: bool = True
    attention: Attention = "flash"  # flash stands for varlen too
    longest: int = 0  # longest document, tokens; matters where scores exist whole; 0: a document may fill all


@dataclass(frozen=True)
class LayerBytes:
    """What one decoder layer costs."""

    saved: Live  # between forward and backward, without its input
    kept_input: int  # bytes of its input, where an operation saves that as it is; else 0
    forward_peak: Live  # during its forward pass, without its input
    backward_peak: Live  # during its backward pass, with all that was saved


class LayerTape:
    """Writes one layer's tape."""

    def __init__(self, shapes: ModelShapes, settings: LayerSettings, has_grad_input: bool = True) -> None:
        self.shapes, self.settings = shapes, settings
        self.tape = Tape()
        self.row = settings.tokens * shapes.hidden * settings.compute_size  # a (T, H) tensor
        self.start = self.tape.input(self.row, needs_grad=has_grad_input)

    def measure(self) -> LayerBytes:
        """Forward, then backward."""
        tape = self.tape
        output = self._layer(self.start)
        forward = tape.peak.copy()
        # the output belongs to what comes next
        output.is_ours = False
        tape.live.activations -= output.size
        saved = tape.saved
        kept_input = self.row if self.start.refs > 1 else 0
        return LayerBytes(saved, kept_input, forward, tape.backward(output))

    # --- the layer ----------------------------------------------------------------------------------------------------

    def _layer(self, x: Value) -> Value:
        shapes, tape = self.shapes, self.tape
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
        one = 4 * tokens * heads  # a scalar for each normed vector
        if self.shapes.norm == "layer":
            return tape.op([x], x.size, saves=[x, tape.extra(2 * one)])
        is_cast = self.settings.compute_size != 4
        x32 = tape.op([x], wide) if is_cast else x
        centered = x32
        if self.shapes.norm == "fp32_layer":
            centered = tape.op([x32], wide, back_work=wide)
        # pow saves its input, and its backward pass makes two more tensors of that size
        squared = tape.op([centered], wide, saves=[centered], back_work=2 * wide)
        mean = tape.op([squared], one)
        tape.drop(squared)
        scale = tape.op([mean], one, saves_output=True)
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
        y = tape.op([x], tokens * linear.outputs * size, weights=weights)
        if linear.name not in settings.adapted:
            return y
        return self._lean(x, y, linear) if settings.is_lean else self._peft(x, y, linear)

    def _lean(self, x: Value, y: Value, linear: Linear) -> Value:
        """`adapters.lean_forward` after the base layer."""
        settings, tape = self.settings, self.tape
        size, tokens, rank = settings.compute_size, settings.tokens, settings.rank
        copies = []
        if size != 4:  # else the fp32 masters themselves are used
            copies = [
                tape.weight_copy(rank * width * size, rank * width * 4) for width in (linear.inputs, linear.outputs)
            ]
        dropped = self._dropout(x)
        low = tape.op([dropped, *copies[:1]], tokens * rank * size, saves=[dropped, *copies[:1]])
        out = tape.op([y, low, *copies[1:]], y.size, saves=[low, *copies[1:]], shares=[y])
        tape.drop(y, low, *copies)
        if dropped is not x:
            tape.drop(dropped)
        return out

    def _peft(self, x: Value, y: Value, linear: Linear) -> Value:
        """PEFT's own forward after the base layer: the input is cast up, B's output scaled, cast down and added."""
        settings, tape = self.settings, self.tape
        tokens, rank = settings.tokens, settings.rank
        copied = tape.op([y], y.size, shares=[y])
        tape.drop(y)
        x32 = x if settings.compute_size == 4 else tape.op([x], 4 * tokens * linear.inputs)
        dropped = self._dropout(x32)
        low = tape.op([dropped], 4 * tokens * rank, saves=[dropped], back_weights=4 * rank * linear.inputs)
        grown = tape.op([low], 4 * tokens * linear.outputs, saves=[low], back_weights=4 * rank * linear.outputs)
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
            # split into views: the fused output lives as long as one of them does
            joined = self._linear(x, fused[0])
            q = k = v = joined
        else:
            q, k, v = (self._linear(x, shapes.named(name)[0]) for name in ("q_proj", "k_proj", "v_proj"))
        if shapes.qk_norm != "none":
            q_heads, k_heads = (shapes.num_heads, shapes.num_kv_heads) if shapes.qk_norm == "head" else (1, 1)
            q, k = self._replace(q, self._norm(q, q_heads)), self._replace(k, self._norm(k, k_heads))
        if shapes.rotary_dim:
            # both are made before the first ones are let go
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
        """(x * cos) + (rotate_half(x) * sin). Saves nothing of x: cos and sin have no gradient."""
        tape = self.tape
        cosine = tape.op([x], size)
        turned = tape.op([x], size, work=size // 2, back_work=3 * size)  # halves padded with zeros, then added
        sine = tape.op([turned], size)
        tape.drop(turned)
        out = tape.op([cosine, sine], size, shares=[cosine, sine])
        tape.drop(cosine, sine)
        return out

    def _scores(self, q: Value, k: Value, v: Value, queries: int, keys: int) -> Value:
        """Attention proper: a flash kernel over all documents, or SDPA a document with copies of its output."""
        tape, shapes, settings = self.tape, self.shapes, self.settings
        size, tokens, heads = settings.compute_size, settings.tokens, shapes.num_heads
        inputs = list(dict.fromkeys([q, k, v]))
        if shapes.has_softcap and settings.attention == "sdpa":
            return self._plain_scores(inputs, queries, keys)
        # backward adds up the queries' gradients in fp32, and makes keys' and values' for every query head
        summed = 4 * queries // size + 4 * tokens * heads
        grouped = 2 * queries if shapes.num_kv_heads != heads else 0
        lse = tape.extra(4 * tokens * heads)
        out = tape.op(inputs, queries, saves=[*inputs, lse], saves_output=True, back_work=summed + grouped)
        if settings.attention == "flash":
            return out
        joined = tape.op([out], queries, shares=[out])  # documents one after another
        tape.drop(out)
        turned = tape.op([joined], queries)  # (T, heads, width), contiguous
        tape.drop(joined)
        return turned

    def _plain_scores(self, inputs: list[Value], queries: int, keys: int) -> Value:
        """`attention._by_plain_math` of one document: capped scores exist whole, in fp32 for the softmax."""
        tape, shapes, settings = self.tape, self.shapes, self.settings
        size, heads = settings.compute_size, shapes.num_heads
        longest = settings.longest or settings.tokens
        square = heads * longest * longest * size
        spread = tape.op(inputs, 2 * queries) if shapes.num_kv_heads != heads else None  # keys and values repeated
        operands = [*inputs, *([spread] if spread else [])]
        scores = tape.op(operands, square, saves=operands, work=square)
        capped = tape.op([scores], square, saves_output=True, work=square)
        tape.drop(scores)
        weights = tape.op([capped], 2 * square, saves_output=True, work=square)
        narrow = tape.op([weights], square)
        out = tape.op([narrow, *operands], queries, saves=[narrow, *operands])
        tape.drop(capped, weights, narrow, *([spread] if spread else []))
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
        if self.shapes.activation == "one":
            return self.tape.op([x], x.size, saves=[x])
        # gelu_new is written out in eight kernels: x, tanh, x / 2 and 1 + tanh are saved
        rest = self.tape.extra(3 * x.size)
        return self.tape.op([x], x.size, saves=[x, rest], work=2 * x.size, back_work=3 * x.size)


def dequantized_bytes(linear: Linear, quantization: str, double_quant: bool, compute_size: int) -> int:
    """What a forward or backward product of a quantized layer makes for a moment: the matrix, and its constants."""
    if quantization == "none":
        return 0
    constants = 4 * -(-linear.num_weights // BLOCK)
    # double quantization: constants times their own, then plus their mean, are two tensors for a moment, then one
    nested = constants if double_quant and quantization != "int8" else 0
    return linear.num_weights * compute_size + nested


def layer_bytes(shapes: ModelShapes, settings: LayerSettings, has_grad_input: bool = True) -> LayerBytes:
    """Bytes of one decoder layer."""
    return LayerTape(shapes, settings, has_grad_input).measure()


@dataclass(frozen=True)
class HeadBytes:
    """What stands between the last layer and the loss."""

    saved: int  # the last norm's tensors and the gradient of the hidden states, from the loss on
    peak: int  # during the loss, with what is saved
    logits: int  # of them: one chunk of fp32 logits and what is made of it


def head_bytes(shapes: ModelShapes, tokens: int, compute_size: int, chunk_bytes: int = CHUNK_BYTES) -> HeadBytes:
    """The last norm, then `loss.nll_sum` with every token a label (a row may hold nothing else)."""
    row = tokens * shapes.hidden * compute_size
    settings = LayerSettings(tokens, compute_size)
    writer = LayerTape(shapes, settings)
    hidden = writer._norm(writer.start)
    normed = writer.tape.saved.total - hidden.size
    chunk = min(tokens, max(1, chunk_bytes // (4 * shapes.vocabulary)))
    logits = 4 * chunk * shapes.vocabulary
    # logsumexp makes one copy of the logits; a cap on them keeps its slope as well
    extra = logits * (3 if shapes.caps_logits else 2)
    # hidden states, those with a label, and their gradient
    return HeadBytes(normed + row, normed + 3 * row + extra, extra)
