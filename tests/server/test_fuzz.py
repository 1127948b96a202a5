"""Tens of thousands of damaged frames: they end their own connections, and nothing else changes.

The town (``town.py``) takes most of them without sockets; a live loop takes the rest, descriptors included.
``HEADWATER_FUZZ_SEED=n`` begins elsewhere. A failure names its seed.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from headwater.errors import ProtocolError
from headwater.server import COORDINATOR
from headwater.server.node import Setting
from headwater.server.replication import records as r
from headwater.server.server import Server
from headwater.transports import memory
from headwater.transports.address import Address
from headwater.transports.channel import descriptors as ancillary
from headwater.types import DenseSpec, Init, OptimizerSpec, ParameterSpec
from headwater.wire import messages as m
from headwater.wire.frames import Flag, Frame, Kind, encode
from headwater.wire.messages import Slot
from headwater.wire.outgoing import Dial
from tests.server.mutations import Mutator, Piece, read
from tests.server.serving import Wire, serve
from tests.server.town import (
    BULK,
    GOOD,
    MINE,
    MINE_PLAIN,
    PLAIN,
    ROOM,
    SHARDS,
    SIZE,
    STALE,
    TABLES,
    Good,
    Inbox,
    Live,
    Said,
    Town,
)

FIRST = int(os.environ.get("HEADWATER_FUZZ_SEED", "0"))
BATCH = 500  # conversations
GROWTH = 64 << 20  # bytes
UNTOUCHED = 3  # the shard that nobody but the good client speaks to


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def _plain(record: logging.LogRecord) -> bool:
    """Only the text of what is logged is kept: an error's traceback holds its connection's buffers."""
    record.msg, record.args = record.getMessage(), ()
    return True


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No traceback reaches a log, nor anything worse than a warning; and memory stays as it is."""
    before = resident()
    caplog.handler.addFilter(_plain)
    with caplog.at_level(logging.WARNING):
        yield
    assert not [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR or "Traceback" in r.getMessage()]
    caplog.clear()
    grown = resident() - before
    assert grown < GROWTH, f"{grown >> 20} MiB were kept"


@pytest.fixture(scope="module")
def recorded() -> list[Said]:
    """Everything that is said while a client trains, a server dies and another takes its place."""
    town = Town()
    good = Good(town)
    good.works()
    town.stop(1)
    town.start(2)
    for _ in range(4):  # primaries move one by one
        town.tick()
    good.open()
    good.works()
    assert all(x.copies == 2 for x in good.status().shards)
    return town.tape


def pieces(tape: list[Said], speaker: str = "", hearer: str = "") -> list[Piece]:
    return [(x.frame, x.payload) for x in tape if x.speaker.startswith(speaker) and x.hearer.startswith(hearer)]


