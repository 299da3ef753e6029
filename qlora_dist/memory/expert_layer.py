"""A decoder layer with stacked experts as a tape: transformers' router and `model.experts`, line by line.

Legend: T tokens, k experts per token, S = T k slots, E experts, H hidden, F inner width.
"""

from __future__ import annotations

from ..config.joint_products import LARGEST_MATRIX
from ..config.quantization import BLOCK
from .layers import LayerTape
from .shapes import Experts
from .tape import Value

INDEX = 8  # bytes of an index, int64


class ExpertTape(LayerTape):
    """Records one layer."""

    def _mlp(self, x: Value) -> Value:
        tape = self.tape
        logits, routing = self._router(x)
        out = self._experts(x, routing)
        tape.drop(logits, routing)
        return out

    def _router(self, x: Value) -> tuple[Value, Value]:
        """(logits (T, E), which stay until the layer's experts are done; weights (T, k))."""
        tape, tokens, size = self.tape, self.settings.tokens, self.settings.compute_size
        experts = self.experts
        scores = tokens * experts.num_experts
        logits = tape.op([x], scores * size)
        wide = 0 if size == 4 else 4 * scores
        probabilities = tape.op([logits], 4 * scores, saves_output=True, work=wide)
        top = tokens * experts.top_k
        chosen = tape.op([probabilities], 4 * top, saves=[tape.extra(INDEX * top)])
        routing = tape.op([chosen], 4 * top)
        tape.drop(probabilities, chosen)
        return logits, routing

    def _experts(self, x: Value, routing: Value) -> Value:
        """`model.experts`: the gradient of the result is that of the first function's output."""
        tape, size, experts = self.tape, self.settings.compute_size, self.experts
        slots = self.settings.tokens * experts.top_k
        rows, inner, order = slots * experts.hidden * size, slots * experts.inner * size, INDEX * slots
        up, down = (self._matrices(*shape) for shape in experts.matrices)
        entered = tape.op(
            [x, routing],
            2 * inner,
            saves=[routing, tape.extra(order)],
            saves_output=True,
            work=rows,
            weights=up,
        )
        last = tape.operations[-1]
        # the tape counts the gradients of both inputs from the start; the rows' comes last
        early = x.size if x.needs_grad else 0
        small = slots * size  # routing weights of all slots
        forward = (
            (2 * inner + small, 0),  # silu(gate), and times up
            (inner + rows, down),
            (2 * rows + order - self.row, 0),
        )
        backward = (
            (rows + inner - early - routing.size, down),  # gradients of rows, and of what they were made of
            (6 * inner + small - early, 0),  # gate and up, their gradients, and both of these in one
            (2 * inner + rows - early, up),
            (2 * rows + order, 0),
        )
        last.back_work, last.back_weights = max(backward, key=sum)
        self.before_last = tape.peak.copy()
        work, weights = max(forward, key=sum)
        out = tape.op([entered], self.row, shares=[entered], work=work, weights=weights, back_weights=0)
        tape.drop(entered)
        return out

    @property
    def experts(self) -> Experts:
        """Of this layer."""
        assert self.shapes.experts is not None
        return self.shapes.experts

    def _matrices(self, outputs: int, inputs: int) -> int:
        """Dequantized at a time; with double quantization their constants too."""
        if self.settings.quantization == "none":
            return 0
        count = min(self.experts.num_experts, max(1, LARGEST_MATRIX // (outputs * inputs)))
        constants = 4 * count * (outputs * inputs // BLOCK) if self.settings.double_quant else 0
        return count * outputs * inputs * self.settings.compute_size + constants
