"""Bugs put in on purpose: the battery must find each. A battery that finds none of them proves nothing."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headwater.cluster.fleet import Fleet
from headwater.server.node import Node
from headwater.server.replication.log import Log
from headwater.server.replication.records import Record
from headwater.server.replication.replica import Replica
from headwater.server.shard import Shard
from headwater.server.snapshots import manifest
from headwater.testing import battery
from headwater.testing.battery import Tally
from headwater.testing.hosts import SimServer
from headwater.testing.scenario import harsh
from headwater.wire import messages as m
from tests.server.snapshots import test_crashes

SEEDS = range(800)


Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Servers that are told to go say so: that is not what is looked for here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def acknowledge_before_replicating(patch: pytest.MonkeyPatch) -> None:
    """The primary applies and acknowledges at once, whoever follows."""

    def take(self: Log) -> Record | None:
        pending: deque[Record] = self.pending
        return pending.popleft() if pending and not self.blocked else None

    patch.setattr(Log, "next_accepted", take)


def forget_session_numbers(patch: pytest.MonkeyPatch) -> None:
    """A newcomer gets the values, and no word of which pushes are in them."""
    begin = Replica.begin_anew

    def begin_anew(self: Replica, lsn: int, members: m.Members, sessions: tuple[Any, ...], *rest: Any) -> None:
        begin(self, lsn, members, tuple(msgspec.structs.replace(s, done=()) for s in sessions), *rest)

    patch.setattr(Replica, "begin_anew", begin_anew)


def skip_the_epoch_check(patch: pytest.MonkeyPatch) -> None:
    """Whoever has as many records as its primary is taken to have the same ones, from whatever epoch they are."""

    def continues(self: Shard, request: m.Follow) -> bool:
        return self.lsn <= request.lsn <= self.log.last

    def follow(self: Node, peer: int, frame: Any, request: m.Follow) -> Any:
        since = self.followers.since
        since.update(dict.fromkeys(since, 0))
        return original(self, peer, frame, msgspec.structs.replace(request, epoch=self.view.epoch))

    original = Node.follow
    patch.setattr(Shard, "continues", continues)
    patch.setattr(Node, "follow", follow)


def reuse_an_incarnation(patch: pytest.MonkeyPatch) -> None:
    """A server that was started again says that it is the one from before."""
    begin = SimServer.__init__
    known: dict[tuple[int, str], SimServer] = {}

    def init(self: SimServer, network: Any, process: Any, *rest: Any) -> None:
        begin(self, network, process, *rest)
        before = known.get((id(network), process.name))
        if before is not None and before.number >= 0:
            self._join = msgspec.structs.replace(before._join, resume=True, server=before.number)
        known[id(network), process.name] = self

    def disconnected(self: Fleet, peer: int) -> Any:
        """The coordinator is not quicker than the restart."""
        for member in self.servers.values():
            if member.peer == peer:
                member.peer = None

    patch.setattr(SimServer, "__init__", init)
    patch.setattr(Fleet, "disconnected", disconnected)


def promote_one_that_is_out_of_sync(patch: pytest.MonkeyPatch) -> None:
    """When a primary dies, whoever is about to learn takes over."""
    repair = Fleet._repair

    def any_heir(self: Fleet, shard: int) -> None:
        view = self.views[shard]
        if view.learners and view.primary is not None and not self._up(view.primary.server):
            self.views[shard] = msgspec.structs.replace(view, backups=(*view.learners, *view.backups), learners=())
        repair(self, shard)

    patch.setattr(Fleet, "_repair", any_heir)


BUGS: list[Patch] = [
    acknowledge_before_replicating,
    forget_session_numbers,
    skip_the_epoch_check,
    reuse_an_incarnation,
    promote_one_that_is_out_of_sync,
]


def test_an_old_snapshot_that_goes_before_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the level of files: a crash between the two leaves neither (tests/server/snapshots has the disk)."""
    publish = manifest.publish

    def too_early(root: Path, *args: Any, disk: Any, **kwargs: Any) -> Any:
        manifest.prune(root, 0, disk)
        for number in manifest.finished(root):
            manifest._delete(manifest.folder_of(root, number), disk)
        return publish(root, *args, disk=disk, **kwargs)

    monkeypatch.setattr(manifest, "publish", too_early)
    disk = test_crashes.record(tmp_path / "run")
    with pytest.raises(AssertionError):
        test_crashes.check_all(disk, tmp_path)


def _found(tally: Tally) -> bool:
    return bool(tally.violations)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_battery_catches(bug: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    tally = battery.sweep(SEEDS, stop=_found, make=harsh)
    assert tally.violations, f"{tally.runs} runs did not find: {bug.__doc__}"


def test_a_failing_run_is_shortened_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    acknowledge_before_replicating(monkeypatch)
    tally = battery.sweep(SEEDS, stop=_found, make=harsh)
    seed, mode, _ = tally.violations[0]
    one = harsh(seed, mode)
    text = battery.explain(one, battery.play(one))
    assert f"--seed {seed} --mode {mode} --keep" in text
    assert text.count("VIOLATION") == 1
