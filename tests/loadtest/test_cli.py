"""The command against a stub, and what it writes: in virtual time where figures count, in real time where signals do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtest.cli import build_parser, main
from loadtest.report import render_report
from loadtest.results import RunResult, load_result, save_result
from tests.loadtest.runs import at_times, measure, poisson
from tests.loadtest.stub import StubService, stub_in_thread, stub_in_virtual_time

USD = "--price-per-replica-hour"
PATIENT = ("--max-lag-ms", "60000", "--timeout", "120")  # other work on this machine must not decide about a test


def plateau_delay(number: int) -> float:
    """1.2 s for every twentieth request, else 0.2 s: p99 lies in the middle of the slow ones, far from any noise."""
    return 1.2 if number % 20 == 7 else 0.2


def run_plateau(url: str, output: Path, *more: str) -> int:
    """50 requests a second."""
    arguments = ["--rate", "50", "--arrivals", "constant", "--slo-ms", "700", USD, "1.8", "--no-progress", *more]
    return main(["run", "--url", url, "--workload", "single", "--output", str(output), *arguments])


@pytest.fixture(scope="module")
def plateau_run(tmp_path_factory) -> tuple[Path, int]:
    output = tmp_path_factory.mktemp("run") / "deep" / "result.json"
    with stub_in_virtual_time(plateau_delay) as url:
        code = run_plateau(url, output, "--duration", "6")
    return output, code


def test_a_run_measures_the_stub(plateau_run):
    output, code = plateau_run
    run = load_result(output)
    assert code == 0
    assert run.valid
    assert run.counts.sent == run.counts.ok == 300
    assert run.latency.p99_s == pytest.approx(1.2, rel=0.05)
    assert run.rates.goodput_per_s == pytest.approx(50 * 19 / 20, rel=0.02)
    assert run.slo_verdict == "missed"
    usd = 1.8 / 3600 / run.rates.good_source_chars_per_s * 1e6
    assert run.cost.usd_per_million_good_chars == pytest.approx(usd)
    assert run.cost.usd_per_million_chars != run.cost.usd_per_million_good_chars
    assert sorted(path.name for path in output.parent.iterdir()) == ["result.html", "result.json"]


@pytest.mark.real_time
def test_a_run_in_real_time_measures_no_less_than_the_stub_takes(tmp_path):
    """Over real sockets, in seconds; how much more it is, the machine decides."""
    with stub_in_thread(plateau_delay) as url:
        assert run_plateau(url, tmp_path / "real.json", "--duration", "2", *PATIENT) == 0
    run = load_result(tmp_path / "real.json")
    assert run.valid
    assert run.counts.sent == run.counts.ok == 100
    assert run.latency.p50_s > 0.199  # of five slow ones and 95 of 0.2 s
    assert run.latency.max_s > 1.19
    assert run.server_timing["total"].max_s == pytest.approx(1.2, rel=0.01)


class _Page(HTMLParser):
    """Open tags, and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    assert "script" not in parser.tags
    for piece in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + piece.split("</svg>")[0] + "</svg>")
        assert "nan" not in piece.split("</svg>")[0]
    return parser


def test_the_report_is_one_sound_page_with_the_figures(plateau_run):
    output, _ = plateau_run
    page = output.with_suffix(".html").read_text(encoding="utf-8")
    assert checked(page).tags.count("svg") == 6
    run = load_result(output)
    for figure in (
        f"{run.rates.goodput_per_s:.4g}/s",
        f"{run.latency.p99_s * 1000:.4g} ms",
        "SLO 99 % within 0.7 s: missed",
    ):
        assert figure in page


