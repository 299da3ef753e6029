"""The page of a run: whole, from whatever its directory holds; nothing from outside becomes HTML or a request."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.browser import chromium
from helpers.fake_run import HOSTILE, make_run

from qlora_dist.files import GIB
from qlora_dist.pages import append_event, read_run, write_report
from qlora_dist.pages.render import HERE, SCRIPTS
from qlora_dist.pages.report import report


class Parsed(HTMLParser):
    """Elements with their attributes, text, and the content of scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.scripts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.cdata_elem else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def data_of(page):
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(block[1])


def page_of(*folders, **options):
    return report([read_run(folder) for folder in folders], **options)


def test_a_page_shows_what_the_directory_holds(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").write_text(
        json.dumps({"tokens_per_second_median": 1234.0, "exact_match_after": 0.987654})
    )
    text = Parsed(page_of(folder)).text
    for part in (
        "step 40 of 40", "lowest held-out loss", "tokens per second 1,234", "(planned 38.00 GiB, -2.6%)",
        "2 × NVIDIA A100-SXM4-80GB", "starts 2", "Ebro, Tajo", "failed: rank 1: <script>", "0.987654",
        "rejected-step-00000007", "1 checkpoint kept, the newest of step 20", "base: codes 32.00 GiB",
        "Each point is one step",
    ):  # fmt: skip
        assert part in text, part
    (run,) = data_of(page_of(folder))["runs"]
    assert run["restarts"] == [20] and run["planned"] == {"peak_bytes": 38.0}
    assert run["steps"]["peak_bytes"]["mean"][0] == 39.0 and run["held_out"]["step"][0] == 0


def test_text_from_outside_is_text(tmp_path):
    """Samples, config, errors, the plan's notes, the names of folders."""
    folder = make_run(tmp_path / "<script>x")
    page = page_of(folder)
    parsed = Parsed(page)
    assert [attributes for tag, attributes in parsed.elements if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}, {},
    ]  # fmt: skip
    assert "img" not in {tag for tag, _ in parsed.elements}
    assert parsed.text.count(HOSTILE) >= 4 and "<script>x" in parsed.text
    assert not any("document.title" in script for script in parsed.scripts[1:])
    assert data_of(page)["runs"][0]["name"] == "<script>x"


def test_control_characters_are_shown_and_a_lone_surrogate_does_not_end_the_page(tmp_path):
    folder = make_run(tmp_path / "run", text="\x1b[2J\u202e")
    (folder / "samples.json").write_text('[{"prompt": "\\ud83d", "after": "\\u0000"}]')
    write_report([read_run(folder)], folder / "report.html")
    page = (folder / "report.html").read_text()
    assert not re.search("[\x00\x1b\u202e]", page) and "\\ud83d" in page and "\\x1b[2J" in page


