"""`qlora-dist report` makes the page of runs from their files, without torch."""

import subprocess
import sys

import pytest
from helpers.fake_run import make_run
from helpers.ranks import python_path

from qlora_dist import commands as cli


def test_it_draws_without_torch_and_quickly_imports_little(tmp_path):
    folder = make_run(tmp_path / "run")
    code = (
        "import sys; from qlora_dist.commands import invoke\n"
        f"code = invoke(['report', {str(folder)!r}])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'accelerate', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": python_path()}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder / 'report.html'}: ") and " KiB, " in done.stdout
    assert "step</dt><dd>40 of 40" in (folder / "report.html").read_text()


def test_several_runs_go_into_the_file_that_is_named(tmp_path, capsys):
    folders = [str(make_run(tmp_path / name, rank=rank)) for name, rank in (("a", 8), ("b", 16))]
    out = tmp_path / "new" / "compared.html"
    assert cli.invoke(["report", *folders, "--out", str(out)]) == 0
    assert "<h1>2 runs</h1>" in out.read_text() and not (tmp_path / "a" / "report.html").exists()


def test_a_run_has_one_page_whatever_path_names_it(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    for name in (str(folder), f"{folder}/", "~/run", ".", "../run", f"{folder}/checkpoints/.."):
        assert cli.invoke(["report", name]) == 0, name
        (folder / "report.html").unlink()
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "RUN nowhere: there is no such folder; name a run directory"),
        (["."], "RUN .: holds no run (no config.yaml, no metrics.jsonl); name a run directory"),
        (["run", "run"], "2 runs in one page: name the file to write, such as --out compared.html"),
        (["run", "--out", "run"], "--out run: this is a folder, expected a file to write"),
        ([], "Missing argument 'RUN"),
    ],
)
def test_mistakes_are_said(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    assert cli.invoke(["report", *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run" / "report.html").exists()
