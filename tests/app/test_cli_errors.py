"""What a mistake at the command line looks like: one message without a stack trace, and nothing half-written."""

from __future__ import annotations

import importlib
import io
import json
import re
import resource
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from app.cli import EXTRA_OF_MODULE, main
from engine.weights.memory import InsufficientMemoryError
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import write_tiny_tokenizer

EN_DE = ("translate", "--from", "en", "--to", "de")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3))


def error_of(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("babelephant: error: ")
    assert "Traceback" not in error
    assert "pydantic" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("inspect", __file__), f"{__file__}/config.json: Not a directory"),
        (("experts", "--texts", "/nowhere.yaml", "--pair", "en-de"), "/nowhere.yaml: No such file or directory"),
        (("evaluate", "--limit", "1", "--out", "/nowhere/scores.json"), "/nowhere: no such folder"),
        (("serve", "/"), "/ cannot be read: Is a directory"),
        (("profile", "/nowhere"), "/nowhere/config.json does not exist"),
        ((*EN_DE, "--threads", "0", "a"), "engine.num_threads: Input should be greater than or equal to 1"),
        ((*EN_DE[:-1], "en-US", "a"), "--from and --to are both eng_Latn"),
        (("evaluate", "--device", "gpu"), "device 'gpu' is unknown; choose cpu or cuda"),
        (("evaluate", "--int8-dense"), "--int8-dense works on a GPU only, not on cpu: add --device cuda"),
        ((*EN_DE, "caf\udce9"), "text 1 is not UTF-8"),
    ],
)
def test_one_message_names_the_mistake(arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in error_of(arguments, capsys)


def test_yaml_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pools.yaml").write_text("a:\n\t- b\n")
    assert "not valid YAML" in error_of(("plan", str(tmp_path / "pools.yaml")), capsys)


def test_standard_input_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for errors in ("strict", "surrogateescape"):  # the latter is Python's choice in the C locale
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
        assert "utf" in error_of(EN_DE, capsys).lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [(*EN_DE, "--device", "cuda", "a"), ("profile", "--device", "cuda")])
def test_a_gpu_that_is_not_there(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert "device cuda: torch" in error_of(command, capsys)


def test_too_little_memory_is_no_fault_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("engine.weights.loading.available_bytes", lambda device: 1000)
    assert "but 0.00 GB are available" in error_of((*EN_DE, "a"), capsys)
    monkeypatch.setattr("engine.weights.loading.available_bytes", lambda device: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its stack trace
        main((*EN_DE, "a"))
    assert issubclass(InsufficientMemoryError, RuntimeError)


def test_a_disk_that_fills_up_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the writer gets its error from the system either way."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "convert", str(checkpoint), str(out)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"babelephant: error: {out} cannot be written, and nothing of it was kept: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


_ENDED = """
import signal, sys, tempfile
import engine.weights.conversion as conversion
from app.cli import main

def half_done(checkpoint, out, *args, **kwargs):
    with tempfile.TemporaryDirectory(dir=out.parent):
        signal.raise_signal(int(sys.argv[2]))

conversion.convert = half_done
main(["convert", "checkpoint", sys.argv[1]])
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_cleans_up(signum: signal.Signals, tmp_path: Path) -> None:
    heeding = f"import signal; signal.signal({int(signum)}, signal.SIG_DFL)\n{_ENDED}"  # the tests may run under nohup
    done = subprocess.run([sys.executable, "-c", heeding, tmp_path / "out", str(int(signum))], check=False)
    assert done.returncode == 128 + signum
    assert list(tmp_path.iterdir()) == []


def test_nohup_is_respected(tmp_path: Path) -> None:
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{_ENDED}"
    done = subprocess.run([sys.executable, "-c", ignoring, tmp_path / "out", str(int(signal.SIGHUP))], check=False)
    assert done.returncode != 128 + signal.SIGHUP


def test_the_module_says_what_the_command_says(tmp_path: Path) -> None:
    """`python -m app.cli` has two copies of the module, and each has a CommandError."""
    command = [sys.executable, "-m", "app.cli", "plan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("babelephant: error: give a YAML file of pools")


def test_a_converted_checkpoint_is_read_at_its_own_precision(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "w4"
    assert main(["convert", str(checkpoint), str(out), "--precision", "w4a16"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert "in w4a16" in capsys.readouterr().out
    assert main([*EN_DE, "--checkpoint", str(out), "--json", "the hen"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "the hen"
    assert "was converted to w4a16" in error_of(("inspect", str(out), "--precision", "w8a16"), capsys)


@pytest.mark.parametrize("module", EXTRA_OF_MODULE)
def test_what_an_extra_brings_is_named_where_it_is_missing(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = [
        re.split(r"[=<>~]", requirement)[0] for requirement in project["optional-dependencies"][EXTRA_OF_MODULE[module]]
    ]
    assert module in names
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.setattr("app.commands.inspect.run", lambda args: importlib.import_module(module))
    assert f"'.[{EXTRA_OF_MODULE[module]}]'" in error_of(("inspect",), capsys)


def test_a_module_of_our_own_that_is_missing_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.commands.inspect.run", lambda args: importlib.import_module("engine.nowhere"))
    with pytest.raises(ModuleNotFoundError):
        main(["inspect"])


def test_progress_is_for_terminals(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.cli", "convert", str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
