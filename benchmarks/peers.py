"""Runs one cell with a stock trainer: transformers' Trainer with PEFT and bitsandbytes, TRL's SFTTrainer, or Unsloth.

Each does the same work as this package's cell: same weights, same documents in the same steps, same initial adapter
weights, same optimizer, learning rate and clipping. Two declared variants:

    default  as in its documentation. Trainer: prepare_model_for_kbit_training (norms, embeddings and head in fp32,
             reentrant checkpointing), padded batches. TRL: its defaults (bf16, checkpointing, padded batches).
             Unsloth: its defaults (its own checkpointing, padded batches).
    best     the documents of a micro-batch in one row without padding (DataCollatorWithFlattening; padding_free), the
             base not cast to fp32, recomputation as set by the cell; flash attention where it is installed.

Only the assignment of documents to steps is replaced (`get_train_dataloader`); collators, losses and loops are theirs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .cells import METHODS, Cell
from .conductor import Conductor
from .memory import items
from .work import LR, MAX_GRAD_NORM, read_documents, sample_gradients

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def run(
    cell: Cell,
    model_folder: Path,
    data_folder: Path,
    scratch: Path,
    conductor: Conductor,
    watch: Any,
    steps: list[list[list[int]]],
    initial: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Trains until the conductor stops it; returns facts for the raw result. `initial`: initial adapter weights."""
    if cell.engine == "unsloth":
        import unsloth  # noqa: F401  it patches what is imported after it
    import datasets  # noqa: F401
    import transformers
    from peft import get_peft_model  # noqa: F401
    from transformers import Trainer  # noqa: F401

    if cell.engine != "trainer":
        from trl import SFTTrainer  # noqa: F401
    # imported before the memory baseline is taken
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    documents = read_documents(data_folder)
    watch.imported()
    model = _load_unsloth(cell, model_folder) if cell.engine == "unsloth" else _load(cell, model_folder)
    trainer = _trainer(cell, model, tokenizer, documents, steps, scratch)
    _set_adapter(trainer.model, initial)
    record: dict[str, Any] = {}
    sizes = [_count(documents, step) for step in steps]
    trainer.add_callback(_callback(conductor, sizes, record, trainer))
    _time_phases(trainer, conductor)
    watch.loaded()
    conductor.start()
    trainer.train()
    total = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "first": {"loss": record["loss"], "gradients": record["gradients"]},
        "attention": trainer.model.config._attn_implementation,
        "trainable_parameters": total,
        "items": record["items"],
        "world_size": 1,
        "rank": 0,
    }


# --- model ------------------------------------------------------------------------------------------------------------


def _load(cell: Cell, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization, double_quant, is_full = METHODS[cell.method]
    options: dict[str, Any] = {}
    if quantization in ("nf4", "fp4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif quantization == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if is_full else torch.bfloat16,
        device_map={"": device},
        attn_implementation=_attention(cell),
        **options,
    )
    model.config.use_cache = False
    if cell.engine == "trainer" and not is_full and cell.variant == "default" and quantization != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=cell.recompute == "full")
    return model


