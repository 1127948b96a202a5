"""Prefixes, with and without a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from headwater.launch.output import Printer

W1: Any = SimpleNamespace(name="w1", role="worker", rank=1)


def test_each_stream_goes_to_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    printer(W1, "stdout", "loss 1.0 [bold]")
    printer(W1, "stderr", "careful")
    out, err = capsys.readouterr()
    assert out == "[w1] loss 1.0 [bold]\n"
    assert err == "[w1] careful\n"


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
