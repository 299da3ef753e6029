"""RUN_OR_ADAPTER -> what was trained: which base, how quantized, which adapter, which data; and loading it.

find_trained        a run directory or an adapter folder -> `Trained`
load_trained_base   its base, as it was trained on
load_trained        base and adapter
require_memory      whether that fits, by the memory plan, before it is loaded
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..cluster.shard_group import ShardGroup
from ..cluster.world import World
from ..config import DataConfig, ModelConfig, RunConfig, load_config
from ..config.names import is_model_path
from ..config.run_dir import RunDir
from ..console import count
from ..data.documents import Documents, build_documents
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..files import format_bytes
from ..memory import with_shards
from ..memory.inference import fewest_ranks, inference_bytes
from ..memory.read_shapes import read_shapes
from ..model import INFERENCE, load_base, lora, lora_files
from ..train.checkpoint import find_newest
from ..train.fit_memory import usable_bytes
from ..train.prompt_format import PromptFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run directory or an adapter folder holds."""

    model: ModelConfig  # the base; after full fine-tuning, the trained model itself
    adapter: Path | None  # None after full fine-tuning
    data: DataConfig | None  # None for an adapter without its run
    seed: int = 0  # the run's: it decides which records are held out
    prompts: PromptFormat | None = None  # None: a run of an earlier version, or an adapter of another program
    read_by: ModelConfig | None = None  # whose tokenizer the run read its data with; None without a run
    run: RunConfig | None = None  # None without a run

    def shards(self, world: World) -> ShardGroup | None:
        """The ranks over which the base is sharded, as in training; None where each holds it whole. Called by all."""
        if self.run is None or self.run.strategy.name != "fsdp" or self.adapter is None:
            return None
        return world.shard_group(self.on_ranks(world).strategy.shard_ranks(world.size))

    def on_ranks(self, world: World) -> RunConfig:
        """The run's config for these ranks, which need not be those of training. Called by all."""
        assert self.run is not None
        auto = self.run.model_copy(update={"strategy": self.run.strategy.model_copy(update={"shard_over": "auto"})})
        shapes = read_shapes(self.model.name, self.model.revision)
        return with_shards(
            auto, shapes, world_size=world.size, node_ranks=world.node_ranks(), device_bytes=usable_bytes(world)
        )

    def load_tokenizer(self) -> Any:
        """The tokenizer of training. What was exported has another EOS and template: it comes second, with a run."""
        if self.read_by is not None:
            try:
                return load_tokenizer(self.read_by.name, self.read_by.revision)
            except UserError as error:
                log.warning("%s: the tokenizer beside the trained weights is used", error)
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            return load_tokenizer(str(self.adapter))
        return load_tokenizer(self.model.name, self.model.revision)


