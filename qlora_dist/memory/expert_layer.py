"""A decoder layer with stacked experts as a tape: transformers' router and `model.experts`, line by line.

Legend: T tokens, k experts per token, S = T k slots, E experts, H hidden, F inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.joint_products import LARGEST_MATRIX
from ..config.quantization import BLOCK
from .layers import LayerTape
from .shapes import Experts
from .tape import Value

INDEX = 8  # bytes of an index, int64


@dataclass(frozen=True)
class _Update:
    """Bytes of the adapters of one weight of all experts: `model.expert_updates`."""

    cast: int = 0  # A in the compute type
    factors: int = 0  # and B, expert by expert
    gradients: int = 0  # of both, fp32


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
        of_up, of_down = self._updates()
        low = slots * self.settings.rank * size if self._is_adapted else 0
        entered = tape.op(
            [x, routing, *([tape.parameter(0)] if self._is_adapted else [])],
            2 * inner,
            saves=[routing, tape.extra(order), *([x, tape.extra(low)] if self._is_adapted else [])],
            saves_output=True,
            work=rows,
            weights=max(up, of_up.factors),
        )
        last = tape.operations[-1]
        # the tape counts the gradients of both inputs from the start; the rows' comes last
        early = x.size if x.needs_grad else 0
        small = slots * size  # routing weights of all slots
        forward = (
            (2 * inner + small, 0),  # silu(gate), and times up
            (inner + rows, max(down, of_down.factors + low)),
            (2 * rows + order - self.row, 0),
        )
        of_both = of_down.gradients + of_up.gradients
        backward = (
            (rows + inner - early - routing.size, down),  # gradients of rows, and of what they were made of
            # those, act and what its gradient needs, weighted; A x of down, and its gradient
            (rows + 4 * inner + 2 * low - early + of_down.gradients, of_down.factors),
            # gate and up, their gradients, and both of these in one
            (6 * inner + small - early + of_down.gradients, 0),
            (2 * inner + rows + low - early + of_both, of_up.factors),  # rows again
            (2 * inner + rows + low - early + of_both, up + of_up.cast),
            (2 * rows + order + of_both, 0),
        )
        last.back_work, last.back_weights = max(backward, key=sum)
        self.before_last = tape.peak.copy()
        work, weights = max(forward, key=sum)
        out = tape.op([entered], self.row, shares=[entered], work=work, weights=weights, back_weights=0)
        tape.drop(entered)
        return out

    @property
    def _is_adapted(self) -> bool:
        return self.experts.name in self.settings.adapted

    def _updates(self) -> tuple[_Update, _Update]:
        """Of gate and up, and of down."""
        size, columns = self.settings.compute_size, self.experts.num_experts * self.settings.rank
        if not self._is_adapted:
            return _Update(), _Update()
        up, down = (
            _Update(
                cast=0 if size == 4 else columns * inputs * size,
                factors=columns * (outputs + (0 if size == 4 else inputs)) * size,
                gradients=4 * columns * (outputs + inputs),
            )
            for outputs, inputs in self.experts.matrices
        )
        return up, down

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
