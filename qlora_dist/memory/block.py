"""A decoder layer computed as one block, as a tape: `model.decoder_block` and `model.products` line by line.

Legend: T tokens, H hidden, F inner width, K inputs, N outputs and R adapter columns of one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.joint_products import (
    BLOCK_FAMILIES,
    LARGEST_JOINT_RANK,
    TOKENS_OF_CALL,
    num_parts,
    num_raised,
    padded_columns,
    split_product,
)
from ..config.quantization import BLOCK
from .expert_layer import ExpertTape
from .layers import LayerBytes, LayerSettings, LayerTape
from .shapes import Linear, ModelShapes
from .tape import Value


def is_block(shapes: ModelShapes, settings: LayerSettings) -> bool:
    """Whether training computes these layers as a block."""
    return (
        settings.is_block
        and shapes.family in BLOCK_FAMILIES
        and shapes.is_exact
        and shapes.is_silu
        and not any(linear.has_bias for linear in shapes.linears[3:])
        and (settings.quantization == "none" or all(linear.inputs % BLOCK == 0 for linear in shapes.linears))
    )


@dataclass(frozen=True)
class _Product:
    """Bytes of one product of layers that share their input."""

    joined: int  # [X | low]
    low: int
    result: int
    gradient: int  # [G | G']
    rows: int  # A in the compute type
    matrix: int  # dequantized, with the adapters' columns
    back_matrix: int
    of_a: int  # gradients of adapters, in fp32
    of_b: int
    raising: int  # while G' and the gradient of B are computed


class BlockTape(LayerTape):
    """Records one layer."""

    def _product(self, linears: Sequence[Linear]) -> _Product:
        settings = self.settings
        size, tokens, inputs = settings.compute_size, settings.tokens, linears[0].inputs
        adapted = [linear for linear in linears if linear.name in settings.adapted]
        columns = padded_columns([settings.rank] * len(adapted))
        widths = [linear.outputs for linear in linears]
        parts = split_product(widths, inputs)
        rows = [sum(widths[start:stop]) for start, stop in parts]
        last = [*rows[:-1], rows[-1] + columns]
        return _Product(
            joined=tokens * (inputs + columns) * size,
            low=tokens * columns * size,
            result=tokens * sum(widths) * size,
            gradient=tokens * (sum(widths) + columns) * size,
            rows=columns * inputs * size,
            matrix=max(rows) * (inputs + columns) * size,
            back_matrix=max(last) * inputs * size,
            of_a=4 * columns * inputs,
            of_b=4 * sum(widths) * (settings.rank if self._is_one_pass(linears) else columns),
            raising=self._raising(linears) if self._is_one_pass(linears) else columns * sum(widths) * size,
        )

    def _is_one_pass(self, linears: Sequence[Linear]) -> bool:
        """`raised_gradients._in_one_pass`."""
        settings = self.settings
        is_adapted = all(linear.name in settings.adapted for linear in linears)
        return is_adapted and settings.compute_size == 2 and settings.rank <= LARGEST_JOINT_RANK

    def _raising(self, linears: Sequence[Linear]) -> int:
        """`raised_gradients._in_one_pass`: B, parts of sums and their total."""
        settings, widths = self.settings, [linear.outputs for linear in linears]
        tokens = min(settings.tokens, TOKENS_OF_CALL)
        columns, rows = num_raised(tokens, widths)
        total = sum(widths)
        first = 0 if tokens == settings.tokens else total  # of the tokens before
        parts = rows * total + max(columns * tokens + first, total if rows > 1 else 0)
        return settings.rank * (total * settings.compute_size + 4 * parts)

    @property
    def scales(self) -> int:
        """What a norm multiplied each row by, in fp32."""
        return 4 * self.settings.tokens

    @property
    def room(self) -> int:
        """Of G' behind the rows of the gradient of the layer's output, or of its input."""
        return self._product(self.shapes.linears[6:]).low

    def _layer(self, x: Value) -> Value:
        tape, shapes = self.tape, self.shapes
        queries, output, gate, down = (
            self._product(group)
            for group in (shapes.linears[:3], shapes.linears[3:4], shapes.linears[4:6], shapes.linears[6:])
        )
        heads = self._queries(x, queries)
        widths = [self.settings.tokens * linear.outputs * self.settings.compute_size for linear in shapes.linears[:2]]
        attended = self._scores(heads[0], heads[0], heads[-1], *widths)
        # the residual stream goes through the first function, whose output has a gradient if any of them has
        through = x if x.needs_grad else tape.input(self.row, needs_grad=heads[0].needs_grad)
        opened = self._gate(attended, through, output, gate, down)
        tape.drop(attended, *dict.fromkeys(heads))
        self.before_last = tape.peak.copy()
        out = tape.op([opened], self.row, shares=[opened], weights=down.matrix, back_weights=0)
        tape.drop(opened)
        return out

    def _parameter(self, product: _Product) -> list[Value]:
        """What gives an output a gradient where the input has none; gradients of adapters are counted as work."""
        return [self.tape.parameter(0)] if product.low else []

    def _queries(self, x: Value, product: _Product) -> list[Value]:
        """Queries, keys and values in one tensor, or with norms of heads [queries and keys, values]."""
        tape, has_norms = self.tape, self.shapes.qk_norm == "head"
        saves = [x, tape.extra(self.scales), tape.extra(product.low)]
        values = self.settings.tokens * self.shapes.linears[2].outputs * self.settings.compute_size
        rotated = product.result - values if has_norms else product.result
        columns = tape.extra(rotated) if has_norms else None
        backward = [
            (product.gradient + max(product.raising, product.of_b + product.of_a) + product.low, 0),
            (product.gradient + product.of_a + product.of_b + self.row + self.room, product.back_matrix),
        ]
        back_work, back_weights = max(backward[: 1 + x.needs_grad], key=sum)
        result = tape.op(
            [x, *self._parameter(product)],
            rotated,
            saves=[*saves, *([columns] if columns else [])],
            # the product is done when the rotated copy is made
            work=product.joined + (values if has_norms else 0),
            weights=product.matrix,
            back_work=back_work - (self.row if x.needs_grad else 0),
            back_weights=back_weights,
        )
        if not has_norms:
            return [result]
        return [result, tape.op([result], values, shares=[])]

    @property
    def _is_joint(self) -> bool:
        """`gate_gradients.is_joint`."""
        return self._is_one_pass(self.shapes.linears[4:])

    def _parts(self) -> int:
        """`gate_gradients`: what it needs, parts of sums and their total."""
        if not self._is_joint:
            return 0
        settings, (gate, up, down) = self.settings, self.shapes.linears[4:]
        tokens = min(settings.tokens, TOKENS_OF_CALL)
        columns, rows = num_parts(tokens, down.inputs)
        thin = (gate.outputs + up.outputs + 2 * settings.tokens) * settings.rank * settings.compute_size
        of_rows, total = 2 * columns * tokens, 3 * down.inputs
        first = 0 if tokens == settings.tokens else total  # of the tokens before
        return thin + 4 * settings.rank * (rows * total + max(of_rows + first, total))

    def _gate(self, attended: Value, x: Value, output: _Product, gate: _Product, down: _Product) -> Value:
        """`_Gate`: its result is the last product's input, whose gradient is that of the layer's output."""
        tape, shapes = self.tape, self.shapes
        both = gate.gradient
        kept = [output.low, self.row, self.scales, gate.low, both, down.low]
        held = sum(kept) + down.joined
        forward = (
            (output.joined + output.low + self.row, output.matrix),
            (output.low + self.row + self.scales + gate.joined + gate.low + both, gate.matrix),
            (held, down.rows),
        )
        opened = down.joined - down.low
        of_down, of_gate, of_output = (one.of_a + one.of_b for one in (down, gate, output))
        raised = gate.low
        raising_gate = down.of_a + max(gate.raising, gate.of_b + raised)
        if self._is_joint:  # dA of down, dB of gate and up in one tensor, without padding
            total = 4 * self.settings.rank * 3 * shapes.linears[6].inputs
            of_down = total + down.of_b
            of_gate = 4 * self.settings.rank * 2 * shapes.linears[4].inputs
            raised = 2 * self.settings.tokens * self.settings.rank * self.settings.compute_size
            raising_gate = max(total + raised, self._parts())
        # the gradient of the output has room for G', unless the branch is scaled
        is_scaled = self.shapes.family == "granite"
        scaled, copies = (down.gradient, 2) if is_scaled else (0, 1)
        adapters = of_down + of_gate
        backward = [
            (scaled + down.raising, 0),
            (scaled + down.of_b + opened, down.back_matrix),
            (scaled + down.of_b + opened + raising_gate, 0),
            (adapters + raised, 0),
            (adapters + self.row, gate.back_matrix),
            (adapters + self.row + output.gradient, 0),
            # the gradient of the residual stream is a part of `output.gradient`, unless the branch is scaled
            (adapters + copies * output.gradient + max(output.raising, of_output), 0),
            (adapters + of_output + copies * output.gradient + attended.size, output.back_matrix),
        ]
        work, weights = max(forward, key=sum)
        back_work, back_weights = max(backward, key=sum)
        extras = [tape.extra(size) for size in kept]
        return tape.op(
            [attended, x, *self._parameter(output), *self._parameter(gate), *self._parameter(down)],
            down.joined,
            saves=[attended, *extras],
            work=work - held,
            weights=weights,
            back_work=back_work + self.room - self.row - attended.size,
            back_weights=back_weights,
        )


def layer_bytes(shapes: ModelShapes, settings: LayerSettings, has_grad_input: bool = True) -> LayerBytes:
    """Bytes of one decoder layer, as training computes it."""
    if shapes.traced is not None and settings.quantization != "int8":
        from .traced_layer import traced_bytes  # torch, which listed families do without

        return traced_bytes(shapes.traced, settings, has_grad_input)
    plain = LayerTape if shapes.experts is None else ExpertTape
    kind = BlockTape if is_block(shapes, settings) else plain
    return kind(shapes, settings, has_grad_input).measure()
