"""What must be true of a run, told by those who see all of it: every record, every answer, every push.

Each oracle is independent of the code it judges: values are folded again in numpy, from the records and from what
the workers say they sent. All tables here are float64 under SGD with lr = 1 that maximises: a gradient is added.

Sources: simulation testing as in FoundationDB (Zhou et al., SIGMOD 2021); the ledger is that of Jepsen's set checker.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.layout.dense import only
from headwater.server.replication import records as r
from headwater.server.replication.records import Record
from headwater.server.shard import Shard
from headwater.server.tables.base import Ranges
from headwater.types import DenseSpec
from headwater.wire.messages import Commit, Members

Floats = npt.NDArray[np.float64]
Pieces = list[tuple[int, Floats]]


class Violation(AssertionError):
    """An oracle is not satisfied. ``oracle``: which, so that a history can be shortened to the same failure."""

    def __init__(self, oracle: str, text: str) -> None:
        super().__init__(f"{oracle}: {text}")
        self.oracle = oracle


@dataclass(slots=True)
class _Prepared:
    body: r.Prepare
    total: Pieces
    divide: int


class Fold:
    """One table of one shard, computed from the log alone. ``at`` gives its bytes after any LSN."""

    def __init__(self, spec: DenseSpec, nbytes: int, lsn: int) -> None:
        self.spec = spec
        self.values: Floats = np.zeros(nbytes // 8)
        self.clock = 0
        self.prepared: _Prepared | None = None
        self.writes: list[Pieces] = []  # what the step to be committed starts from
        self._lsns = [lsn]
        self._bytes = [self.values.tobytes()]

    def at(self, lsn: int) -> bytes:
        i = len(self._lsns) - 1
        while self._lsns[i] > lsn:
            i -= 1
        return self._bytes[i]

    @property
    def newest(self) -> bytes:
        return self._bytes[-1]

    def add(self, pieces: Pieces, lsn: int, divide: int = 1, scale: float | None = None) -> None:
        for start, piece in pieces:
            step = piece if divide == 1 else piece / divide
            self.values[start : start + piece.size] += step if scale is None else step * scale
        self._changed(lsn)

    def put(self, pieces: Pieces, lsn: int) -> None:
        for start, piece in pieces:
            self.values[start : start + piece.size] = piece
        self._changed(lsn)

    def _changed(self, lsn: int) -> None:
        self._lsns.append(lsn)
        self._bytes.append(self.values.tobytes())


_Ahead = tuple[Record, int, dict[int, bytes]]  # a record, the epoch it was applied in, the values after it


@dataclass(slots=True)
class _Remembered:
    """What is remembered of a record: enough to see that another one took its number."""

    body: r.Body
    content: bytes
    epoch: int


class Log:
    """The history of one shard: what its primaries applied, one after the other."""

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.entries: list[_Remembered] = []
        self.folds: dict[int, Fold] = {}
        self.done: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)  # (session, table) -> seq -> LSN
        self.last: dict[tuple[int, int], int] = {}  # (session, table) -> the last push of it that was applied
        self.steps: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}  # (table, clock) -> (rank, session)
        self.members = 0  # the membership epoch
        self.cuts: dict[int, dict[int, tuple[int, int]]] = {}  # version -> table -> (LSN, clock) of its moment

    @property
    def lsn(self) -> int:
        return len(self.entries)


class Oracles:
    """Judges a run as it goes. ``observe`` is the shards' observer, the rest is called by the simulated hosts."""

    def __init__(self) -> None:
        self.logs: dict[int, Log] = {}
        self.sent: dict[tuple[int, int, int, int], Floats] = {}  # (session, table, clock, shard) -> a gradient
        self.records = self.pulls = self.acks = 0
        self._seen: dict[tuple[int, int], tuple[int, int]] = {}  # (session, shard) -> (epoch, LSN)
        self._ahead: dict[int, tuple[Shard, dict[int, _Ahead]]] = {}  # by id of a follower: what the log has not
        self._astray: dict[int, Violation] = {}  # by id of a follower that holds what the log does not

    def log(self, shard: int) -> Log:
        found = self.logs.get(shard)
        if found is None:
            found = self.logs[shard] = Log(shard)
        return found

    # ---- records ---------------------------------------------------------------------------------

    def observe(self, replica: Shard, record: Record) -> None:
        """A replica has applied a record."""
        self.records += 1
        log = self.log(replica.number)
        if replica.primary:
            self.leads(replica, record.lsn - 1)
            self._next(log, replica, record)
        elif record.lsn > log.lsn:  # a follower applies what it has accepted, before its primary may
            ahead = self._ahead.setdefault(id(replica), (replica, {}))[1]
            ahead[record.lsn] = (_copy(record), replica.epoch, _values(replica))
            return
        else:
            self._same(log, record, replica.epoch, _whole(replica))
        self._compare(log, replica, record.lsn, _values(replica))

    def leads(self, replica: Shard, upto: int) -> None:
        """A primary speaks: what it applied before it was one counts from now on."""
        log = self.log(replica.number)
        if log.lsn >= upto:
            return
        for lsn, (record, _, values) in sorted(self._ahead.pop(id(replica), (replica, {}))[1].items()):
            if log.lsn < lsn <= upto:
                self._next(log, replica, record)
                self._compare(log, replica, lsn, values)

    def _next(self, log: Log, replica: Shard, record: Record) -> None:
        """A primary's record: the log's next, or one that it must be the same as."""
        if record.lsn <= log.lsn:
            self._same(log, record, replica.epoch, True)
            return
        if record.lsn != log.lsn + 1:
            raise Violation("log", f"shard {log.shard}: LSN {record.lsn} was applied after {log.lsn}")
        log.entries.append(_Remembered(record.body, _content(record), replica.epoch))
        self._fold(log, replica, record)
        for other, ahead in self._ahead.values():
            if other.number == log.shard and record.lsn in ahead:
                self._caught_up(log, other, *ahead.pop(record.lsn))

    def _caught_up(self, log: Log, replica: Shard, record: Record, epoch: int, values: dict[int, bytes]) -> None:
        """The log has reached what a follower had applied. One that went astray must not go on from there."""
        try:
            self._same(log, record, epoch, _whole(replica))
            self._compare(log, replica, record.lsn, values)
        except Violation as violation:
            self._astray[id(replica)] = violation

    def _same(self, log: Log, record: Record, epoch: int, whole: bool) -> None:
        known, content = log.entries[record.lsn - 1], _content(record)
        if known.body != record.body or (known.content != content and whole):
            raise Violation(
                "log", f"shard {log.shard}: LSN {record.lsn} is {known.body} of epoch {known.epoch}; a replica in "
                f"epoch {epoch} has {record.body} there"
            )  # fmt: skip

    def _compare(self, log: Log, replica: Shard, lsn: int, values: dict[int, bytes]) -> None:
        """A replica that has everything holds what the log adds up to."""
        for number, found in values.items():
            fold = log.folds.get(number)
            if fold is None or found == fold.at(lsn):
                continue
            if (astray := self._astray.get(id(replica))) is not None:
                raise astray
            expected, got = np.frombuffer(fold.at(lsn)), np.frombuffer(found)
            wrong = np.flatnonzero(expected != got)
            raise Violation(
                "fold",
                f"shard {log.shard}, table {number}, LSN {lsn} ({type(log.entries[lsn - 1].body).__name__}): a "
                f"{'primary' if replica.primary else 'follower'} holds {got[wrong[:4]]} at elements {wrong[:4]}, "
                f"the log says {expected[wrong[:4]]}",
            )  # fmt: skip
        self._astray.pop(id(replica), None)

    def _fold(self, log: Log, replica: Shard, record: Record) -> None:
        body = record.body
        match body:
            case r.Begin():
                log.folds[body.table] = Fold(only(body.spec), replica.tables[body.table].size, record.lsn)
            case r.Drop():
                log.folds.pop(body.table, None)
            case r.Update():
                self._applied(log, (body.session, body.table), body.seq, record.lsn)
                if not body.skip:
                    log.folds[body.table].add(_pieces(record, body.ranges), record.lsn, 1, body.scale)
            case r.Values():
                self._values(log, record, body)
            case r.Prepare():
                self._prepare(log, record, body)
            case Commit():
                self._commit(log, body, record.lsn)
            case Members():
                log.members = body.epoch
                for fold in log.folds.values():
                    fold.prepared, fold.writes = None, []
            case r.Publish():
                if body.version in log.cuts:
                    raise Violation("versions", f"shard {log.shard} published version {body.version} twice")
                log.cuts[body.version] = {n: (record.lsn, f.clock) for n, f in log.folds.items() if n in body.tables}
            case _:
                pass

    def _values(self, log: Log, record: Record, body: r.Values) -> None:
        fold, pieces = log.folds[body.table], _pieces(record, r.spans(body))
        if not body.clock:
            self._applied(log, (body.session, body.table), body.seq, record.lsn)
            fold.put(pieces, record.lsn)
        elif (body.clock, body.members) == (fold.clock + 1, log.members):
            fold.writes.append(pieces)

    def _applied(self, log: Log, session: tuple[int, int], seq: int, lsn: int) -> None:
        if seq in log.done[session]:
            before = log.done[session][seq]
            raise Violation("ledger", f"shard {log.shard}: push {seq} of {session[0]:x} is LSN {before} and LSN {lsn}")
        if seq <= log.last.get(session, 0):
            raise Violation("order", f"shard {log.shard}: push {seq} of {session[0]:x} came after {log.last[session]}")
        log.done[session][seq] = lsn
        log.last[session] = seq

    # ---- bulk ------------------------------------------------------------------------------------

    def _prepare(self, log: Log, record: Record, body: r.Prepare) -> None:
        fold = log.folds[body.table]
        fold.prepared = None
        if body.members != log.members:  # the membership has changed before it: void
            return
        fold.prepared = _Prepared(body, _pieces(record, body.ranges), record.divide)
        fold.writes = fold.writes[len(fold.writes) - body.writes :]
        if not body.skip:
            self._one_process(log, fold.prepared)
        if body.commit is not None:
            self._commit(log, body.commit, record.lsn)

    def _commit(self, log: Log, body: Commit, lsn: int) -> None:
        fold = log.folds[body.table]
        prepared = fold.prepared
        if prepared is None or (prepared.body.clock, prepared.body.members) != (body.clock, body.members):
            return
        if body.clock != fold.clock + 1:
            return
        fold.prepared, fold.clock = None, body.clock
        writes, fold.writes = fold.writes, []
        for pieces in writes:
            fold.put(pieces, lsn)
        who = tuple((part.rank, part.session) for part in prepared.body.parts)
        log.steps[body.table, body.clock] = who
        for part in prepared.body.parts:
            self._applied(log, (part.session, body.table), part.seq, lsn)
        if not body.skip:
            fold.add(prepared.total, lsn, prepared.divide, body.scale)
        for other in self.logs.values():
            if other.steps.get((body.table, body.clock), who) != who:
                raise Violation(
                    "atomic", f"step {body.clock} of table {body.table}: shard {log.shard} took {who}, "
                    f"shard {other.shard} took {other.steps[body.table, body.clock]}"
                )  # fmt: skip

    def contributed(self, session: int, table: int, clock: int, shard: int, gradient: Floats) -> None:
        """A worker is about to push this to a shard as its step."""
        self.sent[session, table, clock, shard] = gradient

    def _one_process(self, log: Log, prepared: _Prepared) -> None:
        """What the shard added up is what one process gets that adds in rank order, bit for bit."""
        body = prepared.body
        expected = np.zeros(log.folds[body.table].values.size)
        for part in sorted(body.parts, key=lambda part: part.rank):
            expected += self.sent[part.session, body.table, body.clock, log.shard]
        for start, piece in prepared.total:
            if piece.tobytes() != expected[start : start + piece.size].tobytes():
                raise Violation(
                    "bulk", f"shard {log.shard}, step {body.clock}: the sum differs from that of one process"
                )  # fmt: skip

    # ---- answers ---------------------------------------------------------------------------------

    def acknowledged(self, shard: int, session: int, table: int, seq: int, lsn: int) -> None:
        """A server tells a client that its push is applied."""
        self.acks += 1
        log = self.log(shard)
        if log.last.get((session, table), 0) < seq:
            raise Violation("ack", f"shard {shard} acknowledged push {seq} of {session:x}, which nobody has applied")
        if lsn > log.lsn:
            raise Violation("ack", f"shard {shard} acknowledged at LSN {lsn}, its log ends at {log.lsn}")

    def pulled(self, shard: int, table: int, lsn: int, start: int, payload: memoryview) -> None:
        """A server's values, as they leave."""
        self.pulls += 1
        log = self.log(shard)
        fold = log.folds.get(table)
        if fold is None:
            raise Violation("pull", f"shard {shard} sent values of table {table}, which does not exist")
        if lsn > log.lsn or fold.at(lsn)[start : start + len(payload)] != payload:
            raise Violation(
                "pull", f"shard {shard}, table {table}: values sent as of LSN {lsn} are not those of the log"
            )

    def saw(self, session: int, shard: int, epoch: int, lsn: int) -> None:
        """A client receives something of this LSN: it never goes back."""
        before = self._seen.get((session, shard), (0, 0))
        if lsn < before[1]:
            raise Violation("monotonic", f"session {session:x} saw LSN {lsn} of shard {shard} after {before[1]}")
        self._seen[session, shard] = (epoch, lsn)

    # ---- at the end ------------------------------------------------------------------------------

    def replica(self, replica: Shard, where: str) -> None:
        """A member of the last view, when all is quiet: it holds what the log adds up to."""
        log = self.log(replica.number)
        if replica.lsn > log.lsn:  # it has accepted what its primary has not applied yet
            return
        for number, table in replica.tables.items():
            if table.store.whole and table.store.published()[0].numpy().tobytes() != log.folds[number].at(replica.lsn):
                raise Violation("fold", f"{where}: table {number} of shard {replica.number} at LSN {replica.lsn}")


