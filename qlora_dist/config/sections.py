"""The sections of the config: frozen pydantic models.

The docstring below each field gives its meaning and unit; it is also the description in the JSON schema
(`qlora-dist schema`). Unknown keys are errors. Checks of one section are in that section, checks across sections in
`RunConfig`. Types that make local paths absolute are in `paths`. Below the trainer, functions take the values that they
use, never these models.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .names import AdaptedExperts
from .paths import DataPath, LocalPath, ModelPath, TemplatePath
from .quantization import Quantization

DataFormat = Literal[  # one function per format in data.formats
    "auto", "alpaca", "alpaca-cleaned", "alpaca-gpt4", "messages", "sharegpt", "oasst", "guanaco", "self-instruct",
    "chip2", "hh-rlhf", "longform", "dolly", "unnatural-instructions", "input-output", "prompt-completion", "text",
    "tokens",
]  # fmt: skip


LARGEST = 2**63 - 1  # of any number: what torch and the file formats store
MANY = 10**12  # more than any run counts


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _possible(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what no field can mean, before pydantic converts it."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        for one in _values(value):
            if isinstance(one, bool) and not _allows_bool(annotation):
                raise PydanticCustomError("truth_value", "what is expected stands in the annotation")
            if isinstance(one, int | float) and not abs(one) <= LARGEST:
                raise ValueError("expected a finite number below 2**63")
            if isinstance(one, str) and "\0" in one:
                raise ValueError("text cannot hold a NUL character")
        return value


def _values(value: Any) -> list[Any]:
    """A field's own values; those of a section are looked at there."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict):
        return [one for pair in value.items() for one in pair if isinstance(one, str)]
    return [value]


def _allows_bool(annotation: Any) -> bool:
    return annotation is bool or any(map(_allows_bool, get_args(annotation)))


class ModelConfig(_Section):
    name: ModelPath
    """Hub name or local folder of a causal language model with safetensors weights."""
    revision: str | None = None
    """Hub branch, tag or commit. null: the default branch."""
    quantization: Quantization = "nf4"
    """Storage type of the frozen base. `none` stores it in `compute_dtype` (LoRA on a 16-bit or 32-bit base)."""
    double_quant: bool = True
    """Also quantize the quantization constants (QLoRA, section 3). 4-bit bases only; saves 0.373 bit per parameter."""
    weights: Literal["files", "random"] = "files"
    """random: drawn from `seed` in the shapes given by config.json alone, for benchmarks and dry runs of any size."""
    cache_4bit: LocalPath | None = None
    """Folder for a 4-bit copy of the base: the first start on a node writes it, later ones read it. null: no copy."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations, dequantized matrices, and everything that is not quantized (norms, embeddings, head). Not
    float16, whose gradients underflow without loss scaling."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Packed attention: flash-attn, torch's varlen, or one SDPA call per document. auto: the first available one."""
    kernels: Literal["auto", "reference", "off"] = "auto"
    """auto: decoder layers of the Llama family are computed as one block, adapters within the base's products; in other
    families, and with dropout, one linear layer at a time. reference: one linear layer at a time, in every family.
    off: PEFT's layers unchanged."""


class LoraConfig(_Section):
    rank: int = Field(64, ge=1, le=2**16)
    """Rank r in W + (alpha / r) * B @ A."""
    alpha: float = Field(16.0, gt=0, le=1e6)
    """alpha in W + (alpha / r) * B @ A."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A. The paper uses 0.1 up to 13B and 0.05 above."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (all linear layers except the output head), or names that each match at least one linear layer."""
    experts: AdaptedExperts = "shared"
    """Which experts of a mixture get adapters. shared: those that every token meets, as far as target_modules selects
    them. all: also every expert that a router chooses, each with A and B of rank r of its own (4-bit bases only, no
    dropout). none: no expert. The router never gets one."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora scales by alpha / sqrt(r); dora learns magnitude and direction separately (slower)."""
    init_from: LocalPath | None = None
    """Folder of a PEFT adapter to start from; its rank and target modules must match those set here."""

    @model_validator(mode="after")
    def _fits_experts(self) -> LoraConfig:
        if self.experts == "all" and self.dropout:
            raise ValueError(
                f"experts is all, but dropout is {self.dropout}: PEFT's adapters of stacked experts have none, so that "
                "nothing could load the result as it was trained; set dropout to 0, or experts to shared"
            )
        if self.experts == "all" and self.variant == "dora":
            raise ValueError("experts is all, but variant is dora, which PEFT has for linear layers only; use lora")
        return self


