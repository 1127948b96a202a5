from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import headwater
from headwater.errors import UsageError
from headwater.launch import Shape
from headwater_recipes.common.options import make_changes
from headwater_recipes.common.settings import cluster, parse_sync
from headwater_recipes.lm.settings import LmSettings


def test_the_policies() -> None:
    assert parse_sync("bulk") == headwater.Bulk()
    assert parse_sync("stale:3") == headwater.Stale(3)
    assert parse_sync("async") == headwater.Async()
    assert parse_sync("async:8") == headwater.Async(8)


@pytest.mark.parametrize("text", ["", "bulk:2", "stale", "stale:-1", "async:x", "local:8"])
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be bulk, stale:N, async or async:N"):
        parse_sync(text)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preset": "huge"}, "'huge' is none of"),
        ({"workers": 0}, "workers=0"),
        ({"seq": 1}, "seq=1"),
        ({"vocabulary": 256}, "vocabulary=256"),
        ({"steps": 5, "minutes": 1.0}, "one of them"),
        ({"steps": 0}, "--steps 0"),
        ({"lr": -1.0}, "--lr"),
        ({"sync": "never"}, "--sync never"),
        ({"replicas": 3}, "replicas=3 with servers=2"),
        ({"snapshot_every": 1.0}, "--snapshots"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(changes: dict[str, Any], says: str) -> None:
    LmSettings().check()
    with pytest.raises(UsageError, match=says):
        LmSettings(**changes).check()


def test_options_left_out_change_nothing() -> None:
    given = {"lr": None, "seed": 0, "precision": "float32"}
    assert make_changes(LmSettings, given) == {"seed": 0, "precision": "float32"}
    with pytest.raises(UsageError, match="--precision half"):
        make_changes(LmSettings, {"precision": "half"})
    with pytest.raises(UsageError, match="--ack paper"):
        make_changes(LmSettings, {"ack": "paper"})


def test_what_the_launcher_is_told() -> None:
    assert cluster(LmSettings()).items() >= {"replicas": 1, "ack": "memory", "state": None}.items()
    found = cluster(LmSettings(replicas=2, snapshots="x", snapshot_every=5.0))
    assert (found["replicas"], found["snapshots"], found["snapshot_every"]) == (2, Path("x"), 5.0)
    assert found.keys() <= inspect.signature(Shape).parameters.keys()
