"""`qlora-dist data` shows what would be learned, and warns about what is usually a mistake."""

import copy
import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.browser import CUT, chromium
from helpers.tiny_run import make_inputs, write_config
from helpers.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from rich.console import Console

from qlora_dist.commands.data_report import audit, print_audit, run_data_command, sample_of, write_html
from qlora_dist.config import SourceConfig, parse_config
from qlora_dist.data.documents import build_documents
from qlora_dist.data.packing import pack_best_fit
from qlora_dist.errors import UserError

ROWS = [{"instruction": f"Say {i}", "output": f"The number {i}."} for i in range(30)]


def audit_of(tmp_path, rows, tokenizer=None, trained_on=None, show=2, **options):
    tokenizer = tokenizer or byte_level_tokenizer()
    path = tmp_path / "data.jsonl"
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    options = {"row_tokens": 256, "cache_dir": tmp_path / "cache", "on_bad": "skip", **options}
    documents = build_documents([SourceConfig(path=str(path))], tokenizer, **options)
    rows = pack_best_fit(documents.lengths, options["row_tokens"], 0)
    template = options.get("template", "auto")
    return documents, audit(documents, rows, tokenizer, template=template, show=show, trained_on=trained_on)


def test_good_data_gives_no_warning(tmp_path):
    documents, result = audit_of(tmp_path, ROWS)
    assert result.warnings == []
    assert sum(count for _, _, count in result.histogram) == 30
    assert result.num_rows < 30 and 0 < result.full_share < result.padded_share <= 1
    assert result.packed_share == documents.lengths.sum() / (result.num_rows * 256)


@pytest.mark.parametrize(
    ("rows", "options", "warning"),
    [
        ([*ROWS, {"instruction": 1}], {}, r"1 of 31 records cannot be used; the first: .*line 31: field instruction"),
        ([*ROWS, {"instruction": "a", "output": "b " * 300}], {}, "1 conversations are truncated to data.row_tokens"),
        ([*ROWS, {"instruction": "b " * 300, "output": "b"}], {}, "1 examples are dropped"),
        (ROWS + ROWS[:3], {}, "3 examples are duplicates"),
        ([*ROWS, {"instruction": "a", "output": " "}], {}, "1 examples have an empty answer"),
        ([*ROWS, {"instruction": "<|im_end|>", "output": "b"}], {}, r"1 conversations spell out .* \(<\|im_end\|>\)"),
        ([*ROWS, {"instruction": "caf�", "output": "b"}], {}, "1 examples contain U\\+FFFD"),
        ([*ROWS, ROWS[0] | {"id": 1}], {}, r"nothing reads these fields \(number of records\): id \(1\)"),
        ([{"instruction": "a " * 200, "output": "b"}], {"row_tokens": 512}, r"only 0\.\d% of the tokens are labels"),
        ([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, *ROWS], {}, "30 of 31 records cannot be used"),
        (
            ROWS,
            {"template": "chatml", "tokenizer": sentencepiece_tokenizer},
            r"30 of 30 inspected examples do not end with a special token",
        ),
        (
            ROWS,
            {"template": "llama3", "tokenizer": sentencepiece_tokenizer},
            r"meant for a base with <\|start_header_id\|>.* as single tokens; this one splits",
        ),
    ],
)
def test_common_mistakes_give_warnings(tmp_path, rows, options, warning):
    options = dict(options)
    tokenizer = options.pop("tokenizer", byte_level_tokenizer)()
    _, result = audit_of(tmp_path, rows, tokenizer, **options)
    assert any(re.search(warning, text) for text in result.warnings), result.warnings


