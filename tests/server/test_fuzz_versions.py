"""Damaged words about versions, by the thousand: at holders, at the coordinator, from mad leaders, over sockets.

As ``test_fuzz.py``, whose town this is: the good client has versions, and they stay what they were.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from headwater.versions.lifecycle import ABANDONED
from headwater.wire import delta
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Frame, Kind
from tests.server.mutations import Mutator, Piece, read
from tests.server.serving import Wire, serve
from tests.server.test_fuzz import BATCH, FIRST, Trial, from_a_coordinator, from_a_primary, harmless, held
from tests.server.test_fuzz import quiet as quiet
from tests.server.town import BULK, GOOD, MINE, PLAIN, SHARDS, SIZE, STALE, TABLES, Good, Live, Said, Town

OWN = "own"  # the model of the good client's versions


class Reads:
    """The good client's versions, and what they hold, by (shard, table)."""

    def __init__(self, good: Good) -> None:
        self.good, self.town = good, good.town
        self.publish("v1")
        good.works()
        self.publish("v2")
        self.wanted = self.all_of("v2")

    def publish(self, name: str) -> None:
        begun = self.good._ask(self.good.control, self.good.news, v.Publish(OWN, name, MINE, keep=1 << 40))
        assert isinstance(begun, v.Publishing)
        assert isinstance(self.good._ask(self.good.control, self.good.news, v.Await(begun.number)), v.Found)

    def all_of(self, name: str) -> dict[tuple[int, int], bytes]:
        """Each part, which is the same from each of its holders."""
        end, inbox = self.town.visit(self.town.control, "coordinator")
        self.good._ask(end, inbox, m.Join("reader", GOOD + 1))
        leased = self.good._ask(end, inbox, v.Lease(OWN, name))
        assert isinstance(leased, v.Leased)
        found: dict[tuple[int, int], bytes] = {}
        for at in leased.parts:
            assert at.holders
            for holder in at.holders:
                data = self._fetch(int(holder.address), v.Fetch(leased.info.number, at.shard, at.table))
                assert found.setdefault((at.shard, at.table), data) == data
        self.town.close(end)
        self.town.run()
        return found

    def _fetch(self, server: int, fetch: v.Fetch) -> bytes:
        end, inbox = self.town.visit(self.town.servers[server], f"server {server}")
        self.town.say(end.other, Frame(Kind.REQUEST, seq=1, body=m.pack(fetch)))
        self.town.run()
        _, *pieces = inbox.take()
        self.town.close(end)
        return b"".join(bytes(piece.payload or b"") for piece in pieces)

    def check(self) -> None:
        assert self.all_of("v2") == self.wanted


@pytest.fixture(scope="module")
def recorded() -> list[Said]:
    """All that is said while a client trains and publishes, a reader reads, and a server dies and is replaced."""
    delta.warm()  # what it loads stays
    town = Town()
    good = Good(town)
    good.works()
    reads = Reads(good)
    town.stop(1)
    town.start(2)
    for _ in range(4):
        town.tick()
    for _ in range(3):  # the new one is told to hold what was published before
        town.tick(6.0)
    good.open()
    good.works()
    reads.check()
    assert any(x.frame.kind == Kind.PIECE and x.hearer == "server 2" for x in town.tape)
    return town.tape


@pytest.fixture
def trial(recorded: list[Said]) -> Trial:
    return Trial(recorded)


def reader_talk(chance: random.Random) -> list[Piece]:
    """What a reader may say to whoever holds versions."""
    said: list[Piece] = []
    for seq in range(1, chance.randint(2, 6)):
        at = chance.choice((1, 2, 2, 3)), chance.randrange(SHARDS), chance.choice(MINE)
        fetch = v.Fetch(*at, base=chance.choice((0, 1, 2, 9)), shared=chance.random() < 0.5)
        said.append((Frame(Kind.REQUEST, seq=seq, body=m.pack(fetch)), b""))
        if chance.random() < 0.5:
            said.append((Frame(Kind.NOTICE, body=m.pack(v.Unmap(*at))), b""))
    return said


def about_versions(data: bytes) -> bool:
    """Whether it is noise, or of versions: what else the token allows is the other fuzzer's."""
    _, message = read(data)
    return message is None or isinstance(message, v.Fetch | v.Unmap)


def at_a_holder(trial: Trial, seed: int) -> None:
    mutator = Mutator(seed, trial.strange)
    town = trial.town
    town.guarded, _ = town.visit(town.servers[mutator.chance.randrange(2)])
    for data in mutator.talk(reader_talk(mutator.chance), mutator.chance.choice((0, 1))):
        if town.guarded.alive and about_versions(data):
            trial.frames += 1
            town.feed(town.guarded, data)
            town.run()
    town.close(town.guarded)
    town.run()


