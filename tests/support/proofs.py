"""What is proven of one family, on a tiny random model of it, in fp32 on a CPU. A cell is

yes                 the proof was run and holds
no: REASON          the program refuses, in its own words
not applicable      there is nothing to prove
FAILED: REASON      the program accepts and is wrong, or breaks: no such cell may stay (tests/test_docs/test_support)
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from helpers.ranks import on_ranks
from helpers.tiny_models import alone, random_batch, randomized, save_model, tiny_wrapper
from helpers.tiny_run import changed, config_of, losses_of, make_inputs, metrics_of, resumed_digests
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from qlora_dist.commands.merge import merge
from qlora_dist.config import parse_config
from qlora_dist.errors import UserError
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.model import (
    INFERENCE,
    check_blocks,
    check_config,
    check_head,
    hidden_states,
    linear_layers,
    load_base,
    output_head,
    set_recompute,
)
from qlora_dist.model.bitsandbytes_import import bitsandbytes
from qlora_dist.model.experts import packed_experts
from qlora_dist.model.lora import attach_lora, load_adapters, trainable_parameters
from qlora_dist.model.lora_files import save_adapter
from qlora_dist.model.loss import nll_sum
from qlora_dist.train import train

from .configs import is_wrapper, tiny_config

LENGTHS = (9, 6, 5)
IDS = torch.tensor([[5, 9, 30, 7, 61, 12]])
STEPS = 4
STRATEGIES = ("ddp", "fsdp", "zero2")
_SETTINGS: dict[str, Any] = {"double_quant": True, "compute_dtype": torch.float32, "device": torch.device("cpu")}


class Subject:
    """One family: its tiny model in a folder, and what several proofs need."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder

    @cached_property
    def raw(self) -> dict[str, Any]:
        """Model, data and the config of a run."""
        raw = make_inputs(self.folder, num_examples=24)
        shutil.rmtree(self.folder / "model")
        save_model(self.folder / "model", tiny_model_of(self.family))
        raw["train"] = {"steps": STEPS, "save_every": 2}
        return raw

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The layers of attention: what is adapted where all-linear is refused."""
        within, elsewhere = set(), set()
        for name in linear_layers(self.base("none")):
            (within if re.search(r"att(entio)?n\b", name) else elsewhere).add(name.rpartition(".")[2])
        return tuple(sorted(within - elsewhere))

    def adapted(self, base: Any) -> Any:
        """With adapters on every linear layer, if that is accepted."""
        try:
            return attach_lora(base, rank=4, alpha=8)
        except UserError:
            self.raw["lora"]["target_modules"] = list(self.targets)
            return attach_lora(self.base("none"), rank=4, alpha=8, target_modules=self.targets)

    @property
    def name(self) -> str:
        return str(self.raw["model"]["name"])

    def base(self, quantization: Any, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        settings = {**_SETTINGS, "compute_dtype": dtype}
        return load_base(self.name, quantization=quantization, attention=attention, **settings)

    def stock(self, folder: str | Path | None = None) -> Any:
        """transformers' own model, in fp32."""
        auto = AutoModelForMultimodalLM if is_wrapper(self.family) else AutoModelForCausalLM
        return auto.from_pretrained(folder or self.name, dtype=torch.float32).eval()

    @cached_property
    def run(self) -> str:
        """The directory of a run of one process in NF4."""
        with torch.enable_grad():  # the first to ask may be a comparison of logits
            train(config_of(self.raw))
        return str(self.raw["run_dir"])

    @property
    def adapter(self) -> Path:
        return Path(self.run) / "adapter"

    @cached_property
    def stock_logits(self) -> Tensor:
        """Of transformers' model over the 16-bit base with the adapter of the run, loaded by PEFT."""
        return logits_of(PeftModel.from_pretrained(self.stock(), str(self.adapter)))


def tiny_model_of(family: str) -> Any:
    if is_wrapper(family):
        return tiny_wrapper(family)
    torch.manual_seed(0)
    config: Any = tiny_config(family)
    auto = AutoModelForMultimodalLM if "text_config" in config.sub_configs else AutoModelForCausalLM
    model = randomized(auto.from_config(config), 0)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():  # such as a router's corrections
            buffer.copy_(buffer + 0.1 * torch.randn(buffer.shape))
    return model


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


