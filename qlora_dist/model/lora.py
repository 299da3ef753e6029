"""LoRA on a frozen base: attach, count, combine; its files are in `lora_files`. Only these two import peft.

Adapters are fp32 masters for every base; the forward pass casts them to the dtype of its input.

Legend: T tokens, I inputs, O outputs of a layer, r rank.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn

from ..config.names import AdaptedExperts, adapted_names
from ..data.tokenizer import first_line
from ..errors import UserError
from .base_weights import num_weights
from .decoder_block import use_decoder_blocks
from .dropout import use_row_dropout
from .experts import packed_experts
from .forward import linear_layers, plain_name, strip_wrappers, text_part, unwrap
from .lora_experts import ParamWrapper, adapted_experts, expert_targets, wrappable_experts
from .lora_files import ADAPTER, load_adapter_weights, read_adapter
from .lora_forward import lowrank_forward

log = logging.getLogger(__name__)

Variant = Literal["lora", "rslora", "dora"]
Kernels = Literal["auto", "reference", "off"]


def attach_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | tuple[str, ...] = "all-linear",
    experts: AdaptedExperts = "shared",
    variant: Variant = "lora",
    seed: int = 0,
    init_from: str | Path | None = None,
    kernels: Kernels = "auto",
    device: torch.device | None = None,
) -> PeftModel:
    """Attaches trainable adapters to the target layers; everything else stays frozen. A is random, B is zero.

    `experts`: of a mixture; shared ones are linear layers, all: also the stacked ones, if they are in 4 bits.

    The same seed gives the same A on every rank and device. `init_from` is the folder of a PEFT adapter whose rank,
    scale, variant and targets must match these. kernels "reference" replaces PEFT's forward of plain LoRA by
    `lean_forward`; "auto" also computes whole decoder layers at once where `decoder_block` can.
    `device` is where adapters live; None: where their layers' weights are, which may be host memory (offloaded bases).
    Raises UserError when a name in target_modules matches nothing or init_from does not fit.
    """
    names = adapted_names(tuple(linear_layers(model)), target_modules, experts, unwrap(model).config.model_type)
    parameters = expert_targets(unwrap(model)) if experts == "all" else None
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=_shortest_targets(model, names),
        target_parameters=parameters,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        fan_in_fan_out=not isinstance(dict(unwrap(model).named_modules())[names[0]], nn.Linear),  # Conv1D
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU, then moves the result: the device does not matter
        torch.manual_seed(seed)
        try:
            with _without_deprecation_warning(), wrappable_experts(unwrap(model)):
                adapted = get_peft_model(unwrap(model), config, autocast_adapter_dtype=True)
        except ValueError as error:  # of a mixture: it takes names of dense layers for those of experts
            raise UserError(f"lora.target_modules: PEFT does not accept these layers ({first_line(error)})") from None
    stacked = {name for name in packed_experts(model) if experts == "all"}
    _check_adapted({*names, *stacked}, adapted, "lora.target_modules")
    _check_renamed(adapted)
    for name, parameter in trainable_parameters(adapted).items():
        assert "lora_" in name and parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
        if device is not None:
            parameter.data = parameter.data.to(device)
    use_row_dropout(lora_layers(adapted))
    if kernels != "off" and variant != "dora":
        use_lean_forward(adapted)
    if kernels == "auto":
        use_decoder_blocks(adapted)
    if init_from is not None:
        _check_same_shape(read_adapter(init_from)[0], config, Path(init_from))
        load_adapter_weights(adapted, init_from)
    return adapted


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Last parts of the names if they select the same modules (other tools expect short names), else the names."""
    chosen = set(names)
    short = {name.rsplit(".", 1)[-1] for name in names}
    selected = {name for name, _ in unwrap(model).named_modules() if name.rsplit(".", 1)[-1] in short}
    return sorted(short) if selected == chosen else names


# --- the forward pass -------------------------------------------------------------------------------------------------


def use_lean_forward(model: nn.Module) -> None:
    """Replaces PEFT's forward of every plain LoRA layer. DoRA layers keep PEFT's."""
    for layer in lora_layers(model).values():
        if not layer.lora_variant:
            layer.forward = MethodType(lean_forward, layer)


def lean_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """base(x) + scale * B(A(dropout(x))), shape (..., O), in the dtype of x.

    PEFT's own forward clones the base output, computes in fp32 when the adapters are fp32 (casting x up and the
    product down), and scales and adds in two more passes over (T, O).
    """
    if layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    updates = [
        (
            layer.lora_dropout[name](x),
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
        )
        for name in layer.active_adapters
        if name in layer.lora_A
    ]
    return lowrank_forward(layer.base_layer, x, updates)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Adapted linear layers by their name in the base."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    }


