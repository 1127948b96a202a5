"""Relays with their sockets, on the loopback, behind a cluster of this process; readers as anybody has them."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import headwater
from headwater.errors import (
    AddressInUse,
    AuthenticationFailed,
    ClusterError,
    LinkBroken,
    NotEnoughMemory,
    Unreachable,
    UsageError,
)
from headwater.launch.inproc import InprocHub
from headwater.relay.events import News, Taken, Trouble
from headwater.relay.serving import Serving
from headwater.transports import inproc
from headwater.transports.stream import Handler, Link
from headwater.versions.part_store import PartStore
from headwater.wire import messages as m
from headwater.wire import versions as v
from tests.patience import PATIENCE

ROWS = 64
_names = (f"relay-{number}" for number in itertools.count())


class Town:
    """A cluster of two servers in this process, its trainer, and relays that serve from threads."""

    def __init__(self) -> None:
        self.name = next(_names)
        self.news: dict[str, list[News]] = {}
        self._heard = threading.Condition()
        self._relays: list[tuple[Serving, threading.Thread]] = []
        self._links: list[Link] = []
        self._hub: InprocHub | None = None
        self.begin()

    # ---- the cluster -----------------------------------------------------------------------------

    def begin(self) -> None:
        """A new cluster."""
        self.address = f"inproc://{next(_names)}"
        self.trainer = headwater.connect(self.address, servers=2, rank=0, world=1, timeout=PATIENCE)
        self._table = self.trainer.dense("lm", (ROWS, 1024), optimizer="SGD", lr=1.0)
        hub = inproc.hub(self.address.removeprefix("inproc://"), 2)
        assert isinstance(hub, InprocHub)
        self._hub = hub

    def end(self) -> None:
        """The cluster is gone."""
        self._hub = None
        for link in self._links:
            link.close()
        self._links.clear()

    def dial(self, view: m.ShardView | None, handler: Handler) -> Link:
        if self._hub is None:
            raise Unreachable("nobody answers at the cluster's address")
        self._links.append(self._hub.connect(-1 if view is None else view.shard, handler))
        return self._links[-1]

    def publish(self, name: str, *rows: int, tags: tuple[str, ...] = (), keep: int = 3) -> headwater.VersionInfo:
        """Subtract 1 from these rows, and publish that."""
        gradient = torch.zeros(ROWS, 1024)
        for row in rows:
            gradient[row] += 1.0
        self._table.push(gradient).wait()
        return self.trainer.publish([self._table], name, tags=tags, keep=keep).wait(PATIENCE)

    def part_stores(self) -> list[PartStore]:
        """Of the cluster's servers."""
        assert self._hub is not None
        return [server.setting.part_store for server in self._hub._servers]

    def sent(self) -> int:
        """Bytes that left the servers for readers."""
        return sum(part_store.sent_bytes for part_store in self.part_stores())

    # ---- relays ----------------------------------------------------------------------------------

    def relay(self, upstream: str = "", *, listen_at: str = "tcp://127.0.0.1:0", keep: int = 3) -> Serving:
        """One more relay, of the cluster or of another relay."""
        said: list[News] = []

        def report(news: News) -> None:
            with self._heard:
                said.append(news)
                self._heard.notify_all()

        serving = Serving(
            ["lm"], upstream or self.address, listen_at=listen_at, keep=keep, report=report,
            dial=None if upstream else self.dial,
        )  # fmt: skip
        self.news[serving.address] = said
        thread = threading.Thread(target=serving.run, name="relay", daemon=True)
        thread.start()
        self._relays.append((serving, thread))
        return serving

    def until(self, serving: Serving, what: Callable[[News], bool]) -> News:
        """Wait for news of a relay."""
        said = self.news[serving.address]
        with self._heard:
            assert self._heard.wait_for(lambda: any(map(what, said)), PATIENCE), said
            return next(filter(what, said))

    def has(self, serving: Serving, name: str) -> Taken:
        """Wait until a relay serves a version."""
        news = self.until(serving, lambda each: isinstance(each, Taken) and each.info.name == name)
        assert isinstance(news, Taken)
        return news

    def stop(self, serving: Serving) -> None:
        """A relay ends."""
        thread = next(thread for each, thread in self._relays if each is serving)
        serving.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()

    def close(self) -> None:
        for serving, thread in reversed(self._relays):
            if thread.is_alive():
                self.stop(serving)
        self.trainer.close()