def test_strangers_at_holders(trial: Trial) -> None:
    reads = Reads(trial.good)
    for first in range(FIRST, FIRST + 3000, BATCH):
        trial.batch(first, at_a_holder)
        reads.check()
    assert trial.frames > 6000


def version_talk(chance: random.Random) -> list[Piece]:
    """What publishers, readers and servers say of versions, where it belongs and where it does not."""
    role, shard = chance.choice(("reader", "worker", "server")), chance.randrange(SHARDS)
    model, name, number = chance.choice((OWN, "theirs")), f"v{chance.randrange(60)}", chance.randrange(9)
    tables = chance.choice(((BULK,), (PLAIN,), (STALE, PLAIN)))
    parts = tuple(v.PartDigest(table, SIZE, chance.getrandbits(64)) for table in tables)
    clocks = tuple((table, chance.choice((0, 1, 1 << 40))) for table in tables)
    said: list[m.Request | m.Notice] = [
        v.Publish("theirs", name, tables, chance.choice(((), clocks)), {"k": "v"}, 2, 60.0, ("prod",), 1.0),
        v.Publish("theirs", name, tables, clocks),
        v.Await(number),
        v.Watch(model, name, number),
        v.Lease(model, "latest", ((1, 2),), 1.0, number),
        v.Release(number, number),
        v.Holding(((number, 2), (7, 1)), 8),
        v.ListVersions(model, number),
        v.SetTag("theirs", "prod", name),
        v.Retire("theirs", name),
        v.PartDone(number, shard, 2, parts, clocks, 0.1),
        v.PartDone(number, shard, 2, error="full"),
        v.CutVersion(number, shard, tables, clocks),
        v.DropVersion((1, 2, number)),
        v.Hold(number, shard, parts, ((BULK, TABLES[BULK]),), v.Holder("nowhere", "nowhere", "")),
        v.Fetch(number, shard, BULK),
        v.Unmap(number, shard, BULK),
    ]
    join = m.Join(role, chance.getrandbits(62), "host", 7, address="nowhere", local="nowhere")
    return [
        (Frame(Kind.REQUEST if isinstance(x, m.Request) else Kind.NOTICE, 0, shard, seq=i, body=m.pack(x)), b"")
        for i, x in enumerate((join, *chance.choices(said, k=chance.randint(2, 6))))
    ]


def at_the_coordinator(trial: Trial, seed: int) -> None:
    mutator = Mutator(seed, trial.strange)
    town = trial.town
    end, _ = town.visit(town.control, "coordinator")
    for data in mutator.talk(version_talk(mutator.chance), mutator.chance.choice((0, 1, 1))):
        _, message = read(data)
        own = isinstance(message, v.Publish | v.SetTag | v.Retire) and message.model == OWN  # who has the token may
        if end.alive and harmless(data) and not own:
            trial.frames += 1
            town.feed(end, data)
            town.run()
    town.close(end)
    town.run()


def test_strangers_at_the_coordinator(trial: Trial) -> None:
    trial.settled = False
    reads = Reads(trial.good)
    for first in range(FIRST, FIRST + 1500, BATCH):
        trial.batch(first, at_the_coordinator)
        trial.town.tick(1 + ABANDONED)  # what strangers wished for and do not wait for is no hindrance then
        reads.check()
        reads.publish(f"after {first}")
    assert trial.frames > 5000


@pytest.mark.parametrize("attack", [from_a_primary, from_a_coordinator])
def test_mad_leaders(trial: Trial, attack: Callable[[Trial, int], None]) -> None:
    reads = Reads(trial.good)
    trial.batch(FIRST, attack, 300)
    reads.check()


def test_strangers_at_holders_over_sockets(recorded: list[Said]) -> None:
    """They are given descriptors, and hang up without a word: nothing is kept for them."""
    trial = Trial(recorded, share=True)
    reads = Reads(trial.good)
    files = held()
    with serve(Live(trial.town), unix=f"headwater-fuzz-versions-{os.getpid()}") as address:
        for seed in range(FIRST, FIRST + 300):
            mutator = Mutator(seed, trial.strange)
            with Wire(address) as wire:
                wire.greet()
                for data in mutator.talk(reader_talk(mutator.chance), mutator.chance.choice((0, 1))):
                    if about_versions(data):
                        try:
                            wire.sock.sendall(data)
                        except OSError:
                            break  # it was closed while it still spoke
    for peer in range(1, 1000):  # a loop that ends does not say so of its connections
        trial.town.carry(trial.town.servers[0], trial.town.servers[0].closed(peer))
    reads.check()
    assert held() == files, "descriptors were kept"
