"""Shapes of Llama models, their FLOPs, and model folders with random weights of these shapes.

Weights are N(0, 0.02), with the projections that add to the residual stream scaled by 1 / sqrt(2 layers), so that
activations stay finite at any depth: speed and memory are those of a trained model, the loss is about ln(vocabulary).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from qlora_dist.config.joint_products import LARGEST_JOINT_RANK, LARGEST_LOWERED, padded_columns

MAX_POSITIONS = 8192
DRAWN = "weights-are-drawn"  # marker file in a model folder without weights


@dataclass(frozen=True)
class Shape:
    """A Llama decoder; `hidden` etc. as in its config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer in a decoder layer."""
        h, f, kv = self.hidden, self.intermediate, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied by: decoder matrices and output head, without the embedding."""
        return self.layers * sum(o * i for o, i in self.matrices().values()) + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_parameters + self.vocabulary * self.hidden + norms

    def model_flops(self, lengths: list[int], *, is_full: bool) -> float:
        """FLOPs of training on documents of these lengths, not counting recomputation.

        4 per weight and token with adapters (forward, and the input gradient), 6 for full fine-tuning (also the weight
        gradient); attention 3 times its forward pass, in which a token attends to half of its document on average.
        """
        weights = (6 if is_full else 4) * self.linear_parameters * sum(lengths)
        attention = 3 * self.layers * sum(4 * self.hidden * n * (n + 1) / 2 for n in lengths)
        return weights + attention

    def product_flops(self, tokens: int, labels: int, rank: int, recomputed_layers: int) -> int:
        """FLOPs of a library's matrix products in one QLoRA step with adapters on every linear layer; not attention's.

        2 per weight and token for a product. Layers that share their input are one product with R columns of adapters
        (`model.products`): the frozen matrix has one product forward and one for the gradient of its input, which the
        first layer's q, k and v do not need: nothing before them is trained. A's columns of the input are multiplied
        forward with B, those of the gradient backward with A, and A's gradient is a product. A recomputed layer repeats
        its forward products except the last one. The rotary angles are an outer product. Not counted is what Triton
        kernels multiply (`model.kernels.lower`, for up to LARGEST_LOWERED columns, and `.gradients`, for ranks up to
        LARGEST_JOINT_RANK): the input with A, A's gradient of down, and all of B's backward.
        """
        assert rank <= LARGEST_JOINT_RANK
        total = 4 * labels * self.vocabulary * self.hidden + self.head_dim * tokens
        matrices = self.matrices()
        for layer in range(self.layers):
            for names in SHARED_INPUT:
                outputs, inputs = sum(matrices[name][0] for name in names), matrices[names[0]][1]
                columns = padded_columns([rank] * len(names))
                has_input_gradient = layer > 0 or names is not SHARED_INPUT[0]
                is_last, is_repeated = names is SHARED_INPUT[-1], layer < recomputed_layers
                frozen = 1 + has_input_gradient + (is_repeated and not is_last)
                down = has_input_gradient + (not is_last)  # A: beside its input's gradient, its own gradient
                if columns > LARGEST_LOWERED:
                    down += 1 + is_repeated
                up = 1 + (is_repeated and not is_last)  # B forward
                of_a = columns - 2 * rank if len(names) == 2 else 0  # padding that the gradient of A has not
                thin = (columns * down - of_a) * inputs + columns * up * outputs
                total += 2 * tokens * (frozen * outputs * inputs + thin)
        return total


SHARED_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
SHAPES = {
    "tiny": Shape(128, 256, 2, 4, 2, 512),
    "cpu-40m": Shape(768, 2048, 5, 12, 6, 4096),
    "cpu-80m": Shape(1024, 2816, 6, 16, 8, 4096),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256),  # Llama 3.2 1B, with an untied head
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),  # LLaMA 7B
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama 3 8B
    "13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "33b": Shape(6656, 17920, 60, 52, 52, 32000),
    "65b": Shape(8192, 22016, 80, 64, 64, 32000),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256),  # Llama 3 70B
}


def shape_of(name: str, layers: int | None = None) -> Shape:
    """A named shape, or its first `layers` layers."""
    return SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)


def config_json(shape: Shape, max_positions: int = MAX_POSITIONS) -> dict[str, object]:
    """config.json of the shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }


def write_model(folder: Path, shape: Shape, seed: int = 0, max_positions: int = MAX_POSITIONS) -> Path:
    """A folder of random bf16 weights that transformers loads: one file per layer, never the whole model in memory."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(shape, max_positions), indent=1))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(_parts(shape, generator)):
        file = f"part-{number:03d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))  # last: marks a complete folder
    return folder


def _parts(shape: Shape, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    def drawn(rows: int, columns: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).bfloat16()

    yield {"model.embed_tokens.weight": drawn(shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        part = {
            f"{prefix}.{norm}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, (outputs, inputs) in shape.matrices().items():
            adds_to_residual = name.endswith(("o_proj", "down_proj"))
            scale = 0.02 / math.sqrt(2 * shape.layers) if adds_to_residual else 0.02
            part[f"{prefix}.{name}.weight"] = drawn(outputs, inputs, scale)
        yield part
    yield {
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
        "lm_head.weight": drawn(shape.vocabulary, shape.hidden),
    }