class SourceConfig(_Section):
    path: DataPath
    """A file (json, jsonl, csv, tsv, parquet, arrow, txt), a folder of such files, or a hub dataset name."""
    format: DataFormat = "auto"
    """How a record becomes a conversation or text. auto: detected from the columns and reported."""
    columns: dict[str, str] = {}
    """Maps a format's column names to yours, for example {instruction: question, output: answer}."""
    split: str | None = None
    """Split of a hub dataset, folder or file, or part of one: train[:90%], train[100:200]. null: train; in data.eval,
    validation or else test, if present."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    streaming: bool = False
    """Read a hub dataset record by record instead of downloading all of it."""
    weight: float = Field(1.0, gt=0, le=1e4)
    """How often an example is used per epoch: 2 = twice, 0.5 = a seeded half of the examples, once each."""
    max_examples: int | None = Field(None, ge=1, le=MANY)
    """Use at most N records: the first N, or with `shuffle` a seeded sample."""
    shuffle: bool = False
    """Sample the `max_examples` records with the seed instead of taking the first ones."""
    hold_out: float | None = Field(None, gt=0, le=MANY)
    """Records held out of training, sampled with the seed: a fraction below 1, or a whole number of records. They are
    evaluated if data.eval is empty; a source with its own validation or test split is evaluated on that instead."""
    part: Literal["all", "train", "held_out"] = "all"
    """Which side of `hold_out` to read. all: both sides in data.eval; all but held-out records in data.train."""

    name: str | None = None
    """What hold_out, shuffle and fractions of weights are drawn by, besides the seed. null: `path` as it is written, so
    that a run which was moved, or is started in another folder, draws the same records."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("name") is None and isinstance(raw.get("path"), str):
            return {**raw, "name": raw["path"]}
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if self.part == "held_out" and self.hold_out is None:
            raise ValueError("part is held_out, but hold_out is not set; set it to the fraction or number of records")
        if self.hold_out is not None and self.hold_out >= 1 and self.hold_out != int(self.hold_out):
            raise ValueError(f"hold_out is {self.hold_out}; expected a fraction below 1, or a whole number of records")
        if self.shuffle and self.max_examples is None:
            raise ValueError("shuffle samples the max_examples records, but max_examples is not set")
        return self


