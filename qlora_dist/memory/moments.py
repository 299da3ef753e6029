"""What comes and goes within a step: saved activations, one layer's working set, the loss; the largest moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config import RunConfig
from .constants import OFFLOAD_AHEAD_BYTES, Item
from .head import HeadBytes, head_bytes
from .items import compute_size
from .layers import LayerBytes, LayerSettings, layer_bytes
from .shapes import ModelShapes, adapted_linears


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment, besides what stays."""

    name: str
    items: dict[str, Item]
    saved_bytes: int  # saved activations over all layers, after the forward pass

    @property
    def size(self) -> int:
        return sum(item.size for item in self.items.values())


def largest_moment(config: RunConfig, shapes: ModelShapes, rows: int, recompute: int) -> Moment:
    tokens = rows * config.data.row_tokens
    size = compute_size(config)
    row = tokens * shapes.hidden * size
    layers = _layers(config, shapes, tokens)
    # between forward and backward a recomputed layer keeps its input, others what they saved (their input among it
    # where a norm saves it as it is)
    keeps = [row if index < recompute else layer.saved.total + layer.kept_input for index, layer in enumerate(layers)]
    all_saved = sum(keeps)
    head = head_bytes(shapes, tokens, size)
    steady = {
        "batch": Item(
            5 * 8 * tokens + 2 * tokens * shapes.rotary_dim * size, "token ids, positions, labels, rotary tables"
        )
    }
    limit = OFFLOAD_AHEAD_BYTES if config.memory.offload_activations else all_saved
    moments = [_loss_moment(head, min(limit, all_saved), steady)]
    below = all_saved
    for index in reversed(range(len(layers))):
        layer, is_recomputed = layers[index], index < recompute
        below -= keeps[index]
        if index in (len(layers) - 1, recompute - 1):
            moments += _layer_moments(
                layer, min(limit, below), row if is_recomputed else layer.kept_input, row, is_recomputed, steady
            )
    largest = max(moments, key=lambda moment: moment.size)
    return replace(largest, saved_bytes=all_saved)


def _layers(config: RunConfig, shapes: ModelShapes, tokens: int) -> list[LayerBytes]:
    lora = config.lora
    settings = LayerSettings(
        tokens=tokens,
        compute_size=compute_size(config),
        rank=0 if lora is None else lora.rank,
        dropout=0.0 if lora is None else lora.dropout,
        is_lean=config.model.kernels == "auto" and (lora is None or lora.variant != "dora"),
        quantization=config.model.quantization,
        double_quant=config.model.double_quant,
        attention="sdpa" if config.model.attention == "sdpa" or config.model.compute_dtype == "float32" else "flash",
        longest=config.data.row_tokens,
    )
    chosen = [frozenset()] * shapes.num_layers if lora is None else adapted_linears(shapes, lora.target_modules)
    known: dict[tuple[frozenset[str], bool], LayerBytes] = {}
    layers = []
    for index, adapted in enumerate(chosen):
        key = (adapted, index > 0)  # the embedding is frozen: nothing before the first adapter has a gradient
        if key not in known:
            known[key] = layer_bytes(shapes, replace(settings, adapted=adapted), has_grad_input=index > 0)
        layers.append(known[key])
    return layers


def _loss_moment(head: HeadBytes, saved: int, steady: dict[str, Item]) -> Moment:
    return Moment(
        "the loss",
        {
            "saved activations": Item(saved, "of all layers"),
            "last hidden states": Item(head.peak - head.logits, "the last norm, hidden states, their gradient"),
            "loss chunk": Item(head.logits, "fp32 logits of one chunk, and what is made of them"),
            **steady,
        },
        saved,
    )


def _layer_moments(
    layer: LayerBytes, below: int, own_input: int, row: int, is_recomputed: bool, steady: dict[str, Item]
) -> Iterator[Moment]:
    """One layer's forward (or recomputation) and backward, over what the layers before it keep."""
    kept = {"saved activations": Item(below + own_input, "of the layers before it, and its input")}
    for name, live, extra in (
        ("a layer's forward pass", layer.recompute_peak if is_recomputed else layer.forward_peak, row),
        ("a layer's backward pass", layer.backward_peak, 0),
    ):
        again = "recomputed and " if is_recomputed else ""
        yield Moment(
            name,
            {
                **kept,
                "one layer's activations": Item(live.activations + extra, f"{again}alive in one layer at a time"),
                "one layer's gradients": Item(live.gradients, "of activations"),
                "dequantized matrix": Item(live.weights, "and adapters in the compute type"),
                **steady,
            },
            below,
        )
