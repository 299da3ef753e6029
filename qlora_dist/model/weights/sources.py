"""Where the weights of a base come from: files, or random numbers. Both can read any part of any weight.

names            names of the model's weights that this source has
shape(name)      as in the model
read(name, a, b) elements a to b in the model's storage order
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ...config.json_file import read_json_object
from ...config.names import model_folder
from ...data.tokenizer import expanded, first_line, where_to_read
from ...errors import UserError, shortened
from ..experts import packed_experts
from ..pretrained import decoded_form
from ..text_part import TextPart
from .decoded_files import DecodedFiles
from .download import fetch
from .safetensors_files import BadFile, WeightFiles

RANDOM_CHUNK = 2**20  # weights per seed: a part of a weight does not depend on how it is split


class WeightSource(Protocol):
    """What the loader needs of a source."""

    names: frozenset[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) elements in storage order."""

    def packed(self, name: str) -> dict[str, Tensor] | None:
        """Constants of a weight that is stored in 4 bits, by bitsandbytes' keys; None for a plain one."""


class FileSource:
    """Weights of safetensors files under the model's names.

    Of a transposed weight, one matrix stays in memory whole while its parts are read.
    """

    def __init__(
        self,
        files: WeightFiles,
        key_of: dict[str, str],
        transposed: frozenset[str],
        stacked: dict[str, Stack] | None = None,
    ) -> None:
        """`key_of`: the model's name -> the files' key. `transposed`: whose matrices are stored the other way round.
        `stacked`: experts that are one weight in the model and many in the files."""
        self._files = files
        self._key_of = key_of
        self._stacked = stacked or {}
        self._transposed = transposed
        self._turned = Turned()
        self.names = frozenset(key_of) | frozenset(self._stacked)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight; the packed shape if it is stored in 4 bits."""
        if name in self._stacked:
            return self._stacked[name].shape
        shape = self._files.entries[self._key_of[name]].shape
        return (*shape[:-2], shape[-1], shape[-2]) if name in self._transposed and self.packed(name) is None else shape

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a weight; its bytes if it is stored in 4 bits, which other tools may save as a float type."""
        if name in self._stacked:
            return self._stacked[name].read(self._files, start, stop)
        key = self._key_of[name]
        if f"{key}.absmax" in self._files.entries:
            return self._files.read_bytes(key, start, stop)
        if name not in self._transposed:
            return self._files.read(key, start, stop)
        stored = self._files.entries[key].shape
        return self._turned.read(name, stored[-2:], start, stop, lambda first, last: self._files.read(key, first, last))

    def packed(self, name: str) -> dict[str, Tensor] | None:
        """absmax, quant_map, ... of a weight that is stored in 4 bits."""
        if name in self._stacked:
            return None
        key = f"{self._key_of[name]}."
        found = [other for other in self._files.entries if other.startswith(key)]
        if f"{key}absmax" not in found:
            return None
        return {
            other.removeprefix(key): self._files.read(other).view(self._files.entries[other].shape) for other in found
        }


class Turned:
    """Reads parts of weights whose matrices are stored transposed. Keeps the one matrix that is being read."""

    def __init__(self) -> None:
        self._of: tuple[str, int] | None = None  # a weight and the index of its matrix
        self._matrix = torch.empty(0)

    def read(
        self, name: str, stored: tuple[int, ...], start: int, stop: int, read: Callable[[int, int], Tensor]
    ) -> Tensor:
        """(stop - start,) elements in the order of the transposed matrices; `stored` is the shape of a stored one."""
        size = torch.Size(stored).numel()
        pieces, position = [], start
        while position < stop:
            index, within = divmod(position, size)
            if self._of != (name, index):
                self._matrix = read(index * size, (index + 1) * size).view(stored).T.contiguous().view(-1)
                self._of = name, index
            end = min(size, within + stop - position)
            pieces.append(self._matrix[within:end])
            position += end - within
        if stop % size == 0:
            self._of, self._matrix = None, torch.empty(0)
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