def test_report_makes_the_page_again(plateau_run, tmp_path, capsys):
    output, _ = plateau_run
    assert main(["report", str(output), "--html", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == output.with_suffix(".html").read_text()


def test_reports_of_odd_runs_render():
    nothing = measure(StubService(kinds={0: "500"}), at_times([0.0]))
    assert nothing.latency is None
    checked(render_report(nothing))
    hostile = nothing.model_copy(update={"label": "<script>alert(1)</script>", "workload": "a & <b>"})
    page = render_report(hostile)
    checked(page)
    assert "&lt;script&gt;" in page


def test_knee_as_a_command(tmp_path, capsys):
    with stub_in_virtual_time(lambda _: 0.1) as url:
        arguments = ["--low", "20", "--high", "40", "--percentile", "70", "--confidence", "0.8", "--trial-duration", "1"]
        more = [
            "--pause",
            "0",
            "--trial-warmup",
            "0.2",
            "--sweep",
            "1",
            "--output",
            str(tmp_path / "k.json"),
            "--no-progress",
        ]
        assert main(["knee", "--url", url, "--workload", "single", *arguments, *more]) == 0
    knee = load_result(tmp_path / "k.json")
    assert knee.knee_per_s == 40
    assert [trial.purpose for trial in knee.trials] == ["search", "search", "sweep", "sweep"]
    assert "raise --high" in knee.finished
    page = (tmp_path / "k.html").read_text(encoding="utf-8")
    assert checked(page).tags.count("svg") == 8
    assert "Knee: 40 requests/s" in page
    assert main(["compare", str(tmp_path / "k.json"), str(tmp_path / "k.json"), "--p99-within", "1"]) == 0


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("compared")
    for name, delay in (("base", 0.1), ("new", 0.12)):
        save_result(measure(StubService(lambda _, delay=delay: delay), poisson(20, 4)), folder / f"{name}.json")
    return str(folder / "base.json"), str(folder / "new.json")


def test_compare_judges_the_difference(two_runs, capsys):
    base, new = two_runs
    assert main(["compare", base, new]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("p50 ms"))
    assert float(line.split()[-1].rstrip("%")) == pytest.approx(20, abs=2)
    assert main(["compare", base, new, "--p99-within", "5"]) == 1
    assert "FAIL: p99 ms changed by +" in capsys.readouterr().out
    assert main(["compare", base, new, "--goodput-within", "2"]) == 0
    assert main(["compare", base, base, new, "--with", base, new, new, "--p99-within", "5"]) == 1  # medians: base, new


def test_compare_refuses_what_cannot_be_compared(two_runs, tmp_path, capsys):
    base, new = two_runs
    other = load_result(Path(new)).model_copy(update={"workload": "other"})
    save_result(other, tmp_path / "other.json")
    assert main(["compare", base, str(tmp_path / "other.json")]) == 2
    assert main(["compare", base]) == 2
    invalid = load_result(Path(new)).model_copy(update={"valid": False, "invalid_because": ["lag"]})
    save_result(invalid, tmp_path / "invalid.json")
    assert main(["compare", base, str(tmp_path / "invalid.json"), "--goodput-within", "5"]) == 1
    assert "NOT VALID" in capsys.readouterr().out


def test_results_survive_the_file(tmp_path):
    run = measure(StubService(lambda _: 0.01), poisson(20, 3))
    save_result(run, tmp_path / "run.json")
    assert load_result(tmp_path / "run.json") == run
    assert json.loads((tmp_path / "run.json").read_text())["format"] == "babelephant-loadtest-run/1"


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = measure(StubService(), at_times([0.0]))
    path = tmp_path / "run.json"
    save_result(run, path)
    before = path.read_text()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_result(run.model_copy(update={"label": "new"}), path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a result"),
        ("not json", "is not a result"),
        ('{"format": "babelephant-loadtest-run/1"}', "created_at: Field required"),
        ('{"format": "other/9"}', "is not a result"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, capsys, content, message):
    (tmp_path / "x.json").write_text(content)
    assert main(["report", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://10.0.0.1"], "add --allow-remote"),
        (["--workload", "nothing"], "no workload 'nothing'"),
        (["--rate", "0"], "some rate must be above 0"),
        (["--rate", "1e9"], "raise --max-requests (200000)"),
        (["--dispersion", "3"], "--dispersion belongs to --arrivals gamma"),
        (["--shape", "steps"], "--shape steps and --steps 5,10,20 go together"),
        (["--shape", "steps", "--steps", "5,x"], "expected rates such as 5,10,20"),
        (["--trace", "nowhere.csv"], "cannot read the trace"),
        (["--percentile", "100"], "--percentile between 0 and 100"),
        (["--max-in-flight", "0"], "max-in-flight at least 1"),
        (["--url", "http://127.0.0.1:1", "--wait-ready", "0"], "start the service"),
    ],
)
def test_bad_input_gets_a_clear_error(arguments, message, capsys, tmp_path):
    assert main(["run", *arguments, "--output", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_sends_nothing_and_writes_the_schedule(tmp_path, capsys):
    csv = tmp_path / "times.csv"
    soak = ["run", "--dry-run", "--shape", "soak", "--rate", "10", "--duration", "100", "--arrivals", "gamma"]
    assert main([*soak, "--schedule-csv", str(csv)]) == 0
    times = [float(line) for line in csv.read_text().splitlines()[1:]]
    assert 800 < len(times) < 1250
    assert max(times) < 105
    assert main(["run", "--dry-run", "--trace", str(csv), "--speed", "10"]) == 0
    assert f"{len(times)} requests (trace times.csv at speed 10" in capsys.readouterr().err


def test_require_slo_decides_the_exit_status(tmp_path):
    with stub_in_virtual_time(lambda _: 0.15) as url:
        common = ["run", "--url", url, "--workload", "single", "--rate", "40", "--duration", "1", "--percentile", "80"]
        common += ["--no-progress", "--output", str(tmp_path / "x.json"), "--require-slo"]
        assert main([*common, "--slo-ms", "200"]) == 0
        assert main([*common, "--slo-ms", "100"]) == 1


@pytest.mark.real_time
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    seen: list[int] = []
    with stub_in_thread(lambda i: seen.append(i) or 0.1) as url:
        command = [
            sys.executable,
            "-m",
            "loadtest",
            "run",
            "--url",
            url,
            "--rate",
            "20",
            "--duration",
            "60",
            "--no-progress",
        ]
        process = subprocess.Popen(
            [*command, *PATIENT, "--output", str(tmp_path / "x.json")],
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
        )
        give_up = time.monotonic() + 60
        while len(seen) < 20:
            assert time.monotonic() < give_up
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=180)
    assert process.returncode == 1, out
    assert "NOT VALID: stopped after" in out
    run = load_result(tmp_path / "x.json")
    assert isinstance(run, RunResult)
    assert 10 <= run.counts.sent == run.counts.ok < run.schedule.num_scheduled


def test_help_teaches_with_commands_that_parse(capsys):
    parser = build_parser()
    pages = []
    for command in ([], ["run"], ["knee"], ["closed"], ["report"], ["compare"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        pages.append(capsys.readouterr().out)
    examples = [
        line.split("   ")[0].strip() for page in pages for line in page.splitlines() if "python -m loadtest " in line
    ]
    examples = [line for line in examples if line.startswith("python -m loadtest ") and "COMMAND" not in line]
    assert len(examples) > 12
    for example in examples:
        parser.parse_args(example.split()[3:])


def test_loadtest_is_a_stranger_to_the_rest():
    forbidden = "('app', 'engine', 'kernels', 'torch', 'ray')"
    code = f"import sys, loadtest.cli; print([m for m in sys.modules if m.split('.')[0] in {forbidden}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["aiohttp", "hdrh"])
def test_a_missing_extra_is_named(module: str) -> None:
    without = f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_module('loadtest', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"loadtest: error: {module} is not installed; `make loadtest` installs it")
    assert "Traceback" not in done.stderr
