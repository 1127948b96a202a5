"""Text as it comes: whole characters, and no stop text."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from headwater.gateway.detokenize import Detokenizer, StopTexts


def decode(ids: Sequence[int]) -> str:
    """A tokenizer of bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_comes_when_it_is_whole() -> None:
    made = Detokenizer(decode)
    assert [made.push(b) for b in "aé🎈z".encode()] == ["a", "", "é", "", "", "", "🎈", "z"]


@given(st.text(max_size=40), st.binary(max_size=8))
def test_the_pieces_are_the_whole(text: str, prompt: bytes) -> None:
    made = Detokenizer(decode, list(prompt.decode("utf-8", "ignore").encode()))
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    assert "".join(made.push(b) for b in text.encode()) == text


@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_neither_stall_nor_grow(data: bytes) -> None:
    made = Detokenizer(decode)
    shown = "".join(made.push(b) for b in (*data, *b"the end, and all of it"))
    assert shown.endswith("all of it")
    assert len(made._ids) <= 16


def test_a_space_that_a_word_begins_with_is_kept() -> None:
    words = ["", "Hello", "▁world", "▁again"]

    def pieces(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    made = Detokenizer(pieces, [1])
    assert made.push(2) + made.push(3) == " world again"


@given(st.lists(st.text("ab", max_size=3), max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_text_is_shown(pieces: list[str], stops: list[str]) -> None:
    made = StopTexts(stops)
    shown, stopped, given_so_far = "", False, ""
    for piece in pieces:
        text, stopped = made.push(piece)
        shown += text
        given_so_far += piece
        assert given_so_far.startswith(shown)
        if stopped:
            break
    assert stopped == any(stop in given_so_far for stop in stops)
    if stopped:
        assert shown == given_so_far[: min(at for stop in stops if (at := given_so_far.find(stop)) >= 0)]
    else:
        assert shown + made.flush() == given_so_far


@given(st.binary(max_size=40))
def test_what_is_left_at_the_end_is_flushed(data: bytes) -> None:
    made = Detokenizer(decode)
    assert "".join(made.push(b) for b in data) + made.flush() == decode(data)
    assert made.flush() == ""


@given(
    st.lists(st.tuples(st.text("ab", max_size=3), st.sampled_from(["", "<s>", "<b>"])), max_size=12),
    st.lists(st.text("ab<s>", min_size=1, max_size=5), max_size=3),
)
def test_texts_of_special_tokens_stop_and_are_not_shown(pieces: list[tuple[str, str]], stops: list[str]) -> None:
    made = StopTexts(stops)
    shown, whole = "", ""
    for text, special in pieces:
        said, stopped = made.push(text, special)
        shown += said
        whole += text + special.replace("<", "(").replace(">", ")")  # told apart from what is shown
        if stopped:
            break
    else:
        stopped = False
        shown += made.flush()
    plain = whole.replace("(", "<").replace(")", ">")
    places = [at for stop in stops if (at := plain.find(stop)) >= 0]
    assert stopped == bool(places)
    upto = whole[: min(places)] if places else whole
    open_, expected = 0, ""
    for letter in upto:
        open_ += letter == "("
        expected += "" if open_ else letter
        open_ -= letter == ")"
    assert shown == expected


def test_a_stop_text_of_several_tokens() -> None:
    made = StopTexts(["<end>\nnext"])
    assert [made.push("one", "<end>"), made.push("\nne"), made.push("w")] == [
        ("one", False), ("", False), ("\nnew", False)
    ]  # fmt: skip
    assert [made.push("two", "<end>"), made.push("\nnext")] == [("two", False), ("", True)]


def test_what_only_looked_like_a_stop_text_comes_later() -> None:
    made = StopTexts(["###"])
    assert [made.push(t)[0] for t in ("a#", "#", "b", "##")] == ["a", "", "##b", ""]
    assert made.flush() == "##"