@dataclass(frozen=True)
class Stack:
    """A stacked weight (E, O, I) whose matrices are tensors of their own in the files: of each expert one or several,
    whose rows follow each other (gate and up)."""

    keys: tuple[tuple[str, ...], ...]  # of each expert
    shapes: tuple[tuple[int, int], ...]  # of an expert's tensors

    @classmethod
    def of(cls, keys: list[list[str]], files: WeightFiles) -> Stack | None:
        """None unless the experts' tensors are matrices alike."""
        found = {tuple(files.entries[key].shape for key in own) for own in keys}
        shapes: Any = next(iter(found))
        is_matrix = all(len(shape) == 2 and shape[1] == shapes[0][1] for shape in shapes)
        return cls(tuple(map(tuple, keys)), shapes) if len(found) == 1 and is_matrix else None

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.keys), sum(rows for rows, _ in self.shapes), self.shapes[0][1]

    def read(self, files: WeightFiles, start: int, stop: int) -> Tensor:
        """(stop - start,) elements in the storage order of the stacked weight."""
        sizes = [rows * width for rows, width in self.shapes]
        pieces, position = [], start
        while position < stop:
            expert, within = divmod(position, sum(sizes))
            index = 0
            while within >= sizes[index]:
                within -= sizes[index]
                index += 1
            end = min(sizes[index], within + stop - position)
            pieces.append(files.read(self.keys[expert][index], within, end))
            position += end - within
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


