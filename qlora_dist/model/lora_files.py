"""Adapter files in PEFT's format: save, read back, compare bit for bit. Stock PEFT loads them.

An adapter trained on a wrapper's text model is saved under the wrapper's names, which is what its base names; its
target_modules select the same layers in the text class. Adapters of either form are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config.json_file import read_json_object
from ..errors import RunFailed, UserError, shortened
from .base_weights import same_bits
from .experts import EXPERT_WEIGHTS
from .forward import linear_layers, plain_name, strip_wrappers, text_part, unwrap
from .lora_experts import adapted_weight
from .text_part import TextPart

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER = "default"  # PEFT's name for the trained adapter
_ROOT = "base_model.model."  # before the base's own names in PEFT's keys


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's keys: copies on the CPU, contiguous, sorted by key."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in sorted(_live_state(model).items())}


def save_adapter(model: nn.Module, folder: str | Path, base_name: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json into an existing or new folder. Not atomic."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model), folder / WEIGHTS, metadata={"format": "pt"})
    config = _peft(model).peft_config[ADAPTER].to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    if (part := text_part(model)) is not None:
        config["target_modules"] = _in_both_classes(model, part)
    # the order of sets differs between processes: sorted, equal adapters give equal files
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def load_adapter_weights(model: nn.Module, folder: str | Path) -> None:
    """Copies a saved adapter into the attached one, in place. Raises UserError unless keys and shapes match."""
    live, stored = _live_state(model), read_adapter_weights(folder)
    if (part := text_part(model)) is not None:  # saved for the text class by another program
        renamed = {key: f"{_ROOT}{part.in_wrapper(key.removeprefix(_ROOT))}" for key in stored}
        stored = {key if key in live else renamed[key]: value for key, value in stored.items()}
    missing, unexpected = sorted(live.keys() - stored.keys()), sorted(stored.keys() - live.keys())
    if missing or unexpected:
        lines = [f"{len(keys)} {what}, first {keys[0]}" for what, keys in
                 (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
        raise UserError(
            f"adapter {folder} does not match this model and lora section: {'; '.join(lines)}; "
            "use the target_modules and the base that it was trained with"
        )
    for key, value in live.items():
        if value.shape != stored[key].shape:
            raise UserError(
                f"adapter {folder}: {key} has shape {tuple(stored[key].shape)}, expected {tuple(value.shape)}; "
                "it was trained with another lora.rank or base"
            )
    with torch.no_grad():
        for key, value in live.items():
            value.copy_(stored[key])  # in place: the optimizer may hold views


def verify_adapter_file(model: nn.Module, folder: str | Path, *, must_be_trained: bool = False) -> None:
    """Reads a saved adapter back and compares it bit for bit with the live one. Raises RunFailed.

    With must_be_trained, an adapter whose B matrices are all zero (it changes nothing) fails too.
    """
    live, stored = adapter_state(model), read_adapter_weights(folder)
    wrong = sorted(
        key for key in live.keys() | stored.keys()
        if key not in live or key not in stored or not same_bits(live[key], stored[key])
    )  # fmt: skip
    if wrong or not live:
        raise RunFailed(
            f"the adapter in {folder} differs from the one in memory in {len(wrong)} of {len(live)} tensors"
            + (f", first {wrong[0]}" if wrong else "")
            + "; do not use this file, earlier checkpoints are unaffected"
        )
    if must_be_trained and not any(bool(value.any()) for key, value in live.items() if "lora_B" in key):
        raise RunFailed(f"the adapter in {folder} changes nothing: every lora_B is zero; no gradient reached it")


def read_adapter_weights(folder: str | Path) -> dict[str, Tensor]:
    """Tensors of a saved adapter. Raises UserError."""
    path = require_weights(folder)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); the file is damaged or incomplete") from None


def require_weights(folder: str | Path) -> Path:
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = f"{pickled.name} is pickled, which can run code: convert it to safetensors" if pickled.is_file() else ""
        raise UserError(f"{folder}: no {WEIGHTS} here; {hint or 'give the folder of a saved PEFT adapter'}")
    return path


# --- adapters from outside --------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """What a LoRA or DoRA adapter adds to one layer, or to one weight of E stacked experts, fp32."""

    a: Tensor  # (r, I), or (E r, I)
    b: Tensor  # (O, r), or (O, r E)
    magnitude: Tensor | None  # (O,); DoRA only


def read_adapter(folder: str | Path, part: TextPart | None = None) -> tuple[LoraConfig, dict[str, Factors]]:
    """Config and weights of an adapter that anyone may have made, by the names in the base of layers and of stacked
    experts' weights; in the text model if the base is that `part` of a wrapper.

    Raises UserError for what is not honoured here, and for weights that are damaged, not finite or not as the config
    says.
    """
    config, path = read_adapter_config(folder), Path(folder) / WEIGHTS
    parts: dict[str, dict[str, Tensor]] = {}
    of_experts: set[str] = set()
    for key, value in read_adapter_weights(folder).items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B|magnitude_vector)(\.weight)?", key)
        if found is None or not value.is_floating_point():
            raise UserError(f"{path}: {key} ({value.dtype}) is not a LoRA weight of a linear layer")
        if not value.float().isfinite().all():
            raise UserError(f"{path}: {key} has values that are NaN or infinite; use an earlier checkpoint")
        stacked = adapted_weight(found[1], config.target_parameters or ())
        of_experts |= set() if stacked is None else {stacked}
        parts.setdefault(stacked or found[1], {})[found[2]] = value.float()
    layers = {}
    for name, own in parts.items():
        a, b, magnitude = (own.get(kind) for kind in ("A", "B", "magnitude_vector"))
        shapes = {f"lora_{kind}": tuple(tensor.shape) for kind, tensor in own.items()}
        is_whole = a is not None and b is not None and a.ndim == b.ndim == 2 and len(a) == b.shape[1]
        if a is not None and is_whole:
            is_whole = len(a) % config.r == 0 if name in of_experts else len(a) == config.r
        if not is_whole or (magnitude is not None) != bool(config.use_dora):
            r = f"{config.r} x experts" if name in of_experts else f"{config.r}"
            raise UserError(
                f"{path}: the weights of {name} are {shapes}; expected lora_A ({r}, inputs), lora_B (outputs, {r}) and "
                f"with use_dora a magnitude vector, as r={config.r} and use_dora={config.use_dora} in {CONFIG} say"
            )
        assert a is not None and b is not None
        layers[name if part is None else part.in_text(name) or name] = Factors(a, b, magnitude)
    if not layers:
        raise UserError(f"{path}: holds no weights; the file is not a saved adapter")
    return config, layers


# what this package reads, or leaves to PEFT: any value of these types
_NUMBER, _NAMES = (int, float), (list, str, type(None))
_HONOURED: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": _NUMBER,
    "lora_dropout": _NUMBER,
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "fan_in_fan_out": (bool,),
    "target_modules": _NAMES,
    "target_parameters": (list, type(None)),
    "exclude_modules": _NAMES,
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": _NAMES,
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
}
# how training began, or who wrote the file: of no effect on a trained adapter
_WITHOUT_EFFECT = {
    "peft_type", "peft_version", "auto_mapping", "inference_mode", "megatron_core", "runtime_config", "eva_config",
    "qalora_group_size",
}  # fmt: skip
# initial values that leave the base as it is; all others of PEFT (pissa, olora, corda, loftq, ...) take a part of it
_KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva")


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """adapter_config.json of a LoRA adapter. Raises UserError for anything else, and for what is not honoured here."""
    path = Path(folder) / CONFIG
    raw = read_json_object(path, f"{folder}: {CONFIG}", "give the folder of a PEFT adapter")
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {shortened(raw.get('peft_type'))}, expected LORA")
    _check_honoured(path, raw)
    for key, types in _HONOURED.items():
        value = raw.get(key)
        is_type = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
        if key in raw and not is_type:
            raise UserError(f"{path}: {key} is {shortened(value)}, expected {' or '.join(t.__name__ for t in types)}")
    try:
        config = LoraConfig(**{key: raw[key] for key in _HONOURED.keys() & raw.keys()}, task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:  # a list of something else than names, for example
        raise UserError(f"{path}: PEFT does not accept these settings ({error})") from None
    targets = config.target_parameters or ()
    if unknown := [one for one in targets if not (isinstance(one, str) and one.endswith(EXPERT_WEIGHTS))]:
        raise UserError(
            f"{path}: target_parameters names {shortened(unknown[0])}, which is not supported here; expected weights "
            f"of stacked experts ({', '.join(EXPERT_WEIGHTS)}). Use PEFT's merge, or train the adapter without it"
        )
    if config.r < 1:
        raise UserError(f"{path}: r is {shortened(config.r)}, expected at least 1")
    if not abs(config.lora_alpha) <= torch.finfo(torch.float32).max:
        raise UserError(f"{path}: lora_alpha is {shortened(config.lora_alpha)}, expected a finite number")
    if not 0 <= config.lora_dropout <= 1:
        raise UserError(f"{path}: lora_dropout is {shortened(config.lora_dropout)}, expected a number from 0 to 1")
    return config


def scale_of(config: LoraConfig) -> float:
    """By how much B A is multiplied."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def _check_honoured(path: Path, raw: dict[str, Any]) -> None:
    """Raises UserError for settings by which the adapter means something else than its A and B say."""
    begun = raw.get("init_lora_weights")
    if not any(begun is kept or begun == kept for kept in _KEEPS_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {shortened(begun)}, which takes a part of the base's weights into the "
            "adapter: on the unchanged base it is not what was trained. Convert it with PEFT: "
            "model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
        )
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(LoraConfig)
        if field.default is not dataclasses.MISSING
    } | {"task_type": "CAUSAL_LM"}
    for key, value in raw.items():
        if key in _HONOURED or key in _WITHOUT_EFFECT or key == "init_lora_weights":
            continue
        if value and value != defaults.get(key):
            raise UserError(
                f"{path}: {key} is {shortened(value)}, which is not supported here; use PEFT's merge, or train the "
                "adapter without it"
            )


