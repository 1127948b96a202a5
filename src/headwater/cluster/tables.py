"""The tables that a cluster has agreed on, and the verdicts on their bulk steps. Part of the coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from headwater.cluster import claims
from headwater.cluster.fleet import Fleet
from headwater.cluster.membership import Member, Membership
from headwater.cluster.outbox import Outbox
from headwater.errors import ClusterError, HeadwaterError, TableConflict, UnknownTable
from headwater.layout.kinds import check_table, place
from headwater.types import Claim, TableSpec, read_spec
from headwater.wire import messages as m
from headwater.wire.exact import clip_factor, merge
from headwater.wire.outgoing import Asker


@dataclass(slots=True)
class DeclaredTable:
    """One table. ``decided``: the last verdict, for a primary that comes after it.

    ``own``: an optimizer made it, so that all workers of its run train it.
    ``restore``: the folder of the snapshot that it began with; ``base``: its clock there. ``run``: the number of the
    run that it is of; ``users``: workers' sessions that use it, with their ranks; ``finished``: ranks of those that
    have left in order.
    """

    number: int
    spec: TableSpec
    participants: tuple[int, ...]
    creating: set[int]
    state: str = "creating"  # creating, assigning, ready, refused
    initialiser: int | None = None  # the peer that assigns the values
    waiting: list[Asker] = field(default_factory=list)
    ready: dict[int, m.Ready] = field(default_factory=dict)
    decided: m.Commit | None = None
    restore: str = ""
    base: int = 0
    run: int = 0
    own: bool = False
    users: dict[int, int] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)

    @property
    def clock(self) -> int:
        """The last bulk step that the coordinator has committed."""
        return max(self.base, self.decided.clock if self.decided is not None else 0)


class _Saved(msgspec.Struct, frozen=True):
    number: int
    spec: TableSpec
    state: str
    restore: str = ""
    base: int = 0
    run: int = 0
    users: dict[int, int] = {}
    finished: tuple[int, ...] = ()
    own: bool = False


class Tables:
    """All tables of a cluster."""

    def __init__(self, outbox: Outbox, fleet: Fleet, membership: Membership) -> None:
        self.by_number: dict[int, DeclaredTable] = {}
        self._outbox = outbox
        self._fleet = fleet
        self._membership = membership
        self._names: dict[str, int] = {}

    def get(self, number: int) -> DeclaredTable:
        """Raises ``UnknownTable``."""
        if number not in self.by_number:
            raise UnknownTable(f"table {number} does not exist in this cluster")
        return self.by_number[number]

    def named(self, name: str) -> DeclaredTable | None:
        """The table of this name, if there is one."""
        return self.by_number.get(self._names.get(name, -1))

    # ---- declaring -------------------------------------------------------------------------------

    def use(self, asker: Asker, spec: TableSpec, claim: Claim) -> DeclaredTable:
        """The table that a client wants, made now or agreed on before; ``answer`` says so to the client.

        Raises what is wrong with the wish; nothing has changed then.
        """
        worker = self._membership.worker(asker.peer)
        table = self.named(spec.name)
        if table is None:
            if claim == "resume":
                raise claims.missing(spec.name, self._names)
            check_table(spec)
            return self._create(spec, worker, claim)
        claims.check(table, claim, worker, self._membership)
        difference = claims.comparable(table.spec, claim).difference(claims.comparable(spec, claim))
        if difference:
            raise TableConflict(
                f"table {spec.name!r} exists with {difference}; nothing was changed. "
                "Use another name, or declare it everywhere in the same way"
            )
        if worker is not None:
            claims.taken(table, claim, worker, self._membership)
            self._save(table)
        return table

    def _create(self, spec: TableSpec, worker: Member | None, claim: Claim) -> DeclaredTable:
        number = max(self.by_number, default=0) + 1
        parts = place(spec, self.shards).participants
        table = DeclaredTable(number, spec, parts, set(parts), run=self._membership.run)
        if worker is not None:
            claims.taken(table, claim, worker, self._membership)
        self.by_number[number] = table
        self._names[spec.name] = number
        self._save(table)
        for shard in parts:
            self._outbox.tell(shard, m.Create(number, spec), number)
        return table

    def answer(self, asker: Asker, table: DeclaredTable) -> None:
        """Tell a client of its table now, or when it is there."""
        if table.state == "ready":
            self._declared(asker, table, assign=False)
        elif table.initialiser == asker.peer:  # asked again, say after a wrong value
            self._declared(asker, table, assign=True)
        else:
            table.waiting = [other for other in table.waiting if other.peer != asker.peer] + [asker]  # asked again
            if table.state == "assigning" and table.initialiser is None:
                self._pass_on(table)

    def revive(self, number: int, spec: TableSpec, clock: int, folder: str) -> None:
        """A table of the snapshot that the cluster begins with; primaries hear of it with their views (``brief``)."""
        parts = place(spec, self.shards).participants
        table = DeclaredTable(number, spec, parts, set(parts), restore=folder, base=clock)
        self.by_number[number] = table
        self._names[spec.name] = number
        self._save(table)

    @property
    def shards(self) -> int:
        """Into how many each table is cut."""
        return self._fleet.shards

    @property
    def any_ready(self) -> bool:
        """Whether some table has its values."""
        return any(table.state == "ready" for table in self.by_number.values())

    @property
    def reviving(self) -> bool:
        """Whether some of a snapshot's tables are not there yet."""
        return any(table.restore and table.state == "creating" for table in self.by_number.values())

    def created(self, number: int, shard: int) -> None:
        """A shard has a table."""
        table = self.by_number.get(number)
        if table is None:
            return
        table.creating.discard(shard)
        if table.creating or table.state != "creating":
            return
        if not table.restore and table.spec.given:
            self._pass_on(table)
        else:
            self._release(table)
        self._save(table)

    def _pass_on(self, table: DeclaredTable) -> None:
        """Let the lowest rank assign its values once it asks: which worker came first must not matter."""
        table.state, table.initialiser = "assigning", None
        membership = self._membership
        lowest = membership.workers.get(min(membership.ranks(), default=-1))
        for asker in table.waiting:
            if lowest is not None and asker.peer == lowest.peer:
                table.waiting.remove(asker)
                table.initialiser = asker.peer
                self._declared(asker, table, assign=True)
                return

    def initialised(self, asker: Asker, number: int) -> None:
        """The client that had to has assigned the values."""
        table = self.get(number)
        if table.state == "ready" and table.initialiser == asker.peer:  # asked again: the answer was lost
            self._outbox.reply(asker, m.Done())
            return
        if table.state != "assigning" or table.initialiser != asker.peer:
            raise ClusterError(f"another worker assigns the values of table {table.spec.name!r}, or they are assigned")
        self._outbox.reply(asker, m.Done())
        self._release(table)
        self._save(table)

    def _release(self, table: DeclaredTable) -> None:
        table.state = "ready"
        waiting, table.waiting = table.waiting, []
        for asker in waiting:
            self._declared(asker, table, assign=False)

    def _declared(self, asker: Asker, table: DeclaredTable, *, assign: bool) -> None:
        self._outbox.reply(asker, m.Declared(table.number, table.spec, assign, self._membership.epoch))

    def give_up(self, table: DeclaredTable, why: HeadwaterError) -> None:
        """Whoever asked for the table is told, the name is free again, and no server keeps memory for it."""
        if table.state != "creating":
            return
        self._names.pop(table.spec.name, None)
        for asker in table.waiting:
            self._outbox.fail(asker, why)
        table.waiting, table.state = [], "refused"
        self._save(table)
        for shard in table.participants:
            self._outbox.tell(shard, m.Drop(table.number))

    def left(self, session: int, clean: bool) -> None:
        """A worker is gone. If it had finished, what it trained is not new to another process of its rank."""
        for table in self.by_number.values():
            rank = table.users.pop(session, None)
            if rank is not None:
                table.finished |= {rank} if clean else set()
                self._save(table)

    def missed(self, peer: int) -> None:
        """Nobody is at this connection any more: it waits for nothing and initialises nothing."""
        for table in self.by_number.values():
            table.waiting = [a for a in table.waiting if a.peer != peer]
            if table.state == "assigning" and table.initialiser == peer:
                table.initialiser = None

    def members_changed(self) -> None:
        """The shards answer again under the new membership."""
        for table in self.by_number.values():
            table.ready.clear()
            if table.state == "assigning" and table.initialiser is None:
                self._pass_on(table)

    # ---- bulk steps ------------------------------------------------------------------------------

    def ready(self, shard: int, message: m.Ready) -> None:
        """A shard can commit a step; when all can, they shall."""
        table = self.get(message.table)
        if shard not in table.participants:
            return
        decided = table.decided
        if decided is not None and message.clock <= decided.clock:
            self._outbox.tell(shard, decided)  # a primary that took over after the verdict
            return
        if message.members != self._membership.epoch:
            return  # the membership changed meanwhile; the shard will say so again
        table.ready[shard] = message
        if len(table.ready) < len(table.participants):
            return
        answers, table.ready = list(table.ready.values()), {}
        table.decided = decide(table.spec, answers)
        for other in table.participants:
            self._outbox.tell(other, table.decided)

    def learned(self, commit: m.Commit) -> None:
        """After a restart: a shard has committed this."""
        table = self.by_number.get(commit.table)
        if table is not None and (table.decided is None or table.decided.clock < commit.clock):
            table.decided = commit

    def committed(self) -> int:
        """The last bulk step that is decided, over all tables; a table on one shard tells by heartbeats."""
        bulk = {t.number for t in self.by_number.values() if t.spec.sync.collective}
        decided = [t.decided.clock for t in self.by_number.values() if t.decided is not None]
        told = [clock for s in self._fleet.servers.values() for number, clock in s.report.tables if number in bulk]
        return max([*decided, *told], default=0)

    def brief(self, shard: int) -> None:
        """What a new primary may have missed of tables and verdicts."""
        for table in self.by_number.values():
            if shard in table.creating and table.state == "creating":
                self._outbox.tell(shard, m.Create(table.number, table.spec, table.restore), table.number)
            if table.decided is not None and shard in table.participants and len(table.participants) > 1:
                self._outbox.tell(shard, table.decided)

    # ---- what must be durable --------------------------------------------------------------------

    def _save(self, table: DeclaredTable) -> None:
        saved = _Saved(
            table.number, table.spec, table.state, table.restore, table.base, table.run, table.users,
            tuple(sorted(table.finished)), table.own,
        )  # fmt: skip
        self._outbox.save(f"table/{table.number}", msgspec.msgpack.encode(saved))

    def restore(self, state: Mapping[str, bytes]) -> None:
        """The tables from before a restart."""
        for key in sorted(key for key in state if key.startswith("table/")):
            saved = msgspec.msgpack.decode(state[key], type=_Saved, dec_hook=read_spec)
            parts = place(saved.spec, self.shards).participants
            creating = set(parts) if saved.state == "creating" else set()
            self.by_number[saved.number] = DeclaredTable(
                saved.number, saved.spec, parts, creating, saved.state, restore=saved.restore, base=saved.base,
                run=saved.run, own=saved.own, users=dict(saved.users), finished=set(saved.finished),
            )  # fmt: skip
            if saved.state != "refused":
                self._names[saved.spec.name] = saved.number


def decide(spec: TableSpec, answers: list[m.Ready]) -> m.Commit:
    """The verdict on a bulk step whose shards are all ready: skipped by all, or applied with one clip factor."""
    first = answers[0]
    if any(answer.skip for answer in answers):
        return m.Commit(first.table, first.clock, first.members, skip=True)
    if spec.max_grad_norm is None:
        return m.Commit(first.table, first.clock, first.members, skip=False)
    norm, scale = clip_factor(spec.max_grad_norm, merge([answer.squares for answer in answers]))
    return m.Commit(first.table, first.clock, first.members, skip=False, norm=norm, scale=scale)
