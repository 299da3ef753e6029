"""The sections of the config: frozen pydantic models.

Every field states its meaning and unit below its name; that text is also the JSON schema's description
(`qlora-dist schema`). Unknown keys are errors. Rules that concern one section live in that section, rules between
sections in `RunConfig`. Below the trainer no function takes these models: they take the values they use.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .quantization import Quantization

DataFormat = Literal[  # one function each in formats
    "auto", "alpaca", "alpaca-cleaned", "alpaca-gpt4", "messages", "sharegpt", "oasst", "guanaco", "self-instruct",
    "chip2", "hh-rlhf", "longform", "dolly", "unnatural-instructions", "input-output", "prompt-completion", "text",
    "tokens",
]  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )


class ModelConfig(_Section):
    name: str
    """Hub name or local folder of a causal language model with safetensors weights."""
    revision: str | None = None
    """Hub branch, tag or commit. None: the default branch."""
    quantization: Quantization = "nf4"
    """Storage of the frozen base. `none` keeps `compute_dtype` (LoRA on a 16-bit or 32-bit base)."""
    double_quant: bool = True
    """Quantize the quantization constants too (QLoRA, section 3). 4-bit bases only; saves 0.373 bit a parameter."""
    weights: Literal["files", "random"] = "files"
    """random: drawn by `seed` in the real shapes from config.json alone, for benchmarks and dry runs of any size."""
    cache_4bit: str | None = None
    """Folder for the base's 4-bit copy: the first start on a node makes it, later ones read it. null: none."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations, of dequantized matrices, and of what is not quantized (norms, embeddings, head). Not
    float16, whose gradients underflow without loss scaling."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Packed attention: flash-attn, torch's varlen, or one SDPA call a document. auto: the first that can be used."""
    kernels: Literal["auto", "off"] = "auto"
    """auto: this package's own LoRA forward (adapters cast once to the compute type, no copies of the base output).
    off: PEFT's layers as they are."""


class LoraConfig(_Section):
    rank: int = Field(64, ge=1)
    """Rank r of the update W + (alpha / r) * B @ A."""
    alpha: float = Field(16.0, gt=0)
    """Numerator of the update's scale."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A. The paper uses 0.1 up to 13B and 0.05 above."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head), or names: each must match at least one linear layer."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora scales by alpha / sqrt(r); dora learns magnitude and direction apart (slower)."""
    init_from: str | None = None
    """Folder of a PEFT adapter to start from; its rank and target modules must equal these."""