def find_trained(path: str | Path, base: str | None = None) -> Trained:
    """Reads a run directory (its adapter, else its newest intact checkpoint) or an adapter folder.

    `base` replaces the base that is named there (a folder that has moved). Raises UserError naming what was found.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; give a run directory or the folder of an adapter")
    run = RunDir(path)
    if run.config.is_file():
        found = _of_run(run, load_config(run.config))
        return _with_base(replace(found, prompts=PromptFormat.read(path)), base)
    if not (path / lora_files.CONFIG).is_file():
        raise UserError(f"{path}: neither a run directory (config.yaml) nor an adapter ({lora_files.CONFIG})")
    for above in list(path.resolve().parents)[:2]:  # RUN/adapter, RUN/checkpoints/step-*
        if RunDir(above).config.is_file():
            config = load_config(RunDir(above).config)
            prompts = PromptFormat.read(path) or PromptFormat.read(above)
            found = Trained(config.model, path, config.data, config.seed, prompts, config.model, config)
            return _with_base(found, base)
    stored = lora_files.read_adapter_config(path)
    named, revision = (stored.base_model_name_or_path, stored.revision) if base is None else (base, None)
    if not named:
        raise UserError(f"{path / lora_files.CONFIG} names no base model; name it with --base")
    log.info("%s belongs to no run directory: the base %s is loaded as nf4 with double quantization", path, named)
    return Trained(ModelConfig(name=named, revision=revision), path, None, prompts=PromptFormat.read(path))


def _of_run(run: RunDir, config: RunConfig) -> Trained:
    if config.lora is None:
        whole = run.path / "model"
        if not whole.is_dir():
            raise UserError(f"{run.path}: the run is not finished: {whole} does not exist yet; let it finish first")
        model = config.model.model_copy(update={"name": str(whole), "revision": None})
        return Trained(model, None, config.data, config.seed, read_by=config.model, run=config)
    if (run.adapter / lora_files.CONFIG).is_file():
        return Trained(config.model, run.adapter, config.data, config.seed, read_by=config.model, run=config)
    newest, rejected = find_newest(run.checkpoints) if run.checkpoints.is_dir() else (None, [])
    for bad, reason in rejected:
        log.warning("checkpoint %s is skipped: %s", bad, reason)
    if newest is None:
        raise UserError(f"{run.path}: no adapter and no intact checkpoint yet; train first")
    log.info("the run is not finished: using its newest checkpoint %s", newest)
    return Trained(config.model, newest, config.data, config.seed, read_by=config.model, run=config)


def _with_base(trained: Trained, base: str | None) -> Trained:
    if base is None:
        if is_model_path(trained.model.name) and not Path(trained.model.name).is_dir():
            raise UserError(
                f"the base that was trained on was {trained.model.name}, and there is no such folder now; put it back, "
                "or name its new place with --base"
            )
        return trained
    model = trained.model.model_copy(update={"name": base})
    return replace(trained, model=model, read_by=trained.read_by and model)


def require_memory(trained: Trained, world: World, tokens: int) -> str:
    """What each rank will hold while `tokens` run at a time, by the memory plan, in words; nothing without a GPU.

    Raises UserError, before anything is loaded, when that is more than the smallest GPU has.
    """
    device_bytes = usable_bytes(world)
    if device_bytes is None or trained.run is None or trained.adapter is None:
        return ""
    config = trained.on_ranks(world)
    shapes = read_shapes(trained.model.name, trained.model.revision)
    if shapes.unknown:
        return ""
    planned = partial(inference_bytes, config, shapes, tokens=tokens)
    needed = planned(world_size=world.size)
    text = f"{format_bytes(needed)} planned for each of {count(world.size, 'rank')}, {format_bytes(device_bytes)} there"
    if needed <= device_bytes or not shapes.is_exact:
        return text
    remedy = "use a GPU with more memory"
    if config.strategy.name == "fsdp":
        fewest = fewest_ranks(config, shapes, device_bytes=device_bytes, tokens=tokens)
        if fewest is not None:
            remedy = f"shard the base over {fewest} GPUs or more, as in training: --ranks {fewest}"
    raise UserError(f"{trained.model.name} does not fit, and nothing was loaded: {text}; {remedy}")


def load_trained_base(
    trained: Trained, device: torch.device, attention: str = INFERENCE, shards: ShardGroup | None = None
) -> torch.nn.Module:
    """The base as in training: quantized the same way, unless all of its weights were trained.

    `attention`: INFERENCE, or a backend for packed batches (auto, flash, varlen, sdpa). `shards`: see `Trained.shards`.
    """
    settings = trained.model
    module: torch.nn.Module = load_base(
        settings.name,
        revision=settings.revision,
        quantization="none" if trained.adapter is None else settings.quantization,
        double_quant=settings.double_quant,
        compute_dtype=getattr(torch, settings.compute_dtype),
        attention=attention,
        device=device,
        shards=shards,
        offload=shards is not None and trained.run is not None and trained.run.strategy.offload,
    )
    return module


def load_trained(trained: Trained, device: torch.device) -> torch.nn.Module:
    """Base and adapter, for inference."""
    base = load_trained_base(trained, device)
    return base if trained.adapter is None else lora.load_adapters(base, {"trained": trained.adapter})


def first_documents(data: DataConfig, tokenizer: Any, how_many: int, row_tokens: int) -> Documents:
    """The first documents of the first training source, as the run saw them. Raises UserError when it is gone."""
    # held-out records, too: of so few none might be left
    source = data.train[0].model_copy(update={"max_examples": how_many, "hold_out": None, "part": "all"})
    with tempfile.TemporaryDirectory() as folder:
        return build_documents(
            [source],
            tokenizer,
            row_tokens=row_tokens,
            on_bad="skip",
            learn="all",  # so that nothing is dropped for lack of labels
            template=data.template,
            date=data.date,
            cache_dir=folder,
        )
