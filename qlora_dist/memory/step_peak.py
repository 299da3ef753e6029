"""What comes and goes within a step: saved activations, one layer's working set, the loss; the largest moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..config import RunConfig
from .block import is_block, layer_bytes
from .constants import OFFLOAD_AHEAD_BYTES, OFFLOAD_LEAST_BYTES, Item
from .layers import LayerBytes, LayerSettings, LayerTape
from .resident import compute_size
from .shapes import ModelShapes, adapted_parts

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
    keeps = [
        Kept((row,), row) if index < recompute else Kept((layer.kept_input, *layer.saved_sizes), layer.kept_input)
        for index, layer in enumerate(layers)
    ]
    steady = {
        "batch": Item(
            5 * 8 * tokens + 2 * tokens * shapes.rotary_dim * size, "token ids, positions, labels, rotary tables"
        )
    }
    is_offloaded = config.memory.offload_activations
    at_loss = held_at_loss(keeps) if is_offloaded else sum(kept.size for kept in keeps)
    head = head_bytes(shapes, settings)
    moments = [_loss_moment(head, at_loss, steady), _norm_moment(head, at_loss, steady)]
    # the model's forward pass holds the embeddings: as a rule the first layer's input, which that layer keeps
    are_kept = is_block(shapes, settings) and not is_offloaded and keeps[0].own_input
    embeddings = 0 if are_kept else row
    # of layers alike the last one's passes hold the most
    last = {(id(layer), index < recompute): index for index, layer in enumerate(layers)}
    for index in last.values():
        before = keeps[:index]
        held = held_in_layer(before, keeps[index], index < recompute) if is_offloaded else whole(before, keeps[index])
        # a recomputation finds the gradient of the layer's output instead
        beside = row if index < recompute else embeddings
        moments += _layer_moments(layers[index], held, beside, index < recompute, steady)
    largest = max(moments, key=lambda moment: moment.size)
    return replace(largest, saved_bytes=sum(kept.size for kept in keeps))


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
        is_offloaded=config.memory.offload_activations,
        longest=config.data.row_tokens,
    )


def _layers(config: RunConfig, shapes: ModelShapes, settings: LayerSettings) -> list[LayerBytes]:
    lora = config.lora
    chosen = (
        [frozenset()] * shapes.num_layers if lora is None else adapted_parts(shapes, lora.target_modules, lora.experts)
    )
    first = next((index for index, adapted in enumerate(chosen) if adapted), 0)
    known: dict[tuple[ModelShapes, frozenset[str], bool], LayerBytes] = {}
    layers = []
    for index, adapted in enumerate(chosen):
        own = shapes.at(index)
        key = (own, adapted, index > first)  # nothing before the first adapter has a gradient
        if key not in known:
            known[key] = layer_bytes(own, replace(settings, adapted=adapted), has_grad_input=index > first)
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


def _norm_moment(head: HeadBytes, saved: int, steady: dict[str, Item]) -> Moment:
    return Moment(
        "the last norm's backward pass",
        {
            "saved activations": Item(saved, "of all layers"),
            "last norm": Item(head.norm_backward, "what it saved, and gradients"),
            **steady,
        },
        saved,
    )


def _layer_moments(
    layer: LayerBytes, held: Held, beside: int, is_recomputed: bool, steady: dict[str, Item]
) -> Iterator[Moment]:
    """One layer's forward (or recomputation) and backward, over what the layers before it keep."""
    forward = layer.recompute_peak if is_recomputed else layer.forward_peak
    backward = layer.backward_peak
    for name, live, saved, own in (
        ("a layer's forward pass", forward, held.forward, forward.activations + beside),
        ("a layer's backward pass", backward, held.backward, max(0, backward.activations - held.on_host)),
    ):
        again = "recomputed and " if is_recomputed else ""
        yield Moment(
            name,
            {
                "saved activations": Item(saved, "of the layers before it, and its input"),
                "one layer's activations": Item(own, f"{again}alive in one layer at a time"),
                "one layer's gradients": Item(live.gradients, "of activations"),
                "dequantized matrix": Item(live.weights, "and adapters in the compute type"),
                **steady,
            },
            saved,
        )


