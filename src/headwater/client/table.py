"""Any table at a client: steps that are ended, acknowledged and waited for, whatever its kind.

What a push carries and where values land is a subclass's, one for each kind of spec: ``headwater.client.kinds``.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from headwater import interrupts
from headwater.client.part import TablePart
from headwater.client.patience import Patience
from headwater.client.session import Answers, Session
from headwater.client.shards import Shards
from headwater.client.tickets import Alike, StepResult, Ticket
from headwater.errors import DeadlineExceeded, HeadwaterError, LinkError
from headwater.types import TableSpec
from headwater.wire import messages as m
from headwater.wire.data_plan import ANY

if TYPE_CHECKING:
    import torch

_PAUSE = 0.01  # seconds


class Table(ABC):
    """``number``: of the table in the cluster. ``clock``: of the last step that this worker has ended.

    It has more methods than other classes because a kind of table is to be written by overriding its first ones.

    A subclass makes its parts and then calls ``_join``; it says what an attachment shares and brings (``_to_share``,
    ``_attached``), how values get there first (``load``), and what ``wait`` and ``pull`` are.
    """

    spec: TableSpec
    _parts: Sequence[TablePart]  # of the subclass's own kind

    def __init__(self, shards: Shards, declared: m.Declared) -> None:
        self.spec = declared.spec
        self.number = declared.table
        self.clock = 0
        self.failures = 0  # steps and pulls that ended with an error: what was sent with them may be lost
        self.digest = 0  # of what every worker should have alike beside the table; 0: of nothing
        self._shards = shards
        self._members = declared.members
        self._open = False  # a step was ended and not yet waited for
        self._ahead = False  # waits in the middle of a step
        self._ticket: Ticket | None = None  # of the last step
        self._renewed: list[Callable[[], None]] = []

    # ---- what a kind is --------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def check(cls, spec: TableSpec, values: Mapping[str, torch.Tensor]) -> None:
        """Before it is declared: whether ``values``, which has all that are ``given``, can be what it begins with.

        Raises ``ShapeMismatch`` or ``UsageError``.
        """

    @abstractmethod
    def load(self, values: Mapping[str, torch.Tensor], assign: bool) -> None:
        """Let the table begin with ``values`` (``assign``: this worker is who says so), or fetch what there is."""

    @abstractmethod
    def pull(self) -> Ticket:
        """Ask for the newest values."""

    @abstractmethod
    def wait(self) -> None:
        """Until the last step is acknowledged, and what was asked for is here."""

    def _to_share(self, session: Session) -> tuple[tuple[int, ...], int]:
        """Descriptors of this process's memory for a server of this host, and the bytes in it."""
        return (), 0

    @abstractmethod
    def _attached(self, session: Session, attached: m.Attached, fds: tuple[int, ...]) -> None:
        """A shard has answered; ``fds``: of its memory, if some was shared. Raises ``LinkBroken``."""

    @abstractmethod
    def _renew(self) -> None:
        """Others' steps were applied while this worker was paused: fetch what there is now."""

    # ---- attachments -----------------------------------------------------------------------------

    def _join(self, members: int) -> None:
        """Attach all parts, under ``Bulk`` as of when each shard knows ``members``."""
        deadline = self._shards.deadline()
        self._shards.tables[self.number] = self
        for part in self._parts:
            part.session.parts[self.number] = part
            self._shards.reach(part.session)
            self._attach_until(part, deadline, members)
        self.clock = max(part.clock for part in self._parts)

    def _attach_until(self, part: TablePart, deadline: float, members: int) -> None:
        """Steps that were decided before the shard knew this worker are not its own."""
        part.known = -1
        while True:
            try:
                self.attach(part.session, deadline)
            except LinkError as error:
                self._shards.recover(part.session, deadline, error)
            if part.known >= members or not self.spec.sync.collective or self._shards.rank < 0:
                return
            if self._shards.runtime.now() > deadline:
                raise DeadlineExceeded(f"{part.session.name} did not hear of this worker in time; nothing was pushed")
            self._shards.runtime.sleep(_PAUSE)

    def attach(self, session: Session, deadline: float) -> None:
        """Use the table over the present connection of a session; the first one, or one to a new primary."""
        part = self._part_on(session)
        fds, size = self._to_share(session)
        request = m.Attach(self.number, bool(fds), size, part.base)
        answer: Answers = session.request(request, max(0.0, deadline - self._shards.runtime.now()), fds)
        attached = answer.replies[0]
        assert isinstance(attached, m.Attached)
        self._attached(session, attached, answer.fds)
        if part.lsn:
            self.failures += 1  # a new primary has not heard what this worker's hyperparameters are
        part.lsn = max(part.lsn, attached.lsn)
        part.known, part.clock = attached.members, attached.clock
        part.send_again(attached.seq)

    def push_again(self, session: Session) -> None:
        """Another worker's death undid the step on one shard: push it under the new membership."""
        part = self._part_on(session)
        self._members = self._shards.members = max(part.members, self._members)
        part.push_again(self._members)

    def _part_on(self, session: Session) -> TablePart:
        return next(part for part in self._parts if part.session is session)

    # ---- pauses ----------------------------------------------------------------------------------

    @property
    def paced(self) -> bool:
        """Whether others' reads or steps may have to wait for what this worker does next, other than under ``Bulk``."""
        return self.spec.sync.paced

    def pause(self, deadline: float) -> None:
        """Others' reads and steps do without this worker."""
        self._say_paused(True, deadline)

    def resume(self, deadline: float) -> None:
        """They wait for it again."""
        self._say_paused(False, deadline)

    @interrupts.deferred
    def _say_paused(self, paused: bool, deadline: float) -> None:
        """A shard that nobody serves is left out: whoever needs it hears of it."""
        for part in self._parts:
            with contextlib.suppress(LinkError, DeadlineExceeded):
                self._shards.request(part.session, m.PauseTable(self.number, paused), deadline)

    @interrupts.deferred
    def catch_up(self, members: int) -> None:
        """After a pause: others' steps were applied meanwhile. A shard counts from when it knows ``members``."""
        self._members = members
        if not self.spec.sync.collective:
            return
        self._join(members)
        self._renew()
        for renewed in list(self._renewed):
            renewed()

    def when_renewed(self, act: Callable[[], None]) -> Callable[[], None]:
        """Call ``act`` whenever a pause has brought the values of later steps; the returned function ends that."""
        self._renewed.append(act)

        def stop() -> None:
            if act in self._renewed:
                self._renewed.remove(act)

        return stop

    # ---- steps -----------------------------------------------------------------------------------

    def _step_ended(self) -> Ticket:
        """All of the step has been sent, its end too."""
        self.clock += 1
        self._open = True
        self._ticket = Ticket(self._all_settled, self._settle)
        return self._ticket

    @interrupts.deferred
    def settle(self) -> None:
        """Until the last step is acknowledged: then the memory of its gradients is free again."""
        if self._open:
            self._settle(None)

    def _all_settled(self) -> bool:
        return all(part.settled() for part in self._parts)

    def _settle(self, timeout: float | None) -> StepResult:
        """Wait until every shard has acknowledged the step. A failure takes the clock back: nothing was applied."""
        self._pump(TablePart.settled, timeout)
        self._open = False
        stale = lsn = lag = 0
        applied, apart, differ = True, False, False
        error: HeadwaterError | None = None
        for part in self._parts:
            error = error or part.error
            if part.staleness > stale:
                stale = part.staleness
            if part.lsn > lsn:
                lsn = part.lsn
            if part.lag > lag:
                lag = part.lag
            applied, apart, differ = applied and not part.skipped, apart or part.note.apart, differ or part.note.differ
            if part.members > self._members:
                self._members = self._shards.members = part.members
        if error is not None:
            self._failed(error)
        self._shards.counters.stepped(stale, lag)
        first = self._parts[0].note
        alike = self._alike() if first.mark else None
        result = StepResult(
            self.clock, applied, first.norm, stale, lsn, first.skipped_by, first.groups, alike, apart, differ
        )
        if self._ticket is not None:
            self._ticket.resolve(result)
        return result

    def _alike(self) -> Alike | None:
        """Who contributed the same bits on every shard; None unless all of them have looked."""
        notes = [part.note for part in self._parts]
        if not all(note.mark for note in notes):
            return None
        ranks = frozenset(notes[0].alike).intersection(*(note.alike for note in notes[1:]))
        return Alike(ranks, tuple(note.mark for note in notes))

    def _failed(self, error: HeadwaterError) -> NoReturn:
        for part in self._parts:
            part.give_up()
        if self.spec.sync.collective:
            self.clock -= 1
        self.failures += 1
        if self._ticket is not None:
            self._ticket.reject(error)
        raise error

    def _raise_failed(self) -> None:
        for part in self._parts:
            if part.error is not None:
                error, part.error = part.error, None
                self.failures += 1
                raise error

    # ---- waiting ---------------------------------------------------------------------------------

    def _pump(self, done: Callable[[Any], bool], timeout: float | None, *, ahead: bool = False) -> None:
        """Receive until ``done`` of every part. ``ahead``: in the middle of a step, until others come to it too."""
        waiting = [part for part in self._parts if not done(part)]
        if not waiting:
            return
        shards = self._shards
        patience = Patience(shards, timeout, self._who_is_late)
        self._ahead = ahead
        try:
            shards.pump(waiting, done, patience)
        finally:
            self._ahead = False
        shards.counters.wait_seconds += shards.runtime.now() - patience.begun

    def _who_is_late(self) -> m.WhoIsLate:
        """Under ``Bulk`` those who have not come to this step too, else those who are too far behind."""
        sync, clock = self.spec.sync, self.reached
        if sync.read_bound is not None:
            clock -= sync.read_bound
        elif not sync.collective:
            clock = ANY if sync.paced else 0
        return m.WhoIsLate(self.spec.name, clock)

    @property
    def reached(self) -> int:
        """The step that this worker has come to: the last that it ended, or the one in whose middle it waits."""
        return self.clock + self._ahead
