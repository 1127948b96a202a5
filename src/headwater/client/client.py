"""A client of a cluster: its connections, its heartbeat, its tables."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch

from headwater.client.dense import Dense
from headwater.client.session import Session
from headwater.client.table import Table, check_tensor
from headwater.cluster.placement import check_table, layout
from headwater.errors import HeadwaterError, InternalError, UsageError
from headwater.transports.address import host_identity
from headwater.transports.stream import Handler, Link
from headwater.types import Async, Init, OptimizerSpec, ParameterSpec, Sync, TableSpec
from headwater.wire import messages as m
from headwater.wire.tensors import dtype_name

ZEROS, ASYNC = Init("zeros"), Async()
Dial = Callable[[m.ShardView | None, Handler], Link]
"""Opens a link to a shard's server, or to the coordinator for ``None``."""


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

    def __init__(
        self, dial: Dial, *, role: str = "worker", rank: int | None = None, world: int | None = None, timeout: float
    ) -> None:
        self.timeout = timeout
        self.session = secrets.randbits(63)
        self.tables: dict[str, Table] = {}
        self.servers: dict[int, Session] = {}
        self._closed = False
        self._steps = self._stale_sum = self._stale_max = self._stale_last = self._lag_max = 0
        self._waited = 0.0
        self._coordinator = Session("the coordinator", self.session)
        self._coordinator.link = dial(None, self._coordinator)
        join = m.Join(role, self.session, host_identity(), os.getpid(), rank, world)
        try:
            joined = self._coordinator.request(join, timeout).replies[0]
            if not isinstance(joined, m.Joined):
                raise InternalError(f"the coordinator answered {type(joined).__name__} to a join")
            self.rank, self.world = joined.rank, joined.world
            for view in joined.views:
                self.servers[view.shard] = self._open(view, dial)
        except BaseException:
            self._hang_up()
            raise
        self._stop = threading.Event()
        self._beat = threading.Thread(
            target=self._heartbeats, args=(joined.heartbeat,), name="headwater-heartbeat", daemon=True
        )
        self._beat.start()

    def _open(self, view: m.ShardView, dial: Dial) -> Session:
        session = Session(f"server {view.shard}", self.session)
        session.shard, session.epoch = view.shard, view.epoch
        session.link = dial(view, session)
        opened = session.request(m.Open(self.session, self.rank, view.shard), self.timeout).replies[0]
        if isinstance(opened, m.Opened):
            session.seq = opened.seq
        return session

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
        spec = TableSpec(
            name,
            (ParameterSpec(name, tuple(shape), dtype_name(dtype), 0, init),),
            OptimizerSpec(kind, (dict(hyper),)),  # type: ignore[arg-type]
            sync,
            max_grad_norm,
            nonfinite,  # type: ignore[arg-type]
            seed,
        )
        return Dense(self.table(spec), self.rank)

    def table(self, spec: TableSpec, values: Mapping[str, torch.Tensor] | None = None) -> Table:
        """A table of many parameters.

        ``values`` fill the parameters whose init is ``values``: the lowest rank assigns its own, the others wait
        for those; so every worker must ask for such a table.

        Raises as ``dense``, and ``UsageError`` if values are needed and missing.
        """
        check_table(spec)
        known = self.tables.get(spec.name)
        if known is not None and known.spec == spec:
            return known
        needed = [p.name for p in spec.parameters if p.init.kind == "values"]
        missing = [name for name in needed if name not in (values or {})]
        if missing:
            raise UsageError(f"table {spec.name!r}: no values were given for {missing[0]!r}; nothing was declared")
        for p in spec.parameters:
            if p.init.kind == "values":
                check_tensor(p, (values or {})[p.name])
        declared = self._coordinator.request(m.Declare(spec), self.timeout).replies[0]
        assert isinstance(declared, m.Declared)
        table = Table(self, declared, layout(declared.spec, len(self.servers)))
        if declared.assign:
            table.assign({name: (values or {})[name] for name in needed})
            self._coordinator.request(m.Initialised(table.number), self.timeout)
        elif not table.live:
            table.pull().wait()
        self.tables[spec.name] = table
        return table

    # ---- the rest ------------------------------------------------------------------------------------

    def barrier(self, name: str = "", timeout: float | None = None) -> None:
        """Wait until every worker has called this. Raises ``WorkerLost`` if one dies meanwhile."""
        self._coordinator.request(m.Barrier(name), self.timeout if timeout is None else timeout)

    def status(self) -> m.ClusterStatus:
        """Servers, workers and tables, from the last heartbeats."""
        status = self._coordinator.request(m.Status(), self.timeout).replies[0]
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

    def _heartbeats(self, period: float) -> None:
        """On the coordinator's own connection, so that bulk traffic never delays it."""
        while not self._stop.wait(period):
            s = self.statistics()
            clock = max((table.clock for table in list(self.tables.values())), default=0)
            beat = m.Heartbeat(clock, s.pushed_bytes, s.pulled_bytes, s.staleness_last)
            try:
                self._coordinator.notify(beat)
            except HeadwaterError:
                return

    def close(self) -> None:
        """Finish the steps under way and leave. The others go on without this worker."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(HeadwaterError):
            for table in self.tables.values():
                table.wait()
            # only now: a step that was ended and not decided would be dropped with a worker that leaves
            self._coordinator.request(m.Leave(), 5.0)
        self._stop.set()
        self._hang_up()

    def _hang_up(self) -> None:
        for session in [*self.servers.values(), self._coordinator]:
            if session.link is not None:
                session.link.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # a step may be half pushed: the others are told that this worker died
            self._closed = True
            self._stop.set()
            self._hang_up()