def require(holds: Any, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def require_close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-5) -> None:
    gap = float((ours - theirs).abs().max())
    require(gap <= tolerance * max(1.0, float(theirs.abs().max())), f"{what} differs by {gap:.2g}")


# --- the proofs -------------------------------------------------------------------------------------------------------


def plan(one: Subject) -> None:
    """The plan counts the weights that the model has, and knows every kind of them."""
    shapes, model = read_shapes(one.name), one.base("none")
    count = sum(parameter.numel() for parameter in model.parameters())
    require(shapes.base_parameters == count, f"{shapes.base_parameters:,} weights planned, {count:,} built")
    if shapes.unknown:
        raise UserError(f"not planned: {shapes.unknown}")


def nf4(one: Subject) -> None:
    """Codes and constants are bitsandbytes', of every linear layer and every expert."""
    model, plain = one.base("nf4"), one.base("none")
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, layer in linear_layers(model).items():
        source: Any = linear_layers(plain)[name]
        weight = source.weight.T if type(source).__name__ == "Conv1D" else source.weight
        state = layer.weight.quant_state  # type: ignore[union-attr]
        found[name] = (weight.detach(), layer.weight.data.view(-1), state.absmax)  # type: ignore[operator, union-attr]
    for name, packed in packed_experts(model).items():
        stacked = plain.get_parameter(name).detach()
        for index, matrix in enumerate(stacked):
            weight = matrix.T if packed.is_transposed else matrix
            found[f"{name}.{index}"] = (weight, packed.codes[index].view(-1), packed.absmax[index])
    require(found, "nothing was quantized")
    for name, (weight, codes, absmax) in found.items():
        expected, state = bitsandbytes.functional.quantize_4bit(
            weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        require(torch.equal(codes, expected.view(-1)), f"the codes of {name} are not bitsandbytes'")
        require(torch.equal(absmax.view(-1), state.absmax.view(-1)), f"the constants of {name} are not bitsandbytes'")


def all_linear(one: Subject) -> None:
    """Every linear layer can have an adapter. Where this is refused, the other proofs adapt attention alone."""
    attach_lora(one.base("nf4"), rank=4, alpha=8)


@torch.no_grad()
def packed_as_alone(one: Subject) -> None:
    """In NF4, each document of a packed row has the hidden states that it has alone."""
    model, batch = one.base("nf4"), random_batch(LENGTHS)
    check_head(model)
    together = hidden_states(model, batch)
    require_close(together, torch.cat([hidden_states(model, part) for part in alone(batch)]), "a packed document")


def loss_and_gradient(one: Subject) -> None:
    """In fp32, packed and recomputed, those of transformers' model with each document alone and the adapter in stock
    PEFT."""
    check_config(one.name, device_type="cpu")
    model, batch = one.adapted(one.base("none")), random_batch(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in trainable_parameters(model).items():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    check_head(model)
    check_blocks(model)
    save_adapter(model, one.folder / "random", one.name)
    set_recompute(model.train(), "full")
    loss = nll_sum(hidden_states(model, batch), output_head(model), batch.label_positions, batch.labels)
    loss.backward()
    ours = {key.replace(".default", ""): weight.grad for key, weight in trainable_parameters(model).items()}

    theirs = PeftModel.from_pretrained(one.stock(), str(one.folder / "random"), is_trainable=True).eval()
    losses = [
        torch.nn.functional.cross_entropy(
            theirs(input_ids=part.input_ids, use_cache=False).logits[0, :-1].float(),
            part.input_ids[0, 1:],
            reduction="sum",
        )
        for part in alone(batch)
    ]
    torch.stack(losses).sum().backward()
    grads = {key.replace(".default", ""): weight.grad for key, weight in trainable_parameters(theirs).items()}
    gap = float(abs(loss - sum(losses)) / loss)
    require(gap <= 1e-5, f"the loss differs by {gap:.2g} of it")
    require(len(grads) == len(ours) > 0, f"{len(ours)} adapter matrices here, {len(grads)} in PEFT")
    for key, grad in grads.items():
        own = ours[re.sub(r"model\.(language|text)_model\.", "model.", key)]
        require((own is None) == (grad is None), f"only one of the two has a gradient of {key}")
        if own is not None and grad is not None:
            require_close(own, grad, f"the gradient of {key}")
    moving = sum(grad is not None and bool(grad.abs().max() > 0) for grad in grads.values())
    require(moving == len(grads), f"{len(grads) - moving} of {len(grads)} adapter matrices have no gradient")


@torch.no_grad()
def adapter_in_peft(one: Subject) -> None:
    """The adapter of a run gives our logits in transformers' model, loaded by stock PEFT; it is not nothing."""
    losses = losses_of(one.run)
    require(len(losses) == STEPS and losses[-1] < losses[0], f"the loss does not fall: {losses}")
    ours = logits_of(load_adapters(one.base("none", INFERENCE), {"one": one.adapter}))
    require_close(ours, one.stock_logits, "a logit")
    moved = float((one.stock_logits - logits_of(one.stock())).abs().max())
    require(moved > 1e-3, f"the adapter changes the logits by {moved:.2g} only")


def resume(one: Subject) -> None:
    """A run that is resumed at its middle ends with the bytes of the uninterrupted one."""
    assert one.run  # it is there
    expected, found = resumed_digests(one.raw, one.folder / "resumed")
    require(found == expected, "a resumed run differs from the uninterrupted one")


def merge_onto_dequantized(one: Subject) -> None:
    """The merged model, loaded by transformers, is what was trained."""
    out = one.folder / "onto-dequantized"
    report = merge(one.run, out, onto="dequantized", dtype=torch.float32, compare=True)
    gap = report.gaps["dequantized"] / report.logit_range
    require(gap <= 1e-4, f"its logits differ by {gap:.2g} of their largest from the trained model's")
    require(report.gaps["base"] > 10 * report.gaps["dequantized"], "merged onto the base it would be as near")
    trained = logits_of(load_adapters(one.base("nf4", INFERENCE), {"one": one.adapter}))
    require_close(logits_of(one.stock(out)), trained, "a logit of the stock class", 1e-4)


def merge_onto_base(one: Subject) -> None:
    """The merged model, loaded by transformers, is the 16-bit base with the adapter."""
    out = one.folder / "onto-base"
    merge(one.run, out, onto="base", dtype=torch.float32, compare=False)
    require_close(logits_of(one.stock(out)), one.stock_logits, "a logit", 1e-4)


def _same_as_one_rank(strategy: str) -> Callable[[Subject], None]:
    def proof(one: Subject) -> None:
        expected = metrics_of(one.run)
        raw = changed(one.raw, run_dir=str(one.folder / strategy), strategy__name=strategy)
        raw["train"] = {"steps": 2, "save_every": None}  # the second shows the update of the first
        if (refused := on_ranks(_train, 2, raw, timeout=150)[0]) is not None:
            raise UserError(refused)
        found = metrics_of(raw["run_dir"])
        require(len(found) == 2, f"{len(found)} steps instead of 2")
        for key in ("loss", "grad_norm"):
            gap = max(abs(a[key] - b[key]) / max(1.0, b[key]) for a, b in zip(found, expected, strict=False))
            require(gap <= 1e-5, f"{key} differs by {gap:.2g} from that of one rank")

    proof.__doc__ = f"Two ranks under {strategy} have the losses and gradient norms of one process."
    return proof


def _train(raw: dict[str, Any]) -> str | None:
    with silence():
        try:
            train(parse_config(raw))
        except UserError as error:
            return str(error)
    return None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What a run says is not what is asked for here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


PROOFS: dict[str, Callable[[Subject], None]] = {
    "plan": plan,
    "NF4": nf4,
    "all-linear": all_linear,
    "packed = alone": packed_as_alone,
    "loss and gradient": loss_and_gradient,
    "adapter in PEFT": adapter_in_peft,
    "resume": resume,
    "merge onto dequantized": merge_onto_dequantized,
    "merge onto base": merge_onto_base,
    **{strategy: _same_as_one_rank(strategy) for strategy in STRATEGIES},
}
IN_PROCESS = [name for name in PROOFS if name not in STRATEGIES]
