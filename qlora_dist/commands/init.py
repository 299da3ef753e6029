"""`qlora-dist init`: a first config for a base, data and hardware, with sizes chosen by the memory plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..config import RunConfig, json_schema, parse_config
from ..config.commented import Setting, commented_yaml, nested
from ..config.names import is_data_path
from ..config.reading import parse_yaml
from ..data.formats import detect_format, find_files, read_file
from ..errors import UserError
from ..files import format_bytes, write_json, write_text
from ..memory import MemoryPlan, ModelShapes, choose
from ..memory.gpus import Gpu, parse_gpu
from ..memory.read_shapes import read_config_json, read_shapes
from .preflight import check_base, check_data

SCHEMA = "qlora_dist.schema.json"
ROW_TOKENS = (4096, 2048, 1024, 512)  # longest first; a longer one only if the user asks for it
RANKS = (64, 16)  # of LoRA: the paper's, and one that needs a quarter of the memory
CPU_ROW_TOKENS = 512
LARGE = 20e9  # base weights above which the paper halves the learning rate: it has no model between 13B and 33B
HELD_OUT = 0.05


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    base: str
    data: tuple[str, ...]
    device: str  # auto, cuda, cpu
    gpu: str | None  # name or amount of memory
    ranks: int


@dataclass(frozen=True)
class Draft:
    """A config that the reader accepts, as settings, and the plan that it was chosen by (None: no GPU was named)."""

    settings: tuple[Setting, ...]
    config: RunConfig
    plan: MemoryPlan | None

    def text(self, target: Path) -> str:
        """The file."""
        header = [
            f"yaml-language-server: $schema={SCHEMA}",
            f"To launch: qlora-dist train {target} --ranks {'auto' if self.config.device != 'cpu' else 1}",
            "Every key with its meaning: qlora-dist schema. What is not set here has its default.",
        ]
        return commented_yaml(self.settings, header)


def draft(wanted: Wanted, stem: str) -> Draft:
    """Chooses formats by the data and sizes by the plan. Raises UserError, before anything is written."""
    gpu = None if wanted.gpu is None or wanted.device == "cpu" else parse_gpu(wanted.gpu)
    sources = list(_sources(wanted.data))
    shapes = read_shapes(wanted.base)
    positions = read_config_json(wanted.base).get("max_position_embeddings")
    longest = positions if type(positions) is int and positions > 0 else ROW_TOKENS[0]
    head = [
        Setting("run_dir", f"runs/{stem}", "checkpoints, metrics and the adapter go here"),
        Setting("device", wanted.device, "cuda: a GPU, or an error; auto: a GPU if there is one; cpu"),
        Setting("model.name", wanted.base, f"{_linear_weights(shapes):,} weights in linear layers"),
    ]
    if gpu is None:
        is_cpu = wanted.device == "cpu"
        rows = min(CPU_ROW_TOKENS if is_cpu else ROW_TOKENS[1], longest)
        why = "rows for a CPU; longer ones take longer" if is_cpu else "no GPU was named: see `qlora-dist plan`"
        return _draft(head, sources, shapes, wanted, rows, RANKS[0] if not is_cpu else RANKS[-1], why)
    return _fitting(head, sources, shapes, wanted, gpu, longest)


def _fitting(
    head: list[Setting], sources: list[Setting], shapes: ModelShapes, wanted: Wanted, gpu: Gpu, longest: int
) -> Draft:
    """The first that fits of: longer rows before shorter ones, a large rank before a small one, ddp before fsdp."""
    lengths = sorted({min(tokens, longest) for tokens in ROW_TOKENS}, reverse=True)
    strategies = ("ddp", "fsdp") if wanted.ranks > 1 else ("ddp",)
    plan = None
    for strategy in strategies:
        for rank in RANKS:
            for rows in lengths:
                why = f"the longest of {', '.join(map(str, lengths))} that fits on {gpu.name}"
                one = _draft(head, sources, shapes, wanted, rows, rank, why, strategy, gpu)
                plan = choose(one.config, shapes, world_size=wanted.ranks, device_bytes=gpu.device_bytes)
                if plan.fits:
                    return Draft(one.settings, one.config, plan)
    assert plan is not None
    raise UserError(
        f"--base {wanted.base}: does not fit on {wanted.ranks} x {gpu.name} ({format_bytes(gpu.device_bytes)}), not "
        f"even with rows of {lengths[-1]} tokens and rank {RANKS[-1]}: {'; '.join(plan.advice)}. Name a larger GPU, "
        "more --ranks, or a smaller base"
    )


def _draft(
    head: list[Setting],
    sources: list[Setting],
    shapes: ModelShapes,
    wanted: Wanted,
    row_tokens: int,
    rank: int,
    why: str,
    strategy: str = "ddp",
    gpu: Gpu | None = None,
) -> Draft:
    is_cpu, is_large = wanted.device == "cpu", _linear_weights(shapes) > LARGE
    rows = -(-16 // wanted.ranks) * wanted.ranks
    settings = [
        *head,
        _compute_type(is_cpu, gpu),
        Setting("lora.rank", rank, "adapters on all linear layers"),
        Setting("lora.alpha", 16, "updates are scaled by alpha / rank"),
        *sources,
        Setting("data.row_tokens", row_tokens, why),
        Setting("batch.rows_per_step", rows, "rows of an update, over all processes: the batch size"),
        Setting("batch.micro_rows", 1, "rows of a forward pass; auto: as many as fit, with the same result"),
        Setting(
            "optim.name", "adamw" if is_cpu else "paged_adamw_32bit", "" if is_cpu else "moves to the host if needed"
        ),
        Setting("optim.lr", 1e-4 if is_large else 2e-4, "QLoRA's, for a base of this size"),
        Setting("optim.schedule", "cosine"),
        Setting("optim.warmup_steps", 0.03, "that share of the steps"),
        Setting("train.epochs", 3, "passes over the data; or steps: N"),
        Setting("train.eval_every", 100, "steps between evaluations of what is held out"),
        Setting("train.save_every", 100, "steps between checkpoints"),
    ]
    if strategy != "ddp":
        settings.append(Setting("strategy.name", strategy, "the base is sharded: it does not fit on each GPU"))
    raw = nested(settings)
    config = parse_config(raw, "init")
    result = Draft(tuple(settings), config, None)
    assert parse_yaml(result.text(Path("x")), "init") == raw, "the text is not what was checked"
    return result


def _compute_type(is_cpu: bool, gpu: Gpu | None) -> Setting:
    if is_cpu:
        return Setting("model.compute_dtype", "float32", "many CPUs emulate bfloat16")
    if gpu is not None and not gpu.has_bfloat16:
        why = f"a {gpu.name} has no bfloat16; on other GPUs that takes less memory and time"
        return Setting("model.compute_dtype", "float32", why)
    return Setting("model.compute_dtype", "bfloat16")


def _linear_weights(shapes: ModelShapes) -> int:
    return shapes.linear_weights + shapes.expert_weights


def _sources(paths: Sequence[str]) -> Iterator[Setting]:
    for i, path in enumerate(paths):
        here = f"data.train.{i}"
        yield Setting(f"{here}.path", path)
        if is_data_path(path):
            name, why = _format_of(path)
            yield Setting(f"{here}.format", name, f"detected: {why}")
        else:
            yield Setting(f"{here}.format", "auto", "detected when it is downloaded, and reported by `qlora-dist data`")
        yield Setting(f"{here}.hold_out", HELD_OUT, "this share is evaluated, not trained on")


def _format_of(path: str) -> tuple[str, str]:
    """The format of a local source by its first record that can be read, and the reason."""
    for file in find_files(path):
        for record in islice(read_file(file), 100):
            if record.fields is not None:
                return detect_format(record.fields, path)
    raise UserError(f"data source {path}: none of its first records can be read; expected records with named fields")


def write_draft(one: Draft, target: Path) -> list[str]:
    """Checks it as `train` would, as far as files alone tell, and writes it with the schema beside it. Returns what to
    say."""
    check_data(one.config)
    check_base(one.config)
    schema = target.parent / SCHEMA
    target.parent.mkdir(parents=True, exist_ok=True)
    if not schema.exists():
        write_json(schema, json_schema())
    write_text(target, one.text(target))
    lines = [f"Written to {target}, with {SCHEMA} for editors beside it."]
    for source in one.config.data.train:
        lines.append(f"  data      {source.path}: format {source.format}")
    lines.append(f"  rows      {one.config.data.row_tokens:,} tokens, {one.config.batch.rows_per_step} rows per step")
    if one.config.lora is not None:
        lines.append(f"  adapters  rank {one.config.lora.rank} on all linear layers")
    if one.plan is not None:
        plan = one.plan
        free = format_bytes(plan.headroom_bytes or 0)
        lines.append(
            f"  memory    {format_bytes(plan.peak_bytes - plan.paged_out_bytes)} planned per GPU, {free} free; "
            f"{plan.recompute} of {plan.num_layers} layers recomputed; strategy {plan.strategy}"
        )
    return lines


def show_data_and_plan(config: RunConfig, gpu: str | None, ranks: int) -> None:
    """What `qlora-dist data` and `qlora-dist plan` show of it."""
    from ..data.tokenizer import load_tokenizer
    from .data_report import run_data_command
    from .plan import run_plan_command

    run_data_command(config, load_tokenizer(config.model.name, config.model.revision), show=1)
    if config.device != "cpu":
        run_plan_command(config, gpu=gpu, ranks=ranks, as_json=False, simulate=False)
