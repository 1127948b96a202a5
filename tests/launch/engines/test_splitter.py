"""Lines out of the bytes of pipes."""

from __future__ import annotations

from headwater.launch.engines.splitter import LineSplitter


def test_lines_come_whole_however_the_bytes_arrive() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"on", 0.0) == []
    assert splitter.feed(b"e\ntwo\r\nth", 0.0) == ["one", "two"]
    assert splitter.feed(b"ree \xff\n", 0.0) == ["three \N{REPLACEMENT CHARACTER}"]
    assert splitter.flush() == []


def test_what_is_left_without_an_end_of_line_is_not_lost() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"tail", 0.0) == []
    assert splitter.flush() == ["tail"]


def test_a_character_split_between_reads_is_put_together() -> None:
    first, second = "β\n".encode()[:1], "β\n".encode()[1:]
    splitter = LineSplitter()
    assert splitter.feed(first, 0.0) + splitter.feed(second, 0.0) == ["β"]


def test_a_progress_bar_becomes_a_line_a_second() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b" 1%\r 2%\r", 0.0) == [" 2%"]
    assert splitter.feed(b" 3%\r", 0.5) == []
    assert splitter.feed(b" 4%\r", 1.0) == [" 4%"]
    assert splitter.feed(b"99%\r100%\n", 1.1) == ["100%"]


def test_an_endless_line_is_cut() -> None:
    splitter = LineSplitter()
    (line,) = splitter.feed(b"x" * 100_000, 0.0)
    assert len(line) == 100_000
    assert splitter.flush() == []


def test_an_unfinished_line_is_a_prompt_after_a_while() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"hello\n(Pdb) ", 5.0) == ["hello"]
    assert 5.0 < splitter.prompting < 6.0
    assert splitter.prompt() == "(Pdb) "
    assert splitter.prompting == float("inf")
    assert splitter.feed(b"42\n", 7.0) == ["42"]


def test_a_progress_bar_is_no_prompt() -> None:
    splitter = LineSplitter()
    splitter.feed(b"\r10 %\r20 %", 5.0)
    assert splitter.prompting == float("inf")