class RandomSource:
    """Weights drawn from (seed, name): the same for any number of ranks. For benchmarks and dry runs of any size.

    N(0, 0.02), projections back into the residual stream scaled by 1 / sqrt(2 * layers) (GPT-2's rule, which keeps
    activations of deep models in range), norms at one, biases at zero. CUDA and CPU draw different numbers.
    """

    def __init__(self, model: nn.Module, config: PretrainedConfig, seed: int, device: torch.device) -> None:
        text = config.get_text_config()
        self._shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
        packed = packed_experts(model)
        self._shapes |= {name: tuple(one.shape) for name, one in packed.items()}
        self._transposed = {name for name, one in packed.items() if one.is_transposed}
        self._turned = Turned()
        self._residual = 1 / math.sqrt(2 * text.num_hidden_layers)
        self._norm = 0.0 if text.model_type.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + weight
        self._seed = seed
        self._device = device
        tied = getattr(model, "all_tied_weights_keys", {}) or {}
        self.names = frozenset(self._shapes) - frozenset(tied)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._shapes[name]

    def packed(self, name: str) -> None:
        """Nothing is stored in 4 bits."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of a weight, drawn again on each call."""
        if len(self._shapes[name]) < 2:
            value = 0.0 if name.endswith("bias") else self._norm
            return torch.full((stop - start,), value, device=self._device)
        if name in self._transposed:  # the same numbers as of the model's own parameter
            _, outputs, inputs = self._shapes[name]
            return self._turned.read(name, (inputs, outputs), start, stop, lambda *part: self._draw(name, *part))
        return self._draw(name, start, stop)

    def _draw(self, name: str, start: int, stop: int) -> Tensor:
        std = 0.02 * (self._residual if _writes_residual(name) else 1.0)
        out = torch.empty(stop - start, device=self._device)
        first = start // RANDOM_CHUNK
        for chunk in range(first, -(-stop // RANDOM_CHUNK)):
            begin, end = max(start, chunk * RANDOM_CHUNK), min(stop, (chunk + 1) * RANDOM_CHUNK)
            generator = torch.Generator(self._device).manual_seed(self._seed_of(name, chunk))
            drawn = torch.randn(RANDOM_CHUNK, generator=generator, device=self._device)
            out[begin - start : end - start] = drawn[begin - chunk * RANDOM_CHUNK : end - chunk * RANDOM_CHUNK]
        return out.mul_(std)

    def _seed_of(self, name: str, chunk: int) -> int:
        digest = hashlib.sha256(f"{self._seed} {name} {chunk}".encode()).digest()
        return int.from_bytes(digest[:7], "little")


def _writes_residual(name: str) -> bool:
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return module in ("o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h", "fc2", "fc_out")


# --- files ------------------------------------------------------------------------------------------------------------


def open_files(name: str, revision: str | None = None) -> WeightFiles:
    """The safetensors files of a hub model or folder. Raises UserError when there are none or one is damaged."""
    try:
        form, paths = decoded_form(name, revision), weight_paths(name, revision)
        return WeightFiles(paths) if form is None else DecodedFiles(paths, form)
    except (OSError, BadFile) as error:
        raise UserError(f"model.name {name}: weights cannot be read ({first_line(error)})") from None


def weight_paths(name: str, revision: str | None = None) -> list[Path]:
    """Paths of the weight files; a hub model is fetched into the local cache first."""
    source = where_to_read(name, revision)
    options = {"revision": source["revision"], "local_files_only": source["local_files_only"]}
    quiet = {"_raise_exceptions_for_missing_entries": False}
    where = expanded(name)
    is_remote = model_folder(name) is None and not source["local_files_only"]
    if is_remote:
        fetch(name, revision, [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME], is_one_enough=True)
    single = cached_file(where, SAFE_WEIGHTS_NAME, **options, **quiet)
    if single is not None:
        return [Path(single)]
    index = cached_file(where, SAFE_WEIGHTS_INDEX_NAME, **options, **quiet)
    if index is None:
        raise OSError(f"there is no *.safetensors file: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    _check_index(Path(index))
    if is_remote:
        fetch(name, revision, sorted(set(read_json_object(Path(index), index)["weight_map"].values())))
    paths, _ = get_checkpoint_shard_files(where, index, **options)
    return [Path(path) for path in paths]


def _check_index(path: Path) -> None:
    """Raises BadFile unless an index of any form names files beside it."""
    try:
        index = read_json_object(path, str(path))
    except UserError as error:
        raise BadFile(str(error)) from None
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(index.get("metadata"), dict):
        raise BadFile(f"{path} has no weight_map that gives the file of each weight, or no metadata")
    for weight, file in names.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
            raise BadFile(
                f"{path}: {shortened(weight)} is in {shortened(file)}; expected a *.safetensors file beside it"
            )


@dataclass
class Names:
    """How the files name a model's weights."""

    key_of: dict[str, str]  # the model's name -> the files' key
    stacks: dict[str, list[list[str]]]  # the model's name of stacked experts -> the files' keys of each expert


def match_names(model: PreTrainedModel, keys: list[str]) -> tuple[Names, str | None]:
    """(the files' names, why renaming and stacking are not enough, or None).

    Names are matched by transformers' own rules: old names, a missing or extra prefix of the base model, experts that
    are stored one by one. The files of a wrapper are matched by its rules, and what is not in its text model is left.
    """
    found = Names({}, {})
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # not in every version that pyproject.toml allows
        return found, "this version of transformers does not expose its rules for names"
    part: TextPart | None = getattr(model, "text_part", None)
    whole = model if part is None else part.wrapper
    mapping = get_model_conversion_mapping(whole)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    stacking = {pattern: (one, index) for one in converters if _stacks(one)
                for index, pattern in enumerate(one.source_patterns)}  # fmt: skip
    # only the names count; experts in 4 bits have other parameters than the files
    own = [*model.state_dict(), *packed_experts(model)]
    known = dict.fromkeys(own if part is None else [*part.wrapper.state_dict(), *map(part.in_wrapper, own)], True)
    is_own = dict.fromkeys(own, True)
    parts: dict[str, dict[tuple[int, int], str]] = {}
    for key in sorted(keys):
        name, pattern = rename_source_key(key, renamings, converters, whole.base_model_prefix, known)
        if part is not None:
            if (inside := part.in_text(name)) is None:
                continue
            name = inside
        if pattern is None:
            if name in is_own:
                found.key_of[name] = key
        elif pattern in stacking:
            _, index = stacking[pattern]
            expert = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), _renamed(key, renamings))
            assert expert is not None
            parts.setdefault(name, {})[int(expert[1]), index] = key
        else:
            return found, f"{key} must be converted for this version of transformers ({pattern})"
    for name, pieces in parts.items():
        experts = sorted({expert for expert, _ in pieces})
        num_parts = 1 + max(index for _, index in pieces)
        if len(pieces) != len(experts) * num_parts or experts != list(range(len(experts))):
            continue  # reported as missing
        found.stacks[name] = [[pieces[expert, index] for index in range(num_parts)] for expert in experts]
    return found, None


def _renamed(key: str, renamings: list[Any]) -> str:
    for one in renamings:
        key, _ = one.rename_source_key(key)
    return key


def _stacks(converter: Any) -> bool:
    """Whether a conversion puts the matrices of experts into one weight (E, O, I), in rows one below the other."""
    kinds = [(type(one).__name__, one.dim) for one in converter.operations if hasattr(one, "dim")]
    is_known = kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    are_starred = all(pattern.count("*") == 1 for pattern in converter.source_patterns)
    return len(kinds) == len(converter.operations) and is_known and are_starred and len(converter.target_patterns) == 1


def same_in_source(source: WeightSource, left: str, right: str, piece: int) -> bool:
    """Whether two weights of a source are equal, compared piece by piece."""
    shape = source.shape(left)
    if shape != source.shape(right):
        return False
    total = torch.Size(shape).numel()
    ends = [(start, min(total, start + piece)) for start in range(0, total, piece)]
    return all(torch.equal(source.read(left, *end), source.read(right, *end)) for end in ends)