# --- counting ---------------------------------------------------------------------------------------------------------


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer updates, in the order of the model's layers, by name without wrappers."""
    return {strip_wrappers(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_own_expert(name: str) -> bool:
    """Whether a weight belongs to an expert that is layers of its own: without a token it has no gradient. The adapters
    of stacked experts always have one, with zeros for experts without a token."""
    return re.search(r"experts\.\d+\.", name) is not None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(weights of the base, trainable weights). A 4-bit weight counts as one, not as half a byte; ties count once."""
    base = trainable = 0
    for name, parameter in model.named_parameters():
        size = num_weights(parameter)
        base += 0 if "lora_" in name else size
        trainable += size if parameter.requires_grad else 0
    return base, trainable


# --- several adapters -------------------------------------------------------------------------------------------------


def load_adapters(model: nn.Module, folders: dict[str, Path], *, lean: bool = True) -> PeftModel:
    """Attaches saved adapters to a base for generation, by name; the first is active. lean False: stock PEFT."""
    adapted: PeftModel | None = None
    for name, folder in folders.items():
        # fail clearly before PEFT, which would load pickled weights or look for them on the hub
        base = unwrap(model)
        part = text_part(base)
        _, factors = read_adapter(folder, part)
        settings: dict[str, Any] = {"adapter_name": name, "is_trainable": False}
        if part is not None:  # saved under the wrapper's names
            settings["key_mapping"] = {rf"^{re.escape(theirs)}\.": f"{ours}." for theirs, ours in part.paths}
        try:
            with _without_deprecation_warning(), wrappable_experts(base):
                if adapted is None:
                    adapted = PeftModel.from_pretrained(base, str(folder), **settings)
                else:
                    adapted.load_adapter(str(folder), **settings)
        except (ValueError, TypeError, RuntimeError) as error:  # layers that the base lacks, or of another shape
            raise UserError(f"{folder}: the adapter does not fit this base: {first_line(error)}") from None
        _check_adapted(factors.keys(), adapted, f"{folder}", name)
    if adapted is None:
        raise UserError("no adapter was given; expected at least one name=folder")
    if lean:  # generate with the forward used in training
        use_lean_forward(adapted)
        use_decoder_blocks(adapted)
    if (sharded := getattr(unwrap(adapted), "sharded", None)) is not None:  # an offloaded base is in host memory
        for parameter in (one for name, one in adapted.named_parameters() if "lora_" in name):
            parameter.data = parameter.data.to(sharded.group.device)
    return adapted.eval()


def activate(model: PeftModel, name: str) -> None:
    """Switches to one of the loaded adapters. Raises UserError naming what is loaded."""
    if name not in model.peft_config:
        raise UserError(f"adapter {name!r} is not loaded; loaded: {', '.join(model.peft_config)}")
    model.set_adapter(name)


def combine_adapters(model: PeftModel, weights: dict[str, float], how: str = "cat", name: str = "combined") -> None:
    """Builds and activates sum(weight * adapter). `cat` is exact; svd, linear, ties, ... are PEFT's approximations."""
    for one in weights:
        if one not in model.peft_config:
            raise UserError(f"adapter {one!r} is not loaded; loaded: {', '.join(model.peft_config)}")
    if adapted_experts(model):
        raise UserError("adapters of experts cannot be combined: PEFT combines those of linear layers only; use one")
    try:
        model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type=how)
    except ValueError as error:
        raise UserError(f"adapters {', '.join(weights)} cannot be combined by {how}: {error}") from None
    model.set_adapter(name)


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _without_deprecation_warning() -> Iterator[None]:
    """PEFT 0.21 reads a deprecated property of transformers 5.23; remove once it does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _check_adapted(asked: Set[str], model: PeftModel, where: str, adapter: str = ADAPTER) -> None:
    """Raises UserError unless exactly these layers have the adapter: PEFT rewrites the targets of some model types."""
    layers = lora_layers(model) | adapted_experts(model)
    found = {name for name, layer in layers.items() if adapter in layer.lora_A}
    if found != asked:
        lacking, extra = sorted(asked - found)[:3], sorted(found - asked)[:3]
        raise UserError(
            f"{where} asks for {len(asked)} layers, PEFT adapts {len(found)} of this base"
            + (f"; not {', '.join(lacking)}" if lacking else "")
            + (f"; instead {', '.join(extra)}" if extra else "")
            + ". Name layers that PEFT leaves as they are, or the base that the adapter was trained on"
        )


def _check_same_shape(found: LoraConfig, expected: LoraConfig, folder: Path) -> None:
    pairs = {
        "lora.rank": (found.r, expected.r),
        "lora.alpha": (found.lora_alpha, expected.lora_alpha),
        "lora.variant rslora": (found.use_rslora, expected.use_rslora),
        "lora.variant dora": (found.use_dora, expected.use_dora),
    }
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(
                f"lora.init_from {folder}: the adapter has {key} {theirs}, the config has {ours}; make them equal"
            )


def _check_renamed(model: PeftModel) -> None:
    """Raises UserError for weights that PEFT would not find again: of some model types it renames what it loads, as
    transformers renames the base's weights, and leaves an adapter that it does not recognize at random in silence."""
    if text_part(model) is not None:
        return  # saved under other names
    keys = {key.replace(f".{ADAPTER}", ""): torch.zeros(1, 1) for key in trainable_parameters(model)}
    config = model.peft_config[ADAPTER]
    found = convert_peft_adapter_state_dict_for_transformers(model, config, keys).keys()
    if lost := sorted(keys.keys() - {key.replace(f".{ADAPTER}", "") for key in found}):
        parts = sorted({key.removeprefix("base_model.model.").partition(".lora_")[0] for key in lost})
        raise UserError(
            f"lora.target_modules: PEFT would not load the adapters of {len(parts)} layers again, whose names it "
            f"changes while it reads them ({', '.join(parts[:3])}); leave them out"
        )