def _attention(cell: Cell) -> str:
    """best uses flash attention where it is installed, otherwise SDPA with transformers' document boundaries."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if cell.variant == "best" and is_flash_attn_2_available() else "sdpa"


def _load_unsloth(cell: Cell, folder: Path) -> Any:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=cell.row_tokens,
        dtype=torch.bfloat16,
        load_in_4bit=METHODS[cell.method][0] == "nf4",
        full_finetuning=METHODS[cell.method][2],
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=cell.rank,
        lora_alpha=16,
        lora_dropout=0,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if cell.recompute == "full" else False,
    )


def _set_adapter(model: Any, initial: dict[str, torch.Tensor]) -> None:
    """Copies the same adapter weights into any engine's model, keeping the engine's dtype."""
    from qlora_dist.model.lora import trainable_parameters

    if not initial:
        return
    live = trainable_parameters(model)
    if live.keys() != initial.keys():
        different = sorted(live.keys() ^ initial.keys())[:3]
        raise RuntimeError(f"the peer trains different weights than this package: {different}")
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(initial[name])


# --- trainer ----------------------------------------------------------------------------------------------------------


def _trainer(
    cell: Cell, model: Any, tokenizer: Any, documents: list[Any], steps: list[list[list[int]]], scratch: Path
) -> Any:
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    is_full = METHODS[cell.method][2]
    lora = None if is_full else LoraConfig(
        r=cell.rank, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )  # fmt: skip
    options: dict[str, Any] = {
        "output_dir": str(scratch / "trainer"),
        "per_device_train_batch_size": 8,  # the batch sampler decides; 1 would warn about padding-free training
        "gradient_accumulation_steps": len(steps[0]),
        "max_steps": len(steps),
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": cell.recompute == "full",
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
    }
    if cell.engine == "trainer":
        if lora is not None:
            model = get_peft_model(model, lora)
            if cell.recompute == "full":
                model.enable_input_require_grads()
        collator = (
            DataCollatorWithFlattening()
            if cell.packing
            else DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
        )
        trainer = _with_our_documents(Trainer, steps)(
            model=model,
            args=TrainingArguments(**options, remove_unused_columns=False),
            train_dataset=documents,
            data_collator=collator,
        )
    else:
        from trl import SFTConfig, SFTTrainer

        options |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
        options |= {"padding_free": True, "max_length": None} if cell.packing else {}
        trainer = _with_our_documents(SFTTrainer, steps)(
            model=model,
            args=SFTConfig(**options),
            train_dataset=datasets.Dataset.from_list(documents),
            processing_class=tokenizer,
            peft_config=None if cell.engine == "unsloth" else lora,
        )
    return trainer


def _with_our_documents(base: Any, steps: list[list[list[int]]]) -> Any:
    """The trainer class with given documents for each micro-step; collator and preparation are unchanged."""

    class WithOurDocuments(base):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            micro_steps = [documents for step in steps for documents in step]
            loader = torch.utils.data.DataLoader(
                self.train_dataset,
                batch_sampler=micro_steps,
                collate_fn=self.data_collator,
                pin_memory=torch.cuda.is_available(),
            )
            return self.accelerator.prepare(loader)

    return WithOurDocuments


def _count(documents: list[Any], step: list[list[int]]) -> tuple[int, int]:
    """(tokens, labels) of a step's documents; padding is not counted."""
    chosen = [documents[index] for group in step for index in group]
    tokens = sum(len(document["input_ids"]) for document in chosen)
    return tokens, sum(label != -100 for document in chosen for label in document["labels"])


def _callback(conductor: Conductor, sizes: list[tuple[int, int]], record: dict[str, Any], trainer: Any) -> Any:
    from transformers import TrainerCallback

    from qlora_dist.model.lora import trainable_parameters

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                record["gradients"] = sample_gradients(trainable_parameters(trainer.model))
                record["loss"] = float(trainer._tr_loss)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                trainable = trainable_parameters(trainer.model).values()
                gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
                record["items"] = items(trainer.model, trainer.optimizer, trainable, gradients)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tokens, labels = sizes[state.global_step - 1]
            if not conductor.step_done(tokens, labels):
                control.should_training_stop = True

    return Steps()


def _time_phases(trainer: Any, conductor: Conductor) -> None:
    """Timers around the trainer's own calls; active only in the instrumented steps."""

    def timed(owner: Any, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: Any, **keywords: Any) -> Any:
            with conductor.phase(phase):
                return inner(*arguments, **keywords)

        setattr(owner, name, outer)

    timed(trainer, "compute_loss", "forward")
    timed(trainer, "get_batch_samples", "data")
    timed(trainer.accelerator, "backward", "backward")
    timed(trainer, "_clip_grad_norm", "optimizer")
    create = trainer.create_optimizer

    def create_timed(*arguments: Any, **keywords: Any) -> Any:
        optimizer = create(*arguments, **keywords)
        timed(optimizer, "step", "optimizer")
        return optimizer

    trainer.create_optimizer = create_timed


def missing(cell: Cell) -> str | None:
    """Why this machine cannot run the cell's engine; None if it can."""
    import importlib.util

    needed = {"trl": "trl", "unsloth": "unsloth"}.get(cell.engine)
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed (pip install {needed})"
    if cell.engine == "unsloth" and not torch.cuda.is_available():
        return "Unsloth needs a GPU"
    if cell.engine in ("trainer", "trl", "unsloth") and cell.ranks > 1:
        return "peers are measured on one rank only"
    return None
