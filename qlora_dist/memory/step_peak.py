"""What comes and goes within a step: saved activations, one layer's working set, the loss; the largest moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..config import RunConfig
from .block import is_block, layer_bytes
from .constants import OFFLOAD_AHEAD_BYTES, Item
from .layers import LayerBytes, LayerSettings, LayerTape
from .resident import compute_size
from .shapes import ModelShapes, adapted_linears

CHUNK_BYTES = 512 * 2**20  # model.loss.CHUNK_BYTES["cuda"]


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment, besides what is resident."""

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
    settings = _settings(config, tokens)
    layers = _layers(config, shapes, settings)
    # between forward and backward a recomputed layer keeps its input, others what they saved (including their input
    # if a norm saves it unchanged)
    keeps = [row if index < recompute else layer.saved.total + layer.kept_input for index, layer in enumerate(layers)]
    all_saved = sum(keeps)
    head = head_bytes(shapes, settings)
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


def _settings(config: RunConfig, tokens: int) -> LayerSettings:
    """What is the same in every layer."""
    lora = config.lora
    return LayerSettings(
        tokens=tokens,
        compute_size=compute_size(config),
        rank=0 if lora is None else lora.rank,
        dropout=0.0 if lora is None else lora.dropout,
        is_lean=config.model.kernels != "off" and (lora is None or lora.variant != "dora"),
        is_block=(
            config.model.kernels == "auto"
            and config.model.quantization != "int8"
            and lora is not None
            and lora.variant != "dora"
            and lora.dropout == 0
        ),
        quantization=config.model.quantization,
        double_quant=config.model.double_quant,
        attention="sdpa" if config.model.attention == "sdpa" or config.model.compute_dtype == "float32" else "flash",
        longest=config.data.row_tokens,
    )


def _layers(config: RunConfig, shapes: ModelShapes, settings: LayerSettings) -> list[LayerBytes]:
    lora = config.lora
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
            "last hidden states": Item(head.peak - head.logits, "the last norm, hidden states and their gradient"),
            "loss chunk": Item(head.logits, "fp32 logits of one chunk, and tensors computed from them"),
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


# --- the last norm and the loss ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadBytes:
    """Memory between the last layer and the loss."""

    saved: int  # the last norm's tensors and the gradient of the hidden states, from the loss on
    peak: int  # during the loss, including `saved`
    logits: int  # part of `peak`: one chunk of fp32 logits and tensors computed from it


def head_bytes(shapes: ModelShapes, settings: LayerSettings, chunk_bytes: int = CHUNK_BYTES) -> HeadBytes:
    """The last norm, then `model.loss.nll_sum` with every token a label (as a row may be)."""
    tokens = settings.tokens
    row = tokens * shapes.hidden * settings.compute_size
    if is_block(shapes, settings):
        normed = row  # `decoder_block._Norm` saves its input
    else:
        writer = LayerTape(shapes, LayerSettings(tokens, settings.compute_size))
        hidden = writer._norm(writer.start)
        normed = writer.tape.saved.total - hidden.size + (row if writer.start.refs > 1 else 0)
    chunk = min(tokens, max(1, chunk_bytes // (4 * shapes.vocabulary)))
    logits = 4 * chunk * shapes.vocabulary
    # logsumexp copies the logits once; capped logits also save the derivative of the cap
    extra = logits * (3 if shapes.caps_logits else 2)
    # hidden states, the labeled ones, and their gradient
    return HeadBytes(normed + row, normed + 3 * row + extra, extra)
