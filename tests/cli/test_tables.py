"""Tables that fit, and their redrawing."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import count

import pytest
from rich.console import Console
from rich.text import Text

from headwater.cli import tables
from headwater.cli.tables import fit, grid, watch


def _drawn(until: int) -> Callable[[int], Text]:
    """Draws ``picture 0``, ``picture 1`` …; then comes a Ctrl-C."""
    numbers = count()

    def draw(width: int) -> Text:
        number = next(numbers)
        if number == until:
            raise KeyboardInterrupt
        return Text(f"picture {number} of {width}")

    return draw


def test_columns_go_in_the_order_that_was_named() -> None:
    table = grid("T", "name", "long", "longer>", "note~")
    table.add_row("a", "12345", "1234567", "some words that may wrap")
    assert fit(table, 100, ("long", "longer")) == []
    assert fit(table, 30, ("long", "longer")) == ["long"]
    assert fit(table, 1, ("longer",)) == ["longer"]
    assert [column.header for column in table.columns] == ["name", "note"]
    console = Console(width=16)
    with console.capture() as captured:
        console.print(table)
    assert [line.rstrip() for line in captured.get().splitlines()] == [
        "T", "name  note", "a     some words", "      that may", "      wrap",
    ]  # fmt: skip


def test_into_a_pipe_one_picture_follows_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    watch(_drawn(2), 0.0)
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    assert first[:2] == "20"  # the date
    assert first.count(":") == 2
    assert second == "picture 0 of 160"
    assert third == ""
    assert rest[1:] == ["picture 1 of 160", ""]


def test_what_is_written_into_a_pipe_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture is flushed before the next is drawn."""

    class Pipe(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    pipe = Pipe()
    monkeypatch.setattr(tables, "out", lambda: Console(file=pipe))
    pictures = _drawn(2)

    def draw(width: int) -> Text:
        assert pipe.flushed == pipe.getvalue()
        return pictures(width)

    watch(draw, 0.0)
    assert "picture 1" in pipe.flushed


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_on_a_terminal_it_is_redrawn_and_on_a_dumb_one_it_is_not(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("TERM", kind)
    file = io.StringIO()
    file.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(tables, "out", lambda: Console(file=file, width=50))
    monkeypatch.setattr("sys.stdout", file)
    watch(_drawn(2), 0.0)
    text = file.getvalue()
    assert "picture 0 of" in text
    assert "picture 1 of" in text
    assert ("\x1b" in text) == (kind == "xterm")
