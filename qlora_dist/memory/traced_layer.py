"""A decoder layer that has no tape: its bytes are those of transformers' own code, run under fake tensors.

For families with state layers, whose functions over time are many small operations. The layer is the one that
training runs: 4-bit base, adapters with their forward pass, packed attention, documents apart; its row is one document.

A scan runs the same operations for every chunk of a row, so a trace of thousands of tokens takes minutes. Three short
rows are traced instead. An operation of one that is also in the others (counted from the start or from the end: longer
rows have more turns of a loop in between) leaves a + b T + c T^2 bytes alive (a scan may relate each chunk to all), and
the peak of a longer row is the largest of these. Of N rows it is a + N (b T + c T^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..data.packing import Batch
from ..model import decoder_layers, hidden_states, is_linear, load_config
from ..model.dropout import dropout_rows
from ..model.lora import attach_lora
from ..model.meta import empty_base, fill_empty
from .layers import LayerBytes, LayerSettings
from .live_bytes import LiveBytes, create_tables, gpu_workspaces
from .shapes import Traced
from .tape import Live

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


ROWS = (256, 512, 768)  # tokens: whole chunks of every family


@dataclass(frozen=True)
class _Trace:
    """One layer's pass over a row."""

    tokens: int
    forward: list[tuple[str, int]]  # (operation, bytes alive after it, without the input)
    num_needed: int  # operations until all that is saved is there: where a recomputation stops
    backward: list[tuple[str, int]]  # ... with what is saved, and the gradient of the output
    early: int  # gradients beside the output's when the backward pass first asks for what is saved: then it recomputes
    saved: int
    sizes: tuple[int, ...]
    keeps_input: bool


