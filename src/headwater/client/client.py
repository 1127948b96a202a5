"""A client of a cluster: its connections, its heartbeat, its tables."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch

from headwater import interrupts
from headwater.client import publication
from headwater.client.control import Control, Dial
from headwater.client.dense.handle import Dense
from headwater.client.dense.memory import check_tensor
from headwater.client.dense.table import Table
from headwater.client.naming import Names
from headwater.client.patience import Patience
from headwater.client.publication import Publication, publish
from headwater.client.runtime import Runtime, Threads
from headwater.client.session import Session
from headwater.errors import (
    ClusterError,
    DeadlineExceeded,
    HeadwaterError,
    LinkBroken,
    LinkError,
    ProtocolError,
    StaleEpoch,
    UnknownTable,
    UsageError,
)
from headwater.layout.dense import check_table, layout, only
from headwater.transports import forks
from headwater.transports.address import host_identity
from headwater.types import Async, Claim, DenseSpec, Init, OptimizerSpec, ParameterSpec, Sync
from headwater.wire import messages as m
from headwater.wire.tensors import dtype_name
from headwater.wire.versions import Retire, VersionStatus

ZEROS, ASYNC = Init("zeros"), Async()
log = logging.getLogger("headwater")

OPEN = 5.0  # seconds in which a server must answer the first request of a connection
AGAIN = 0.02  # seconds between two attempts to reach a shard
UNSERVED = 5.0  # seconds in which the only server of a shard may come back
DAMAGED = 20  # connections in a row that end for damaged frames until that is no accident
_BRIEF = 2.0  # seconds to say that one is back, however late it is
_BACK = "\0back"  # behind a barrier's name: of the one after it, at which nobody stands aside any more


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """Counters since the client connected. Staleness, and lag (of reads behind the fastest worker), in steps."""

    steps: int
    pushed_bytes: int
    pulled_bytes: int
    wait_seconds: float
    staleness_last: int
    staleness_mean: float
    staleness_max: int
    lag_max: int


class Client:
    """Made by ``headwater.connect``. A context manager; one thread at a time may use it."""

    @interrupts.deferred
    def __init__(
        self,
        dial: Dial,
        *,
        role: str = "worker",
        rank: int | None = None,
        world: int | None = None,
        timeout: float,
        step_timeout: float = 0.0,
        runtime: Runtime | None = None,
        run: str = "",
    ) -> None:
        self.timeout = timeout
        self.patience = step_timeout
        self.runtime = runtime or Threads()
        self.session = self.runtime.token()
        self.tables: dict[str, Table] = {}
        self.servers: dict[int, Session] = {}
        self.recoveries = 0
        self._dial = dial
        self._closed = self._abandoned = False
        self._steps = self._stale_sum = self._stale_max = self._stale_last = self._lag_max = 0
        self._waited = 0.0
        self._away = False  # inside ``_aside``
        self._turns: Counter[str] = Counter()
        self.address, self.thread = "", 0  # of the coordinator; of who has made it
        self.names = Names()
        self.kept = False  # by the process that has it for all its optimizers: see ``headwater.client.connecting``
        self._holders = 0  # how often it was asked for by ``connect``
        join = m.Join(role, self.session, host_identity(), os.getpid(), rank, world, run=run, node=platform.node())
        self._control = Control(dial, join, self.runtime, timeout)
        joined = self._control.joined
        self.rank, self.world, self.members = joined.rank, joined.world, joined.members
        self._stated = world
        for view in joined.views:
            session = self.servers[view.shard] = Session(f"shard {view.shard}", self.session, self.runtime)
            session.shard = view.shard  # connected when a table needs it
        self._stop = self.runtime.every(joined.heartbeat, self._heartbeat)

    # ---- shards ------------------------------------------------------------------------------------

    @interrupts.deferred
    def reach(self, session: Session) -> None:
        """Connect to a shard, if that has not happened yet. Raises as ``recover``."""
        if self._abandoned:
            raise forks.refusal()
        if session.link is None:
            self._reach(session, self.runtime.now() + self.timeout, None)

    @interrupts.deferred
    def recover(self, session: Session, deadline: float, error: HeadwaterError) -> None:
        """The link to a shard broke: find its primary, and go on there with what was not acknowledged.

        Raises ``LinkBroken`` if nobody serves the shard any more, or ``DeadlineExceeded``.
        """
        self.recoveries += 1
        session.damaged += isinstance(error, ProtocolError)
        if session.damaged > DAMAGED:
            raise error
        self._reach(session, deadline, error)

    def _reach(self, session: Session, deadline: float, error: HeadwaterError | None) -> None:
        unserved: float | None = None
        while not self._closed:
            try:
                self._open(session, deadline)
                for part in list(session.parts.values()):
                    part.attach(deadline)
                return
            except (LinkError, StaleEpoch) as again:
                if self._control.gone:
                    raise LinkBroken(f"{again}; pushes that were not acknowledged may or may not be applied") from None
                error = again
                session.damaged += isinstance(again, ProtocolError)
                if session.damaged > DAMAGED:
                    raise
            except ClusterError as again:
                if not _nobody(again):
                    raise
                unserved = self.runtime.now() if unserved is None else unserved
                if self.runtime.now() - unserved > UNSERVED:
                    raise LinkBroken(f"{again}; pushes that were not acknowledged may or may not be applied") from None
            except BaseException:  # a deadline, Ctrl-C: not every table is attached, so whoever comes next begins again
                session.close()
                raise
            if self.runtime.now() >= deadline:
                break
            self.runtime.sleep(AGAIN)
        if self._closed:
            raise LinkBroken("this client has closed the connection; what was not acknowledged may not be applied")
        raise DeadlineExceeded(
            f"{session.name} could not be reached within HEADWATER_TIMEOUT ({self.timeout:g} s): {error}; "
            "what was sent and not acknowledged may or may not be applied"
        )

    def _open(self, session: Session, deadline: float) -> None:
        session.close()
        view = self._control.ask(m.Find(session.shard), max(0.0, deadline - self.runtime.now()))
        assert isinstance(view, m.ShardView)
        if view.epoch < session.epoch:
            raise StaleEpoch(f"the coordinator is at epoch {view.epoch}, this client has seen {session.epoch}")
        session.link = self._dial(view, session)
        session.address = view.address
        left = min(OPEN, max(0.0, deadline - self.runtime.now()))
        try:
            opened = session.request(m.Open(self.session, self.rank, view.shard, self.members), left).replies[0]
        except DeadlineExceeded:
            raise LinkBroken(f"{session.name} accepted the connection and did not answer") from None
        assert isinstance(opened, m.Opened)
        session.epoch = opened.epoch

    def still_there(self, session: Session, deadline: float) -> bool:
        """Whether the server at the other end is still the shard's primary; asked when nothing comes from it."""
        try:
            view = self._control.ask(m.Find(session.shard), max(0.0, deadline - self.runtime.now()))
        except ClusterError:
            return True  # nobody else serves it
        return isinstance(view, m.ShardView) and view.address == session.address

    @interrupts.deferred
    def request(self, session: Session, message: m.Request, deadline: float | None = None) -> list[m.Reply]:
        """Ask a shard, over as many connections as it takes. Raises what it was refused with, or a deadline."""
        until = self.runtime.now() + self.timeout if deadline is None else deadline
        there = partial(self.still_there, session, until)
        while True:
            try:
                return session.request(message, max(0.0, until - self.runtime.now()), there=there).replies
            except LinkError as error:
                self.recover(session, until, error)

    @interrupts.deferred
    def ask(self, message: m.Request, timeout: float | None = None) -> m.Reply:
        """Ask the coordinator, over as many connections as it takes. Raises what it was refused with, or a deadline."""
        return self._control.ask(message, timeout)

    def ask_for_others(self, message: m.Request, patience: Patience) -> m.Reply:
        """Ask the coordinator what it answers when other workers have come, however long that may take."""
        while True:
            try:
                return self.ask(message, patience.left)
            except DeadlineExceeded:
                patience.look("the coordinator")

    @property
    def step_timeout(self) -> float:
        """Seconds for which a worker that is alive is waited for."""
        return max(self.timeout, self.patience)

    # ---- tables ------------------------------------------------------------------------------------

    def dense(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        init: Init = ZEROS,
        optimizer: type[torch.optim.Optimizer] | str = torch.optim.SGD,
        dtype: torch.dtype = torch.float32,
        sync: Sync = ASYNC,
        max_grad_norm: float | None = None,
        nonfinite: str = "error",
        seed: int = 0,
        **hyper: object,
    ) -> Dense:
        """A table of one tensor: made on first use, the same for every client that asks for this name.

        ``optimizer``: a class of ``torch.optim`` from the closed list, or its name; ``hyper`` are its arguments.
        Raises ``TableConflict`` if it exists otherwise, ``UnknownOptimizer``, ``NotEnoughMemory``.
        """
        kind = optimizer if isinstance(optimizer, str) else optimizer.__name__
        spec = DenseSpec(
            name,
            (ParameterSpec(name, tuple(shape), dtype_name(dtype), 0, init),),
            OptimizerSpec(kind, (dict(hyper),)),  # type: ignore[arg-type]
            sync,
            max_grad_norm,
            nonfinite,  # type: ignore[arg-type]
            seed,
        )
        return Dense(self.table(spec), self.rank)

    @interrupts.deferred
    @torch.inference_mode(False)  # memory that is written later, outside of it
    def table(self, spec: DenseSpec, values: Mapping[str, torch.Tensor] | None = None, claim: Claim = "any") -> Table:
        """A table of many parameters.

        ``values`` fill the parameters whose init is ``values``: the lowest rank assigns its own, the others wait
        for those; so every worker must ask for such a table.

        ``claim``: which table is meant. ``"any"``: made on first use, the same for all. ``"new"``: made in this run,
        and none that this worker has finished with. ``"resume"``: one that is there, perhaps with other
        hyperparameters.

        Raises as ``dense``, ``UsageError`` if values are needed and missing, ``TableConflict`` for a table that is not
        new, ``UnknownTable`` if there is nothing to resume.
        """
        check_table(spec)
        known = self.tables.get(spec.name)
        if known is not None and known.spec == spec and claim == "any":
            return known
        needed = [p.name for p in spec.parameters if p.init.kind == "values"]
        missing = [name for name in needed if name not in (values or {})]
        if missing:
            raise UsageError(f"table {spec.name!r}: no values were given for {missing[0]!r}; nothing was declared")
        for p in spec.parameters:
            if p.init.kind == "values":
                check_tensor(p, (values or {})[p.name])
        declared = self.ask_for_others(m.Declare(spec, claim), Patience(self, None, m.WhoIsLate(spec.name)))
        assert isinstance(declared, m.Declared)
        if known is not None and known.number == declared.table:
            return known
        table = Table(self, declared, layout(only(declared.spec), len(self.servers)))
        if declared.assign:
            table.assign({name: (values or {})[name] for name in needed})
            self.ask(m.Initialised(table.number))
        elif not table.live:
            table.pull().wait()
        self.tables[spec.name] = table
        return table

    @interrupts.deferred
    def publish(
        self,
        tables: Iterable[Table | Dense | str],
        name: str,
        *,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        keep: int = 3,
        age: float | None = None,
        tags: Iterable[str] = (),
        step: int | None = None,
    ) -> Publication:
        """Make the present state of ``tables`` an immutable version that readers can lease.

        Under ``Bulk`` it is exactly the state after this worker's last step, on all shards; the call returns when that
        moment is past (after the step is committed, and one round to the servers). The servers copy while training
        goes on: wait for the outcome, or do not. Under ``Stale`` and ``Async`` each shard takes its present state.

        Args:
            tables: tables of this client; or names, also of tables that only others use: then each shard takes its
                present state, which lies between two of the others' steps, on all shards the same two.
            name: of the version, new among those of ``model``.
            model: the table set whose version it is; default: the name of the first table.
            metadata: text by name, at most 64 KiB; readers get it with the version.
            keep: how many of the newest versions of the model are kept. Tags and leases hold others beyond that.
            age: seconds after which a version that is not the newest goes too.
            tags: tags that move to the version when it is ready. ``latest`` moves by itself.
            step: the version's ``step``, 0 or more; default: the tables' clock, which counts from the beginning of the
                cluster. A run that goes on in another cluster says where it is.

        Raises:
            VersionExists: the model has a version of that name.
            UnknownTable: a name that is no table of the cluster.
            UsageError: a name, ``keep``, ``age`` or metadata that cannot be.
        """
        chosen = [self._table_of(table) for table in tables]
        return publish(self, chosen, name, model=model, metadata=metadata, keep=keep, age=age, tags=tags, step=step)

    def _table_of(self, table: Table | Dense | str) -> Table | m.TableStatus:
        if isinstance(table, Dense):
            return table.table
        if isinstance(table, Table):
            return table
        if table in self.tables:
            return self.tables[table]
        there = {each.name: each for each in self.status().tables}
        if table not in there:
            known = ", ".join(map(repr, sorted(there))) or "none"
            raise UnknownTable(f"the cluster has no table {table!r}; it has {known}. Nothing was published")
        return there[table]

    def versions(self, model: str = "") -> tuple[VersionStatus, ...]:
        """All versions of a model, or of every one: each with its state, tags, leases and copies, oldest first."""
        return publication.versions(self.ask, model)

    def tag(self, model: str, tag: str, name: str) -> None:
        """Let ``tag`` of ``model`` mean the version that ``name`` (a version or another tag) means now.

        A tag holds its version: it is not retired. Readers that wait for the tag hear of it at once. ``latest`` is
        always the newest version, and cannot be moved.

        Raises:
            UnknownVersion: there is no such version; the tag means what it did.
            UsageError: a tag that cannot be: ``latest``, a version's name, or no name at all.
        """
        publication.tag(self.ask, model, tag, name)

    def untag(self, model: str, tag: str) -> None:
        """Take a tag away; its version may be retired then. Raises ``UnknownVersion`` if there is none."""
        publication.untag(self.ask, model, tag)

    def rollback(self, model: str, tag: str, to: str | None = None) -> VersionStatus:
        """Move a tag that is there to the parent of the version that it means now, or to ``to``; that is returned.

        Raises ``UnknownVersion`` (no such tag, or no parent) or ``VersionExpired`` (the parent was retired or is lost);
        the tag means what it did.
        """
        return publication.rollback(self.ask, model, tag, to)

    def retire(self, model: str, name: str) -> None:
        """Let a version go before its time. Raises ``UsageError`` while a tag or lease holds it, ``UnknownVersion``."""
        self.ask(Retire(model, name))

    # ---- the rest ------------------------------------------------------------------------------------

    @interrupts.deferred
    def barrier(self, name: str = "", timeout: float | None = None) -> None:
        """Wait until every worker has called this. Raises ``WorkerLost`` if one dies meanwhile.

        Under ``Stale`` and ``Async(max_staleness)`` the steps of those that come later do not wait for who is here;
        the first step after it may so be staler than the cap.
        """
        self._meet(name, b"", timeout)

    def gather(self, name: str, value: bytes, timeout: float | None = None) -> dict[int, bytes]:
        """What every worker says, by rank: a ``barrier`` (whose errors it raises) at which each brings a value.

        ``value``: 1 byte to 64 KiB. Names are those of barriers: use one for one purpose.
        """
        met = self._meet(name, value, timeout)
        return dict(met.values) if isinstance(met, m.Met) else {}

    def _meet(self, name: str, value: bytes, timeout: float | None) -> m.Reply:
        self._turns[name] += 1
        patience = Patience(self, timeout, m.WhoIsLate(barrier=name))
        with self._aside(patience.deadline):
            met = self.ask_for_others(m.Barrier(name, self._turns[name], value), patience)
        # Nobody takes a step before all are waited for again.
        self.ask_for_others(m.Barrier(name + _BACK, self._turns[name]), patience)
        return met

    @contextlib.contextmanager
    def _aside(self, deadline: float) -> Iterator[None]:
        """Inside, this worker waits for others: under ``Stale`` and ``Async(max_staleness)`` they do not wait for it.

        Its values and clocks stay as they are.
        """
        if self._away or self.rank < 0:
            yield
            return
        paced = [table for table in self.tables.values() if table.paced]
        self._away = True
        try:
            for table in paced:
                table.aside(True, deadline)
            yield
        finally:
            self._away = False
            until = max(deadline, self.runtime.now() + _BRIEF)
            for table in paced:
                table.aside(False, until)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, steps and reads of others do without this worker, which waits for something that they do.

        Its own steps are finished first; afterwards its ``Bulk`` tables are where the others are.
        """
        for table in self.tables.values():
            table.wait()
        with self._aside(self.runtime.now() + self.timeout):
            if not any(table.spec.sync.collective for table in self.tables.values()):
                yield
                return
            self._rest(True)
            try:
                yield
            finally:
                self._rest(False)
                for table in self.tables.values():
                    table.rejoin(self.members)

    @interrupts.deferred
    def _rest(self, away: bool) -> None:
        answer = self.ask(m.Rest(away))
        assert isinstance(answer, m.Rested)
        self.members = max(self.members, answer.members)

    def status(self) -> m.ClusterStatus:
        """Servers, workers and tables, from the last heartbeats."""
        status = self.ask(m.Status())
        assert isinstance(status, m.ClusterStatus)
        return status

    def statistics(self) -> ClientStatistics:
        """Counters of this client."""
        sessions = self.servers.values()
        return ClientStatistics(
            self._steps,
            sum(s.pushed_bytes for s in sessions),
            sum(s.pulled_bytes for s in sessions),
            self._waited,
            self._stale_last,
            self._stale_sum / max(1, self._steps),
            self._stale_max,
            self._lag_max,
        )

    def observed(self, staleness: int, lag: int) -> None:
        """A table has finished a step."""
        self._steps += 1
        self._stale_last = staleness
        self._stale_sum += staleness
        self._stale_max = max(self._stale_max, staleness)
        self._lag_max = max(self._lag_max, lag)

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def _heartbeat(self) -> None:
        """On the coordinator's own connection, so that bulk traffic never delays it."""
        s = self.statistics()
        tables = list(self.tables.values())
        clock = max((table.clock for table in tables), default=0)
        reached = tuple((table.number, table.reached) for table in tables)
        beat = m.Heartbeat(clock, s.pushed_bytes, s.pulled_bytes, s.staleness_last, tables=reached)
        with contextlib.suppress(HeadwaterError):  # whoever asks the coordinator something is told
            self._control.notify(beat)

    @property
    def closed(self) -> bool:
        """Whether it has left the cluster."""
        return self._closed

    @property
    def declared(self) -> bool:
        """Whether ``world`` was said; else it is the number of those who were there when this worker came."""
        return self._stated is not None or self.alone

    @property
    def alone(self) -> bool:
        """Whether this worker was said to be the only one, or is in a cluster that nobody else can find."""
        return self._stated == 1 or (self._stated is None and self.address == "inproc://")

    def hold(self) -> Client:
        """Asked for in this process, perhaps once more: it leaves when it was closed as often."""
        self._holders += 1
        return self

    def abandon(self) -> None:
        """In a forked child: it is its parent's. What has been sent and received is seen as it was."""
        self._closed = self._abandoned = True

    def leave(self) -> None:
        """Close it, whoever has it."""
        self.kept, self._holders = False, 0
        self.close()

    def let_go(self) -> None:
        """The process does not keep it any more: it is closed with the last that has asked for it."""
        self.kept = False
        if not self._holders:
            self.close()

    @interrupts.deferred
    def close(self) -> None:
        """Finish the steps under way and leave. The others go on without this worker.

        A client that the process keeps for its optimizers, or that was asked for more often than it was closed, stays.
        """
        if self._closed:
            return
        try:
            for table in self.tables.values():
                try:
                    table.wait()
                except HeadwaterError as error:  # whoever wants to know waits for the step before
                    log.warning("the last step of table %r was not acknowledged: %s", table.spec.name, error)
            self._holders = max(0, self._holders - 1)
            if self.kept or self._holders:
                return
            with contextlib.suppress(HeadwaterError):
                # only now: a step that was ended and not decided would be dropped with a worker that leaves
                self._control.leave()
        except BaseException:  # after Ctrl-C as well
            self._hang_up()
            raise
        self._hang_up()

    def _hang_up(self) -> None:
        self._closed = True
        for session in self.servers.values():
            session.close()
        self._control.close()
        self._stop()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self.kept or self._holders > 1:
            self.close()
        elif self._closed:
            return
        else:  # a step may be half pushed: the others are told that this worker died
            self._hang_up()


def _nobody(error: ClusterError) -> bool:
    """Whether the coordinator says that a shard has no server now."""
    return type(error) is ClusterError
