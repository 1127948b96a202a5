"""A client of a cluster: its connections, its heartbeat, its tables."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import overload

import torch

from headwater import interrupts
from headwater.client import publication
from headwater.client.control import Control, Dial
from headwater.client.dense.handle import Dense
from headwater.client.dense.table import DenseTable
from headwater.client.kinds import kind_of
from headwater.client.naming import Names
from headwater.client.patience import Patience
from headwater.client.pauses import Pauses
from headwater.client.publication import Publication, publish
from headwater.client.runtime import Runtime, Threads
from headwater.client.shards import Shards
from headwater.client.statistics import ClientStatistics
from headwater.client.table import Table
from headwater.errors import HeadwaterError, UnknownTable, UsageError
from headwater.layout.kinds import check_table
from headwater.transports.address import host_identity
from headwater.types import Async, Claim, DenseSpec, Init, OptimizerSpec, ParameterSpec, Sync, TableSpec
from headwater.wire import messages as m
from headwater.wire.tensors import dtype_name
from headwater.wire.versions import Retire, VersionStatus

ZEROS, ASYNC = Init("zeros"), Async()
log = logging.getLogger("headwater")


class Client:
    """Made by ``headwater.connect``. A context manager; one thread at a time may use it.

    It has more methods than other classes because it is all that a script sees of a cluster; most are a line or two,
    and the work is in ``Shards``, ``Pauses``, ``Control``, the tables and ``publication``.
    """

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
        self.runtime = runtime or Threads()
        self.session = self.runtime.token()
        self.tables: dict[str, Table] = {}
        self.address, self.thread = "", 0  # of the coordinator; of who has made it
        self.names = Names()
        self.kept = False  # by the process that has it for all its optimizers: see ``headwater.client.connecting``
        self._holders = 0  # how often it was asked for by ``connect``
        self._closed = False
        join = m.Join(role, self.session, host_identity(), os.getpid(), rank, world, run=run, node=platform.node())
        self._control = Control(dial, join, self.runtime, timeout)
        joined = self._control.joined
        self.rank, self.world = joined.rank, joined.world
        self._stated = world
        self.shards = Shards(self._control, dial, self.session, self.runtime, timeout, step_timeout)
        self._pauses = Pauses(self.shards, self.tables)
        self._stop = self.runtime.every(joined.heartbeat, self._heartbeat)

    @property
    def members(self) -> int:
        """The membership epoch that this worker knows: it counts every change among the workers."""
        return self.shards.members

    @property
    def timeout(self) -> float:
        """Seconds that any wait may take, but for workers that are alive."""
        return self.shards.timeout

    @property
    def step_timeout(self) -> float:
        """Seconds for which a worker that is alive is waited for."""
        return self.shards.step_timeout

    @interrupts.deferred
    def ask(self, message: m.Request, timeout: float | None = None) -> m.Reply:
        """Ask the coordinator, over as many connections as it takes. Raises what it was refused with, or a deadline."""
        return self._control.ask(message, timeout)

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

    @overload
    def table(
        self, spec: DenseSpec, values: Mapping[str, torch.Tensor] | None = None, claim: Claim = "any"
    ) -> DenseTable: ...

    @overload  # of another kind: see ``headwater.client.kinds``
    def table(
        self, spec: TableSpec, values: Mapping[str, torch.Tensor] | None = None, claim: Claim = "any"
    ) -> Table: ...

    @interrupts.deferred
    @torch.inference_mode(False)  # memory that is written later, outside of it
    def table(self, spec: TableSpec, values: Mapping[str, torch.Tensor] | None = None, claim: Claim = "any") -> Table:
        """A table of many parameters.

        ``values`` fill the parameters whose init is ``values``: the lowest rank assigns its own, the others wait
        for those; so every worker must ask for such a table.

        ``claim``: which table is meant. ``"any"``: made on first use, the same for all. ``"new"``: made in this run,
        and none that this worker has finished with. ``"resume"``: one that is there, perhaps with other
        hyperparameters.

        Raises as ``dense``, ``UsageError`` if values are needed and missing, ``TableConflict`` for a table that is not
        new, ``UnknownTable`` if there is nothing to resume.
        """
        known = self.tables.get(spec.name)
        if known is not None and known.spec == spec and claim == "any":
            return known
        given, kind = values or {}, kind_of(spec)
        check_table(spec)
        missing = [name for name in spec.given if name not in given]
        if missing:
            raise UsageError(f"table {spec.name!r}: no values were given for {missing[0]!r}; nothing was declared")
        kind.check(spec, given)
        patience = Patience(self.shards, None, partial(m.WhoIsLate, spec.name))
        declared = self.shards.ask_for_others(m.Declare(spec, claim), patience)
        assert isinstance(declared, m.Declared)
        if known is not None and known.number == declared.table:
            return known
        table = kind(self.shards, declared)
        table.load(given, declared.assign)
        if declared.assign:
            self.ask(m.Initialised(table.number))
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
        return publish(self.ask, chosen, name, model=model, metadata=metadata, keep=keep, age=age, tags=tags, step=step)

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
        self._pauses.meet(name, b"", timeout)

    def gather(self, name: str, value: bytes, timeout: float | None = None) -> dict[int, bytes]:
        """What every worker says, by rank: a ``barrier`` (whose errors it raises) at which each brings a value.

        ``value``: 1 byte to 64 KiB. Names are those of barriers: use one for one purpose.
        """
        met = self._pauses.meet(name, value, timeout)
        return dict(met.values) if isinstance(met, m.Met) else {}

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Inside, steps and reads of others do without this worker, which waits for something that they do.

        Its own steps are finished first; afterwards its ``Bulk`` tables are where the others are.
        """
        return self._pauses.all_do_without()

    def status(self) -> m.ClusterStatus:
        """Servers, workers and tables, from the last heartbeats."""
        status = self.ask(m.Status())
        assert isinstance(status, m.ClusterStatus)
        return status

    def statistics(self) -> ClientStatistics:
        """Counters of this client."""
        return self.shards.counters.read(self.shards.sessions.values())

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
        self._closed = True
        self.shards.abandon()

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
        self.shards.close()
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