class DataConfig(_Section):
    train: tuple[SourceConfig, ...]
    """Training data: one or more sources, concatenated in order."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out data for `train.eval_every` and `qlora-dist evaluate`."""
    row_tokens: int = Field(2048, ge=8, le=2**24)
    """Maximum number of tokens per row, and so per document."""
    packing: bool = True
    """Pack whole documents into rows. false: one document per row."""
    on_long: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with a document longer than row_tokens. Always counted; a truncated one loses its end token."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do with a record that cannot be read. Skipped records are counted."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are labels: every answer, the last answer, or everything. End-of-turn tokens are labels too."""
    template: TemplatePath = "auto"
    """How a conversation becomes text: a named template (chatml, llama2, llama3, mistral, gemma, alpaca, vicuna,
    zephyr, none), tokenizer, or the path of a .jinja file. auto: the tokenizer's own; if it has none, alpaca for
    instructions, none for input-output and prompt-completion, vicuna for conversations."""
    date: str | None = None
    """The date (YYYY-MM-DD) that chat templates which ask for today's date are told, so that the same config gives the
    same tokens on every day. null: the day on which the run was first started, kept in its config.yaml."""
    require_eos: bool = True
    """Refuse data whose answers never end in a special token: the model would not learn to stop. Texts are exempt."""
    num_workers: int | None = Field(None, ge=1, le=1024)
    """Number of tokenizer processes. null: one for small data, up to eight for large data."""
    cache_dir: LocalPath = "~/.cache/qlora_dist"
    """Cache of tokenized data, keyed by a fingerprint of everything that affects them: per node, or shared."""

    @field_validator("date", mode="before")
    @classmethod
    def _is_date(cls, value: Any) -> Any:
        if type(value) is datetime.date:  # YAML reads it as one where it is not quoted
            return value.isoformat()
        if isinstance(value, str):
            try:
                if not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
                    raise ValueError
                datetime.date.fromisoformat(value)  # raises ValueError for the 31st of February
            except ValueError:
                raise ValueError("expected a date of the calendar as YYYY-MM-DD") from None
        return value

    @field_validator("train")
    @classmethod
    def _not_empty(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        if not value:
            raise ValueError("expected at least one source {path: ...}")
        return value


class BatchConfig(_Section):
    rows_per_step: int = Field(16, ge=1, le=2**24)
    """Rows per optimizer update over all ranks. This is the batch size; it does not depend on the hardware."""
    micro_rows: Annotated[int, Field(ge=1, le=2**24)] | Literal["auto"] = 1
    """Rows per micro-batch on one rank. auto: as many as fit according to the memory plan (1 on a CPU)."""

    @property
    def resolved_micro_rows(self) -> int:
        """`micro_rows` as a number: the trainer resolves auto before using it."""
        assert self.micro_rows != "auto", "call train.fit_memory.resolve_auto first"
        return self.micro_rows


class OptimConfig(_Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_32bit"
    """adamw is torch's (fused); the others are bitsandbytes'. Paged states move to host memory when the GPU is full."""
    lr: float = Field(2e-4, gt=0, le=1e3)
    """Peak learning rate. The paper uses 2e-4 up to 13B and 1e-4 above."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up. linear and cosine end at lr * min_lr_ratio."""
    warmup_steps: float = Field(0, ge=0, le=MANY)
    """Steps over which the learning rate rises linearly from lr / warmup_steps to lr: a whole number, or below 1 the
    share of the run's steps, rounded up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate of the linear and cosine schedules, as a fraction of lr."""
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    """Decoupled weight decay, applied to matrices but not to biases and norms."""
    max_grad_norm: float | None = Field(0.3, gt=0, le=1e12)
    """Gradients are clipped to this global L2 norm. null: no clipping."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Adam's epsilon."""

    @field_validator("warmup_steps")
    @classmethod
    def _steps_or_share(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("expected a whole number of steps, or a share of the steps below 1")
        return int(value) if value == int(value) else value


class TrainConfig(_Section):
    steps: int | None = Field(None, ge=1, le=MANY)
    """Number of optimizer updates. Set either steps or epochs."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Passes over the training rows; the last step may have fewer rows."""
    eval_every: int | None = Field(None, ge=1, le=MANY)
    """Steps between evaluations of data.eval. null: only at the end."""
    longest_first: bool | None = None
    """Run the longest micro-batch once before the first step, to fail early if it does not fit. null: only on a GPU."""
    eval_at_start: bool = True
    """Evaluate data.eval before the first update, as a baseline."""
    eval_rows: Annotated[int, Field(ge=1, le=MANY)] | Literal["all"] = 256
    """Evaluations during training use at most this many held-out rows, drawn once with the seed. `qlora-dist evaluate`
    uses all of them. A run keeps its value when a later start leaves the key out; runs of earlier versions used all."""
    save_every: int | None = Field(None, ge=1, le=MANY)
    """Steps between checkpoints. null: only at the end and on a stop signal."""
    keep: int = Field(3, ge=1, le=MANY)
    """Number of checkpoints to keep; older ones are deleted once a newer one is complete."""

    @property
    def length(self) -> dict[str, float | None]:
        """What determines when a run is finished."""
        return {"steps": self.steps, "epochs": self.epochs}

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else f"steps: {self.steps} and epochs: {self.epochs:g}"
            raise ValueError(f"set exactly one of train.steps and train.epochs; found {found}")
        return self


class MemoryConfig(_Section):
    recompute: Literal["auto", "full", "none"] | Annotated[int, Field(ge=0, le=2**20)] = "auto"
    """Gradient checkpointing: full = every layer is recomputed in the backward pass, none = no layer, N = the first
    N layers. auto: as few as fit according to the memory plan (all on a CPU). Gradients are bit-identical for all."""
    offload_activations: bool = False
    """Keep saved activations in (pinned) host memory between the forward and backward pass."""


class StrategyConfig(_Section):
    name: Literal["ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp"] = "ddp"
    """What is sharded. ddp: nothing; zero1: optimizer states; zero2: gradients too (zero2_offload: in host memory);
    zero3: everything, if the base is not quantized; fsdp: the base, also in 4 bit, gathered bit-exactly by layer."""
    ds_config: LocalPath | None = None
    """DeepSpeed config of a zero strategy. null: the one shipped for that strategy (ds_configs/)."""
    offload: bool = False
    """fsdp: keep each rank's shard of the base in (pinned) host memory between uses."""
    shard_over: Literal["auto", "node", "all"] | Annotated[int, Field(ge=2, strict=True)] = "auto"
    """fsdp: the ranks that share one base. all: every rank; node: those of a node, so that layers are gathered within
    it and nodes hold alike what is sharded; auto: a node if its shards fit by the memory plan, else all. A number: so
    many consecutive ranks, which must divide those of each node."""
    mixed_devices: bool = False
    """Allow different GPU models or memory sizes in one run: every step then waits for the slowest GPU."""
    timeout_seconds: float = Field(600.0, ge=0.1, le=30 * 86400)
    """Longest wait in a step; then all ranks exit and report the missing ones. Outside steps, three times that; where
    ranks have unequal work (data, download, loading) no limit but that all are alive."""

    def shard_ranks(self, num_ranks: int) -> int:
        """How many ranks share one base, once `auto` and `node` are a number; before that, all."""
        return self.shard_over if isinstance(self.shard_over, int) else num_ranks


class LoggingConfig(_Section):
    trackers: tuple[str, ...] = ("tensorboard",)
    """Accelerate trackers by name: tensorboard, wandb, mlflow, ... metrics.jsonl is always written."""
    project: str = "qlora_dist"
    """Project name for trackers that support one."""


class RunConfig(_Section):
    run_dir: LocalPath
    """Folder of this run: config, metrics, checkpoints, adapter."""
    seed: int = Field(0, ge=0, le=LARGEST)
    """Seed for row order, adapter initialization and dropout."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU if there is one, else the CPU. cuda: a GPU, or an error before anything is read."""
    model: ModelConfig
    """The frozen base model."""
    lora: LoraConfig | None = Field(default_factory=lambda: LoraConfig())
    """The adapters. null with model.quantization none: full fine-tuning."""
    data: DataConfig
    """Training and evaluation data, and how they become rows."""
    batch: BatchConfig = BatchConfig()
    """Rows per step and per micro-batch."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    train: TrainConfig
    """Length, evaluation, checkpoints."""
    memory: MemoryConfig = MemoryConfig()
    """Recomputation and offload of activations."""
    strategy: StrategyConfig = StrategyConfig()
    """How the run is distributed over ranks."""
    logging: LoggingConfig = LoggingConfig()
    """Trackers."""

    @model_validator(mode="after")
    def _between_sections(self) -> RunConfig:
        if self.lora is None and self.model.quantization != "none":
            raise ValueError(
                f"lora is null (full fine-tuning) but model.quantization is {self.model.quantization}: quantized "
                "weights cannot be trained; set model.quantization=none, or give a lora section"
            )
        if self.lora is not None and self.lora.experts == "all" and self.model.quantization not in ("nf4", "fp4"):
            raise ValueError(
                f"lora.experts is all, but model.quantization is {self.model.quantization}: adapters of experts are "
                "trained over nf4 and fp4; set one of these, or lora.experts to shared"
            )
        has_held_out = self.data.eval or any(source.hold_out is not None for source in self.data.train)
        if self.train.eval_every is not None and not has_held_out:
            raise ValueError(
                f"train.eval_every is {self.train.eval_every} but data.eval is empty and no source has hold_out; give "
                "held-out data, or set train.eval_every to null"
            )
        return self