@dataclass(slots=True)
class Ledger:
    """What the workers know of their pushes. Each marks an element of its own, so that a loss hides no double."""

    slots: int
    acknowledged: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    unknown: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _next: int = 0

    def begin(self) -> int:
        """The element of a push that begins; until it ends it is unknown."""
        slot = self._next % self.slots
        self._next += 1
        self.unknown[slot] += 1
        return slot

    def end(self, slot: int, *, applied: bool | None) -> None:
        """The push is acknowledged, is refused for good, or stays unknown (``None``)."""
        if applied is not None:
            self.unknown[slot] -= 1
            self.acknowledged[slot] += applied

    def check(self, marks: Floats, where: str) -> None:
        """``marks``: the elements, as a reader finds them when all is quiet."""
        for slot, value in enumerate(marks):
            low = self.acknowledged.get(slot, 0)
            high = low + self.unknown.get(slot, 0)
            if not low <= value <= high:
                what = "lost" if value < low else "doubled"
                raise Violation("sum", f"{where}: element {slot} is {value}, not {low} to {high}: {what}")

    @property
    def totals(self) -> tuple[int, int]:
        return sum(self.acknowledged.values()), sum(self.unknown.values())


def _copy(record: Record) -> Record:
    """A record to keep: its gradient's memory serves again."""
    if record.gradient is None:
        return record
    return Record(record.lsn, record.body, record.gradient.clone(), record.base)


