"""A client's way to all shards: sessions, found again when connections break; requests; and waiting for answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from headwater import interrupts
from headwater.client.control import Control, Dial
from headwater.client.part import TablePart
from headwater.client.patience import Patience
from headwater.client.runtime import Runtime
from headwater.client.session import TURN, Session, Undone
from headwater.client.statistics import Counters
from headwater.errors import (
    ClusterError,
    DeadlineExceeded,
    HeadwaterError,
    LinkBroken,
    LinkError,
    ProtocolError,
    StaleEpoch,
)
from headwater.transports import forks
from headwater.wire import messages as m

OPEN = 5.0  # seconds in which a server must answer the first request of a connection
AGAIN = 0.02  # seconds between two attempts to reach a shard
UNSERVED = 5.0  # seconds in which the only server of a shard may come back
DAMAGED = 20  # connections in a row that end for damaged frames until that is no accident
_FIRST = 0.01  # seconds: the first turn at each server, doubled from round to round

P = TypeVar("P", bound=TablePart)


class AttachedTable(Protocol):
    """A table as the sessions with its shards see it."""

    def attach(self, session: Session, deadline: float) -> None:
        """Use the table over the session's present connection, and send again what was not acknowledged."""

    def push_again(self, session: Session) -> None:
        """Another worker's death undid the table's step on one shard."""


class Shards:
    """``sessions`` by shard, connected when a table needs them. ``tables`` by number: attached to each new connection.

    Also what tables and waits need of the worker: its ``rank``, its time limits, the coordinator (``ask``), counters.
    """

    def __init__(
        self, control: Control, dial: Dial, number: int, runtime: Runtime, timeout: float, longer: float
    ) -> None:
        joined = control.joined
        self.runtime = runtime
        self.timeout = timeout
        self.rank, self.members = joined.rank, joined.members
        self.tables: dict[int, AttachedTable] = {}
        self.counters = Counters()
        self._undone: list[Undone] = []
        self.sessions = {
            view.shard: Session(f"shard {view.shard}", number, runtime, view.shard, self._undone)
            for view in joined.views
        }
        self._control = control
        self._dial = dial
        self._number = number
        self._longer = longer
        self._closed = self._abandoned = False

    @property
    def step_timeout(self) -> float:
        """Seconds for which a worker that is alive is waited for."""
        return max(self.timeout, self._longer)

    def deadline(self) -> float:
        """When a wait that begins now has taken too long."""
        return self.runtime.now() + self.timeout

    # ---- connections -----------------------------------------------------------------------------

    @interrupts.deferred
    def reach(self, session: Session) -> None:
        """Connect to a shard, if that has not happened yet. Raises as ``recover``."""
        if self._abandoned:
            raise forks.refusal()
        if session.link is None:
            self._reach(session, self.deadline(), None)

    @interrupts.deferred
    def recover(self, session: Session, deadline: float, error: HeadwaterError) -> None:
        """The link to a shard broke: find its primary, and go on there with what was not acknowledged.

        Raises ``LinkBroken`` if nobody serves the shard any more, or ``DeadlineExceeded``.
        """
        session.damaged += isinstance(error, ProtocolError)
        if session.damaged > DAMAGED:
            raise error
        self._reach(session, deadline, error)

    def _reach(self, session: Session, deadline: float, error: HeadwaterError | None) -> None:
        unserved: float | None = None
        while not self._closed:
            try:
                self._open(session, deadline)
                for table in list(session.parts):
                    self.tables[table].attach(session, deadline)
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
            opened = session.request(m.Open(self._number, self.rank, view.shard, self.members), left).replies[0]
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

    def abandon(self) -> None:
        """In a forked child: the connections are its parent's."""
        self._closed = self._abandoned = True

    def close(self) -> None:
        """Nobody is reached any more."""
        self._closed = True
        for session in self.sessions.values():
            session.close()

    # ---- questions -------------------------------------------------------------------------------

    @interrupts.deferred
    def request(self, session: Session, message: m.Request, deadline: float | None = None) -> list[m.Reply]:
        """Ask a shard, over as many connections as it takes. Raises what it was refused with, or a deadline."""
        until = self.deadline() if deadline is None else deadline
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

    # ---- waiting for answers -----------------------------------------------------------------------

    def pump(self, waiting: Sequence[P], done: Callable[[P], bool], patience: Patience) -> None:
        """Receive until ``done`` of each part; all are of one table, which waits. Raises as ``recover``.

        Each server is waited for in turns: it may wait for another that is dead, or be dead itself without a sign.
        """
        turn = _FIRST
        while waiting:
            for part in waiting:
                self.pump_one(part, done, patience, turn)
            waiting = [part for part in waiting if not done(part)]
            turn = min(2 * turn, TURN)

    def pump_one(self, part: P, done: Callable[[P], bool], patience: Patience, turn: float = TURN) -> None:
        """Receive from one shard for a turn, or until ``done``.

        Another worker's death undoes a step; it is pushed again here, from the same memory. Steps of other tables too:
        somebody who waits for one of them may be who this table waits for.
        """
        session = part.session
        assert session.link is not None
        if self._undone:
            self._push_undone_again(part.table)
        try:
            session.link.pump(
                lambda: done(part) or part.lost is not None, min(patience.deadline, self.runtime.now() + turn)
            )
        except LinkError as error:
            self.recover(session, patience.deadline, error)
        except DeadlineExceeded:
            patience.look(session.name)
            if turn == TURN and not self.still_there(session, patience.deadline):
                moved = DeadlineExceeded(f"{session.name} has another primary now")
                self.recover(session, patience.deadline, moved)

    def _push_undone_again(self, waiting: int) -> None:
        """Of the table that waits, and of others if their step is ended: else more of it comes, and then they wait."""
        for undone in list(self._undone):
            session, part = undone
            if part.lost is None or part.ended or part.table == waiting:
                self._undone.remove(undone)
                if part.lost is not None:
                    self.tables[part.table].push_again(session)


def _nobody(error: ClusterError) -> bool:
    """Whether the coordinator says that a shard has no server now."""
    return type(error) is ClusterError