def test_only_the_scripts_of_the_package_may_run_and_nothing_is_fetched(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    (policy,) = [a["content"] for tag, a in Parsed(page).elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    inside = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside]
    assert rules["default-src"] == "'none'" and rules["script-src"].split() == [f"'sha256-{one}'" for one in hashes]
    assert inside == [(HERE / "assets" / name).read_text() for name in SCRIPTS]


def test_the_library_is_the_one_that_was_recorded():
    rows = re.findall(r"^\| `(\S+)` \|.*\| `([0-9a-f]{64})` \|$", (HERE / "assets" / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {path.name for path in (HERE / "assets").glob("uPlot*")}
    for name, digest in rows:
        assert hashlib.sha256((HERE / "assets" / name).read_bytes()).hexdigest() == digest, name
    assert "MIT License" in (HERE / "assets" / "uPlot.LICENSE").read_text()


def test_several_runs_are_laid_over_each_other_with_what_differs(tmp_path):
    folders = [make_run(tmp_path / "a" / "run", 30, rank=8), make_run(tmp_path / "b" / "run", 1100, rank=32)]
    page = page_of(*folders)
    assert [run["name"] for run in data_of(page)["runs"]] == ["a/run", "b/run"]
    text = Parsed(page).text
    assert "lora.rank 8 32" in text and "train.steps 30 1,100" in text and "optim.lr" not in text.split("Curves")[0]
    assert "1 step (a/run), 4 steps (b/run)" in text
    assert [run["name"] for run in data_of(page_of(folders[0], folders[0]))["runs"]] == ["a/run (1)", "a/run (2)"]


@pytest.mark.parametrize(
    ("events", "is_running", "state", "how"),
    [
        ((), True, "running", "running"),
        ((), False, "running, or killed", "no end yet: it runs, or was killed"),
        ((("end", "stopped", "by SIGTERM"),), False, "stopped", "stopped: by SIGTERM"),
        ((("end", "finished", ""),), True, "finished", "finished"),
        ((("start", "", ""),), False, "running, or killed", "no end was written: killed, or its machine was lost"),
    ],
)
def test_how_a_start_ended_is_said(tmp_path, events, is_running, state, how):
    folder = make_run(tmp_path / "run")
    for event, kind, text in events:
        append_event(folder / "history.jsonl", event, step=40, kind=kind, text=text)
    text = Parsed(page_of(folder, is_running=is_running)).text
    assert f"state {state} step" in text and how in text
    assert ("while the run goes on" in text) == is_running


def test_a_plan_for_a_gpu_is_no_line_beside_the_peak_of_a_cpu(tmp_path):
    page = page_of(make_run(tmp_path / "run", device="cpu"))
    assert data_of(page)["runs"][0]["planned"] is None
    assert "(planned" not in Parsed(page).text and "the two do not compare" in Parsed(page).text


def test_a_run_of_a_version_without_a_history_has_a_page(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "history.jsonl").unlink()
    (folder / "completed").write_text("{}")
    summary = {"plan_error": -0.01, "planned_peak_bytes": 3 * GIB, "peak_bytes_max": 4 * GIB, "world_size": 8}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = Parsed(page_of(folder)).text
    assert "state finished" in text and "planned 3.00 GiB, -25.0%" in text and "ranks 8" in text
    assert "made by a version that wrote none" in text


DIGITS = b'{"step": 1, "loss": 1%s, "plan_error": 1%s}' % (b"0" * 400, b"0" * 400)


@pytest.mark.parametrize(
    "junk", [b"", b"\xff\x00{", b"[[[", b"[1, 2]", b'{"step": 1}\n{"step": 2, "loss": 1e999}\n', DIGITS]
)
def test_files_of_any_content_make_a_page(tmp_path, junk):
    for name in ("config.yaml", "metrics.jsonl", "eval_start.json", "summary.json", "history.jsonl", "samples.json"):
        folder = make_run(tmp_path / name)
        (folder / name).write_bytes(junk)
        assert "</html>" in page_of(folder)
    (folder / "history.jsonl").write_text('{"event": "start", "step": "x", "plan": [], "num_steps": null, "time": 3}\n')
    assert "</html>" in page_of(folder, folder)


def test_the_page_of_a_long_run_stays_small(tmp_path):
    short, long = (len(page_of(make_run(tmp_path / str(number), number))) for number in (500, 4_000))
    assert long < 200_000 and long < 2.5 * short


# --- in a browser -----------------------------------------------------------------------------------------------------

LOOK = {
    "title": "document.title",
    "drawn": "document.documentElement.dataset.drawn",
    "background": "getComputedStyle(document.body).backgroundColor",
    "inked": """[...document.querySelectorAll('canvas')].filter((c) => {
        const inked = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return inked.some((value) => value > 0);
    }).length""",
    "ticks": """(() => {
        const select = document.querySelector('select.axis');
        select.value = 'seconds';
        select.dispatchEvent(new Event('change'));
        return document.querySelector('.u-legend .u-label').textContent;
    })()""",
}


def test_pages_open_on_a_phone_and_a_screen_in_light_and_dark(tmp_path):
    above = tmp_path / "a-folder-with-a-long-name"
    folders = [make_run(above / name, steps, rank=steps) for name, steps in (("a", 600), ("b", 40))]
    alone, together = tmp_path / "alone.html", tmp_path / "together.html"
    write_report([read_run(folders[0])], alone)
    write_report([read_run(folder) for folder in folders * 3], together)
    with chromium(tmp_path / "profile") as browser:
        for file, width, dark in itertools.product((alone, together), (1000, 400), (False, True)):
            seen = browser.open(file, width=width, dark=dark, expressions=LOOK)
            where = (file.name, width, dark, seen)
            assert seen.overflow == 0 and seen.width <= width, where
            assert seen.reports == [] and seen.requests == [], where
            assert seen.values["drawn"] == "6" and seen.values["inked"] == 6, where
            assert seen.values["title"] != "run", where
            assert (seen.values["background"] == "rgb(255, 255, 255)") != dark, where
            assert seen.values["ticks"] == "hours in steps", where


def test_the_page_of_a_run_before_its_first_step_opens(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    (folder / "eval_start.json").unlink()
    write_report([read_run(folder)], folder / "report.html", is_running=True)
    with chromium(tmp_path / "profile") as browser:
        seen = browser.open(folder / "report.html", width=400, dark=False, expressions={"drawn": LOOK["drawn"]})
    assert (seen.overflow, seen.reports, seen.values["drawn"]) == (0, [], "0")


def test_the_browser_reports_what_the_pages_must_not_do(tmp_path):
    """Otherwise the test above could not fail."""
    file = tmp_path / "bad.html"
    file.write_text(
        "<body><div style='width: 1200px'>x</div><img src='http://localhost:1/x.png'>"
        "<script>console.error('bad')</script><script>undefined.x</script>"
    )
    with chromium(tmp_path / "profile") as browser:
        seen = browser.open(Path(file), width=1000, dark=False)
    assert seen.overflow >= 200 and seen.requests == ["http://localhost:1/x.png"]
    assert any('"bad"' in text for text in seen.reports) and any("undefined" in text for text in seen.reports)
