"""The words, how they are spelt for the synthesizer, and where they lie among the recordings of a person."""

from __future__ import annotations

from string import ascii_lowercase
from typing import NamedTuple


class Word(NamedTuple):
    """``spelt`` is given to eSpeak NG; ``recorded`` are files of the data set ``asterisk-en``."""

    label: str
    spelt: str
    recorded: tuple[str, ...]


_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_ALPHABET = """
alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo sierra
tango uniform victor whiskey xray yankee zulu
"""
_DAYS = ["sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday"]
_OTHERS = {
    "today": ("digits/today.wav",),
    "tomorrow": ("digits/tomorrow.wav",),
    "yesterday": ("digits/yesterday.wav",),
    "hello": ("hello.wav",),
    "goodbye": ("goodbye.wav", "vm-goodbye.wav"),
}


def words() -> list[Word]:
    """10 digits, 26 letters, the 26 words that spell letters on the radio, 7 days and 5 other words."""
    found = [Word(word, word, (f"digits/{number}.wav",)) for number, word in enumerate(_DIGITS)]
    for letter, spelling in zip(ascii_lowercase, _ALPHABET.split(), strict=True):
        both = ("letters/z.wav", "letters/zed.wav") if letter == "z" else (f"letters/{letter}.wav",)
        found.append(Word(letter, letter.upper(), both))
        found.append(Word(spelling, "x-ray" if spelling == "xray" else spelling, (f"phonetic/{letter}_p.wav",)))
    found += [Word(day, day, (f"digits/day-{number}.wav",)) for number, day in enumerate(_DAYS)]
    return found + [Word(word, word, files) for word, files in _OTHERS.items()]
