from __future__ import annotations

import importlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import app.commands
from app.cli import build_parser, main
from tests.engine.tiny import make_tiny_checkpoint
from tests.engine.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a tiny tokenizer: eng, fra, deu."""
    return write_tiny_tokenizer(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3, eos_bias=4.0))


def test_every_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.stem.replace("_", "-") for path in Path(app.commands.__path__[0]).glob("[a-z]*.py")]
    assert {"translate", "serve", "inspect", "convert"} <= set(names)
    for name in names:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        doc = importlib.import_module(f"app.commands.{name.replace('-', '_')}").__doc__ or ""
        assert doc.partition("\n\n")[0].count("\n") == 0  # the list of commands shows this line and no other
        assert f"babelephant {name}" in shown.partition("examples:")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--version"])
    assert capsys.readouterr().out.startswith("babelephant ")


def test_translate_prints_one_translation_per_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--from", "en", "--to", "de", "--checkpoint", str(checkpoint), "--precision", "fp32", "--json"]
    assert main(["translate", *arguments, "the tin", "", "an\n hen"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["the tin", "", "an\n hen"]
    assert [len(row["lines"]) for row in rows] == [1, 0, 2]
    assert rows[2]["translation"].count("\n") == 1
    assert rows[1]["translation"] == ""
    assert main(["translate", *arguments, "an"]) == 0  # a line alone and in a text translates the same
    alone = json.loads(capsys.readouterr().out)
    assert alone["translation"] == rows[2]["translation"].partition("\n")[0]


def test_translate_reads_standard_input(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_text("the\n\nhen\n")
    with (tmp_path / "in").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert main(["translate", "--from", "en", "--to", "fr", "--checkpoint", str(checkpoint), "--precision", "fp32"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4
    assert lines[1] == lines[3] == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--from", "xx", "--to", "de", "a"], "'xx'"),
        (["--from", "en", "--to", "sw", "a"], "swh_Latn"),
        (["--from", "en", "--to", "de", "--beam-size", "9", "a"], "beam_size"),
        (["--from", "en", "--to", "de", "--checkpoint", "/nowhere", "a"], "/nowhere"),
    ],
)
def test_translate_names_what_is_wrong(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    if "--checkpoint" not in arguments:
        arguments = ["--checkpoint", str(checkpoint), *arguments]
    assert main(["translate", "--precision", "fp32", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("babelephant: error: ")
    assert named in error
    assert "Traceback" not in error


def test_convert_then_inspect(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "converted"
    assert main(["convert", str(checkpoint), str(out), "--precision", "w8a16"]) == 0
    assert main(["inspect", str(checkpoint), "--precision", "w8a16", "--precision", "w4a16"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("relative error") == 3
    assert main(["convert", str(checkpoint), str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_serve_says_at_once_that_the_port_is_busy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert f"--port {port + 1}" in done.stderr
    assert "Starting Ray" not in done.stderr
