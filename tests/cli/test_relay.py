"""What ``headwater relay`` prints."""

from __future__ import annotations

import json

import pytest

from headwater.cli import relay
from headwater.relay.events import Back, Taken, Trouble
from headwater.types import VersionInfo

INFO = VersionInfo("lm", 7, "step-1200", 6, 1200, 5.0, ("lm",), 500_000_000, "ab")


def test_a_line_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    relay._say(Taken(INFO, 500_000_000, "whole", 1.234))
    relay._say(Taken(INFO, 4_600, "delta", 0.031))
    relay._say(Taken(INFO, 4_600, "mixed", 0.031))
    relay._say(Trouble("tcp://… does not answer: [gone]. What is here is served"))
    relay._say(Back(12.4))
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "lm step-1200 step 1,200: 500 MB whole, 1.23 s",
        "lm step-1200 step 1,200: 4.6 kB as a delta, 0.03 s",
        "lm step-1200 step 1,200: 4.6 kB partly as a delta, 0.03 s",
    ]
    assert captured.err.splitlines() == [
        "tcp://… does not answer: [gone]. What is here is served",
        "versions come again, after 12 s",
    ]


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for news in (Taken(INFO, 10, "delta", 0.5), Trouble("why"), Back(2.0)):
        relay._say_json(news)
    taken, trouble, back = map(json.loads, capsys.readouterr().out.splitlines())
    assert taken["version"]["name"] == "step-1200"
    assert (taken["event"], taken["nbytes"], taken["way"], taken["seconds"]) == ("taken", 10, "delta", 0.5)
    assert trouble == {"event": "trouble", "text": "why"}
    assert back == {"event": "back", "seconds": 2.0}
