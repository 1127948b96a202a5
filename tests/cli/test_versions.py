"""``headwater versions``: what it draws, and what each command does to a cluster."""

from __future__ import annotations

import itertools
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from safetensors import safe_open

import headwater
from headwater.cli.versions import draw, now_listed
from headwater.client.dense.handle import Dense
from headwater.types import VersionInfo
from headwater.wire.statuses import RelayStatus
from headwater.wire.versions import VersionStatus

Command = Callable[..., Any]

INFO = VersionInfo("lm", 7, "step-1200", 6, 1200, 1000.0, ("lm",), 270_000_000, "ab12")
READY = VersionStatus(INFO, "ready", ("latest", "production"), 3, 2)
OLDER = VersionStatus(msgspec.structs.replace(INFO, number=6, name="step-600", parent=5, step=600), "ready", (), 0, 2)
NUMBERS = itertools.count()


def _drawn(*found: VersionStatus, wanted: int = 2, width: int = 130) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(draw(found, wanted, 1075.0, width))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def _styles(*found: VersionStatus, wanted: int = 2) -> tuple[str, list[str]]:
    """Of the line that says how things stand, and of the table's rows."""
    group: Any = draw(found, wanted, 1075.0)
    _, health, _, table = group.renderables
    return str(health.style), [str(row.style) for row in table.rows]


# ---- what is drawn -----------------------------------------------------------------------------------


def test_the_newest_is_first_and_parents_have_names() -> None:
    assert _drawn(OLDER, READY) == [
        "2 versions of 1 model, 1.1 GB held",
        "every version has its 2 copies",
        "",
        "model name number step age size state tags leases copies parent",
        "lm step-1200 7 1,200 1 min 15 s 270 MB ready latest production 3 2 of 2 step-600",
        "lm step-600 6 600 1 min 15 s 270 MB ready – 0 2 of 2 5, gone",
    ]


def test_a_narrow_terminal_is_not_shown_everything() -> None:
    assert _drawn(READY, width=80)[3] == "name number step age size state tags leases copies"


def test_a_lost_version_stands_out_most() -> None:
    lost = msgspec.structs.replace(OLDER, state="lost", copies=0)
    assert _styles(READY, lost) == ("bold red", ["", "bold red"])
    assert _drawn(READY, lost)[1].startswith("lost: step-600: no server that is there holds all of it")


def test_one_copy_of_two_stands_out() -> None:
    assert _styles(msgspec.structs.replace(READY, copies=1), OLDER) == ("yellow", ["yellow", ""])
    assert _styles(msgspec.structs.replace(READY, copies=1), wanted=1) == ("dim", [""])


def test_a_version_on_its_way_has_no_copies_to_miss() -> None:
    info = msgspec.structs.replace(INFO, nbytes=0, digest="")
    coming = VersionStatus(info, "cutting", (), 0, 0)
    assert _styles(coming) == ("green", [""])
    assert _drawn(coming)[1] == "every version has its 2 copies; 1 on the way"
    assert " cutting – 0 – " in _drawn(coming)[4]


def test_many_tags_wrap_instead_of_pushing_the_rest_away() -> None:
    tagged = msgspec.structs.replace(READY, tags=tuple(f"customer-{i}" for i in range(20)))
    assert max(map(len, _drawn(tagged, width=90))) <= 90
    assert "2 of 2" in " ".join(_drawn(tagged, width=90))


class _Client:
    """Of a relay, or of a cluster's coordinator."""

    def __init__(self, relay: RelayStatus | None) -> None:
        self._relay = relay

    def status(self) -> Any:
        return SimpleNamespace(replicas=1, relay=self._relay)

    def versions(self, model: str) -> list[VersionStatus]:
        assert model == "lm"
        return [READY]


@pytest.mark.parametrize(
    ("relay", "first"),
    [
        (None, "1 version of 1 model"),
        (RelayStatus("tcp://a:1", 0.0, "", 1, 1), "versions come from tcp://a:1"),
        (RelayStatus("tcp://a:1", 61.0, "it is gone", 1, 1), "tcp://a:1 has been silent for 1 min 1 s (it is gone)"),
    ],
)
def test_at_a_relay_the_first_line_says_whether_versions_come(relay: RelayStatus | None, first: str) -> None:
    console = Console(width=130)
    with console.capture() as captured:
        console.print(now_listed(_Client(relay), "lm", 130))  # type: ignore[arg-type]
    assert captured.get().startswith(first)


