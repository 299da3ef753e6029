"""The shapes that a model's memory and time depend on, without torch and without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config.names import resolve_targets


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
class ModelShapes:
    """Shapes of a model whose decoder layers are all alike."""

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
    rotary_dim: int = 0  # of each head; 0: positions are learned
    splits_rotary: bool = False  # a copy concatenates the rotated part of a head and the rest
    has_softcap: bool = False  # capped attention scores
    caps_logits: bool = False
    scales_logits: bool = False
    is_exact: bool = True  # False: measured on the meta device, layers assumed to work like Llama's

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of all decoder layers, without biases: what is quantized."""
        return self.num_layers * sum(linear.num_weights for linear in self.linears)

    @property
    def bias_weights(self) -> int:
        return self.num_layers * sum(linear.outputs for linear in self.linears if linear.has_bias)

    @property
    def other_weights(self) -> int:
        """Everything that is never quantized."""
        outside = self.embedding_weights + self.head_weights + self.final_weights
        return self.bias_weights + self.num_layers * self.norm_weights + outside

    @property
    def base_parameters(self) -> int:
        return self.linear_weights + self.other_weights

    def named(self, *endings: str) -> list[Linear]:
        """The linear layers whose last name component is one of these."""
        return [linear for linear in self.linears if linear.name.rsplit(".", 1)[-1] in endings]


def adapted_linears(shapes: ModelShapes, target_modules: str | tuple[str, ...]) -> list[frozenset[str]]:
    """For each decoder layer, the names of the linear layers that get adapters. Raises UserError as training does."""
    names = [
        [f"{shapes.layer_prefix}.{index}.{linear.name}" for linear in shapes.linears]
        for index in range(shapes.num_layers)
    ]
    chosen = set(resolve_targets([name for layer in names for name in layer], target_modules))
    return [frozenset(linear.name for name, linear in zip(layer, shapes.linears) if name in chosen) for layer in names]