def _values(replica: Shard) -> dict[int, bytes]:
    """What a replica holds, of the tables that it has whole."""
    return {n: t.store.published()[0].numpy().tobytes() for n, t in replica.tables.items() if t.store.whole}


def _whole(replica: Shard) -> bool:
    return all(table.store.whole for table in replica.tables.values())


def _pieces(record: Record, ranges: Ranges) -> Pieces:
    """What a record adds (or puts), copied: contributions added up in their order."""
    if record.contributions is not None:
        return _added_up(record, ranges)
    if record.gradient is None:
        return []
    raw: Any = record.gradient.numpy()
    return [(a // 8, np.frombuffer(raw[a - record.base : b - record.base].tobytes())) for a, b in ranges]


def _added_up(record: Record, ranges: Ranges) -> Pieces:
    pieces = [(a // 8, np.zeros((b - a) // 8)) for a, b in ranges]
    for contribution in record.contributions or ():
        raw: Any = contribution.gradient.numpy()
        for a, b in contribution.ranges:
            for start, total in pieces:
                if start * 8 <= a and b <= start * 8 + total.nbytes:
                    piece = np.frombuffer(raw[a - contribution.base : b - contribution.base].tobytes())
                    total[a // 8 - start : b // 8 - start] += piece
    return pieces


def _content(record: Record) -> bytes:
    """The bytes that travel with a record; those of contributions are compared by what they add up to."""
    if record.contributions is not None:
        return b"".join((piece / record.divide).tobytes() for _, piece in _added_up(record, r.spans(record.body)))
    if record.gradient is None:
        return b""
    raw: Any = record.gradient.numpy()
    return b"".join(raw[a - record.base : b - record.base].tobytes() for a, b in r.spans(record.body))
