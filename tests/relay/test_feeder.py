"""The line to where versions come from: which base, which holder, what need not come twice."""

from __future__ import annotations

import pytest

from headwater.relay.events import Base, Job, same
from headwater.relay.feeder import nearest, turned
from headwater.types import VersionInfo
from headwater.wire import versions as v

INFO = VersionInfo("lm", 7, "v7", 6, 7, 5.0, ("lm",), 10, "ab")


@pytest.mark.parametrize(("there", "best"), [((1, 5), 5), ((6, 8), 6), ((3, 9), 9), ((), 0), ((12,), 12)])
def test_the_nearest_version_is_the_base(there: tuple[int, ...], best: int) -> None:
    assert nearest(Job(INFO, tuple(Base(number, {}, ()) for number in there), 0)).number == best


def test_each_attempt_begins_with_another_holder() -> None:
    holders = tuple(v.Holder(f"tcp://127.0.0.1:{port}", "", "") for port in (1, 2, 3))
    at = v.PartAt(0, 1, 10, 5, holders)
    first = [turned(at, attempt).holders[0] for attempt in range(4)]
    assert first == [*holders, holders[0]]
    assert set(turned(at, 2).holders) == set(holders)
    assert turned(v.PartAt(0, 1, 10, 5, ()), 3).holders == ()


@pytest.mark.parametrize(
    "other",
    [
        VersionInfo("other", 7, "v7", 6, 7, 5.0, ("lm",), 10, "ab"),
        VersionInfo("lm", 8, "v7", 6, 7, 5.0, ("lm",), 10, "ab"),
        VersionInfo("lm", 7, "v8", 6, 7, 5.0, ("lm",), 10, "ab"),
        VersionInfo("lm", 7, "v7", 6, 7, 6.0, ("lm",), 10, "ab"),
        VersionInfo("lm", 7, "v7", 6, 7, 5.0, ("lm",), 10, "cd"),
    ],
)
def test_a_version_is_known_by_more_than_its_number(other: VersionInfo) -> None:
    assert same(INFO, VersionInfo("lm", 7, "v7", 6, 7, 5.0, ("lm",), 10, "ab", {"more": "words"}))
    assert not same(INFO, other)
