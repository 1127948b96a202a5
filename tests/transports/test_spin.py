"""Spinning stops where it is in vain, and comes back where it is not."""

from __future__ import annotations

from headwater.transports.spin import Spinning


def waits(spinning: Spinning, hits: bool, count: int) -> str:
    """What each of so many waits did: s, it spun (and something came, or nothing), or -, it slept."""
    said = ""
    for _ in range(count):
        pays = spinning.pays()
        said += "s" if pays else "-"
        if pays:
            (spinning.hit if hits else spinning.missed)()
    return said


def test_what_pays_goes_on() -> None:
    assert waits(Spinning(), True, 100) == "s" * 100


def test_what_is_in_vain_is_tried_ever_more_seldom() -> None:
    spinning = Spinning()
    assert waits(spinning, False, 12) == "s-s---s-----"
    assert waits(spinning, False, 6500).count("s") in range(100, 112)


def test_one_hit_and_it_pays_again() -> None:
    spinning = Spinning()
    waits(spinning, False, 1000)
    while not spinning.pays():
        pass
    spinning.hit()
    assert waits(spinning, True, 50) == "s" * 50
    assert waits(spinning, False, 3) == "s-s"