@pytest.fixture
def town() -> Iterator[Town]:
    town = Town()
    with contextlib.closing(town):
        yield town


@pytest.fixture(params=["local", "tcp"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How readers reach a relay."""
    monkeypatch.setenv("HEADWATER_TRANSPORT", request.param)
    return str(request.param)


def reads(address: str, name: str = "latest") -> tuple[str, dict[int, float]]:
    """A new reader's whole life: the version's name, and the rows that are not zero."""
    with headwater.reader("lm", address, timeout=PATIENCE) as reader, reader.lease(name) as weights:
        return weights.version.name, rows(weights)


def rows(weights: headwater.Weights) -> dict[int, float]:
    """The rows that are not zero; each must be of one value."""
    table = weights["lm"]
    assert torch.equal(table, table[:, :1].expand_as(table))
    return {row: float(table[row, 0]) for row in range(ROWS) if table[row, 0] != 0}


class _Rows(torch.nn.Module):
    """A module whose answer is its table's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = torch.nn.Parameter(torch.zeros(ROWS, 1024))

    def forward(self) -> dict[int, float]:
        return {row: float(value) for row, value in enumerate(self.lm[:, 0].tolist()) if value != 0}


# ---- what readers get --------------------------------------------------------------------------------


def test_a_reader_takes_a_relays_address_as_it_does_a_clusters(town: Town, way: str) -> None:
    first = town.publish("v1", 3)
    relay = town.relay()
    with headwater.reader("lm", relay.address, timeout=PATIENCE) as reader:
        with reader.lease() as weights:
            assert weights.version == first
            assert rows(weights) == {3: -1.0}
        town.publish("v2", 5, tags=("production",))
        assert reader.wait(after=first.number).name == "v2"
        with reader.lease("production") as weights:
            assert rows(weights) == {3: -1.0, 5: -1.0}
        parts = reader.statistics().parts
        assert (parts.shared_parts > 0, parts.deltas > 0) == ((True, False) if way == "local" else (False, True))
        assert [(each.info.name, each.tags) for each in reader.versions()] == [
            ("v1", ()),
            ("v2", ("latest", "production")),
        ]


def test_a_module_that_follows_a_relay_is_swapped(town: Town, way: str) -> None:
    town.publish("v1", 3)
    relay = town.relay()
    module = _Rows()
    with (
        headwater.reader("lm", relay.address, timeout=PATIENCE) as reader,
        contextlib.closing(reader.follow(module)),
    ):
        assert module() == {3: -1.0}
        town.publish("v2", 3)
        deadline = time.monotonic() + PATIENCE
        while module() == {3: -1.0} and time.monotonic() < deadline:
            pass
        assert module() == {3: -2.0}


def test_relays_chain(town: Town, way: str) -> None:
    town.publish("v1", 1)
    first = town.relay()
    town.has(first, "v1")
    second = town.relay(first.address)
    town.has(second, "v1")
    assert reads(second.address) == ("v1", {1: -1.0})
    town.publish("v2", 2, tags=("production",))
    assert town.has(second, "v2").way == "delta"
    assert reads(second.address, "production") == ("v2", {1: -1.0, 2: -1.0})
    assert reads(second.address, "v1") == ("v1", {1: -1.0})
    sent = town.sent()
    assert sum(each.nbytes for each in town.news[first.address] if isinstance(each, Taken)) == sent


def test_what_leaves_the_publisher_does_not_grow_with_the_readers(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TRANSPORT", "tcp")
    left: dict[int, int] = {}
    served: dict[int, int] = {}
    for count in (1, 4, 16):
        town.begin()  # the same history each time
        before = town.publish("v0", 0), town.sent()
        relay = town.relay()
        town.has(relay, "v0")
        with contextlib.ExitStack() as stack:
            readers = [
                stack.enter_context(headwater.reader("lm", relay.address, timeout=PATIENCE)) for _ in range(count)
            ]
            for reader in readers:
                reader.lease().release()
            for number in range(1, 4):
                town.publish(f"v{number}", number)
                town.has(relay, f"v{number}")
                for reader in readers:
                    with reader.lease() as weights:
                        assert weights.version.name == f"v{number}"
                        assert rows(weights) == dict.fromkeys(range(number + 1), -1.0)
            served[count] = relay.part_store.sent_bytes
        left[count] = town.sent() - before[1]
        town.stop(relay)
    assert left[1] == left[4] == left[16] > 0
    assert served[16] == 4 * served[4] == 16 * served[1]


def test_a_late_joiner_is_current_while_versions_go_on(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TRANSPORT", "tcp")
    town.publish("v0", 0)
    relay = town.relay()
    done = threading.Event()

    def go_on() -> None:
        for number in itertools.count(1):
            if done.is_set():
                return
            town.publish(f"v{number}", number % ROWS)

    trainer = threading.Thread(target=go_on)
    trainer.start()
    try:
        with headwater.reader("lm", relay.address, timeout=PATIENCE) as reader:
            seen: list[int] = []
            while len(seen) < 8:
                with reader.lease() as weights:
                    total = -sum(rows(weights).values())
                    assert total == weights.version.step  # one row each step, and all of them
                    seen.append(weights.version.number)
                reader.wait(after=seen[-1])
            assert seen == sorted(set(seen))
            assert reader.statistics().parts.deltas > 0
    finally:
        done.set()
        trainer.join(PATIENCE)


def test_a_version_that_the_relay_never_took_is_fetched_on_demand(town: Town) -> None:
    for number in range(1, 4):
        town.publish(f"v{number}", number)
    relay = town.relay(keep=2)
    town.has(relay, "v3")
    assert reads(relay.address, "v1") == ("v1", {1: -1.0})
    with pytest.raises(headwater.UnknownVersion, match="'v9'"):
        reads(relay.address, "v9")


# ---- what goes wrong ---------------------------------------------------------------------------------


def test_a_damaged_delta_is_fetched_again_whole_and_goes_no_further(town: Town) -> None:
    town.publish("v1", 1)
    relay = town.relay()
    first = town.has(relay, "v1").info.number
    with town._hub.lock:  # type: ignore[union-attr]
        info = town.publish("v2", *range(ROWS))  # both servers' parts change
        for part_store in town.part_stores():
            for key in [key for key in part_store.parts if key.number == info.number]:
                part_store.parts[key].deltas[first] = b"no delta at all"
    taken = town.has(relay, "v2")
    assert taken.way == "whole"
    assert relay.feeder._fetcher.counts.damaged == 2
    assert all(not held.deltas for held in relay.part_store.parts.values())
    assert reads(relay.address)[1][5] == -1.0


def test_a_part_with_a_wrong_checksum_is_not_served_and_the_next_version_is(town: Town) -> None:
    town.publish("v1", 1)
    relay = town.relay()
    town.has(relay, "v1")
    with town._hub.lock:  # type: ignore[union-attr]
        info = town.publish("v2", 2)
        for part_store in town.part_stores():
            for key in [key for key in part_store.parts if key.number == info.number]:
                part_store.parts[key].buffer.array[100] ^= 1
    trouble = town.until(relay, lambda news: isinstance(news, Trouble) and "came damaged" in news.text)
    assert isinstance(trouble, Trouble)
    assert "'v2' of 'lm' did not come" in trouble.text
    assert reads(relay.address) == ("v1", {1: -1.0})
    town.publish("v3", 3)
    town.has(relay, "v3")
    assert reads(relay.address) == ("v3", {1: -1.0, 2: -1.0, 3: -1.0})


def test_without_memory_the_version_before_stays(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    town.publish("v1", 1)
    relay = town.relay()
    town.has(relay, "v1")
    take = relay.part_store.pool.take

    def full(size: int) -> object:
        raise NotEnoughMemory(f"{size} bytes, but none are free")

    monkeypatch.setattr(relay.part_store.pool, "take", full)
    town.publish("v2", 2)
    town.until(relay, lambda news: isinstance(news, Trouble) and "none are free" in news.text)
    assert reads(relay.address) == ("v1", {1: -1.0})
    monkeypatch.setattr(relay.part_store.pool, "take", take)
    town.has(relay, "v2")
    assert reads(relay.address) == ("v2", {1: -1.0, 2: -1.0})


def test_the_cluster_gone_readers_know_and_a_new_one_takes_over(town: Town) -> None:
    town.publish("v1", 1, tags=("production",))
    town.publish("v2", 2)
    relay = town.relay()
    second = town.relay(relay.address)
    with headwater.reader("lm", second.address, timeout=PATIENCE) as reader:
        town.has(second, "v1")
        old = reader.lease()
        assert reader.statistics().connected
        town.end()
        town.until(relay, lambda news: isinstance(news, Trouble) and "does not answer" in news.text)
        deadline = time.monotonic() + PATIENCE
        while reader.statistics().connected and time.monotonic() < deadline:
            assert reads(relay.address, "production")[0] == "v1"
        stands = reader.statistics()
        assert "goes on with the versions that it has: nobody answers" in stands.error
        assert stands.age > 0
        assert stands.version == old.version
        town.begin()
        fresh = town.publish("v1", 7)
        assert fresh.number == 1
        town.has(relay, "v1")
        while reads(second.address) != ("v1", {7: -1.0}) and time.monotonic() < deadline:
            reader.wait(after=2)
        assert reads(second.address) == ("v1", {7: -1.0})
        assert rows(old) == {1: -1.0, 2: -1.0}
        with reader.lease("v1") as weights:
            assert weights.version == fresh
            assert rows(weights) == {7: -1.0}
        with pytest.raises(headwater.UnknownVersion):
            reader.lease("production", timeout=0.1)
        while not reader.statistics().connected and time.monotonic() < deadline:
            reader.versions()


def test_a_relay_that_dies_leaves_its_readers_what_they_map_and_they_find_the_next_one(town: Town, way: str) -> None:
    town.publish("v1", 1)
    relay = town.relay()
    with headwater.reader("lm", relay.address, timeout=PATIENCE) as reader:
        weights = reader.lease()
        town.stop(relay)
        assert rows(weights) == {1: -1.0}
        town.publish("v2", 2)
        again = town.relay(listen_at=relay.address)
        assert again.address == relay.address
        assert reader.wait(after=1).name == "v2"
        assert rows(weights) == {1: -1.0}
        with reader.lease() as newest:
            assert rows(newest) == {1: -1.0, 2: -1.0}


def test_memory_that_a_reader_may_still_map_is_not_used_again(town: Town, way: str) -> None:
    town.publish("v0", 0)
    relay = town.relay(keep=1)
    with headwater.reader("lm", relay.address, timeout=PATIENCE) as reader:
        kept = []
        for number in range(1, 6):
            with reader.lease() as weights:
                kept.append((weights["lm"], weights["lm"].clone()))  # tensors outlive their lease
            town.publish(f"v{number}", number)
            town.has(relay, f"v{number}")
            reader.wait(after=weights.version.number)
        assert all(torch.equal(tensor, then) for tensor, then in kept)
        assert {key.number for key in relay.part_store.parts} == {6}


# ---- who may -------------------------------------------------------------------------------------------


def test_a_relay_refuses_what_only_a_cluster_can_do(town: Town) -> None:
    town.publish("v1", 1)
    relay = town.relay()
    with headwater.reader("lm", relay.address, timeout=PATIENCE) as reader:
        reader.wait()
        with pytest.raises(ClusterError, match=r"SetTag does not go to a relay.*Ask the cluster's coordinator"):
            reader.tag("production", "v1")
    with pytest.raises(ClusterError, match="this is a relay"):
        headwater.connect(relay.address, rank=0, world=1, timeout=PATIENCE)
    with headwater.connect(relay.address, role="reader", timeout=PATIENCE) as client:
        status = client.status()
        assert status.relay is not None
        assert status.relay.upstream == town.address


def test_beyond_this_machine_only_with_a_token_and_an_address(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no token is set; nothing was bound"):
        Serving(["lm"], town.address, listen_at="tcp://192.0.2.1:0")
    with pytest.raises(UsageError, match="--advertise"):
        Serving(["lm"], town.address, listen_at="tcp://0.0.0.0:0")
    with pytest.raises(UsageError, match="name a model"):
        Serving([], town.address)
    with pytest.raises(Unreachable):
        Serving(["lm"], "tcp://127.0.0.1:1")
    relay = town.relay()
    with pytest.raises(AddressInUse):
        town.relay(listen_at=relay.address)


def test_a_reader_needs_the_relays_token(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_TOKEN", "the right one")
    town.publish("v1", 1)
    relay = town.relay()
    assert reads(relay.address)[0] == "v1"
    for wrong in ("", "a wrong one"):
        monkeypatch.setenv("HEADWATER_TOKEN", wrong)
        with pytest.raises(AuthenticationFailed):
            headwater.reader("lm", relay.address, timeout=PATIENCE)


def test_parts_that_have_come_do_not_come_again(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    town.publish("v1", 1)
    relay = town.relay()
    town.has(relay, "v1")
    parts = relay.feeder._fetcher.parts
    wanted: list[list[int]] = []

    def half(number: int, ats: list[v.PartAt], *rest: Any) -> None:
        wanted.append([at.shard for at in ats])
        if len(wanted) == 1:
            parts(number, ats[:1], *rest)
            raise LinkBroken("the other server died")
        parts(number, ats, *rest)

    monkeypatch.setattr(relay.feeder._fetcher, "parts", half)
    town.publish("v2", *range(ROWS))
    town.has(relay, "v2")
    assert wanted == [[0, 1], [1]]
    assert reads(relay.address)[1][5] == -1.0


def test_a_relay_with_nothing_to_do_waits_for_news(town: Town) -> None:
    town.publish("v1", 1)
    town.has(town.relay(), "v1")
    assert town._hub is not None
    waiting = town._hub._coordinator.publications.leases
    deadline = time.monotonic() + PATIENCE
    while not waiting._listing and time.monotonic() < deadline:
        assert town.trainer.status().models
    assert len(waiting._listing) == 1


def test_a_bug_in_the_listening_thread_is_told_and_not_the_end(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    town.publish("v1", 1)
    relay = town.relay()
    town.has(relay, "v1")
    ask = relay.feeder._control.ask

    def bug(message: Any, timeout: float) -> Any:
        return 1 / 0 if isinstance(message, v.ListVersions) else ask(message, timeout)

    monkeypatch.setattr(relay.feeder._control, "ask", bug)
    town.publish("v2", 2)
    town.until(relay, lambda news: isinstance(news, Trouble) and "ZeroDivisionError" in news.text)
    monkeypatch.setattr(relay.feeder._control, "ask", ask)
    town.has(relay, "v2")


def test_a_bug_in_the_fetching_thread_is_told_and_not_the_end(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    town.publish("v1", 1)
    relay = town.relay()
    town.has(relay, "v1")
    parts = relay.feeder._fetcher.parts
    monkeypatch.setattr(relay.feeder._fetcher, "parts", lambda *_: 1 / 0)
    town.publish("v2", 2)
    town.until(relay, lambda news: isinstance(news, Trouble) and "ZeroDivisionError" in news.text)
    monkeypatch.setattr(relay.feeder._fetcher, "parts", parts)
    town.has(relay, "v2")