# ---- what it does ------------------------------------------------------------------------------------


@pytest.fixture
def address() -> str:
    """Of a cluster in this process that no other test has."""
    return f"inproc://versions-{next(NUMBERS)}"


@pytest.fixture
def trainer(address: str) -> Iterator[headwater.Client]:
    """Versions a and b of table ``w``; b is one step further."""
    with headwater.connect(address, rank=0, world=1, servers=2) as ps:
        w = ps.dense("w", (50_000,), optimizer=torch.optim.SGD, lr=1.0, sync=headwater.Bulk())
        ps.dense("other", (8,))
        for name in "ab":
            w.push_pull(torch.full((50_000,), -1.0))
            ps.publish([w], name, tags=["production"]).wait()
        yield ps


@pytest.fixture
def versions(headwater_command: Command, trainer: headwater.Client, address: str) -> Command:
    """``headwater versions …`` of the trainer's cluster."""
    return lambda *words: headwater_command("versions", *words, "--address", address)


def _tags(ps: headwater.Client, model: str = "w") -> dict[str, tuple[str, ...]]:
    return {each.info.name: each.tags for each in ps.versions(model)}


def test_without_a_word_it_lists(versions: Command) -> None:
    assert "2 versions of 1 model" in versions().out
    assert "2 versions of 1 model" in versions("w").out
    assert versions("nobody").out == "nothing is published\n"
    found = json.loads(versions("--json").out)["versions"]
    assert [(each["info"]["name"], each["tags"]) for each in found] == [("a", []), ("b", ["latest", "production"])]


def test_the_help_has_every_command(headwater_command: Command) -> None:
    answer = headwater_command("versions", "--help")
    assert answer.code == 0
    for name in ("list", "tag", "rollback", "retire", "publish", "export"):
        assert f" {name} " in answer.out


def test_a_tag_is_made_moved_and_taken_away(versions: Command, trainer: headwater.Client) -> None:
    assert versions("tag", "w", "canary", "a").out == "canary of w means a (number 1, step 1)\n"
    versions("tag", "w", "canary", "production")
    assert _tags(trainer) == {"a": (), "b": ("latest", "canary", "production")}
    assert versions("tag", "w", "canary", "--delete").out == "w has no tag canary any more\n"
    assert _tags(trainer)["b"] == ("latest", "production")
    for words in (("tag", "w", "canary"), ("tag", "w", "canary", "a", "--delete")):
        answer = versions(*words)
        assert (answer.code, "nothing was changed" in answer.err) == (1, True)


def test_rollback_moves_a_tag_to_the_parent(versions: Command, trainer: headwater.Client) -> None:
    assert versions("rollback", "w", "production").out == "production of w means a (number 1, step 1)\n"
    answer = versions("rollback", "w", "production")
    assert answer.code == 1
    assert "'a' is the first version of 'w', without a parent; 'production' still means 'a'" in answer.err
    versions("rollback", "w", "production", "--to", "b")
    assert _tags(trainer) == {"a": (), "b": ("latest", "production")}
    assert "has no tag 'prodution'; it has production" in versions("rollback", "w", "prodution", "--to", "a").err


def test_a_parent_that_is_gone_is_named(versions: Command, trainer: headwater.Client) -> None:
    trainer.retire("w", "a")
    answer = versions("rollback", "w", "production")
    assert answer.code == 1
    assert "the parent of 'b', number 1, is gone: it was retired; 'production' still means 'b'" in answer.err
    assert _tags(trainer) == {"b": ("latest", "production")}


def test_what_is_held_is_not_retired(versions: Command, trainer: headwater.Client, address: str) -> None:
    assert "held by tag 'production'" in versions("retire", "w", "b").err
    with headwater.reader("w", address) as reader, reader.lease("a"):
        assert "held by 1 lease" in versions("retire", "w", "a").err
    assert versions("retire", "w", "a").code == 0
    assert list(_tags(trainer)) == ["b"]