class SourceConfig(_Section):
    path: str
    """A file (json, jsonl, csv, tsv, parquet, txt), a folder of such files, or a hub dataset name."""
    format: DataFormat = "auto"
    """How a record becomes a conversation or text. auto: decided from the columns, and said."""
    columns: dict[str, str] = {}
    """Your columns under a format's names, for example {instruction: question, output: answer}."""
    split: str | None = None
    """Split of a hub dataset or folder. null: train; in data.eval validation, else test, where it has them."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    streaming: bool = False
    """Read a hub dataset record by record instead of downloading it whole."""
    weight: float = Field(1.0, gt=0)
    """How often an example comes in an epoch: 2 = twice, 0.5 = a seeded half of the examples once."""
    max_examples: int | None = Field(None, ge=1)
    """Keep at most N records: the first, or with `shuffle` a seeded choice."""
    shuffle: bool = False
    """Choose the `max_examples` records by the seed instead of taking the first."""
    hold_out: float | None = Field(None, gt=0)
    """Records kept out of training, chosen by the seed: a share below 1, or a whole number of them. Where data.eval
    is empty they are evaluated; a source with its own validation or test split is evaluated on that instead."""
    part: Literal["all", "train", "held_out"] = "all"
    """Which side of `hold_out` is read. all: both in data.eval; in data.train never the held-out records."""

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if self.part == "held_out" and self.hold_out is None:
            raise ValueError("part is held_out, but hold_out is not given; it says how many records that are")
        if self.hold_out is not None and self.hold_out >= 1 and self.hold_out != int(self.hold_out):
            raise ValueError(f"hold_out is {self.hold_out}; expected a share below 1, or a whole number of records")
        if self.shuffle and self.max_examples is None:
            raise ValueError("shuffle chooses the max_examples records, but max_examples is not given")
        return self


class DataConfig(_Section):
    train: tuple[SourceConfig, ...]
    """What is learned: one or more sources, one after another."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out sources for `train.eval_every` and `qlora-dist evaluate`."""
    row_tokens: int = Field(2048, ge=8)
    """Largest number of tokens in a row, and so in a document."""
    packing: bool = True
    """Pack whole documents into rows. False: one document a row."""
    on_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a document longer than row_tokens. Always counted; a truncated one keeps no end token."""
    on_bad: Literal["error", "skip"] = "error"
    """What happens to a record that cannot be read. `skip` counts it."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are labels: every answer, the last answer, or everything. End-of-turn tokens are labels too."""
    template: str = "auto"
    """How a conversation becomes text: a named template (chatml, llama2, llama3, mistral, gemma, alpaca, vicuna,
    zephyr, none), tokenizer, or the path of a .jinja file. auto: the tokenizer's own; without one alpaca for
    instructions, none for input-output and prompt-completion, vicuna for conversations."""
    require_eos: bool = True
    """Refuse data whose answers never end in a special token: the model would not learn to stop. Texts are exempt."""
    num_workers: int | None = Field(None, ge=1)
    """Processes that tokenize. null: one for small data, up to eight for large."""
    cache_dir: str = "~/.cache/qlora_dist"
    """Where tokenized data are kept, by a fingerprint of all that decides them: one for each node, or a shared one."""

    @field_validator("train")
    @classmethod
    def _not_empty(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        if not value:
            raise ValueError("data.train names no source; give at least one {path: ...}")
        return value


class BatchConfig(_Section):
    rows_per_step: int = Field(16, ge=1)
    """Rows of one optimizer update over all ranks. This is the batch size: it does not depend on the hardware."""
    micro_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Rows that one rank holds in memory at a time. auto: the most that fit by the memory plan (on a CPU 1)."""

    @property
    def resolved_micro_rows(self) -> int:
        """`micro_rows` as a number: the trainer replaces auto before it uses it."""
        assert self.micro_rows != "auto", "train.fit_memory.resolve_auto comes first"
        return self.micro_rows


class OptimConfig(_Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_32bit"
    """adamw is torch's (fused); the others are bitsandbytes'. Paged states move to host memory when the GPU is full."""
    lr: float = Field(2e-4, gt=0)
    """Peak learning rate. The paper: 2e-4 up to 13B, 1e-4 above."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up. linear and cosine end at lr * min_lr_ratio."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from lr / warmup_steps to lr."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """End of the linear or cosine schedule as a share of lr."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; biases and norms have none."""
    max_grad_norm: float | None = Field(0.3, gt=0)
    """Global L2 norm to which gradients are clipped. null: no clipping."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""


class TrainConfig(_Section):
    steps: int | None = Field(None, ge=1)
    """Number of optimizer updates. Give steps or epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training rows; the last step may hold fewer rows."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations of data.eval. null: only at the end."""
    longest_first: bool | None = None
    """Run the longest micro-batch once before the first step: what does not fit ends at once. null: on a GPU only."""
    eval_at_start: bool = True
    """Evaluate data.eval before the first update, as the figure to compare with."""
    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints. null: only at the end and on a stop signal."""
    keep: int = Field(3, ge=1)
    """Checkpoints kept; older ones are deleted after a newer one is complete."""

    @property
    def length(self) -> dict[str, float | None]:
        """What decides when a run is finished."""
        return {"steps": self.steps, "epochs": self.epochs}

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        found = f"found steps={self.steps}, epochs={self.epochs}"
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give exactly one of train.steps and train.epochs, {found}")
        return self


class MemoryConfig(_Section):
    recompute: Literal["auto", "full", "none"] | int = "auto"
    """Gradient checkpointing: full = every layer is recomputed in the backward pass, none = no layer, N = the first
    N layers. auto: as few layers as fit by the memory plan (on a CPU all). All give the same gradients, bit for bit."""
    offload_activations: bool = False
    """Keep saved activations in (pinned) host memory between forward and backward."""

    @field_validator("recompute")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 0:
            raise ValueError(f"memory.recompute must be auto, full, none or a number of layers >= 0, got {value}")
        return value


class StrategyConfig(_Section):
    name: Literal["ddp", "zero1", "zero2", "zero2_offload", "zero3", "fsdp"] = "ddp"
    """What is sharded: ddp nothing; zero1 optimizer states; zero2 gradients too (offload: on host); zero3 all, of a
    plain base; fsdp the base, also in 4 bit: a layer is gathered, bit-exactly, when it runs."""
    ds_config: str | None = None
    """DeepSpeed config of a zero strategy. null: the shipped one of that name (ds_configs/)."""
    offload: bool = False
    """fsdp: keep each rank's share of the base in (pinned) host memory between uses."""
    mixed_devices: bool = False
    """Allow GPUs of different kinds or memory in one run: every step then waits for the slowest of them."""
    timeout_seconds: float = Field(600.0, gt=0)
    """Longest wait within a step: then all ranks end and name the missing ones. Outside of steps, three times that."""


class LoggingConfig(_Section):
    trackers: tuple[str, ...] = ("tensorboard",)
    """Accelerate trackers by name: tensorboard, wandb, mlflow, ... metrics.jsonl is always written."""
    project: str = "qlora_dist"
    """Project name given to trackers that have one."""


class RunConfig(_Section):
    run_dir: str
    """Folder of this run: config, metrics, checkpoints, adapter."""
    seed: int = Field(0, ge=0)
    """Seed of row order, adapter initialization and dropout."""
    model: ModelConfig
    """The frozen base."""
    lora: LoraConfig | None = Field(default_factory=lambda: LoraConfig())
    """The adapters. null with model.quantization none: full fine-tuning."""
    data: DataConfig
    """What is learned and how it becomes rows."""
    batch: BatchConfig = BatchConfig()
    """Rows of a step."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    train: TrainConfig
    """Length, evaluation, checkpoints."""
    memory: MemoryConfig = MemoryConfig()
    """Recomputation and offload."""
    strategy: StrategyConfig = StrategyConfig()
    """How ranks share the work."""
    logging: LoggingConfig = LoggingConfig()
    """Trackers."""

    @model_validator(mode="after")
    def _between_sections(self) -> RunConfig:
        if self.lora is None and self.model.quantization != "none":
            raise ValueError(
                f"lora is null (full fine-tuning) but model.quantization is {self.model.quantization}: quantized "
                "weights cannot be trained; set model.quantization=none, or give a lora section"
            )
        has_held_out = self.data.eval or any(source.hold_out is not None for source in self.data.train)
        if self.train.eval_every is not None and not has_held_out:
            raise ValueError(
                f"train.eval_every is {self.train.eval_every} but data.eval is empty and no source has hold_out; name "
                "held-out data, or set train.eval_every to null"
            )
        return self
