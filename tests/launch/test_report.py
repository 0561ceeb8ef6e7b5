"""The page of a run: whole, of itself, honest about what is missing, and deaf to what a text would make it do."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from launch import drill
from launch.errors import exit_code_of
from launch.report import report
from launch.run_report import charts
from launch.run_report.record import PNG, read_runs
from tests.parity.harness import changed, run_on, text_corpus, tiny_config
from tests.pool import RankPool

BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
HOSTILE = "</script></pre><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
NUM_EXPERTS, STEPS = 4, 12


def run_folder(folder: Path, *, experts: bool = True, **settings: Any) -> Path:
    """A run as the trainer leaves it, killed while it wrote a line."""
    folder.mkdir()
    lines = []
    for step in range(1, STEPS + 1):
        line = {
            "step": step,
            "loss": None if step == 5 else 5.0 / step,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "reward": step / 10,
        }
        line |= {"step_seconds": 0.5, "tokens_per_second_per_gpu": 1000.0, "peak_memory_gib": 70.0, "tokens": 8 * step}
        line |= {f"moe_load_{expert}": 1.0 for expert in range(NUM_EXPERTS)} if experts else {}
        lines.append(json.dumps(line | ({"validation_loss": 1.0} if step == 6 else {})))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 13, "lo']))
    events = [{"time": "t", "kind": "start", "text": HOSTILE}, {"time": "t", "kind": "resume", "step": 6, "text": "on"}]
    events += [{"time": "t", "kind": "sample", "step": 12, "text": "sampled", "sample": HOSTILE}]
    answers = {"prompt": HOSTILE, "sample": f"said {HOSTILE}", "expected": HOSTILE}
    events += [{"time": "t", "kind": "answers", "step": 6, "text": "5 of 8 held-out prompts", **answers}]
    traced = {"kind": "profile", "step": 8, "step_ms": 12.5, "kinds_ms": {"matrix_products": 7.5}, "idle_ms": 1.25}
    kernel = {"name": HOSTILE, "kind": "matrix_products", "ms_per_step": 7.5, "calls_per_step": 3}
    events += [{"time": "t", "text": "traced", **traced, "kernels": [kernel]}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    times = [{"step": 3, "late_seconds": [0.0, 0.25]}]  # before the first step time
    times += [{"step": step, "late_seconds": [0.0, 0.25], "step_seconds": [0.5, 0.75]} for step in (6, 12)]
    (folder / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    info = {"device": {"type": "cuda", "name": HOSTILE, "memory_gib": 139.8}, "world_size": 2, "mesh": {"tp": 2}}
    info |= {"predicted": {"peak_memory_gib": 68.0}, "starts": [{"time": "t", "command": ["launch/train.py", HOSTILE]}]}
    (folder / "run.json").write_text(json.dumps(info))
    config = {"train": {"steps": STEPS, **settings}, "hub": {"token": "hunter2"}, "run": {"name": HOSTILE}}
    (folder / "config.yaml").write_text(json.dumps(config))  # YAML holds JSON
    return folder


class Tags(HTMLParser):
    """Everything in a page that is markup, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def written(*arguments: object) -> str:
    assert exit_code_of(report, [str(argument) for argument in arguments]) == 0
    path = arguments[arguments.index("--out") + 1] if "--out" in arguments else Path(str(arguments[0])) / "report.html"
    return Path(str(path)).read_text()


def test_the_page_has_what_the_run_has_and_asks_for_nothing(tmp_path: Path) -> None:
    """A file that is missing beside it where the page is read; a secret in it."""
    text = written(run_folder(tmp_path / "run"))
    page = Tags(text)
    for title in (
        "Summary",
        "Curves",
        "Further metrics",
        "Experts",
        "Ranks",
        "Samples of run",
        "Events of run",
        "Settings",
        "Where steps of run went",
    ):
        assert title in page.texts
    assert "70 (predicted 68, +2.9%)" in page.texts
    assert "12 of 12" in page.texts
    assert "matrix_products: 7.5" in page.texts
    assert f"said {HOSTILE}" in page.texts  # an answer, beside its question and what its row has
    assert "hunter2" not in text
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses == []


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    page = Tags(written(run_folder(tmp_path / "run")))
    assert all(tag != "img" and "onerror" not in attributes for tag, attributes in page.tags)
    shown = sum(HOSTILE in text for text in page.texts)
    # As it is, of an event, a sample, an answer with its question and row, the device, a setting, a command, a kernel.
    assert shown >= 9


def test_a_line_that_is_damaged_costs_that_line(tmp_path: Path) -> None:
    """A run that was torn by a crash and went on, of which nobody gets a page any more."""
    run = run_folder(tmp_path / "run")
    for name in ("events.jsonl", "ranks.jsonl"):
        with open(run / name, "ab") as file:
            file.write(b'{"kind": "torn\xff\n' + b'{"time": "t", "kind": "resume", "text": "after it", "step": 9}\n')
    (record,) = read_runs([run])
    assert record.damaged == {"events.jsonl": 1, "ranks.jsonl": 1}
    assert (record.events[-1]["text"], record.ranks[-1]["step"]) == ("after it", 9)
    assert "events.jsonl: 1; ranks.jsonl: 1" in Tags(written(run)).texts
    assert drill.lines_of(run / "events.jsonl") == record.events


LINK = "<a href='https://elsewhere.example/'>loss</a>"


