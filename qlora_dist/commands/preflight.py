"""What can be known of a config before anything is imported that takes seconds: mistakes are said at once.

Nothing here decides what training would accept: each check is one that `train` makes too, on all ranks together and for
every caller, or one of the same words. What takes a model or a library to know is left to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cluster.device import require_cuda, why_no_cuda
from ..cluster.trackers import require_trackers
from ..config import RunConfig, dump_yaml, load_config
from ..config.changes import free_fields
from ..config.json_file import read_json_object
from ..config.names import is_data_path, is_template_path, model_folder
from ..config.run_dir import RunDir
from ..data.accumulation import derive_accumulation
from ..data.formats import find_files
from ..errors import UserError
from ..files import MANIFEST
from ..memory.families import shapes_from_config
from ..memory.read_shapes import read_config_json
from ..memory.shapes import ModelShapes, adapted_parts

ADAPTER_CONFIG = "adapter_config.json"


def check_train(config: RunConfig, resume: str, fresh: bool, is_main: bool, ranks: int = 1) -> str | None:
    """Raises UserError for what `train` would refuse on that many ranks. `is_main`: rank 0, which alone looks at the
    run directory. Returns what is to be said if the run there is finished, else None."""
    if fresh and resume not in ("auto", "never"):
        raise UserError(
            f"--fresh starts over, --resume {resume} goes on from a checkpoint: give one of the two; to start another "
            "run from trained weights, set lora.init_from to the folder of an adapter"
        )
    micro_rows = config.batch.micro_rows
    _check_resume(resume)
    finished = _check_run_dir(config, resume) if is_main and not fresh else None
    require_cuda(config.device, why_no_cuda())
    if config.model.attention == "flash" and (config.device == "cpu" or why_no_cuda() is not None):
        raise UserError(
            "model.attention is flash, which cannot be used here: it needs a CUDA device, and this run has none. Set "
            "model.attention=auto, or sdpa, which always works"
        )
    derive_accumulation(config.batch.rows_per_step, 1 if micro_rows == "auto" else micro_rows, ranks)
    require_trackers(config.logging.trackers)
    check_data(config)
    check_base(config)
    return finished


def check_data(config: RunConfig) -> None:
    """Sources, template and tokenizer, by their files alone. Raises UserError."""
    for source in (*config.data.train, *config.data.eval):
        if is_data_path(source.path):
            find_files(source.path, source.split)
    template = config.data.template
    if is_template_path(template):
        _require_file("data.template", Path(template), "give a .jinja file, or the name of a template")
    folder = model_folder(config.model.name)
    if folder is not None:
        _check_vocabulary(config.model.name, folder)


def check_base(config: RunConfig) -> None:
    """The model's folder and config.json, the target modules of a family that is known, an adapter to start from."""
    if config.lora is not None and config.lora.init_from is not None:
        for name in (ADAPTER_CONFIG, "adapter_model.safetensors"):
            _require_file("lora.init_from", Path(config.lora.init_from) / name, "give the folder of a PEFT adapter")
    if config.strategy.ds_config is not None:
        _require_file("strategy.ds_config", Path(config.strategy.ds_config), "give a DeepSpeed config, or leave it out")
    shapes = shapes_from_config(read_config_json(config.model.name, config.model.revision))
    if shapes is not None and config.lora is not None:
        adapted_parts(shapes, config.lora.target_modules, config.lora.experts)


def check_result(path: str, config: str | None = None, is_evaluated: bool = False) -> None:
    """A run directory or the folder of an adapter, and with `is_evaluated` its held-out data, as far as its files tell.
    `config`: of another data section. Raises UserError."""
    folder = Path(path).expanduser()
    run = RunDir(folder)
    if not folder.is_dir():
        raise UserError(f"{path}: there is no such folder; give a run directory or the folder of an adapter")
    if not run.config.is_file():
        if not (folder / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{path}: neither a run directory (config.yaml) nor an adapter ({ADAPTER_CONFIG}); give one"
            )
        return
    trained = load_config(run.config)
    has_result = (run.adapter / ADAPTER_CONFIG).is_file() or (run.path / "model").is_dir()
    if not has_result and not (run.checkpoints.is_dir() and any(run.checkpoints.iterdir())):
        raise UserError(f"{path}: no adapter and no intact checkpoint yet; train first (qlora-dist train CONFIG)")
    data = trained.data if config is None else load_config(config).data
    if is_evaluated and not data.eval and all(source.hold_out is None for source in data.train):
        raise UserError(f"{config or path}: data.eval is empty; name held-out data with --config CONFIG")


def _require_file(field: str, path: Path, remedy: str) -> None:
    if not path.is_file():
        raise UserError(f"{field}: there is no file {path}; {remedy}")


def _check_resume(resume: str) -> None:
    if resume not in ("auto", "never") and not (Path(resume).expanduser() / MANIFEST).is_file():
        raise UserError(
            f"--resume {resume}: there is no checkpoint in {Path(resume).expanduser().absolute()} (no {MANIFEST}). "
            "Give a folder checkpoints/step-*, or --resume auto for the newest good"
        )


def _check_run_dir(config: RunConfig, resume: str) -> str | None:
    run = RunDir(Path(config.run_dir))
    date = config.data.date or (run.saved_fields() or {}).get("data.date")
    data = config.data.model_copy(update={"date": date})
    train = config.train.model_copy(update={"eval_rows": run.eval_rows(config.train)})
    run.check(dump_yaml(config.model_copy(update={"data": data, "train": train})), free_fields(config))
    if resume == "never":
        run.require_no_checkpoints()
    steps = run.completed_steps(config.train.length)
    return None if steps is None else run.describe_completed(steps)


def _check_vocabulary(name: str, folder: Path) -> None:
    """The words that a tokenizer was trained with need a row each. Tokens that were added later may be unused, and are
    left to the data (`check_ids`)."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    shapes: ModelShapes | None = shapes_from_config(read_config_json(name))
    model: Any = read_json_object(file, f"model.name {name}: {file}").get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, dict):
        largest = max((number for number in words.values() if type(number) is int), default=0)
    else:
        largest = len(words) - 1 if isinstance(words, list) else 0
    if shapes is not None and largest >= shapes.vocabulary:
        raise UserError(
            f"model.name {name}: the tokenizer has tokens up to {largest:,}, but the model's embedding has "
            f"{shapes.vocabulary:,} rows (vocab_size in config.json): they belong to different models; put the model's "
            "own tokenizer.json there"
        )