# --- saved activations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What one layer keeps between forward and backward."""

    sizes: tuple[int, ...]  # of its tensors, in the order in which they are saved
    own_input: int  # one of them: the layer's input

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def moved(self) -> list[int]:
        """Tensors that offload moves to the host."""
        return [size for size in self.sizes if size >= OFFLOAD_LEAST_BYTES]

    @property
    def stays(self) -> int:
        """Bytes of those that it leaves on the device."""
        return self.size - sum(self.moved)


@dataclass(frozen=True)
class Held:
    """Saved activations on the device in one layer's passes, besides what the layer's own peak counts."""

    forward: int
    backward: int
    on_host: int = 0  # bytes that the peak of its backward pass counts


def whole(before: Sequence[Kept], own: Kept) -> Held:
    """Without offload: of all layers before it, and its input."""
    held = sum(kept.size for kept in before) + own.own_input
    return Held(held, held)


def held_at_loss(keeps: Sequence[Kept]) -> int:
    """With offload: small tensors, and one whose copy to the host may still run. The other one in flight is the last
    norm's, which is counted there."""
    return sum(kept.stays for kept in keeps) + next(iter(keeps[-1].moved[::-1]), 0)


def held_in_layer(before: Sequence[Kept], own: Kept, is_recomputed: bool) -> Held:
    """With offload: small tensors, and what is prefetched.

    A recomputed layer reads its input and drops it when the recomputation ends. Another layer's peak counts all of its
    tensors; on the device are one that is read (say the largest) and as many prefetched ones as the limit allows: which
    of them changes from operation to operation, so the whole limit is counted.
    """
    stays = sum(kept.stays for kept in before)
    earlier = [size for kept in before for size in kept.moved]
    if is_recomputed:
        ahead = stays + prefetched(earlier)
        return Held(ahead + own.own_input, ahead)
    read = max(own.moved, default=0)
    ahead = read + min(OFFLOAD_AHEAD_BYTES, sum(earlier) + sum(own.moved) - read)
    return Held(stays + own.own_input, stays + own.own_input + ahead, on_host=sum(own.moved))


def prefetched(earlier: Sequence[int]) -> int:
    """Bytes fetched before they are needed, as `ActivationOffload` does: backwards, one tensor at least."""
    total = 0
    for size in reversed(earlier):
        if total and total + size > OFFLOAD_AHEAD_BYTES:
            break
        total += size
    return total


# --- the last norm and the loss ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadBytes:
    """Memory between the last layer and the loss."""

    norm_backward: int  # during the last norm's backward pass
    peak: int  # during the loss, with what the last norm saved
    logits: int  # part of `peak`: one chunk of fp32 logits and tensors computed from it


def head_bytes(shapes: ModelShapes, settings: LayerSettings, chunk_bytes: int = CHUNK_BYTES) -> HeadBytes:
    """The last norm, then `model.loss.nll_sum` with every token a label (as a row may be)."""
    tokens = settings.tokens
    row = tokens * shapes.hidden * settings.compute_size
    if is_block(shapes, settings):
        normed = row  # `decoder_block._Norm` saves its input
        norm_backward = 3 * row  # and has two gradients
    else:
        writer = LayerTape(shapes, LayerSettings(tokens, settings.compute_size))
        hidden = writer._norm(writer.start)
        writer.tape.drop(hidden)
        own_input = row if writer.start.refs > 1 else 0
        normed = writer.tape.saved.total + own_input
        norm_backward = writer.tape.backward(hidden).total + own_input
    chunk = min(tokens, max(1, chunk_bytes // (4 * shapes.vocabulary)))
    logits = 4 * chunk * shapes.vocabulary
    # logsumexp copies the logits once; capped logits also save the derivative of the cap
    extra = logits * (3 if shapes.caps_logits else 2)
    # hidden states, the labeled ones, and their gradient
    return HeadBytes(norm_backward, normed + 3 * row + extra, extra)
