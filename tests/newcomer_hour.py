"""A newcomer's first hour, in minutes: clone, install, demo, own data, train, look, use, stop, resume.

    python tests/newcomer_hour.py [--keep]      (make test-hour)

The commit that is checked out is cloned into a temporary folder and installed from there as a wheel, into an
environment of its own that borrows the libraries of the interpreter that runs this. All commands are typed in another,
empty folder with an empty home: what they need has to be in the wheel. Each must say what it is expected to say.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 600.0  # seconds of one command
WORDS = [f"w{i}" for i in range(6, 100)]  # what the tiny base's tokenizer knows


class Hour:
    """A folder in which a newcomer works, and what was typed there."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "env" / "bin"
        self.clone = folder / "clone"
        self.home = folder / "home"
        self.home.mkdir()
        dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {key: value for key, value in os.environ.items() if key not in dropped} | {
            "HOME": str(self.home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120",
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }  # fmt: skip
        self.seconds: list[tuple[float, str]] = []

    def run(self, line: str, *expected: str, code: int = 0, **extra: str) -> str:
        """Types a line; everything in `expected` must be said."""
        began = time.monotonic()
        done = subprocess.run(
            line, shell=True, cwd=self.home, env=self.environment | extra, text=True, timeout=LONGEST,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._took(began, line)
        require(done.returncode == code, f"{line}\nexit code {done.returncode}, expected {code}\n{done.stdout}")
        for text in expected:
            require(text in done.stdout, f"{line}\nexpected to read: {text}\n{done.stdout}")
        return done.stdout

    def interrupt(self, line: str, metrics: Path, *expected: str) -> str:
        """Types a line, and Ctrl-C once three steps are done."""
        began = time.monotonic()
        process = subprocess.Popen(
            line.split(), cwd=self.home, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            # what a shell starts in the background inherits that SIGINT is ignored, and launchers respect that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            require(time.monotonic() - began < LONGEST, f"{line}: no three steps in time")
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of its foreground
        said, _ = process.communicate(timeout=LONGEST)
        self._took(began, f"{line}   ^C")
        for text in expected:
            require(text in said, f"{line}   ^C\nexpected to read: {text}\n{said}")
        return said

    def _took(self, began: float, line: str) -> None:
        self.seconds.append((time.monotonic() - began, line))
        print(f"{self.seconds[-1][0]:7.1f} s  {line}", flush=True)


def require(is_so: bool, text: str) -> None:
    """Ends the script unless it is so."""
    if not is_so:
        raise SystemExit(f"\nnot as expected: {text}")


def install(hour: Hour) -> None:
    """Clone and wheel. The environment's own packages come first, then those of this interpreter."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    hour.run(f"git clone --quiet --no-checkout {ROOT} {hour.clone}")
    hour.run(f"git -C {hour.clone} checkout --quiet {commit.stdout.strip()}")
    hour.run(f"{sys.executable} -m venv --without-pip {hour.bin.parent}")
    own = hour.run(f'{hour.bin}/python -c "import site; print(site.getsitepackages()[0])"').strip()
    (Path(own) / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = f"{sys.executable} -m pip --python {hour.bin}/python install --quiet --disable-pip-version-check"
    hour.run(f"{pip} --no-deps --no-build-isolation {hour.clone}")  # needs no network
    where = hour.run(f'{hour.bin}/python -c "import qlora_dist; print(qlora_dist.__file__)"').strip()
    require(where.startswith(own), f"the package comes from {where}, expected from the wheel in {own}")


def demo(hour: Hour) -> None:
    """The demo from the wheel, with so few steps that it learns nothing: `make demo` trains it whole."""
    hour.run("qlora-dist init --demo", "Written to demo", "python demo/make_base.py")
    hour.run("python demo/make_data.py", "build/demo/data")
    hour.run("python demo/make_base.py --steps 10", "build/demo/base")
    hour.run(
        "qlora-dist train demo/demo.yaml --ranks 2 --set train.epochs=null --set train.steps=4 "
        "--set train.eval_every=null --set train.save_every=null",
        "step 4/4", "runs/demo/adapter",
    )  # fmt: skip
    hour.run("qlora-dist merge runs/demo build/demo/merged --onto dequantized", "merged onto dequantized")
    hour.run("python demo/report.py", "before", "after", "merged", "expected at most 20% before", code=1)


def prepare(hour: Hour) -> None:
    """The newcomer's own data, in Alpaca's form, and a tiny base."""
    draw = random.Random(0)
    records = [
        {"instruction": "w6 w7", "input": " ".join(draw.choices(WORDS, k=4)) if draw.random() < 0.5 else "",
         "output": " ".join(draw.choices(WORDS, k=3))}
        for _ in range(150)
    ]  # fmt: skip
    (hour.home / "mine.json").write_text(json.dumps(records, indent=1))
    code = "from pathlib import Path; from helpers.tiny_models import save_model; save_model(Path('base'))"
    hour.run(f'{hour.bin}/python -c "{code}"', PYTHONPATH=str(hour.clone / "tests"))


def first_run(hour: Hour) -> None:
    """From data to a trained, merged model."""
    runs = hour.home / "runs"
    hour.run("qlora-dist --version", "version")
    hour.run(
        "qlora-dist init --base ./base --data mine.json --device cpu --out mine.yaml",
        "Written to mine.yaml", "format alpaca", "packing: ", "Next: qlora-dist train mine.yaml --ranks 1",
    )  # fmt: skip
    hour.run("qlora-dist data mine.yaml --show 1", "mine.json", "alpaca", "learned")
    hour.run("qlora-dist plan mine.yaml --gpu t4", "Longest rows that fit", "Largest micro-batch that fits")
    hour.run("qlora-dist train mine.yam --ranks 2", "error: config mine.yam: cannot be read", code=2)
    hour.run(
        "qlora-dist train mine.yaml --ranks 2 --set train.epochs=1",
        "machine", "2 ranks", "memory", "step 1/", "held-out loss", "runs/mine/adapter",
    )  # fmt: skip
    page = (runs / "mine" / "report.html").read_text()
    require("</html>" in page and "finished" in page, "runs/mine/report.html is no page of a finished run")
    require((runs / "mine" / "adapter" / "adapter_model.safetensors").is_file(), "there is no adapter in runs/mine")
    hour.run("qlora-dist train mine.yaml --ranks 2 --set train.epochs=1", "this run is finished")
    hour.run("qlora-dist report runs/mine --out mine.html", "mine.html", "opens in any browser")
    hour.run("qlora-dist evaluate runs/mine --with-base", "base: held-out loss", "trained: held-out loss")
    hour.run('qlora-dist generate runs/mine --prompt "w6 w7" --max-new-tokens 8', "w")
    hour.run(
        "qlora-dist merge runs/mine merged", "merged onto dequantized, the nearer to what was trained", "onto base"
    )
    code = "from transformers import AutoModelForCausalLM as M; print(type(M.from_pretrained('merged')).__name__)"
    hour.run(f'python -c "{code}"', "LlamaForCausalLM")


def stop_and_resume(hour: Hour) -> None:
    """Ctrl-C in a run that would take long, and the same command again, to an earlier end."""
    line = "qlora-dist train mine.yaml --ranks 2 --set run_dir=runs/second --set batch.rows_per_step=2"
    line += " --set train.epochs=null --set optim.schedule=constant --set train.steps="
    second = hour.home / "runs" / "second"
    metrics = second / "metrics.jsonl"
    hour.interrupt(f"{line}100000", metrics, "stopped by SIG", "checkpoint saved in", "Start the same command again")
    last = metrics.read_text().count("\n") + 20
    hour.run(f"{line}{last}", "resuming from", f"step {last:,}/{last:,}")
    steps = [json.loads(one)["step"] for one in metrics.read_text().splitlines()]
    require(steps == list(range(1, last + 1)), f"runs/second/metrics.jsonl has the steps {steps}")
    ends = [json.loads(one).get("kind") for one in (second / "history.jsonl").read_text().splitlines()]
    require(ends == [None, "stopped", None, "finished"], f"runs/second/history.jsonl tells {ends}")


def main() -> None:
    """The whole hour; the folder is removed unless --keep is given or something was not as expected."""
    folder = Path(tempfile.mkdtemp(prefix="newcomer-hour-"))
    print(f"in {folder}")
    hour = Hour(folder)
    for part in (install, demo, prepare, first_run, stop_and_resume):
        part(hour)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = (
        f"{sum(seconds for seconds, _ in hour.seconds):.1f} s, {used.ru_utime + used.ru_stime:.1f} s of the processor"
    )
    print(f"{took}; everything was as expected")
    if "--keep" not in sys.argv[1:]:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