def test_no_text_of_a_run_becomes_a_link_in_a_chart(tmp_path: Path) -> None:
    """Plotly makes links of what stands in labels: of a metric's name, a device's, a folder's."""
    folder = run_folder(tmp_path / "a<b>run")
    lines = [{"step": step, LINK: 1.0, "loss": 1.0, "peak_memory_gib": 70.0} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = written(folder)
    drawn = [script for script in Tags(text).texts if "Plotly.newPlot(" in script and "elsewhere.example" in script]
    assert drawn  # the chart of that metric
    for script in Tags(text).texts:
        if "Plotly.newPlot(" in script and len(script) < 100_000:  # not plotly itself
            assert "\\u003ca href" not in script
            assert "\\u003cb\\u003e" not in script
            assert "\\u003cimg" not in script
    assert any("&lt;a href" in script for script in drawn)


def test_what_is_no_picture_stays_out_of_the_page(tmp_path: Path) -> None:
    """A run from elsewhere whose timeline is a link to a key, which the reader then publishes with the page."""
    folder = run_folder(tmp_path / "run")
    (tmp_path / "key").write_text("private")
    (folder / "pipeline_timeline.png").symlink_to(tmp_path / "key")
    assert "data:image" not in written(folder).split("</script></head>")[1]
    (folder / "pipeline_timeline.png").unlink()
    (folder / "pipeline_timeline.png").write_bytes(PNG + b"...")
    assert "data:image/png" in written(folder).split("</script></head>")[1]


def test_several_runs_are_told_apart_and_their_differences_come_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = run_folder(tmp_path / "a" / "run"), run_folder(tmp_path / "b" / "run", experts=False, seq_len=64)
    page = Tags(written(first, second, "--out", tmp_path / "both.html"))
    assert {"a/run", "b/run"} <= set(page.texts)
    settings = page.texts[page.texts.index("Settings") :]
    assert settings.index("train.seq_len") < settings.index("all settings") < settings.index("train.steps")


def test_a_real_run_of_two_ranks_is_drawn(ranks: RankPool, tmp_path: Path) -> None:
    """Files that the trainer writes otherwise than they are read here."""
    config = tiny_config(tmp_path / "base", text_corpus(tmp_path))
    config.resilience.straggler_interval = 2
    config.train.profile.steps = [3]
    run_on(ranks, 2, changed(config, tmp_path / "run", train__steps=4))
    (record,) = read_runs([tmp_path / "run"])
    assert [(line["step"], len(line["late_seconds"])) for line in record.ranks] == [(2, 2), (4, 2)]
    logged = record.metrics["step_seconds"]
    # Rank 0's is what is logged of steps: of step 1 alone, and then of steps 2 and 3, which had been measured by then.
    for line, mine in zip(record.ranks, ([logged[0]], logged[1:3]), strict=True):
        assert line["step_seconds"][0] == median(mine)
        assert all(seconds > 0 for seconds in line["step_seconds"])
    page = Tags(written(tmp_path / "run"))
    assert {"Curves", "Ranks", "Where steps of run went", "4 of 4"} <= set(page.texts)


def test_ranks_are_rows_of_both_heat_maps(tmp_path: Path) -> None:
    """Steps where ranks should be; a rank that an earlier start did not have, and shifts the others; damaged lines."""
    folder = run_folder(tmp_path / "run")
    with open(folder / "ranks.jsonl", "a") as file:
        for line in (
            {"step": 18, "step_seconds": [1, 2, 3]},
            {"step": "x", "step_seconds": [1]},
            {"step_seconds": "y"},
        ):
            file.write(json.dumps(line) + "\n")
    (record,) = read_runs([folder])
    steps, late = charts.rank_step_times(record), charts.rank_lateness(record)
    assert steps is not None
    assert late is not None
    assert (list(steps.data[0].x), list(late.data[0].x)) == ([6, 12, 18], [3, 6, 12])
    assert [list(row) for row in steps.data[0].z] == [[0.5, 0.5, 1], [0.75, 0.75, 2], [None, None, 3]]
    assert [list(row) for row in late.data[0].z] == [[0.0] * 3, [0.25] * 3]


@pytest.mark.parametrize("left", ["metrics.jsonl", "run.json"])
def test_a_run_that_died_early_has_a_page(tmp_path: Path, left: str) -> None:
    folder = run_folder(tmp_path / "run")
    for path in folder.iterdir():
        if path.name != left:
            path.unlink()
    assert "Summary" in written(folder)


def test_what_is_no_run_or_is_damaged_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "run")
    for arguments, said in [
        ([tmp_path], "is no run"),
        ([folder, folder], "named twice"),
        ([tmp_path / "absent"], "is no run"),
        ([], "RUN"),
    ]:
        assert exit_code_of(report, [str(argument) for argument in arguments]) == 2
        assert said in capsys.readouterr().err
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    assert exit_code_of(report, [str(folder)]) == 2
    assert "line 2" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here; `apt-get install chromium` brings one")
def test_a_browser_draws_every_chart_and_runs_nothing_else(tmp_path: Path) -> None:
    """A chart that stays empty, an error in the page's script, a text that became one."""
    folder = run_folder(tmp_path / "run")
    drawings = written(folder).count("plotly-graph-div")
    assert drawings == 10  # loss, norm, speed, step, memory, rate; reward; experts; ranks: step time and lateness
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    switches += [
        "--disable-sync",
        "--disable-component-update",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
    ]
    command = [str(BROWSER), *switches, f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    seen = subprocess.run([*command, str(folder / "report.html")], capture_output=True, text=True, timeout=360)
    drawn = Tags(seen.stdout)
    assert sum("main-svg" in (attributes.get("class") or "").split() for _, attributes in drawn.tags) >= drawings
    assert sum("plot-container" in (attributes.get("class") or "").split() for _, attributes in drawn.tags) == drawings
    assert "CONSOLE" not in seen.stderr, seen.stderr
    assert "<title>run</title>" in seen.stdout
