"""A client's line to the coordinator. It is dialed again when it breaks, and questions are asked again.

Every question may be asked twice: the coordinator answers the second time as it did the first.
"""

from __future__ import annotations

from collections.abc import Callable

from headwater import interrupts
from headwater.client.runtime import Runtime
from headwater.client.session import Session
from headwater.errors import DeadlineExceeded, HeadwaterError, InternalError, LinkError, ProtocolError
from headwater.transports.stream import Handler, Link
from headwater.wire import messages as m

Dial = Callable[[m.ShardView | None, Handler], Link]
"""Opens a link to a shard's server, or to the coordinator for ``None``."""

AGAIN = 0.1  # seconds between two attempts to reach the coordinator
ANSWER = 1.0  # seconds that a coordinator has to know this client again
BRIEF = 2.0  # seconds of attempts where the coordinator does not come back after a crash


class Control:
    """``join`` is what this client says of itself. Raises what the coordinator refuses with, or ``Unreachable``."""

    def __init__(self, dial: Dial, join: m.Join, runtime: Runtime, timeout: float) -> None:
        self._dial = dial
        self._runtime = runtime
        self._timeout = timeout
        self._lock = runtime.lock()
        self._session = self._connect()
        self._closed = False
        self.gone = False  # the coordinator has died and does not come back
        try:
            joined = self._session.request(join, timeout).replies[0]
            if not isinstance(joined, m.Joined):
                raise InternalError(f"the coordinator answered {type(joined).__name__} to a join")
        except BaseException:
            self.close()
            raise
        self.joined = joined
        self._join = m.Join(join.role, join.session, join.host, join.pid, joined.rank, join.world, resume=True)

    def _connect(self) -> Session:
        session = Session("the coordinator", 0, self._runtime)
        session.link = self._dial(None, session)
        return session

    @interrupts.deferred
    def ask(self, message: m.Request, timeout: float | None = None) -> m.Reply:
        """The answer, over as many connections as it takes. Raises what it was refused with, or a deadline."""
        deadline = self._runtime.now() + (self._timeout if timeout is None else timeout)
        while True:
            session = self._session
            try:
                return session.request(message, max(0.0, deadline - self._runtime.now())).replies[0]
            except LinkError as error:
                if isinstance(error, ProtocolError) and session.link is not None and session.link.error is None:
                    raise  # that is the answer: asking again would not help
                self._again(session, deadline, error)

    def notify(self, message: m.Notice) -> None:
        """Say something that needs no answer; it may be lost. Raises as ``ask`` if the line cannot be mended soon."""
        session = self._session
        try:
            session.notify(message)
        except LinkError as error:
            self._again(session, self._runtime.now() + ANSWER, error)

    @interrupts.deferred
    def _again(self, broken: Session, deadline: float, error: HeadwaterError) -> None:
        """Come back as the same member. One thread does it, the others wait for it."""
        with self._lock:
            if self._session is not broken:
                return
            if not self.joined.durable:
                deadline = min(deadline, self._runtime.now() + BRIEF)
            broken.close()
            while not self._closed:
                try:
                    self._session = self._resumed()
                    return
                except (LinkError, DeadlineExceeded) as again:
                    error = again
                if self._runtime.now() + AGAIN >= deadline:
                    break
                self._runtime.sleep(AGAIN)
            self.gone = not self.joined.durable
        raise error

    def _resumed(self) -> Session:
        session = self._connect()
        try:
            session.request(self._join, min(ANSWER, self._timeout))
        except BaseException:
            session.close()
            raise
        return session

    def leave(self) -> None:
        """Say goodbye, once and without waiting for a coordinator that is away."""
        self._session.request(m.Leave(), 5.0)

    def close(self) -> None:
        self._closed = True
        self._session.close()
