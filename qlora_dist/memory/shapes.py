"""The shapes that a model's memory and time depend on, without torch and without weights."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from ..config.names import AdaptedExperts, adapted_names
from ..errors import UserError


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer."""

    name: str  # within its layer, such as self_attn.q_proj
    inputs: int
    outputs: int
    has_bias: bool = False

    @property
    def num_weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Experts:
    """Stacked experts of a decoder layer: gate and up in one matrix, and down, for each of them."""

    name: str  # within its layer, such as mlp.experts
    num_experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(outputs, inputs) of an expert's two matrices."""
        return (2 * self.inner, self.hidden), (self.hidden, self.inner)

    @property
    def num_weights(self) -> int:
        return 3 * self.num_experts * self.hidden * self.inner


@dataclass(frozen=True)
class Traced:
    """Where a layer is whose bytes are traced, for want of a tape."""

    name: str
    revision: str | None
    index: int  # the first layer of its kind


@dataclass(frozen=True)
class LayerKind:
    """What differs between the decoder layers of some models."""

    linears: tuple[Linear, ...]
    norm_weights: int
    experts: Experts | None = None
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    traced: Traced | None = None


@dataclass(frozen=True)
class ModelShapes:
    """Shapes of a model. Its decoder layers are all alike, or `layers` says of what kind each of them is."""

    family: str  # model_type
    num_layers: int
    hidden: int
    vocabulary: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_prefix: str  # model.layers
    linears: tuple[Linear, ...]  # of one layer, in the order of its forward pass
    norm_weights: int  # of one layer: norms and everything else outside linear layers
    embedding_weights: int  # token and position tables
    head_weights: int  # 0 when tied to the token table
    final_weights: int  # last norm, bias of the head
    norm: Literal["rms", "layer", "fp32_layer"] = "rms"
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    qk_norm: Literal["none", "head", "row"] = "none"
    is_parallel: bool = False  # attention and MLP read the same input
    shares_norm: bool = False  # ... through one norm
    is_gated: bool = True
    activation: Literal["one", "composed"] = "one"  # one kernel, or gelu_new as elementwise kernels
    is_silu: bool = True  # the gate's activation
    max_positions: int | None = None  # longest document that the model was built for; None: unknown
    rotary_dim: int = 0  # of each head; 0: positions are learned
    splits_rotary: bool = False  # a copy concatenates the rotated part of a head and the rest
    has_softcap: bool = False  # capped attention scores
    caps_logits: bool = False
    scales_logits: bool = False
    is_exact: bool = True  # False: measured on the meta device, layers assumed to work like Llama's
    unknown: str = ""  # what of a layer is not planned at all, in words
    experts: Experts | None = None  # of one layer, beside `linears`
    traced: Traced | None = None  # of one layer, where its bytes are traced
    layers: tuple[LayerKind, ...] = ()  # of each layer, where they differ; the first is also in the fields above

    def at(self, index: int) -> ModelShapes:
        """The same with the shapes of one layer."""
        if not self.layers:
            return self
        kind = self.layers[index]
        return replace(self, layers=(), **{field.name: getattr(kind, field.name) for field in fields(kind)})

    def each_layer(self) -> list[tuple[ModelShapes, int]]:
        """(shapes of a kind of layers, how many there are), in the order in which they come first."""
        counts: dict[LayerKind | None, int] = {}
        for kind in self.layers or (None,) * self.num_layers:
            counts[kind] = counts.get(kind, 0) + 1
        return [(self if kind is None else self.at(self.layers.index(kind)), count) for kind, count in counts.items()]

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of all decoder layers, without biases: what is quantized, besides experts."""
        return sum(count * sum(linear.num_weights for linear in one.linears) for one, count in self.each_layer())

    @property
    def expert_weights(self) -> int:
        """Weights of all experts of all decoder layers."""
        return sum(count * one.experts.num_weights for one, count in self.each_layer() if one.experts is not None)

    @property
    def active_weights(self) -> int:
        """Weights of linear layers and experts that one token meets."""
        kinds = [(one.experts, count) for one, count in self.each_layer() if one.experts is not None]
        of_experts = sum(count * one.num_weights * one.top_k // one.num_experts for one, count in kinds)
        return self.linear_weights + of_experts

    @property
    def bias_weights(self) -> int:
        return sum(
            count * sum(linear.outputs for linear in one.linears if linear.has_bias) for one, count in self.each_layer()
        )

    @property
    def other_weights(self) -> int:
        """Everything that is never quantized."""
        outside = self.embedding_weights + self.head_weights + self.final_weights
        return self.bias_weights + sum(count * one.norm_weights for one, count in self.each_layer()) + outside

    @property
    def base_parameters(self) -> int:
        return self.linear_weights + self.expert_weights + self.other_weights

    def named(self, *endings: str) -> list[Linear]:
        """The linear layers whose last name component is one of these."""
        return [linear for linear in self.linears if linear.name.rsplit(".", 1)[-1] in endings]


def adapted_parts(
    shapes: ModelShapes, target_modules: str | tuple[str, ...], experts: AdaptedExperts = "shared"
) -> list[frozenset[str]]:
    """For each decoder layer, the names of the linear layers and stacked experts that get adapters. Raises UserError as
    training does."""
    kinds = [shapes.at(index) for index in range(shapes.num_layers)]
    names = [
        [f"{shapes.layer_prefix}.{index}.{linear.name}" for linear in kind.linears] for index, kind in enumerate(kinds)
    ]
    chosen = set(adapted_names([name for layer in names for name in layer], target_modules, experts, shapes.family))
    if experts == "all" and not shapes.expert_weights:
        raise UserError(
            f"lora.experts is all, but {shapes.family} has no stacked experts that are held in 4 bits; set shared"
        )
    return [
        frozenset(linear.name for name, linear in zip(own, kind.linears) if name in chosen)
        | (frozenset({kind.experts.name}) if experts == "all" and kind.experts is not None else frozenset())
        for own, kind in zip(names, kinds)
    ]
