"""Repeats one short run on two hosts and looks for a repeat that hangs or differs. By hand, resumable; needs root:

    python tests/repeat_hosts.py                                # 200 runs with zero2
    python tests/repeat_hosts.py --strategy zero3 --times 50
    python tests/repeat_hosts.py --busy 4                       # beside four processes that compute

Each repeat is a line of build/repeat/STRATEGY.jsonl. One that takes longer than --seconds counts as hung: the stacks of
its ranks, native frames too where gdb is to be had, and the hosts' connections are left in build/repeat/, and the
repeats go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from helpers.ranks import ROOT, clean_environment

os.environ.update(clean_environment())

from helpers.crew import Crew
from helpers.tiny_run import changed, losses_of, make_inputs, write_config
from helpers.two_hosts import Hosts, why_not

FOLDER = ROOT / "build" / "repeat"
NAMES = "debian, own name only"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="zero2")
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    options = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / f"{options.strategy}.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    try:
        with tempfile.TemporaryDirectory() as name, Hosts(Path(name), NAMES) as hosts:
            inputs = changed(
                make_inputs(Path(name)), strategy__name=options.strategy, strategy__timeout_seconds=600,
                batch__rows_per_step=8, batch__micro_rows=2, train__steps=4, train__save_every=2,
            )  # fmt: skip
            while len(done) < options.times:
                done.append({"repeat": len(done), **_repeat(Path(name) / "one", inputs, hosts, options.seconds)})
                with log.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    finally:
        for process in busy:
            process.kill()
    return _summary(options.strategy, done)


def _repeat(folder: Path, inputs: dict[str, Any], hosts: Hosts, limit: float) -> dict[str, Any]:
    """How one run went."""
    folder.mkdir()
    config = write_config(folder / "config.yaml", inputs, run_dir=str(folder / "run"))
    started = time.monotonic()
    with Crew(config, folder / "logs", hosts=hosts) as crew:
        while any(process.is_alive() for process in crew.processes) and time.monotonic() - started < limit:
            time.sleep(0.05)
        seconds = time.monotonic() - started
        is_hung = any(process.is_alive() for process in crew.processes)
        if is_hung:
            _keep_stacks(crew, hosts)
    codes = [process.exitcode for process in crew.processes]
    result = {"seconds": round(seconds, 2), "load": os.getloadavg()[0], "codes": codes, "is_hung": is_hung}
    if codes == [0, 0]:
        result["losses"] = losses_of(folder / "run")
    else:
        shutil.copytree(folder / "logs", FOLDER / f"failed-{time.time_ns()}")
    shutil.rmtree(folder)
    return result


def _keep_stacks(crew: Crew, hosts: Hosts) -> None:
    """Of a run that hangs; its ranks end with it."""
    place = FOLDER / f"hung-{time.time_ns()}"
    place.mkdir()
    for number, process in enumerate(crew.processes):
        (place / f"connections-{number}").write_text(hosts.inside(number, "ss -tanop || true", "--net"))
        if process.is_alive() and shutil.which("gdb"):
            command = ["gdb", "-p", str(process.pid), "-batch", "-ex", "thread apply all bt 30"]
            with (place / f"native-{number}").open("w") as file:
                subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=300)
    crew.print_stacks()
    (place / "output").write_text(crew.output())


def _summary(strategy: str, done: list[dict[str, Any]]) -> int:
    seconds = sorted(one["seconds"] for one in done)
    hung = [one["repeat"] for one in done if one["is_hung"]]
    failed = [one["repeat"] for one in done if not one["is_hung"] and one["codes"] != [0, 0]]
    kinds = {json.dumps(one["losses"]) for one in done if "losses" in one}
    loads = [one["load"] for one in done]
    print(
        f"{strategy}: {len(done)} runs, hung {hung or 0}, failed {failed or 0}, {len(kinds)} distinct list(s) of "
        f"losses; seconds: median {statistics.median(seconds):.1f}, longest {seconds[-1]:.1f}; load: median "
        f"{statistics.median(loads):.1f}, highest {max(loads):.1f}"
    )
    return int(bool(hung or failed) or len(kinds) != 1)


if __name__ == "__main__":
    sys.exit(main())
