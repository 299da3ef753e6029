"""A wrapper's text model: what is trained of a model that also reads images or sound.

text_config_of    the wrapper's config -> that of its text model, which is built, planned and trained
check_wrapper     refuses those whose text model alone is not known to compute the same
text_part_of      where the text model is in the wrapper, by name; checks that nothing of it is missing or left over

Files of the base and saved adapters have the wrapper's names, the model in memory those of its text class.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..config.wrappers import WRAPPERS
from ..errors import UserError, shortened

_ADVICE = "use another base model, or the text model's own files"


@dataclass(frozen=True)
class TextPart:
    """The text model of a wrapper."""

    wrapper: PreTrainedModel  # without storage
    paths: tuple[tuple[str, str], ...]  # (in the wrapper, in the text model) of its decoder and its output head

    def in_wrapper(self, name: str) -> str:
        """A module or weight of the text model by the wrapper's name for it."""
        for theirs, ours in self.paths:
            if f"{name}.".startswith(f"{ours}."):
                return theirs + name[len(ours) :]
        return name

    def in_text(self, name: str) -> str | None:
        """The reverse; None for what is not in the text model."""
        for theirs, ours in self.paths:
            if f"{name}.".startswith(f"{theirs}."):
                return ours + name[len(theirs) :]
        return None

    @property
    def num_left_out(self) -> int:
        """Weights that are not the text model's."""
        return sum(value.numel() for value in self._left_out().values())

    def _left_out(self) -> dict[str, nn.Parameter]:
        return {key: value for key, value in self.wrapper.named_parameters() if self.in_text(key) is None}

    def describe(self) -> str:
        """One line: what is left out."""
        rest, weights = self._left_out(), self.num_left_out
        prefix = f"{self.wrapper.base_model_prefix}."
        parts = sorted({key.removeprefix(prefix).partition(".")[0] for key in rest})
        amount = f"{weights / 1e6:,.0f} M" if weights >= 1e6 else f"{weights:,}"
        return f"the {len(rest)} tensors of {' and '.join(parts)} ({amount} parameters) are left out: text only"


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a wrapper's text model, with what holds for the whole file; any other config unchanged."""
    family = WRAPPERS.get(config.model_type)
    if family is None:
        return config
    text: Any = copy.deepcopy(config.get_text_config())
    if family.stand_in is not None:
        text = _stand_in(text, family.stand_in)
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))  # it ties the wrapper's own head
    for key in ("dtype", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id"):
        if (value := getattr(config, key, None)) is not None:
            setattr(text, key, value)
    text.name_or_path = config.name_or_path
    return text


def _stand_in(text: PretrainedConfig, family: str) -> PretrainedConfig:
    """The config of another family with the same layers. Positions in three dimensions (M-RoPE) become plain ones:
    those of text are equal in all three."""
    known = vars(AutoConfig.for_model(family)).keys() - {"model_type", "architectures", "transformers_version"}
    values = {key: value for key, value in text.to_dict().items() if key in known}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        values["rope_parameters"] = {
            key: value for key, value in rope.items() if not key.startswith("mrope_") and value != "mrope"
        }
    return AutoConfig.for_model(family, **values)


def text_part_of(name: str, config: PretrainedConfig) -> TextPart | None:
    """The text model of the wrapper `name` with this config; None for a model that is no wrapper.

    Takes about a second, no memory. Raises UserError if the wrapper's text weights are not those of the text class, or
    only one of the two changes its logits.
    """
    if config.model_type not in WRAPPERS:
        return None
    _check_logits(name, config.model_type, config.get_text_config())
    wrapper_class = _wrapper_class(config)
    try:
        with torch.device("meta"):
            wrapper = wrapper_class._from_config(copy.deepcopy(config), dtype=torch.bfloat16)
            text = AutoModelForCausalLM.from_config(
                text_config_of(config), dtype=torch.bfloat16, trust_remote_code=False
            )
    except Exception as error:  # a family's code on values that it does not expect
        raise UserError(
            f"model.name {name}: {config.model_type} cannot be built ({shortened(str(error))}); the config.json is "
            "damaged or was edited: download it again"
        ) from None
    pairs = (
        (wrapper.get_decoder(), text.base_model),
        (wrapper.get_output_embeddings(), text.get_output_embeddings()),
    )
    paths = tuple((_path(wrapper, theirs), _path(text, ours)) for theirs, ours in pairs)
    part = TextPart(wrapper, paths)
    found = _shapes(wrapper)
    expected = {part.in_wrapper(key): shape for key, shape in _shapes(text).items()}
    differ = sorted(key for key in expected if found.get(key) != expected[key])
    differ += sorted(key for key in found.keys() - expected.keys() if part.in_text(key) is not None)
    if differ:
        raise UserError(
            f"model.name {name}: {differ[0]} of {type(wrapper).__name__} is not the same weight in "
            f"{type(text).__name__} ({len(differ)} such weights); expected a wrapper around that text model. Use the "
            "text model's own files"
        )
    return part


def check_wrapper(name: str, config: PretrainedConfig) -> None:
    """Raises UserError for a wrapper, by the config of its whole file, whose text model alone is not known to compute
    the same."""
    if config.model_type in WRAPPERS or not config.sub_configs:
        return
    text_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if text_class is None or text_class.config_class is type(config):
        parts = ", ".join(sorted(config.sub_configs))
        raise UserError(
            f"model.name {name}: {config.model_type} is made of several models ({parts}); that its text model alone "
            f"computes the same has been shown only for {', '.join(sorted(WRAPPERS))}; {_ADVICE}"
        )


def _check_logits(name: str, family: str, text: PretrainedConfig) -> None:
    keys = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    scaled = next((key for key in keys if getattr(text, key, None) not in (None, 1.0)), None)
    if scaled is not None:
        raise UserError(
            f"model.name {name}: its text_config sets {scaled} to {getattr(text, scaled)}, by which the text model "
            f"changes its logits and {family} does not: they are not the same model; {_ADVICE}"
        )


def _wrapper_class(config: PretrainedConfig) -> Any:
    """transformers' class for text beside images or sound."""
    for auto in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM"):
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        if type(config) in mapping:
            return mapping[type(config)]
    raise UserError(f"{config.model_type}: this version of transformers has no class for it; install a newer one")


def _path(model: nn.Module, part: Any) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
