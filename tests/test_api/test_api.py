"""The Python API: small results that agree with the command line's, and a process that is left as it was."""

from __future__ import annotations

import contextlib
import html
import inspect
import io
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import yaml
from helpers.ranks import run_python
from helpers.terminal import Clock, Terminal
from helpers.tiny_run import changed, make_inputs

import qlora_dist
from qlora_dist import Plan, Run, RunConfig, RunFailed, UserError, build_data, compare, load_config, load_trained, plan
from qlora_dist.api.training import train as train_function
from qlora_dist.api.unchanged import unchanged
from qlora_dist.cluster.quiet import LIBRARIES
from qlora_dist.commands import invoke, start_ranks
from qlora_dist.console import Console

train: Any = qlora_dist.train


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("api")
    made = make_inputs(folder)
    return changed(made, train__steps=3, data__eval=[{"path": str(folder / "held_out.json"), "format": "input-output"}])


@pytest.fixture(scope="module")
def made(raw: dict[str, Any]) -> Iterator[SimpleNamespace]:
    """One run, and what was different around it before and after."""
    before = _process()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        run = train(raw, optim={"lr": 5e-3}, lora__rank=8)
    yield SimpleNamespace(run=run, before=before, after=_process())


def _process() -> dict[str, Any]:
    """What belongs to the whole process."""
    loggers = ["", "qlora_dist", "DeepSpeed", "accelerate", "torch", *LIBRARIES]
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "torch": (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
        "warnings": list(warnings.filters),
        "streams": (sys.stdout, sys.stderr),
        "logging": [
            (
                logging.getLogger(name).level,
                [(type(one), list(one.filters)) for one in logging.getLogger(name).handlers],
            )
            for name in loggers
        ],
        "group": torch.distributed.is_initialized(),
    }


# --- what the package offers ------------------------------------------------------------------------------------------


