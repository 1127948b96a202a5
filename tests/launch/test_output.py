"""Prefixes, with and without a terminal."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from headwater.launch.engines.splitter import LineSplitter
from headwater.launch.output import Printer, note

W1: Any = SimpleNamespace(name="w1", role="worker", rank=1)


def test_each_stream_goes_to_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    printer(W1, "stdout", "loss 1.0 [bold]")
    printer(W1, "stderr", "careful")
    out, err = capsys.readouterr()
    assert out == "[w1] loss 1.0 [bold]\n"
    assert err == "[w1] careful\n"


def test_a_full_disk_loses_lines_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printer = Printer()
    with Path("/dev/full").open("w", encoding="utf-8") as full:  # and closes: nothing is left in its buffer
        monkeypatch.setattr("sys.stdout", full)
        for _ in range(3):
            printer(W1, "stdout", "loss 1.0")
    printer(W1, "stderr", "careful")
    err = capsys.readouterr().err
    assert err.count("lost from here on (No space left on device); the job goes on") == 1
    assert err.endswith("[w1] careful\n")


def test_a_pipe_that_nobody_reads_is_told_to_the_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        monkeypatch.setattr("sys.stdout", file)
        with pytest.raises(BrokenPipeError):
            Printer()(W1, "stdout", "loss 1.0")
    assert "nobody reads what this command prints any more" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_not_in_the_outputs_encoding_is_written_as_numbers(
    monkeypatch: pytest.MonkeyPatch, encoding: str, terminal: bool
) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(out, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stdout", out)
    (line,) = LineSplitter().feed("caf\u00e9 \u2713 ".encode() + b"\xff\n", 0.0)
    Printer()(W1, "stdout", line + "\udce9")
    text = raw.getvalue().decode(encoding)
    assert "caf" in text
    assert ("\u2713" if encoding == "utf-8" else "\\u2713") in text
    assert "\\udce9" in text


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_without_a_standard_stream_the_line_is_dropped(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(f"sys.{stream}", None)
    Printer()(W1, stream, "loss 1.0")
    note("somebody died")


def test_on_a_terminal_the_prefix_is_coloured_and_the_line_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    printer = Printer()
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, color_system="standard", width=20)
    monkeypatch.setitem(printer._consoles, "stdout", terminal)
    printer(W1, "stdout", "[red]not markup[/red] and \x1b[31mlonger than the terminal\x1b[0m")
    text = file.getvalue()
    assert text.count("\n") == 1
    assert "\x1b[35m[w1] \x1b[0m" in text
    assert "[red]not markup[/red]" in text
    assert "\x1b[31mlonger than the terminal" in text


def test_a_prompt_stays_open_for_its_process_and_not_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    w0: Any = SimpleNamespace(name="w0", role="worker", rank=0)
    printer.prompt(W1, "stdout", "name? ")
    assert capsys.readouterr().out == "[w1] name? "
    printer(W1, "stdout", "hello")
    printer.prompt(W1, "stdout", "(Pdb) ")
    printer(w0, "stdout", "step 3")
    printer(W1, "stdout", "over")
    assert capsys.readouterr().out == "hello\n[w1] (Pdb) \n[w0] step 3\n[w1] over\n"


def test_on_a_terminal_the_space_behind_a_prompt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    printer = Printer()
    file = io.StringIO()
    monkeypatch.setitem(printer._consoles, "stdout", Console(file=file, force_terminal=True, color_system=None))
    printer.prompt(W1, "stdout", "(Pdb) ")
    assert file.getvalue() == "[w1] (Pdb) "