class Trial:
    """A town with a good client, and what strangers did to it."""

    def __init__(self, recorded: list[Said], *, share: bool = False) -> None:
        self.recorded = recorded
        self.strange = pieces(recorded)
        self.town = Town(share=share)
        self.good = Good(self.town)
        self.good.works()
        self.settled = True  # nobody joins or leaves, which would change the clocks
        self.town.taping = False
        self.frames = 0
        self.whole = self._whole()

    def _whole(self) -> str:
        """The digest of shard 2 at a follower that was told no lies."""
        honest = Follower(self, 2)
        honest.hears([encode(frame) + payload for frame, payload in of_primary(self, 2)[:-2]], random.Random(0))
        return honest.server.nodes[2].shard.replica.digest()

    def damage(self, seed: int, attack: Callable[[Trial, int], None]) -> None:
        """One conversation of a stranger's."""
        try:
            attack(self, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error

    def untouched(self) -> list[object]:
        """What no stranger has any business with: one whole shard, and the good client's tables on all of them."""
        nodes = [node for _, server in sorted(self.town.servers.items()) for _, node in sorted(server.nodes.items())]
        hashes = [node.shard.replica.digest() for node in nodes if node.shard.number == UNTOUCHED and self.settled]
        return [
            hashes,
            *(node.shard.tables[number].store.values.numpy().tobytes() for node in nodes for number in MINE),
        ]

    def batch(self, first: int, attack: Callable[[Trial, int], None], count: int = BATCH) -> None:
        """Many of them; then the good client must find everything as it should be."""
        untouched = self.untouched()
        for seed in range(first, first + count):
            self.damage(seed, attack)
        assert self.untouched() == untouched, f"seeds {first} to {first + count - 1}"
        assert self.good.alive, f"seeds {first} to {first + count - 1}: a connection that did nothing wrong was closed"
        self.good.works()
        found = self.town.digests()
        for shard in range(SHARDS):
            assert len({digest for (_, k), digest in found.items() if k == shard}) == 1, (
                f"copies of shard {shard} differ"
            )
        for server in self.town.servers.values():
            for node in server.nodes.values():
                node.shard.validate()


# ---- strangers who speak to a server -------------------------------------------------------------------


def client_talk(trial: Trial, chance: random.Random, shard: int) -> list[Piece]:
    """What a worker or reader may say to a shard's primary, from its first frame on."""
    server = trial.town.primary(shard)
    led = server.nodes[shard].shard
    session = chance.choice((chance.getrandbits(62), 1000 + chance.randrange(3)))
    rank = chance.choice((0, 0, -1, 1, 7))
    table = chance.choice((BULK, PLAIN, STALE))
    known = led.sessions.get(session)
    seq = 1 + (known.seq.get(table, 0) if known is not None else 0)
    clock, epoch, members = led.tables[table].gathering.clock + 1, led.epoch, led.replica.members.epoch

    def ask(request: m.Request) -> Piece:
        return Frame(Kind.REQUEST, 0, shard, seq=chance.getrandbits(40), body=m.pack(request)), b""

    def push(seq: int, flags: int, body: bytes = b"") -> Piece:
        data = chance.choice((torch.ones(SIZE // 4).numpy().tobytes(), chance.randbytes(SIZE)))
        frame = Frame(Kind.PUSH, flags, shard, table, session, epoch, seq, 0, clock, 0, SIZE, members, body)
        return frame, data

    slot = Slot(shard, "exp_avg", 0, (SIZE // 4,), "float32", bytes(SIZE))
    values = Frame(Kind.ASSIGN, Flag.END, shard, table, session, epoch, seq, 0, clock, 0, SIZE), bytes(SIZE)
    rest = [
        push(seq, Flag.WANT),
        push(seq + 1, Flag.END | Flag.WANT, m.pack(m.StepBody(({"lr": 0.5},), 1.0, 1.0))),
        push(seq, Flag.END),
        (Frame(Kind.PULL, 0, shard, table, session, epoch, 3, 0, clock, 0, SIZE), b""),
        values,
        ask(m.SlotPart(table, (slot, slot), False, True)),
        ask(m.Slots(table)),
    ]
    chance.shuffle(rest)
    return [
        ask(m.Open(session, rank, shard, members)),
        ask(m.Attach(table, False, 0, seq)),
        *rest[: chance.randint(1, 4)],
    ]


def allowed(data: bytes) -> bool:
    """Whether a stranger may say this here: what is sound and would rightly touch what is the good client's, not.

    Who may open a session may write to the tables, and who has the token may say that it is server 1.
    """
    frame, message = read(data)
    if frame is not None and frame.kind in (Kind.PUSH, Kind.ASSIGN) and frame.table in MINE:
        return False
    if isinstance(message, m.Open):
        return message.shard != UNTOUCHED and message.session != GOOD
    if isinstance(message, m.SlotPart):
        return message.table not in MINE
    return not (isinstance(message, m.Follow) and message.server in (0, 1))


def at_a_server(trial: Trial, seed: int) -> None:
    mutator = Mutator(seed, trial.strange)
    shard = mutator.chance.randrange(SHARDS - 1)
    town = trial.town
    talk = mutator.talk(client_talk(trial, mutator.chance, shard), mutator.chance.choice((0, 1, 2, 2)))
    town.guarded, _ = town.visit(town.primary(shard))
    if mutator.chance.random() < 0.2:
        talk = [b"".join(data for data in talk if allowed(data))]
    for data in talk:
        if town.guarded.alive and allowed(data):
            trial.frames += 1
            town.feed(town.guarded, data)
            town.run()
    town.close(town.guarded)
    town.run()


def test_strangers_at_a_server(recorded: list[Said]) -> None:
    trial = Trial(recorded)
    for first in range(FIRST, FIRST + 12_000, BATCH):
        trial.batch(first, at_a_server)
        trial.town.tick()
    assert trial.frames > 25_000


# ---- strangers who speak to the coordinator --------------------------------------------------------------


def member_talk(trial: Trial, chance: random.Random) -> list[Piece]:
    """What a client, an operator's command or a server may say to the coordinator."""
    role = chance.choice(("reader", "worker", "server", "nobody"))
    join = m.Join(role, chance.getrandbits(62), "host", 7, address="nowhere", local="nowhere")
    shard = chance.randrange(SHARDS)
    values = (ParameterSpec("v", (64,), init=Init("values")),)
    own = DenseSpec(f"t{chance.randrange(20)}", values, OptimizerSpec("SGD", ({"lr": 1.0},)))
    said: list[m.Request | m.Notice] = [
        m.Declare(TABLES[BULK]),
        m.Declare(own),
        m.Initialised(chance.randrange(9)),
        m.Barrier("b", 1),
        m.Find(shard),
        m.Drain(9),
        m.TakeSnapshot(),
        m.Status(),
        m.PlanNext(f"p{chance.randrange(9)}", 100, 2, 1, 10, False, 1, ((0, 1),)),
        m.Pause(paused=True),
        m.Heartbeat(1, 2, 3, 4, 5, 6, ((1, 5), (2, 6)), ((0, 5, 1),)),
        m.Heartbeat(server=2, tables=((1, 5),), shards=((0, 5, 1),)),
        m.Ready(BULK, shard, 2, 1, (1.0,), skip=False),
        m.Synced(shard, 1, 2, 5),
        m.Suspect(shard, 1, 1, "why not"),
        m.CutDone(1, shard, "file", 5, "00", 5, ((1, 1),)),
        m.Leave(),
    ]
    chosen = [join, *chance.choices(said, k=chance.randint(1, 5))] if role != "nobody" else chance.choices(said, k=4)
    return [
        (Frame(Kind.REQUEST if isinstance(x, m.Request) else Kind.NOTICE, 0, shard, seq=i, body=m.pack(x)), b"")
        for i, x in enumerate(chosen)
    ]


def harmless(data: bytes) -> bool:
    """An operator with the token may drain a server, and who knows a server's session may speak for it."""
    frame, message = read(data)
    if isinstance(message, m.Drain):
        return message.server not in (0, 1)
    if isinstance(message, m.Join):
        return message.session != GOOD and not (message.resume and message.server in (0, 1))
    if isinstance(message, m.Declare):
        return message.spec.name not in {spec.name for spec in TABLES.values()} or message.spec in TABLES.values()
    return (
        frame is None
        or frame.kind != Kind.NOTICE
        or not isinstance(message, m.Heartbeat)
        or message.server not in (0, 1)
    )


def at_the_coordinator(trial: Trial, seed: int) -> None:
    mutator = Mutator(seed, trial.strange)
    town = trial.town
    talk = mutator.talk(member_talk(trial, mutator.chance), mutator.chance.choice((0, 1, 1)))
    end, _ = town.visit(town.control, "coordinator")
    for data in talk:
        if end.alive and harmless(data):
            trial.frames += 1
            town.feed(end, data)
            town.run()
    town.close(end)
    town.run()


def test_strangers_at_the_coordinator(recorded: list[Said]) -> None:
    trial = Trial(recorded)
    trial.settled = False
    for first in range(FIRST, FIRST + 3000, BATCH):
        trial.batch(first, at_the_coordinator)
        trial.town.tick()
        assert [w.rank for w in trial.good.status().workers] == [0]
    assert trial.frames > 8_000


# ---- a server whose primary is mad -----------------------------------------------------------------------


class Follower:
    """Server 2, whose primary of shard 2 is whatever the test says; or server 1, which has followed from the start."""

    def __init__(self, trial: Trial, number: int) -> None:
        self.town = trial.town
        self.server = Server(Setting(number, SHARDS, available=lambda: ROOM, threads=False))
        self.control, _ = self.town.connect("server", self.server, "coordinator", Inbox(), COORDINATOR)
        self.now = 0.0
        views = [x for x in trial.recorded if x.speaker == "coordinator" and x.hearer == f"server {number}"]
        said = next(x.frame for x in views if x.frame.kind == Kind.NOTICE and x.frame.shard == 2)
        self.dials = [x for x in self.server.receive(COORDINATOR, said) if isinstance(x, Dial)]

    def hears(self, talk: list[bytes], chance: random.Random) -> int:
        """Over a new connection to its primary; returns how many frames it took."""
        self.now += 1.0
        self.dials = self.dials or [x for x in self.server.tick(self.now) if isinstance(x, Dial)]
        assert self.dials, "it does not look for its primary again"
        end, _ = self.town.connect("server", self.server, "primary", Inbox())
        self.town.carry(self.server, self.server.dialed(self.dials.pop().key, end.peer))
        taken = 0
        for data in talk:
            if end.alive:
                taken += 1
                frame, _ = read(data)
                fds = descriptors(chance) if frame is not None and frame.kind == Kind.REQUEST else ()
                self.town.feed(end, data, fds)
                self.town.run()
        self.town.close(end)
        return taken


def descriptors(chance: random.Random) -> tuple[int, ...]:
    """Beside a frame: the right one, a wrong one, several, or none."""
    made = [
        memory.create("fuzz", chance.choice((SIZE, SIZE, 1, 2 * SIZE))) for _ in range(chance.choice((1, 1, 1, 0, 2)))
    ]
    if chance.random() < 0.1:
        made += os.pipe()
    return tuple(made)


def of_primary(trial: Trial, number: int) -> list[Piece]:
    """All that server 0 told this one about shard 2, and two buffers that it lends."""
    said = [x for x in pieces(trial.recorded, "server 0", f"server {number}") if x[0].shard == 2]
    lend = Frame(Kind.REQUEST, 0, 2, body=m.pack(m.Lend(PLAIN, 0, SIZE))), b""
    last = said[-1][0].lsn + 1
    body = r.pack(r.Update(PLAIN, GOOD, 0, 9, 9, ((0, SIZE),), True, False, False, None, None, None))
    return [*said, lend, (Frame(Kind.RECORD, Flag.END | Flag.SHARED, 2, PLAIN, epoch=1, lsn=last, body=body), b"")]


def from_a_primary(trial: Trial, seed: int) -> None:
    mutator = Mutator(seed, trial.strange)
    number = mutator.chance.choice((1, 2))
    follower = Follower(trial, number)
    talk = of_primary(trial, number)
    trial.frames += follower.hears(mutator.talk(talk, mutator.chance.choice((0, 1))), mutator.chance)
    if number == 2:  # whatever it was told, an honest primary makes it whole again
        follower.hears([encode(frame) + payload for frame, payload in talk[:-2]], mutator.chance)
        assert follower.server.nodes[2].shard.replica.digest() == trial.whole
    follower.server.nodes[2].close()
    trial.town.close(follower.control)


def from_a_coordinator(trial: Trial, seed: int) -> None:
    mutator = Mutator(seed, trial.strange)
    follower = Follower(trial, 1)
    said = pieces(trial.recorded, "coordinator", "server 1")
    for data in mutator.talk([x for x in said if x[0].kind != Kind.REPLY]):
        if follower.control.alive:
            trial.frames += 1
            trial.town.feed(follower.control, data)
            trial.town.run()
    trial.town.close(follower.control)


@pytest.mark.parametrize("attack", [from_a_primary, from_a_coordinator])
def test_mad_leaders(recorded: list[Said], attack: Callable[[Trial, int], None]) -> None:
    trial = Trial(recorded)
    trial.batch(FIRST, attack, 800)
    assert trial.frames > 6000


# ---- a live loop -----------------------------------------------------------------------------------------


class Served:
    """The good client over a socket: what it asks is answered while strangers come and go."""

    def __init__(self, address: Address, town: Town) -> None:
        self.wire = Wire(address)
        self.wire.greet()
        self.wire.ask(m.Open(GOOD, 0, 0, town.coordinator.membership.epoch))
        attached = self.wire.ask(m.Attach(MINE_PLAIN, False))
        assert isinstance(attached, m.Attached)
        self.seq = attached.seq
        self.value = self.pull()

    def pull(self) -> float:
        self.wire.send(Frame(Kind.PULL, 0, 0, MINE_PLAIN, seq=1, stop=SIZE))
        data = self.wire.read()
        assert data.kind == Kind.DATA
        assert data.payload is not None
        low, high = torch.frombuffer(data.payload, dtype=torch.float32).aminmax()
        assert low == high
        return float(low)

    def works(self) -> None:
        self.seq += 1
        payload = torch.ones(SIZE // 4).numpy().tobytes()
        epoch = 1
        self.wire.send(
            Frame(Kind.PUSH, Flag.END, 0, MINE_PLAIN, epoch=epoch, seq=self.seq, clock=self.seq, stop=SIZE), payload
        )
        assert self.wire.read().kind == Kind.ACK
        self.value -= 1
        assert self.pull() == self.value


def held() -> Counter[str]:
    """What this process has open, by kind."""
    gc.collect()
    shown = (str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
    return Counter(
        name.split("[")[0].split(" ")[0] for name in shown if not name.startswith("/proc") and ":log." not in name
    )


def over_a_socket(trial: Trial, address: Address, seed: int) -> None:
    mutator = Mutator(seed, trial.strange)
    chance = mutator.chance
    hello = Frame(Kind.HELLO, body=m.pack(m.Hello(chance.randbytes(32), "x"))), b""
    proof = Frame(Kind.PROOF, body=m.pack(m.Proof(chance.randbytes(32)))), b""
    early = chance.random() < 0.2
    talk = client_talk(trial, chance, chance.choice((0, 2)))
    with Wire(address) as wire:
        if not early:
            wire.greet()
        for data in mutator.talk(
            [hello, proof, *talk[:2]] if early else talk, 0 if early else chance.choice((0, 1, 2))
        ):
            if not allowed(data):
                continue
            frame, _ = read(data)
            fds = descriptors(chance) if frame is not None and chance.random() < 0.3 else ()
            if frame is not None and chance.random() < 0.1:
                fds *= 3
            try:
                trial.frames += 1
                wire.sock.sendmsg([data], ancillary(fds))
            except OSError:
                break  # it was closed while it still spoke
            finally:
                memory.close_all(tuple(set(fds)))
        with contextlib.suppress(OSError):
            wire.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ProtocolError):
            wire.ends()


def test_strangers_over_sockets(recorded: list[Said]) -> None:
    trial = Trial(recorded, share=True)
    for first in range(FIRST, FIRST + 1800, 300):
        untouched = trial.town.servers[0].nodes[UNTOUCHED].shard.replica.digest()
        files = held()
        with serve(Live(trial.town), unix=f"headwater-fuzz-{os.getpid()}-{first}") as address:
            good = Served(address, trial.town)
            for seed in range(first, first + 300):
                trial.damage(seed, lambda trial, seed: over_a_socket(trial, address, seed))
            good.works()
            good.wire.__exit__()
        for peer in range(1, 2000):  # a loop that ends does not say so of its connections
            trial.town.carry(trial.town.servers[0], trial.town.servers[0].closed(peer))
        assert trial.town.servers[0].nodes[UNTOUCHED].shard.replica.digest() == untouched
        assert trial.town.digests()[0, 0] == trial.town.digests()[1, 0]
        assert held() == files, "descriptors were kept"
    assert trial.frames > 5000


# ---- found by the above ----------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [PLAIN, STALE])
def test_pushes_in_one_breath_do_not_overwrite_each_other_before_the_backup_has_them(
    recorded: list[Said], table: int
) -> None:
    trial = Trial(recorded)
    town, session = trial.town, 77
    members = town.coordinator.membership.epoch
    end, _ = town.visit(town.primary(0))
    town.feed(end, encode(Frame(Kind.REQUEST, 0, 0, seq=1, body=m.pack(m.Open(session, 0, 0, members)))))
    town.run()
    breath = b"".join(
        encode(Frame(Kind.PUSH, Flag.END, 0, table, session, 1, seq, 0, seq, 0, SIZE, members, payload_length=SIZE))
        + torch.full((SIZE // 4,), float(seq)).numpy().tobytes()
        for seq in (1, 2, 3)
    )
    town.feed(end, breath)
    town.run()
    assert town.digests()[0, 0] == town.digests()[1, 0]
    if table == STALE:  # SGD with learning rate 1
        assert town.primary(0).nodes[0].shard.tables[table].store.values.view(torch.float32).eq(-6.0).all()


def test_strangers_sessions_are_bounded(recorded: list[Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.server.shard.STRANGERS", 5)
    trial = Trial(recorded)
    town = trial.town
    for session in range(10):
        end, _ = town.visit(town.primary(0))
        town.feed(end, encode(Frame(Kind.REQUEST, 0, 0, seq=1, body=m.pack(m.Open(session, 3, 0, 1)))))
        town.run()
        town.close(end)
    assert len(town.primary(0).nodes[0].shard.sessions) <= 6
    trial.good.works()


def test_what_is_said_about_a_table_that_was_dropped_is_void(recorded: list[Said]) -> None:
    trial = Trial(recorded)
    shard = trial.town.primary(0).nodes[0].shard
    gone = r.Update(99, GOOD, 0, 9, 9, (), end=True, want=True, skip=False, scale=None, norm=None, groups=None)
    before = trial.town.digests()
    shard.proposals.propose(gone)
    server = trial.town.primary(0)
    server.nodes[0].carry_out(shard.handle(m.Members(0, (), 0)))
    trial.town.carry(server, server.effects.drain())
    trial.town.run()
    assert len(set(before.values())) == len(set(trial.town.digests().values()))


def test_who_says_it_is_a_backup_and_lies_is_found_out(recorded: list[Said]) -> None:
    """It has the token, so it is heard; the real backup comes back, and the copies agree again."""
    trial = Trial(recorded)
    town = trial.town
    for seed in range(FIRST, FIRST + 60):
        mutator = Mutator(seed, trial.strange)
        chance, shard = mutator.chance, mutator.chance.choice((0, 2))
        node = town.primary(shard).nodes[shard]
        follow = m.Follow(shard, node.view.epoch, chance.choice((0, 1)), chance.choice((-1, 0, node.shard.lsn)), 1)
        talk = [(Frame(Kind.REQUEST, 0, shard, seq=1, body=m.pack(follow)), b"")]
        for _ in range(3):
            flags, lsn, seq = chance.choice((0, Flag.END)), chance.choice((0, node.shard.log.last, 1 << 62)), 1 << 60
            talk.append((Frame(Kind.ACCEPT, flags, shard, epoch=1, lsn=lsn, seq=chance.choice((0, 1, 9, seq))), b""))
        end, _ = town.visit(town.primary(shard))
        for data in mutator.talk(talk, 1):
            if end.alive:
                town.feed(end, data)
                town.run()
        town.close(end)
        for _ in range(4):
            town.tick(1.2)
        trial.good.open()
        trial.batch(seed, at_a_server, 0)