def test_answers_in_documents_of_their_own_are_said_and_an_added_end_token_is_none_to_warn_of(tmp_path):
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.add_tokens(["<|eot|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' }}{{ '<t>' if m.role == 'assistant' and loop.last }}"
        "{{ m.content + '<|eot|>\n' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    turns = [{"role": role, "content": "abcd"} for role in ("user", "assistant") * 2]
    documents, result = audit_of(tmp_path, [{"messages": turns}], tokenizer)
    assert len(documents) == 2
    (warning,) = [text for text in result.warnings if "duplicates" not in text]
    assert "2 examples hold one answer each: the template writes earlier answers" in warning


def test_lines_in_another_encoding_give_a_warning(tmp_path):
    path = tmp_path / "latin.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in ROWS)
    path.write_bytes(good.encode() + '{"instruction": "café", "output": "x"}\n'.encode("latin1"))
    tokenizer = byte_level_tokenizer()
    documents = build_documents(
        [SourceConfig(path=str(path))], tokenizer, row_tokens=256, cache_dir=tmp_path / "c", on_bad="skip"
    )
    result = audit(documents, pack_best_fit(documents.lengths, 256, 0), tokenizer)
    assert re.search("line 31: not UTF-8", result.warnings[0])


def test_evaluation_examples_that_are_trained_on_give_a_warning(tmp_path):
    trained, _ = audit_of(tmp_path, ROWS)
    (tmp_path / "held").mkdir()
    _, result = audit_of(tmp_path / "held", [*ROWS[:4], {"instruction": "new", "output": "x"}], trained_on=trained)
    assert result.warnings == ["4 of 5 evaluation examples also occur in the training data"]


def test_a_template_other_than_the_bases_own_gives_a_warning(tmp_path):
    import copy

    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    _, result = audit_of(tmp_path, ROWS, tokenizer, template="alpaca")
    assert any("the base has its own chat template" in text for text in result.warnings)


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_a_sample_shows_every_token_and_distinguishes_learned_context_and_special(tmp_path, tokenizer):
    tokenizer = tokenizer()
    documents, _ = audit_of(tmp_path, ROWS, tokenizer)
    sample = sample_of(documents, 3, tokenizer)
    assert "".join(run.text for run in sample.runs) == tokenizer.decode(documents[3].input_ids)
    learned = [run for run in sample.runs if run.is_label]
    assert [run.text for run in learned] == ["The number 3.", tokenizer.eos_token]
    assert [run.is_special for run in learned] == [False, True]


def config_of(tmp_path, **data):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return parse_config(
        {
            "run_dir": "x",
            "model": {"name": "x"},
            "train": {"steps": 1},
            "data": {
                "train": [{"path": str(tmp_path / "train.jsonl"), "hold_out": 5}],
                "row_tokens": 256,
                "cache_dir": str(tmp_path / "cache"),
                **data,
            },
        }
    )


def test_the_command_prints_sources_lengths_packing_and_samples_for_train_and_eval(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system="truecolor")
    audits = run_data_command(config_of(tmp_path), byte_level_tokenizer(), show=1, console=console)
    assert [(one.name, one.sources[0].examples) for one in audits] == [("data.train", 25), ("data.eval", 5)]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    for part in ("data.train", "data.eval", "train.jsonl", "share", "tokens per document", "rows of 256 tokens"):
        assert part in plain
    assert "\x1b[" in out.getvalue() and "### Instruction:" in plain and "<|endoftext|>" in plain


def test_a_large_source_with_a_long_path_is_readable_in_80_columns(tmp_path):
    _, result = audit_of(tmp_path, [{"instruction": "a", "output": "b"}])
    source = replace(
        result.sources[0], path="data/" + "long/" * 30 + "train.jsonl", records=12_345_678, tokens=9_876_543_210
    )
    out = io.StringIO()
    print_audit(replace(result, sources=[source]), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("12,345,678" in line and "9,876,543,210" in line for line in lines), "numbers stay unbroken, on one line"
    assert all(head in out.getvalue() for head in ("records", "tokens", "labels", "dropped", "bad"))


def test_the_page_is_self_contained_and_escapes_the_data(tmp_path):
    rows = [{"instruction": "<script>alert(1)</script> & more", "output": "<b>bold</b>"}]
    _, result = audit_of(tmp_path, rows, show=1)
    write_html([result], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "") and "src=" not in page
    learned = re.findall(r'<span class="label[^"]*">(.*?)</span>', page, re.S)
    assert "&lt;b&gt;bold&lt;/b&gt;" in learned and "&lt;|endoftext|&gt;" in learned
    assert page.count('<div class="bars">') == 2 and f"{result.packed_share:.2%}" in page


def test_the_page_opens_on_a_phone_and_a_screen(tmp_path):
    """A long path, large numbers, and a word without an end stay inside."""
    _, result = audit_of(tmp_path, [{"instruction": "a" * 120, "output": "<script>document.title = 'run'</script>"}])
    source = replace(
        result.sources[0], path="data/" + "long/" * 30 + "train.jsonl", records=12_345_678, tokens=9_876_543_210
    )
    warnings = ["data/" + "long/" * 60 + "train.jsonl: 3 examples"]
    write_html([replace(result, sources=[source], warnings=warnings)] * 2, tmp_path / "page.html")
    with chromium(tmp_path / "profile") as browser:
        for width, dark in ((1000, False), (400, True)):
            seen = browser.open(
                tmp_path / "page.html", width=width, dark=dark, expressions={"title": "document.title", "cut": CUT}
            )
            assert seen.overflow == 0 and seen.width <= width, (width, seen)
            assert (seen.reports, seen.requests, seen.values) == ([], [], {"title": "Training data", "cut": []}), width


def test_the_command_writes_the_page(tmp_path):
    out = io.StringIO()
    page = tmp_path / "page.html"
    run_data_command(config_of(tmp_path), byte_level_tokenizer(), 1, str(page), Console(file=out, width=200))
    assert "data.eval" in page.read_text() and str(page) in out.getvalue().replace("\n", "")


def test_a_page_that_cannot_be_written_ends_in_one_paragraph(tmp_path):
    write_html([], tmp_path / "new" / "folder" / "page.html")
    assert (tmp_path / "new" / "folder" / "page.html").is_file()
    with pytest.raises(UserError, match=r"writing .*folder: .*a folder stands where a file is expected"):
        write_html([], tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_the_command_imports_no_library_that_only_a_model_needs(tmp_path):
    config = write_config(tmp_path / "run.yaml", make_inputs(tmp_path))
    code = (
        "import sys\n"
        "from qlora_dist.commands import invoke\n"
        f"code = invoke(['data', {str(config)!r}, '--show', '1'])\n"
        "print(sorted({'bitsandbytes', 'peft', 'deepspeed'} & sys.modules.keys()), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and "learned" in done.stdout, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"