@lru_cache(maxsize=1024)
def traced_bytes(traced: Traced, settings: LayerSettings, has_grad_input: bool) -> LayerBytes:
    """Bytes of one layer."""
    length = min(settings.longest or settings.tokens, settings.tokens)
    num_rows = settings.tokens / length
    alike = replace(settings, tokens=0, longest=0)
    is_short = num_rows == 1 and length <= ROWS[-1]
    one, two, three = (_trace(traced, alike, has_grad_input, length if is_short else tokens) for tokens in ROWS)

    def at(first: int, second: int, third: int) -> int:
        """The value for these rows of a quantity of the traced ones."""
        if is_short:
            return first
        step = ROWS[1] - ROWS[0]
        bend = (third - 2 * second + first) / (2 * step**2)
        slope = (second - first) / step - bend * (ROWS[0] + ROWS[1])
        fixed = first - slope * ROWS[0] - bend * ROWS[0] ** 2
        return round(fixed + num_rows * (slope * length + bend * length**2))

    def peak(*rows: list[tuple[str, int]]) -> int:
        """The largest value of all operations that all rows have."""
        found = []
        for alike in (rows, [row[::-1] for row in rows]):
            for operations in zip(*alike, strict=False):
                if len({name for name, _ in operations}) > 1:
                    break
                found.append(at(*(size for _, size in operations)))
        return max(found, default=0)

    traces = (one, two, three)
    saved = at(*(trace.saved for trace in traces))
    backward = peak(*(trace.backward for trace in traces))
    return LayerBytes(
        saved=Live(saved),
        saved_sizes=tuple(size * saved // max(1, three.saved) for size in three.sizes),
        kept_input=settings.tokens * _width(traced) * settings.compute_size if three.keeps_input else 0,
        forward_peak=Live(peak(*(trace.forward for trace in traces))),
        recompute_peak=Live(
            peak(*(trace.forward[: trace.num_needed] for trace in traces)), at(*(trace.early for trace in traces))
        ),
        backward_peak=Live(saved, max(0, backward - saved)),
    )


def _width(traced: Traced) -> int:
    return int(load_config(traced.name, traced.revision).get_text_config().hidden_size)


@lru_cache(maxsize=256)
def _trace(traced: Traced, settings: LayerSettings, has_grad_input: bool, tokens: int) -> _Trace:
    create_tables(settings.quantization)
    model = _one_layer(traced, settings)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(gpu_workspaces()) as live:
        fill_empty(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        dropout_rows(model).rows = ((tokens, 0),)
        x, layer = _input_of(model, tokens, has_grad_input)
        with torch.no_grad():
            layer(x)  # for what the first call leaves behind: masks, indices
        return _measure(layer, x, live, tokens)


def _one_layer(traced: Traced, settings: LayerSettings) -> Any:
    """The model with this layer alone, on the meta device."""
    config = load_config(traced.name, traced.revision)
    model: Any = empty_base(
        config,
        quantization=settings.quantization,
        double_quant=settings.double_quant,
        compute_dtype=_DTYPES[settings.compute_size],
        backend="sdpa" if settings.attention == "sdpa" else "varlen",
    )
    chosen = decoder_layers(model)[traced.index]
    layers = next(
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and chosen in list(module)
    )
    del layers[traced.index + 1 :], layers[: traced.index]
    if settings.adapted:
        linears = tuple(sorted(name for name in settings.adapted if is_linear(chosen.get_submodule(name))))
        model = attach_lora(
            model,
            rank=settings.rank,
            alpha=1,
            dropout=settings.dropout,
            target_modules=linears,
            experts="all" if len(linears) < len(settings.adapted) else "shared",
            kernels="reference" if settings.is_lean else "off",
        )
    return model.train()


class _Captured(Exception):
    """How the model calls its layer."""

    def __init__(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.args_of_layer, self.keywords = args, keywords


def _input_of(model: Any, tokens: int, has_grad_input: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The layer's input, and the layer as the model calls it."""
    (layer,) = decoder_layers(model)
    layer.gradient_checkpointing = False

    def capture(_module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        raise _Captured(args, keywords)

    hook = layer.register_forward_pre_hook(capture, with_kwargs=True, prepend=True)
    try:
        hidden_states(model, _row_of(tokens))
    except _Captured as found:
        captured = found
    hook.remove()
    keywords = dict(captured.keywords)
    args = list(captured.args_of_layer)
    given = args.pop(0) if args else keywords.pop("hidden_states")
    x = given.detach().requires_grad_(has_grad_input)

    def run(x: Tensor) -> Tensor:
        result = layer(x, *args, **keywords)
        return cast(Tensor, result[0] if isinstance(result, tuple) else result)

    return x, run


def _row_of(tokens: int) -> Batch:
    ids, places = (torch.zeros(1, tokens, dtype=torch.int64) for _ in range(2))
    borders, none = torch.arange(2, dtype=torch.int32) * tokens, torch.zeros(0, dtype=torch.int64)
    return Batch(ids, places, borders, tokens, none, none, (0,), (tokens,), (tokens,))


def _measure(layer: Callable[[Tensor], Tensor], x: Tensor, live: LiveBytes, tokens: int) -> _Trace:
    start, known, kept, num_needed = live.total, set(live.counted), dict[int, int](), 0
    forward: list[tuple[str, int]] = []

    def note(tensor: Tensor) -> Tensor:
        nonlocal num_needed
        num_needed = len(forward)
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    alive_at_first: list[int] = []

    def hand_out(tensor: Tensor) -> Tensor:
        alive_at_first.append(live.total)
        return tensor

    live.timeline = forward
    with saved_tensors_hooks(note, hand_out):
        y = layer(x)
    saved = live.total - start - y.nbytes
    backward: list[tuple[str, int]] = []
    live.timeline = backward
    if y.requires_grad:
        torch.autograd.backward([y], [torch.empty_like(y)])
    live.timeline = None
    sizes = [size for key, size in kept.items() if key not in known]
    return _Trace(
        tokens=tokens,
        forward=[(name, size - start) for name, size in forward],
        num_needed=num_needed,
        backward=[(name, size - start - y.nbytes) for name, size in backward],
        early=max(0, alive_at_first[0] - start - y.nbytes - saved - x.nbytes) if alive_at_first else 0,
        saved=saved,
        sizes=(*sizes, max(0, saved - sum(sizes))),
        keeps_input=x.untyped_storage()._cdata in kept,
    )
