"""Data that would teach the wrong thing or nothing ends a run, before the model is read where that is possible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.ranks import on_ranks, outcome
from helpers.tiny_run import changed, config_of, losses_of, write_config

from qlora_dist import commands as cli
from qlora_dist.errors import UserError
from qlora_dist.train import train


@pytest.mark.usefixtures("no_model")
def test_answers_without_an_end_token_are_refused_unless_asked_for(raw, tmp_path, capsys, monkeypatch):
    # every record is longer than a row: each is cut, and no end token is left
    long = [{"input": "w6 w7", "output": " ".join(["w8"] * 60)} for _ in range(20)]
    (tmp_path / "long.json").write_text(json.dumps(long))
    config = write_config(tmp_path / "c.yaml", raw, data__train=[{"path": str(tmp_path / "long.json")}])
    assert cli.invoke(["train", str(config)]) == 2
    error = capsys.readouterr().err
    assert "an end token (EOS, end of turn) is never a label" in error
    assert "long.json: none of 20 documents inspected (20 are truncated at data.row_tokens)" in error
    assert "such as </s>" in error and "data.require_eos=false" in error
    assert cli.invoke(["train", str(config), "--set", "data.require_eos=false"]) == 1
    assert "AssertionError: the model was read" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_texts_that_are_cut_need_no_end_token(raw, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(["w8"] * 600))
    with pytest.raises(AssertionError, match="the model was read"):
        train(config_of(raw, data__train=[{"path": str(tmp_path / "text.txt"), "format": "text"}]))


@pytest.mark.usefixtures("no_model")
def test_one_source_without_end_tokens_is_found_among_others(raw, tmp_path, capsys):
    (tmp_path / "long.json").write_text(json.dumps([{"input": "w6 w7", "output": " ".join(["w8"] * 60)}] * 3))
    sources = [*raw["data"]["train"], {"path": str(tmp_path / "long.json")}]
    assert cli.invoke(["train", str(write_config(tmp_path / "c.yaml", raw, data__train=sources))]) == 2
    error = capsys.readouterr().err
    assert "long.json: none of 3" in error and "train.json: none" not in error


@pytest.mark.parametrize("learn", ["assistant", "last", "all"])
def test_an_end_token_with_a_line_break_after_it_is_learned(learn, tmp_path):
    import copy

    from helpers.tiny_tokenizers import byte_level_tokenizer

    from qlora_dist.config import SourceConfig
    from qlora_dist.data.documents import build_documents
    from qlora_dist.errors import UserError
    from qlora_dist.train.checks.learning import check_ends_are_learned

    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content + '<|im_end|>\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}))
    source = SourceConfig(path=str(tmp_path / "d.jsonl"))

    def documents():
        return build_documents([source], tokenizer, row_tokens=64, learn=learn, cache_dir=tmp_path / "cache")

    check_ends_are_learned(documents(), tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<end>")
    with pytest.raises(UserError, match="none of 1 documents inspected"):
        check_ends_are_learned(documents(), tokenizer)


@pytest.mark.usefixtures("no_model")
def test_ids_that_the_model_has_no_row_for_are_refused_before_it_is_read(raw, tmp_path, capsys):
    model = Path(raw["model"]["name"])
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    known = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(known | {"vocab_size": 8}))
    config = write_config(tmp_path / "c.yaml", raw, model__name=str(tmp_path))
    assert cli.invoke(["train", str(config)]) == 2
    assert "the tokenizer has tokens up to" in capsys.readouterr().err, "said before the data are tokenized"
    with pytest.raises(UserError, match=r"the training data hold token .* the model's embedding has 8 rows"):
        train(config_of(raw, model__name=str(tmp_path)))


def test_a_run_keeps_the_date_of_its_first_start(raw, tmp_path):
    from qlora_dist.config import dump_yaml
    from qlora_dist.config.run_dir import RunDir
    from qlora_dist.data.templates import today
    from qlora_dist.train.run import run_date

    config, run_dir = config_of(raw), RunDir(tmp_path / "run")
    assert config.data.date is None and run_date(config, run_dir) == today()
    run_dir.open(dump_yaml(config_of(raw, data__date="2024-07-06")))
    run_dir.begin()
    assert run_date(config, run_dir) == "2024-07-06"
    assert run_date(config_of(raw, data__date="2024-07-07"), run_dir) == "2024-07-07"
    # a run of before there was a date goes on without one
    run_dir.config.write_text(dump_yaml(config))
    assert run_date(config, run_dir) is None


def test_a_step_whose_rows_have_no_label_is_found_before_the_model_is_read():
    import numpy as np

    from qlora_dist.data.packing import one_document_per_row
    from qlora_dist.errors import UserError
    from qlora_dist.train.checks.learning import check_every_step_has_labels

    class Counts:
        lengths = np.full(6, 4, dtype=np.int32)
        num_labels = np.array([2, 0, 0, 0, 1, 1], dtype=np.int32)

        def __len__(self):
            return 6

    rows = one_document_per_row(Counts.lengths, 4)
    check_every_step_has_labels(Counts(), rows, lambda step: np.arange(6)[3 * step : 3 * step + 3], 2)
    with pytest.raises(UserError, match=r"the rows of step 2 have no label \(3 of 6 rows have none\)"):
        check_every_step_has_labels(Counts(), rows, lambda step: np.arange(6)[2 * step : 2 * step + 2], 3)
    Counts.num_labels = np.zeros(6, dtype=np.int32)
    with pytest.raises(UserError, match="none of the 6 training documents has a label"):
        check_every_step_has_labels(Counts(), rows, lambda step: np.arange(6), 1)


def test_the_first_step_without_labels_is_named_wherever_it_lies():
    import numpy as np

    from qlora_dist.data.packing import one_document_per_row
    from qlora_dist.errors import UserError
    from qlora_dist.train.checks.learning import check_every_step_has_labels

    for seed in range(60):
        rng = np.random.default_rng(seed)
        number, size = int(rng.integers(1, 7)), int(rng.integers(1, 4))
        order = rng.permutation(number * size)
        lengths = np.full(len(order), 4, dtype=np.int32)
        labels = rng.integers(0, 2, len(order)).astype(np.int32)
        labels[order[0]] = 1

        class Counts:
            num_labels = labels

            def __len__(self):
                return len(self.num_labels)

        steps = order.reshape(number, size)
        rows = one_document_per_row(lengths, 4)
        empty = [step for step in range(number) if not labels[steps[step]].any()]
        if empty:
            with pytest.raises(UserError, match=f"the rows of step {empty[0] + 1} have no label"):
                check_every_step_has_labels(Counts(), rows, steps.__getitem__, number)
        check_every_step_has_labels(Counts(), rows, steps.__getitem__, empty[0] if empty else number)


def test_rows_that_one_rank_loses_end_all_ranks_before_the_update(raw):
    results = on_ranks(_loses_a_row, 2, changed(raw, train__steps=4))
    assert {name for name, _ in results} == {"RunFailed"}
    for _, text in results:
        assert text.startswith("step 3: ") and "rows were lost, duplicated or have no label" in text
    assert len(losses_of(raw["run_dir"])) == 2


def _loses_a_row(raw):
    from dataclasses import replace

    from qlora_dist.data.loader import Loader

    original = Loader.step

    def losing(self, step):
        rows = original(self, step)
        if step == 2 and self.rank == 1:
            rows = replace(rows, microbatches=[rows.microbatches[0].without_labels(), *rows.microbatches[1:]])
        return rows

    Loader.step = losing
    return outcome(train, config_of(raw))
