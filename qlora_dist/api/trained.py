"""load_trained: a run or an adapter -> a model that answers, and whose loss on any records can be asked for."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from ..cluster.world import own_device
from ..commands.generate import Writer, open_writer
from ..commands.trained import Trained, find_trained
from ..config import DataConfig, SourceConfig
from ..console import Console
from ..data.documents import Documents, build_documents
from ..data.loader import eval_batches
from ..data.packing import Batch, one_document_per_row
from ..errors import UserError, shortened
from ..model import Sampling, output_head, unwrap
from ..model.loss import nll_sum
from ..train.evaluation import EvalResult, evaluate
from .runs import Run
from .unchanged import unchanged

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or a conversation: [{"role": "user", "content": ...}, ...]


class TrainedModel:
    """Base and adapter, ready to answer. `model` is the torch module (of PEFT, where there is an adapter)."""

    def __init__(self, trained: Trained, writer: Writer) -> None:
        self._trained = trained
        self._writer = writer

    @property
    def model(self) -> torch.nn.Module:
        """The module itself: PEFT's model over transformers', in 4 bits as it was trained."""
        return self._writer.model

    @property
    def tokenizer(self) -> Any:
        """As in training."""
        return self._writer.tokenizer

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self,
        prompts: Prompt,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        batch_size: int = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
        batch_size: int = ...,
    ) -> list[str]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
    ) -> str | list[str]:
        """The answer to one prompt (a text), or the list of answers to several, which look exactly as in training.

        Greedy by default: the same prompts give the same texts. Raises UserError.
        """
        conversations, is_one = _conversations(prompts)
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        with unchanged():
            answers = list(self._writer.answer(conversations, sampling, batch_size=batch_size))
        return answers[0] if is_one else answers

    def loss(self, records: Sequence[Mapping[str, Any]] | str | Path, format: str | None = None) -> EvalResult:
        """Mean loss per learned token, and perplexity, on records in the form of the training data, or a file of them.

        What is learned of a record is decided as in training; none is truncated silently: one that is longer than the
        run's rows is an error. `format`: of other records, a name as in `data.train`. Raises UserError.
        """
        data = self._trained.data or DataConfig(train=(SourceConfig(path="unused", format="auto"),))
        with unchanged(), Console(True, sys.stdout), tempfile.TemporaryDirectory() as folder:
            path = str(records) if isinstance(records, str | Path) else _written(records, Path(folder))
            changes = {"path": path, "weight": 1.0, "max_examples": None, "shuffle": False, "hold_out": None,
                       "part": "all", "split": None, "subset": None, "revision": None, "streaming": False}  # fmt: skip
            source = data.train[0].model_copy(update=changes | ({"format": format} if format else {}))
            documents = build_documents(
                [source],
                self.tokenizer,
                row_tokens=data.row_tokens,
                on_long="error",
                learn=data.learn,
                template=data.template,
                date=data.date,
                cache_dir=Path(folder) / "cache",
            )
            return self._loss_of(documents)

    def _loss_of(self, documents: Documents) -> EvalResult:
        base = unwrap(self.model)
        head, device = output_head(self.model), next(base.parameters()).device

        def alone(batch: Batch) -> torch.Tensor:  # of one document: the model was loaded for generation
            hidden = base.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state.squeeze(0)
            return nll_sum(hidden, head, batch.label_positions, batch.labels)

        batches = eval_batches(documents, one_document_per_row(documents.lengths), 1, 0, 1)
        return evaluate(self.model, batches, alone, _OneProcess(device), what="evaluating document")

    def __repr__(self) -> str:
        adapter = "" if self._trained.adapter is None else f" with {self._trained.adapter}"
        return f"<TrainedModel {self._trained.model.name}{adapter}>"


class _OneProcess:
    """What evaluation needs of a world."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def any(self, flag: bool) -> bool:
        return flag


def load_trained(
    run: Run | str | Path,
    *,
    base: str | None = None,
    template: str = "auto",
    device: str | None = None,
) -> TrainedModel:
    """Loads a run (its adapter, else its newest checkpoint) or the folder of an adapter, as it was trained.

    `base`: the base model, if it has moved. `template`: auto (as in training), raw, or a name. `device`: by default the
    GPU if there is one. Raises UserError.

        load_trained("runs/alpaca-7b").generate("Name three rivers in Spain.")
    """
    with unchanged(), Console(True, sys.stdout):
        trained = find_trained(run.directory if isinstance(run, Run) else run, base)
        on = own_device(None if device is None else torch.device(device))
        return TrainedModel(trained, open_writer(trained, on, template=template))


def _conversations(prompts: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """(conversations, whether it was one prompt)."""
    given = prompts if isinstance(prompts, Sequence) else []
    is_one = isinstance(prompts, str) or (bool(given) and all(isinstance(one, Mapping) for one in given))
    found = []
    for one in [prompts] if is_one else given:
        messages = [{"role": "user", "content": one}] if isinstance(one, str) else one
        is_sound = isinstance(messages, Sequence) and all(
            isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages
        )
        if not is_sound or not messages:
            raise UserError(
                f"prompts: expected texts, or lists of messages with role and content, found {shortened(one)}"
            )
        found.append([dict(message) for message in messages])
    if not found:
        raise UserError(f"prompts: expected a text, or a list of them, found {shortened(prompts)}")
    return found, is_one


def _written(records: Sequence[Mapping[str, Any]], folder: Path) -> str:
    if not records or not all(isinstance(record, Mapping) for record in records):
        raise UserError(
            f"records: expected a list of dicts, in the form of the training data, found {shortened(list(records))}"
        )
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record, default=str) + "\n" for record in records), encoding="utf-8")
    return str(file)
