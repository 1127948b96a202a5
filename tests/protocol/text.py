"""Frames, messages and records as a line of text each: names where a person knows one, else numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import torch

from headwater.server.replication import records as r
from headwater.server.replication import state as s
from headwater.server.table import Table
from headwater.wire import messages as m
from headwater.wire import versions as v
from headwater.wire.frames import Flag, Frame, Kind

FLAGS = {value: name for name, value in vars(Flag).items() if name.isupper() and name not in ("NONE", "ALL", "CHECKED")}
READERS: dict[Kind, Callable[[bytes], msgspec.Struct]] = {
    Kind.REQUEST: m.unpack_request,
    Kind.REPLY: m.unpack_reply,
    Kind.NOTICE: m.unpack_notice,
    Kind.RECORD: r.unpack,
    Kind.STATE: s.unpack,
}
DATA = (
    Kind.PUSH, Kind.ACK, Kind.PULL, Kind.DATA, Kind.ASSIGN, Kind.RECORD, Kind.STATE, Kind.ACCEPT, Kind.ERROR
)  # fmt: skip
"""What names its shard in the header alone; so do, of other messages, these:"""
TO_A_SHARD = (m.Commit, m.Members, m.Create, m.Created, m.Drop)
NUMBERED = (Kind.PUSH, Kind.ACK, Kind.ASSIGN)


def listed(names: list[str]) -> str:
    return " ".join(names) or "nobody"


def values(table: Table) -> str:
    """What a replica of a dense table holds."""
    return numbers(table.store.published()[0])


def numbers(data: memoryview | torch.Tensor | bytes) -> str:
    """float32 numbers: one if all are the same, else the different ones."""
    tensor = data if isinstance(data, torch.Tensor) else torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = [f"{x:g}" for x in tensor.view(torch.float32).unique().tolist()]
    return found[0] if len(found) == 1 else f"{found[0]} … {found[-1]}"


@dataclass
class Names:
    """Who is who: servers and workers by their sessions, tables by their numbers."""

    sessions: dict[int, str] = field(default_factory=dict)
    tables: dict[int, str] = field(default_factory=dict)
    shards: int = 1

    def frame(self, f: Frame) -> str:
        """One line: kind, table, number, record, step, bytes, flags; then what it carries."""
        words = [f.kind.name]
        if f.kind in (Kind.RECORD, Kind.ACCEPT):
            words.append(str(f.lsn))
        if f.kind in DATA:
            words += self._shard(f.shard)
        if f.table and f.kind != Kind.RECORD:
            words.append(self.table(f.table))
        if f.kind in NUMBERED:
            words.append(f"seq {f.seq}")
        if f.kind in (Kind.STATE, Kind.DATA, Kind.ACK):
            words.append(f"lsn {f.lsn}")
        if f.clock:
            words.append(f"step {f.clock}")
        if f.stop > f.start:
            words.append(f"bytes {f.start}:{f.stop}")
        if f.kind == Kind.ACK and f.start:
            words.append(f"staleness {f.start}")
        words += [name for bit, name in FLAGS.items() if f.flags & bit]
        if f.kind == Kind.PUSH:
            words.append(f"(epoch {f.epoch}, members {f.members})")
        carried = [text for text in (self.body(f), self._payload(f)) if text]
        between = " " if f.kind in (Kind.REQUEST, Kind.REPLY, Kind.NOTICE) else ": "
        return " ".join(words) + (between + ", ".join(carried) if carried else "")

    def body(self, f: Frame) -> str:
        if not f.body:
            return ""
        if f.kind == Kind.ERROR:
            error = m.unpack(f.body, m.ErrorBody)
            return f"{error.code}: {error.message.split(';')[0]}"
        if f.kind == Kind.STATE and f.flags & Flag.WANT:
            return self.record(r.unpack(f.body))
        kinds = {Kind.ACK: m.AckBody, Kind.PUSH: m.StepBody}
        if f.kind in kinds:
            found = m.unpack(f.body, kinds[f.kind])
            if isinstance(found, m.AckBody):
                found = msgspec.structs.replace(found, mark=0)  # a hash, which says nothing to a person
            return "" if found == kinds[f.kind]() else self.plain(found)
        read = READERS.get(f.kind)
        if read is None:
            return ""
        found = read(f.body)
        if f.kind == Kind.RECORD:
            return self.record(found)
        shard = self._shard(f.shard) if isinstance(found, TO_A_SHARD) and f.kind != Kind.STATE else []
        return " ".join([self.message(found), *(f"at {each}" for each in shard)])

    def _payload(self, f: Frame) -> str:
        if f.payload is None:
            return ""
        if f.kind == Kind.STATE:
            block = None if f.flags & Flag.WANT else s.unpack(f.body)
            size = block.stop - block.start if isinstance(block, s.ChunkHead) else len(f.payload)
            return f"values {numbers(f.payload[:size])}"  # what is behind them is the optimizer's state
        what = {Kind.PUSH: "gradient", Kind.DATA: "values", Kind.RECORD: "gradient", Kind.PIECE: "values"}
        if f.flags & Flag.MEAN:
            return f"mean {numbers(f.payload)}"
        return f"{what.get(f.kind, 'values')} {numbers(f.payload)}"

    def _shard(self, number: int) -> list[str]:
        return [f"shard {number}"] if self.shards > 1 else []

    def table(self, number: int) -> str:
        return self.tables.get(number, f"table {number}")

    def who(self, session: int) -> str:
        return self.sessions.get(session, f"session {session}")

    def _tables(self, clocks: tuple[tuple[int, int], ...]) -> str:
        return " ".join(f"{self.table(t)} step {c}" for t, c in clocks)

    # ---- records ---------------------------------------------------------------------------------

    def record(self, body: msgspec.Struct) -> str:
        match body:
            case r.Begin():
                return f"Begin {body.spec.name}" + (" from a snapshot" if body.restore else "")
            case r.Seat():
                return f"Seat {self.who(body.session)} members {body.members}"
            case r.Prepare():
                parts = ", ".join(f"{self.who(p.session)} to seq {p.seq}" for p in body.parts)
                skip = " SKIP" if body.skip else ""
                commit = "; with its Commit" if body.commit else ""
                step = f"{self.table(body.table)} step {body.clock} members {body.members}{skip}"
                return f"Prepare {step} of {parts}{commit}"
            case r.Update():
                skip = " SKIP" if body.skip else ""
                end = " END" if body.end else ""
                who = self.who(body.session)
                return f"Update {self.table(body.table)} of {who} step {body.clock} to seq {body.seq}{end}{skip}"
            case r.Values():
                at = f"{body.start}:{body.start + body.length}"
                return f"Values {self.table(body.table)} of {self.who(body.session)} to seq {body.seq} bytes {at}"
            case r.Publish():
                return f"Publish version {body.version} of {listed([self.table(t) for t in body.tables])}"
            case _:
                return self.message(body)

    # ---- messages --------------------------------------------------------------------------------

    def message(self, x: msgspec.Struct) -> str:
        return self._membership(x) or self._following(x) or self._steps(x) or self._versions(x) or self.plain(x)

    def _membership(self, x: msgspec.Struct) -> str:
        match x:
            case m.Join():
                has = "".join(
                    f", has shard {h.shard} as {h.role} to lsn {h.lsn}"
                    + "".join(f" with {self.message(commit)}" for commit in h.commits)
                    for h in x.hosted
                )
                return f"Join {x.role} {self.who(x.session)}" + (" again" if x.resume else "") + has
            case m.Joined():
                return f"Joined rank {x.rank} of {x.world} members {x.members}"
            case m.Welcome():
                return f"Welcome s{x.server} shards {x.shards} replicas {x.replicas} ack {x.ack}"
            case m.View():
                primary = f"s{x.primary.server}" if x.primary else "nobody"
                rest = "".join(
                    f", {role} {listed([f's{e.server}' for e in ends])}"
                    for role, ends in (("backups", x.backups), ("learners", x.learners)) if ends
                )  # fmt: skip
                return f"View shard {x.shard} epoch {x.epoch}: primary {primary}{rest}"
            case m.ShardView():
                return f"ShardView shard {x.shard} epoch {x.epoch} at {x.address}"
            case m.Members():
                lost = f", step lost at {x.lost}" if x.lost else ""
                return f"Members {x.epoch}: {listed([self.who(n) for n in x.sessions])}{lost}"
        return ""

    def _following(self, x: msgspec.Struct) -> str:
        match x:
            case m.Follow():
                tail = f" tail {x.tail}" if x.tail > x.lsn else ""
                shard = "".join(f" {each}" for each in self._shard(x.shard))
                return f"Follow{shard} for s{x.server} epoch {x.epoch} lsn {x.lsn}{tail} of reign {x.reign}"
            case m.Following():
                what = "the whole state" if x.whole else "the records"
                return f"Following {what} after lsn {x.lsn}, epoch {x.epoch} of reign {x.since}"
            case m.Synced() | m.Suspect():
                why = f": {x.why}" if isinstance(x, m.Suspect) else f" lsn {x.lsn}"
                shard = "".join(f" {each}" for each in self._shard(x.shard))
                return f"{type(x).__name__}{shard} s{x.server} epoch {x.epoch}{why}"
            case m.Open():
                return f"Open {self.who(x.session)} shard {x.shard} members {x.members}"
            case s.ShardState():
                done = [
                    f"{self.who(x.number)} to " + (" ".join(f"{self.table(t)} seq {n}" for t, n in x.done) or "nothing")
                    for x in x.sessions
                ]
                return f"ShardState {self.message(x.members)}; {', '.join(done) or 'no sessions'}"
            case s.TableState():
                clocks = " ".join(f"rank {rank} at {clock}" for rank, clock in x.clocks)
                return f"TableState {x.spec.name} step {x.clock}" + (f", {clocks}" if clocks else "")
            case s.ChunkHead():
                return f"ChunkHead {x.start}:{x.stop}"
        return ""

    def _steps(self, x: msgspec.Struct) -> str:
        match x:
            case m.Declare():
                return f"Declare {x.spec.name}"
            case m.Declared():
                return f"Declared {x.spec.name} members {x.members}"
            case m.Create():
                return f"Create {x.spec.name}" + (" from a snapshot" if x.restore else "")
            case m.Attach():
                return f"Attach {self.table(x.table)} from seq {x.base}"
            case m.Attached():
                return f"Attached lsn {x.lsn} step {x.clock} applied to seq {x.seq} members {x.members}"
            case m.Ready():
                skip = " SKIP" if x.skip else ""
                norm = f" norm² {sum(x.squares):g}" if x.squares else ""
                return f"Ready {self.table(x.table)} shard {x.shard} step {x.clock} members {x.members}{skip}{norm}"
            case m.Commit():
                skip = " SKIP" if x.skip else ""
                norm = "" if x.norm is None else f" norm {x.norm:g}"
                scale = "" if x.scale is None else f" scale {x.scale:g}"
                return f"Commit {self.table(x.table)} step {x.clock} members {x.members}{skip}{norm}{scale}"
            case m.Cut():
                what = "prepare" if x.prepare else self._tables(x.clocks) or "now"
                return f"Cut snapshot {x.snapshot}: {what if x.folder else 'given up'}"
            case m.CutDone():
                what = x.error or ("prepared" if x.prepared else f"{x.file} at lsn {x.lsn} {self._tables(x.clocks)}")
                return f"CutDone snapshot {x.snapshot} shard {x.shard}: {what}"
            case m.SnapshotTaken():
                return "SnapshotTaken"
        return ""

    def _versions(self, x: msgspec.Struct) -> str:
        match x:
            case v.Publish():
                return f"Publish {x.name} of {x.model} at {self._tables(x.clocks) or 'once'}"
            case v.CutVersion():
                late = " (late)" if x.late else ""
                return f"CutVersion {x.number} shard {x.shard} at {self._tables(x.clocks) or 'once'}{late}"
            case v.PartDone():
                what = x.error or ("held" if x.parts else "begun")
                return f"PartDone version {x.number} shard {x.shard} at s{x.server}: {what} {self._tables(x.clocks)}"
            case v.Found():
                return f"Found {x.info.name}, version {x.info.number}"
            case v.Lease():
                return f"Lease {x.name} of {x.model}"
            case v.Leased():
                at = ", ".join(f"shard {p.shard} at {' '.join(h.address for h in p.holders)}" for p in x.parts)
                return f"Leased {x.info.name}, version {x.info.number}: {at}"
            case v.Hold():
                return f"Hold version {x.number} shard {x.shard} from {x.holder.address}"
            case v.Part():
                return f"Part {x.encoding} of {x.nbytes} bytes"
        return ""

    def plain(self, x: msgspec.Struct) -> str:
        """The fields that are not what they are without a word."""
        defaults = dict(zip(reversed(x.__struct_fields__), reversed(x.__struct_defaults__), strict=False))
        found = {name: getattr(x, name) for name in x.__struct_fields__}
        if "table" in found:
            found["table"] = self.table(found["table"])
        said = [f"{k} {_brief(n)}" for k, n in found.items() if k not in defaults or n != defaults[k]]
        return " ".join([type(x).__name__, *said])


def _brief(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