def test_the_stub_and_the_package_offer_the_same_names() -> None:
    stub = (Path(qlora_dist.__file__).with_suffix(".pyi")).read_text()
    named = {line.split(" as ")[1] for line in stub.splitlines() if " as " in line}
    assert named | {"__version__"} == set(qlora_dist.__all__) <= set(dir(qlora_dist))
    for name in qlora_dist.__all__:
        assert getattr(qlora_dist, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = qlora_dist.trian  # type: ignore[attr-defined]


def test_train_is_the_function_and_the_subpackage() -> None:
    import qlora_dist.train as package
    from qlora_dist.train import run as module

    assert package is qlora_dist.train and package.run is module, "monkeypatching and imports find the subpackage"
    parameters = list(inspect.signature(package).parameters.values())
    assert [(p.name, p.kind, p.default) for p in parameters] == [
        (p.name, p.kind, p.default) for p in inspect.signature(train_function).parameters.values()
    ]


# --- configs ----------------------------------------------------------------------------------------------------------


def test_a_file_a_dict_and_a_config_with_overrides_give_one_config(raw: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    expected = changed(raw, optim__lr=1e-4, lora__rank=32, run_dir=str(tmp_path))
    expected["data"]["train"][0]["max_examples"] = 5
    kept = json.dumps(raw)
    for config in (file, str(file), raw, load_config(raw)):
        found = load_config(config, optim={"lr": 1e-4}, lora__rank=32, run_dir=tmp_path, data__train__0__max_examples=5)
        assert found == load_config(expected) and isinstance(found, RunConfig)
    assert json.dumps(raw) == kept, "what was given is not changed"
    assert load_config(raw, lora=None, model={"quantization": "none"}).lora is None
    config = load_config(raw)
    assert load_config(config) is config
    assert load_config(config, seed=5).model_fields_set == config.model_fields_set


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ({}, {}, "config: run_dir: missing"),
        (None, {"optim": {"learning_rate": 1}}, "optim.learning_rate: unknown key; .*optim.lr"),
        (None, {"optim__lr": -1}, "optim.lr: expected a number > 0"),
        (None, {"data__train__7__path": "x"}, "data__train__7__path='x': data.train is a list of length 1"),
        (5, {}, "expected the path of a YAML file, a dict or a RunConfig, found 5"),
        ("missing.yaml", {}, "config missing.yaml: cannot be read"),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], config: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(raw if config is None else config, **overrides)


# --- plan -------------------------------------------------------------------------------------------------------------

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "repro_65b_48gb.yaml"


@pytest.fixture
def llama_65b(tmp_path: Path) -> Path:
    """Only its config.json."""
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 22016,
        "num_hidden_layers": 80, "num_attention_heads": 64, "vocab_size": 32000, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_a_plan_says_what_the_command_says(llama_65b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(RECIPE, gpu="a6000", model={"name": str(llama_65b), "revision": None})
    words = [f"--set=model.name={llama_65b}", "--set=model.revision=null"]
    assert invoke(["plan", str(RECIPE), "--gpu=a6000", "--json", *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.pop("simulation") is said.pop("prediction") is None and said == planned.as_dict()
    assert invoke(["plan", str(RECIPE), "--gpu=a6000", *words]) == 0
    assert capsys.readouterr().out == f"{planned}\n"
    assert isinstance(planned, Plan) and planned.fits() and planned.fits("48GiB") and not planned.fits("rtx4090")
    assert planned.peak_bytes == sum(planned.items.values()) > 30 * 2**30
    assert planned.on("rtx4090").advice and not planned.advice
    assert repr(planned).startswith(f"<Plan of {llama_65b} on 1 x a6000: Fits in ")
    assert all(html.escape(name) in planned._repr_html_() for name in planned.items)
    anywhere = plan(RECIPE, model__name=str(llama_65b), model__revision=None)
    assert "a6000" in anywhere.fitting_gpus and "rtx4090" not in anywhere.fitting_gpus
    with pytest.raises(UserError, match="the plan is of no GPU"):
        anywhere.fits()


# --- data -------------------------------------------------------------------------------------------------------------


def test_built_data_shows_rows_with_what_is_learned(raw: dict[str, Any]) -> None:
    data = build_data(raw)
    assert len(data) == data.counts["rows"] and data.counts["documents"] == data.counts["records"] == 60
    assert sum(row.num_tokens for row in data) == data.counts["tokens"]
    assert sum(row.num_labels for row in data) == data.counts["labels"]
    assert data.counts["efficiency"] == pytest.approx(data.counts["tokens"] / (len(data) * 32), abs=1e-4)
    assert sorted(one for row in data.rows for one in row.documents) == list(range(60))
    records = json.loads(Path(raw["data"]["train"][0]["path"]).read_text())
    document = data.document(3)
    before, learned = document.decode().removesuffix("]]").split("[[")
    assert learned.split()[:-1] == records[3]["output"].split() and learned.split()[-1] == "</s>"
    assert document.decode(None) == before + learned and repr(document) == document.decode()
    assert document._repr_html_().count("<mark") == 1 and "&lt;/s&gt;" in document._repr_html_()
    row = data[0]
    assert row.decode(("{", "}")).count("{") == len(row.documents) == row._repr_html_().count("<mark")
    assert data[:2][1].decode() == data[1].decode() and data[-1].index == len(data) - 1
    assert data.held_out is not None and data.held_out.counts["documents"] == 12
    assert data.sources[0]["format"] == "input-output" and pandas.DataFrame(data.sources).shape[0] == 1
    assert "documents 60" in repr(data) and "<td>60</td>" in data._repr_html_()
    with pytest.raises(UserError, match="no such file or folder"):
        build_data(raw, data__train__0__path="missing.json")


# --- train ------------------------------------------------------------------------------------------------------------


def test_a_run_gives_what_its_directory_holds(made: SimpleNamespace, raw: dict[str, Any], tmp_path: Path) -> None:
    run = made.run
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics == lines and [line["lr"] for line in lines] == [5e-3] * 3
    table = pandas.DataFrame(run.metrics).set_index("step")
    assert table.loss.notna().all() and table.eval_loss.notna().sum() == 1
    assert run.summary == json.loads((run.directory / "summary.json").read_text())
    assert run.is_finished and run.step == 3 and run.stopped_by is None and run.config.lora.rank == 8
    assert run.page.read_text().startswith("<!doctype html>") and (run.adapter / "adapter_config.json").is_file()
    assert "finished" in repr(run) and str(run.directory) in run._repr_html_()
    again = Run(run.directory)
    assert again.metrics == run.metrics and again.name == run.name
    page = compare([run, run.directory], tmp_path / "pages" / "both.html")
    assert page.read_text().count(run.name) > 1
    with pytest.raises(UserError, match="there is no such folder"):
        Run(tmp_path / "missing")


def test_the_process_is_left_as_it_was(made: SimpleNamespace) -> None:
    for what, before in made.before.items():
        assert made.after[what] == before, what


def test_what_a_library_changes_is_undone() -> None:
    """What a run on one CPU leaves alone, others do not: DeepSpeed, CUDA, a loader that seeds."""
    before = _process()
    with pytest.raises(RunFailed), unchanged():
        os.environ["LOCAL_RANK"] = "0"
        del os.environ["PATH"]
        warnings.filterwarnings("ignore", message="anything")
        torch.manual_seed(1)
        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        random.seed(1)
        np.random.seed(1)
        changed_parts = {what for what, value in _process().items() if value != before[what]}
        raise RunFailed("the run")
    assert {"environment", "warnings", "torch", "random"} <= changed_parts
    after = _process()
    for what in before:
        assert after[what] == before[what], what


def test_a_second_run_in_the_process_equals_one_alone(
    made: SimpleNamespace, raw: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(17)  # what the notebook drew before must not matter
    again = train(load_config(raw, optim={"lr": 5e-3}, lora__rank=8), run_dir=tmp_path / "again")
    assert [line["loss"] for line in again.metrics] == [line["loss"] for line in made.run.metrics]
    assert train(raw, optim={"lr": 5e-3}, lora__rank=8).is_finished, "a finished run says so and does nothing"


def test_errors_are_those_of_the_command_and_leave_no_handlers(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _process()
    wrong = changed(raw, run_dir=str(tmp_path / "a"), data__train=[{"path": str(tmp_path / "missing.json")}])
    with pytest.raises(UserError) as refused:
        train(wrong)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    assert invoke(["train", str(tmp_path / "wrong.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {refused.value}\n"

    def diverge(*_: Any, **__: Any) -> None:
        held = torch.zeros(1000)  # as the model in the frames of a run
        seen.append(held)
        raise RunFailed("the loss is not finite")

    seen: list[Any] = []
    monkeypatch.setattr("qlora_dist.train.train_step", diverge)
    with pytest.raises(RunFailed, match="the loss is not finite") as failed:
        train(raw, run_dir=tmp_path / "b")
    frames = []
    trace = failed.tb
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    (deepest,) = [frame for frame in frames if frame.f_code.co_name == "diverge"]
    assert "held" not in deepest.f_locals, "a notebook keeps its last error: it must not keep the model"
    capsys.readouterr()
    after = _process()
    for what in before:
        assert after[what] == before[what], what


def test_the_stop_button_saves_and_the_same_call_goes_on(
    raw: dict[str, Any], made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_dist.train import train_step

    def interrupted(*arguments: Any, step: int, **options: Any) -> Any:
        if step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*arguments, step=step, **options)

    with monkeypatch.context() as patch:
        patch.setattr("qlora_dist.train.train_step", interrupted)
        run = train(raw, optim={"lr": 5e-3}, lora__rank=8, run_dir=tmp_path / "run")
    assert run.stopped_by == "SIGINT" and not run.is_finished and 1 <= run.step < 3
    assert "stopped by SIGINT" in repr(run)
    run = train(raw, optim={"lr": 5e-3}, lora__rank=8, run_dir=tmp_path / "run")
    assert run.is_finished and [line["loss"] for line in run.metrics] == [line["loss"] for line in made.run.metrics]


def test_training_works_in_a_thread(raw: dict[str, Any], tmp_path: Path) -> None:
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(train(raw, train__steps=1, run_dir=tmp_path / "run")))
    thread.start()
    thread.join()
    assert [run.is_finished for run in runs] == [True]


# --- what is seen meanwhile -------------------------------------------------------------------------------------------


def test_on_a_terminal_progress_is_one_line_and_nothing_is_wider(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("qlora_dist.console.DRAW_SECONDS", 0.0)
    monkeypatch.setattr("qlora_dist.progress.TELL_SECONDS", 0.0)
    computer, terminal = os.openpty()
    seen, parts = Terminal(), list[bytes]()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other side was closed
            while part := os.read(computer, 65536):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(terminal, "w") as stream:
        patch.setattr(sys, "stdout", stream)
        train(raw, run_dir=tmp_path / "run", data={"cache_dir": tmp_path / "cache"}, train={"eval_every": 2})
    reader.join()
    os.close(computer)
    seen.write(b"".join(parts).decode().replace("\r\n", "\n"))
    states = seen.states()
    assert all(len(state) <= 80 for state in states if str(tmp_path) not in state), max(states, key=len)
    for what in ("tokenizing record 60", "packing document 60/60", "loading the base 100%", "evaluating batch 6/6"):
        assert any(state.startswith(what) for state in states), what
    (step,) = [line for line in seen.screen() if line.startswith("step 3/3 ")]
    assert re.fullmatch(r"step 3/3  ━+  loss \d\.\d{4}  left 0:00  [\d,]+ tok/s  [\d.]+ [GM]iB.*", step), step
    assert not any(what in line for line in seen.screen() for what in ("tokenizing", "evaluating", "loading the base "))


def test_quantizing_and_merging_tell_how_far_they_are(made: SimpleNamespace, tmp_path: Path) -> None:
    from qlora_dist.commands.merge import merge
    from qlora_dist.model import quantize_model

    with Console(True, said := io.StringIO(), Clock(10.0)):
        merge(made.run.directory, tmp_path / "merged", compare=False)
        quantize_model(made.run.config.model.name, tmp_path / "nf4", quantization="nf4", double_quant=True,
                       compute_dtype=torch.float32, device=torch.device("cpu"))  # fmt: skip
    lines = [line.split("  ")[0] for line in said.getvalue().splitlines()]
    assert {"writing tensor 21/21", "measuring layer 2/2", "quantizing 100%"} <= set(lines)


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.launched
def test_several_ranks_stream_their_lines_and_give_the_same_run(
    raw: dict[str, Any], made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(raw, ranks=2, optim={"lr": 5e-3}, lora__rank=8, run_dir=tmp_path / "run")
    said = capsys.readouterr().out
    assert "2 ranks" in said and "finished: 3 steps" in said
    assert run.is_finished and run.summary["world_size"] == 2
    losses = [line["loss"] for line in made.run.metrics]
    assert [line["loss"] for line in run.metrics] == pytest.approx(losses, abs=1e-5)


def test_the_error_of_a_rank_is_raised_here_with_its_paragraph(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_dist.api import training

    def run_ranks(ranks: int, words: list[str], say: Any) -> int:
        say("step 1/3")
        outcome = next(word for word in words if word.startswith("--outcome=")).removeprefix("--outcome=")
        if kinds[-1]:
            Path(outcome).write_text(json.dumps({"kind": kinds[-1], "text": "the loss is not finite"}))
        return 1

    kinds: list[str] = []

    monkeypatch.setattr(training, "run_ranks", run_ranks)
    for kind, error, message in (
        ("failed", RunFailed, "^the loss is not finite$"),
        ("user_error", UserError, "^the loss is not finite$"),
        ("machine_failed", qlora_dist.MachineFailed, "^the loss is not finite$"),
        ("", RunFailed, "exit code 1 and did not say why; their last lines:\nstep 1/3"),
    ):
        kinds.append(kind)
        with pytest.raises(error, match=message):
            train(raw, ranks=2, run_dir=tmp_path / "run")
    assert capsys.readouterr().out == "step 1/3\n" * 4
    with pytest.raises(UserError, match="ranks=0: expected auto or a number"):
        train(raw, ranks=0, run_dir=tmp_path / "run")


def test_the_stop_button_reaches_the_ranks_and_a_second_one_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = (
        "import os, signal, sys, time; say = lambda text: os.write(1, f'{text}\\n'.encode()); saved = []\n"
        "signal.signal(signal.SIGINT, lambda *_: (say('saved'), saved.append(1)))\n"
        "say(os.getpid()); say('step 1')\n"
        "while not saved or sys.argv[1] == 'deaf': time.sleep(0.01)\n"
    )
    for behaviour, expected in (("listens", ["step 1", "saved"]), ("deaf", ["step 1", "saved"])):
        command = [sys.executable, "-E", "-S", "-c", code, behaviour]
        monkeypatch.setattr(start_ranks, "_command", lambda *_, command=command: command)
        said: list[str] = []

        def say(line: str, said: list[str] = said, behaviour: str = behaviour) -> None:
            said.append(line)
            if line == "step 1" or (line == "saved" and behaviour == "deaf"):
                raise KeyboardInterrupt  # as it reaches this process anywhere in the loop

        if behaviour == "listens":
            assert start_ranks.run_ranks(2, [], say) == 0
        else:
            with pytest.raises(KeyboardInterrupt):
                start_ranks.run_ranks(2, [], say)
        assert said[1:] == expected
        with pytest.raises(ProcessLookupError):
            os.kill(int(said[0]), 0)


# --- what was trained -------------------------------------------------------------------------------------------------


def test_a_trained_model_answers_and_knows_its_loss(
    made: SimpleNamespace, raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_trained(made.run)
    records = json.loads(Path(raw["data"]["eval"][0]["path"]).read_text())
    prompts = [record["input"] for record in records[:3]]
    answers = model.generate(prompts, max_new_tokens=4)
    assert [model.generate(prompt, max_new_tokens=4) for prompt in prompts] == answers
    assert model.generate([{"role": "user", "content": prompts[0]}], max_new_tokens=4) == answers[0]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    capsys.readouterr()
    assert invoke(["generate", str(made.run.directory), "--prompts", str(tmp_path / "prompts.txt"),
                   "--max-new-tokens=4"]) == 0  # fmt: skip
    said = [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]
    assert said == answers
    num_labels = build_data(raw).held_out.counts["labels"]
    (held_out,) = [line["eval_loss"] for line in made.run.metrics if "eval_loss" in line]
    for given in (records, raw["data"]["eval"][0]["path"]):
        found = model.loss(given)
        assert found.loss == pytest.approx(held_out, abs=1e-5) and found.num_labels == num_labels
    assert model.model.get_base_model().config.model_type == "llama" and model.tokenizer.eos_token == "</s>"
    assert str(made.run.adapter) in repr(load_trained(made.run.adapter))
    for wrong, message in (
        (5, "expected a text, or a list"),
        ([], "expected a text"),
        ([5], "expected texts, or lists"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate(wrong)
    with pytest.raises(UserError, match="expected a list of dicts"):
        model.loss(["text"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="there is no such folder"):
        load_trained(tmp_path / "missing")


# --- start-up ---------------------------------------------------------------------------------------------------------


def test_the_package_and_the_command_start_at_once() -> None:
    """In processor time, which a loaded machine does not change."""
    run_python(
        """
        import resource, sys

        def used():
            usage = resource.getrusage(resource.RUSAGE_SELF)
            return usage.ru_utime + usage.ru_stime

        began = used()
        import qlora_dist
        ours = {name for name in sys.modules if name.startswith("qlora_dist")}
        assert ours == {"qlora_dist"} and used() - began < 0.05, (ours, used() - began)
        assert qlora_dist.UserError and {"torch", "pydantic", "numpy"}.isdisjoint(sys.modules)
        from qlora_dist.commands import invoke
        assert invoke(["--help"]) == 0
        assert used() < 0.6, used()  # with the interpreter
        from qlora_dist import Plan, Run, RunConfig, RunFailed, compare, load_config, plan
        heavy = {"torch", "transformers", "bitsandbytes", "accelerate", "peft", "datasets"} & set(sys.modules)
        assert not heavy, heavy
        """
    )