def test_publish_from_the_shell(versions: Command, trainer: headwater.Client, address: str) -> None:
    Dense(trainer.tables["w"], 0).push(torch.full((50_000,), -1.0)).wait()
    answer = versions("publish", "w", "c", "--tag", "staging", "--keep", "1", "--metadata", "loss=0.5=half")
    assert "c of w: number 3, step 3, " in answer.out
    found = {each.info.name: each for each in trainer.versions("w")}
    assert {name: each.tags for name, each in found.items()} == {"b": ("production",), "c": ("latest", "staging")}
    assert found["c"].info.metadata == {"loss": "0.5=half"}
    with headwater.reader("w", address) as reader, reader.lease("c") as weights:
        assert weights["w"].eq(3.0).all()


def test_publish_names_its_tables(versions: Command, trainer: headwater.Client) -> None:
    assert versions("publish", "pair", "one", "--tables", "w", "--tables", "other").code == 0
    assert trainer.versions("pair")[0].info.tables == ("w", "other")
    assert "no table 'pair'; it has 'other', 'w'" in versions("publish", "pair", "two").err
    assert "'half' is not KEY=VALUE" in versions("publish", "w", "two", "--metadata", "half").err
    assert "has a version 'a' already" in versions("publish", "w", "a").err
    assert list(_tags(trainer)) == ["a", "b"]


def test_what_python_is_told(trainer: headwater.Client, address: str) -> None:
    with headwater.reader("w", address) as reader:
        reader.tag("canary", "a")
        assert reader.rollback("production").info.name == "a"
        reader.untag("canary")
        assert {each.info.name: each.tags for each in reader.versions()} == {"a": ("production",), "b": ("latest",)}
        with pytest.raises(headwater.UsageError, match="name a version"):
            reader.tag("production", "")
        reader.rollback("production", "latest")
        reader.retire("a")
    assert _tags(trainer) == {"b": ("latest", "production")}
    with pytest.raises(headwater.UnknownVersion, match="no tag 'canary'"):
        trainer.untag("w", "canary")
    with pytest.raises(headwater.UnknownTable, match="no table 'v'"):
        trainer.publish(["v"], "x")


# ---- export --------------------------------------------------------------------------------------------


def test_a_version_becomes_a_file(versions: Command, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    assert "model.safetensors  200 kB" in versions("export", "w", "production", str(out)).out
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.get_tensor("w").eq(2.0).all()
        told = dict(file.metadata())
    assert len(told.pop("digest")) == 16
    assert told == {"format": "pt", "model": "w", "version": "b", "step": "2"}
    answer = versions("export", "w", "a", str(out))
    assert (answer.code, "exists; nothing was written" in answer.err) == (1, True)
    assert versions("export", "w", "a", str(out), "--force").code == 0
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.get_tensor("w").eq(1.0).all()


def _with_room_for(nbytes: int, call: Callable[[], Any]) -> Any:
    """What ``call`` returns while no file may grow beyond ``nbytes``: a write comes up short, the next one fails.

    A reader's memory counts as files too: each shard's part must fit.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_behind(versions: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = _with_room_for(150_000, lambda: versions("export", "w", "b", str(out)))
    assert answer.code == 1
    assert answer.err.startswith("headwater: DiskFull: ")
    assert f"there is no {out}/model.safetensors, and nothing is left of the attempt" in answer.err
    assert not out.exists()


def test_a_full_disk_leaves_what_was_there(versions: Command, tmp_path: Path) -> None:
    versions("export", "w", "a", str(tmp_path))
    before = (tmp_path / "model.safetensors").read_bytes()
    answer = _with_room_for(150_000, lambda: versions("export", "w", "b", str(tmp_path), "--force"))
    assert "model.safetensors is as it was before" in answer.err
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("model.safetensors?*"))


def test_a_folder_that_cannot_be(versions: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    answer = versions("export", "w", "b", str(tmp_path / "file" / "out"))
    assert (answer.code, "nothing was written" in answer.err) == (1, True)
    assert "UnknownVersion" in versions("export", "w", "zebra", str(tmp_path / "out")).err
    assert not (tmp_path / "out").exists()