# --- helpers ----------------------------------------------------------------------------------------------------------


def _peft(model: nn.Module) -> PeftModel:
    """The PeftModel inside data-parallel and compile wrappers."""
    inner: Any = model
    while not isinstance(inner, PeftModel):
        outer, inner = inner, getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            raise RuntimeError(f"{type(outer).__name__} has no adapters; call attach_lora first")
    return inner


def _in_both_classes(model: nn.Module, part: TextPart) -> str:
    """A pattern that selects the adapted layers in the wrapper and in the text class, and no other."""
    adapted = [
        plain_name(name)
        for name, module in unwrap(model).named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)  # whose names fit both classes
    ]
    linears = {name.removesuffix(".base_layer") for name in linear_layers(model) if "lora_" not in name}
    patterns = {re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in adapted}  # any layer
    if {name for name in linears if any(re.fullmatch(one, name) for one in patterns)} != set(adapted):
        patterns = {re.escape(name) for name in adapted}
    (theirs, ours), *_ = part.paths
    rest = sorted(one.removeprefix(re.escape(f"{ours}.")) for one in patterns)
    return rf"(?:{re.escape(theirs)}|{re.escape(ours)})\.(?:{'|'.join(rest)})"


def _live_state(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's keys -> the parameters themselves. Own code: PEFT's function does not handle wrappers inside the model."""
    part = text_part(model)
    state: dict[str, Tensor] = {}
    for name, value in _peft(model).named_parameters():
        if "lora_" in name and f".{ADAPTER}." in name:
            suffix = "" if "lora_magnitude_vector" in name else ".weight"
            key = strip_wrappers(name).replace(f".{ADAPTER}.weight", suffix)
            state[key if part is None else f"{_ROOT}{part.in_wrapper(key.removeprefix(_ROOT))}"] = value
    return state
