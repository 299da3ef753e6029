"""train: a run in this process, or in several that are started for it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

from ..cluster.launcher import launched_ranks
from ..commands.preflight import check_train
from ..commands.start_ranks import number_of_ranks, run_ranks
from ..commands.supervise.exit_report import Outcome, read_outcome
from ..config import RunConfig
from ..errors import MachineFailed, RunFailed, UserError
from ..train import train as train_here
from .configs import ConfigLike, load_config, plain_config
from .runs import Run
from .unchanged import unchanged


def train(
    config: ConfigLike, *, ranks: int | Literal["auto"] = 1, resume: str = "auto", fresh: bool = False, **overrides: Any
) -> Run:
    """Trains until the last step, and returns the run. One that is in its directory goes on from its newest checkpoint.

    `config`: a YAML file, a dict or a RunConfig; `overrides`: as for `load_config`. One rank is this process, on its
    GPU if it has one; several (`auto`: one for each GPU of this machine) are started as by `qlora-dist train --ranks`,
    and their lines are printed here. `resume`: auto, never, or a checkpoint folder. `fresh`: a run that is there is set
    aside.

    The stop button, or Ctrl-C, saves a checkpoint and returns the run with `stopped_by`; the same call goes on from it.
    Raises UserError for what the config or the data get wrong, RunFailed for a run that failed.

        run = train("run.yaml", optim={"lr": 1e-4}, run_dir="runs/lr-1e-4")
    """
    loaded = load_config(config, **overrides)
    check_train(loaded, resume, fresh, is_main=launched_ranks().rank == 0)
    number = 1 if ranks == 1 else number_of_ranks(str(ranks), loaded.device, "ranks=")
    if number > 1:
        stopped_by = _train_on_ranks(loaded, number, resume, fresh)
    else:
        with unchanged():
            stopped_by = train_here(loaded, resume, fresh).stopped_by
    return Run(loaded.run_dir, stopped_by)


def _train_on_ranks(config: RunConfig, ranks: int, resume: str, fresh: bool) -> str | None:
    """The signal that stopped it, if any. Raises what the command line would have printed."""
    with tempfile.TemporaryDirectory(prefix="qlora_dist-") as folder:
        file, outcome = Path(folder) / "config.yaml", Path(folder) / "outcome.json"
        file.write_text(json.dumps(plain_config(config)), encoding="utf-8")  # JSON is YAML
        words = ["train", str(file), f"--resume={resume}", *["--fresh"] * fresh, f"--outcome={outcome}"]
        said: list[str] = []

        def say(line: str) -> None:
            said[:] = [*said[-20:], line]
            print(line, flush=True)

        code = run_ranks(ranks, words, say)
        ended = read_outcome(outcome)
    if code == 0 and ended is not None:
        return ended.signal
    raise _error(ended, code, said)


def _error(ended: Outcome | None, code: int, said: list[str]) -> Exception:
    if ended is None or not ended.text:
        last = "\n".join(said)
        return RunFailed(f"the ranks ended with exit code {code} and did not say why; their last lines:\n{last}")
    kinds: dict[str, type[UserError] | type[RunFailed]] = {"user_error": UserError, "machine_failed": MachineFailed}
    return kinds.get(ended.kind, RunFailed)(ended.text)
