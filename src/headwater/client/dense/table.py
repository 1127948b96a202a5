"""A dense table at a client: the router between flat memories here and shards there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import torch

from headwater import interrupts
from headwater.client.dense.memory import Gradients, Mapped, Values, as_bytes, check_tensor, plain, views
from headwater.client.dense.part import Part, Span
from headwater.client.dense.slots import Slots, join_slots, slot_requests
from headwater.client.patience import Patience
from headwater.client.session import TURN
from headwater.client.tickets import Alike, StepResult, Ticket
from headwater.errors import DeadlineExceeded, HeadwaterError, LinkBroken, LinkError, UsageError
from headwater.layout.dense import Layout, only
from headwater.transports import memory
from headwater.types import Hyper, Segment
from headwater.wire import messages as m
from headwater.wire.data_plan import ANY
from headwater.wire.exact import clip_factor
from headwater.wire.frames import Flag

if TYPE_CHECKING:
    from headwater.client.client import Client

Groups = Sequence[Mapping[str, Hyper]]
_FIRST = 0.01  # seconds: the first turn at each server, doubled from round to round
_PAUSE = 0.01  # seconds
_LARGE = 256 << 10  # bytes of values from which they are received while the worker computes


class Table:
    """Many parameters with one optimizer and one policy; what ``headwater.Optimizer`` uses.

    ``gradients`` and ``values`` map names to CPU tensors of the parameters' shapes and dtypes, views of two flat
    memories. With ``live`` the values are the servers' own memory: a pull copies nothing.
    """

    def __init__(self, client: Client, declared: m.Declared, layout: Layout) -> None:
        self.spec = only(declared.spec)
        self.number = declared.table
        self.layout = layout
        self.clock = 0
        self.failures = 0  # steps and pulls that ended with an error: what was sent with them may be lost
        self._client = client
        self._members = declared.members
        self._parts = [
            Part(client.servers[shard], declared.table, layout.blocks_of(shard), layout.segments[shard])
            for shard in layout.participants
        ]
        self._spans: dict[tuple[str, ...], list[list[Span]]] = {}
        self._pushed: set[str] = set()
        self._index = {p.name: i for i, p in enumerate(self.spec.parameters)}
        self._open = False  # a step was ended and not yet waited for
        self._uncopied = False
        self._meets = False  # waits for the mean of the step under way
        self._ticket: Ticket | None = None  # of the last step
        self.digest = 0  # of what every worker should have alike beside the table; 0: of nothing
        self._said = 0, 0  # the digest that was sent last, and the failures then
        self.renewed: Callable[[], None] | None = None  # called after a rest: ``values`` are those of later steps
        self._attach()

    # ---- set-up ----------------------------------------------------------------------------------

    def _attach(self) -> None:
        for part in self._parts:
            self._client.reach(part.session)
        sharing = [part.session.link is not None and part.session.link.shared for part in self._parts]
        self._gradients = Gradients(self.spec, self.layout, any(sharing))
        self._memory: Values | None = None
        live = all(sharing) and not self.spec.sync.reads_own_memory
        deadline = self._client.runtime.now() + self._client.timeout
        for part in self._parts:
            part.live = live
            part.attach = partial(self._attach_part, part)
            part.session.parts[self.number] = part
            self._attach_until(part, deadline, self._members)
        self.clock = max(part.clock for part in self._parts)
        self._memory = Values(self.spec, self.layout, self._live_pieces() if live else None)
        self._views()

    def _attach_until(self, part: Part, deadline: float, members: int) -> None:
        """Attach, under ``Bulk`` as of when the shard knows this worker: steps decided before that are not its own."""
        part.known = -1
        while True:
            try:
                self._attach_part(part, deadline)
            except LinkError as error:
                self._client.recover(part.session, deadline, error)
            if part.known >= members or not self.spec.sync.collective or self._client.rank < 0:
                return
            if self._client.runtime.now() > deadline:
                raise DeadlineExceeded(f"{part.session.name} did not hear of this worker in time; nothing was pushed")
            self._client.runtime.sleep(_PAUSE)

    def _attach_part(self, part: Part, deadline: float) -> None:
        """Use the table over the present connection of its session; the first one, or one to a new primary."""
        session = part.session
        assert session.link is not None
        shared = session.link.shared and self._gradients.fd >= 0
        fds = (self._gradients.fd,) if shared else ()
        request = m.Attach(self.number, shared, self.layout.size if shared else 0, part.base)
        answer = session.request(request, max(0.0, deadline - self._client.runtime.now()), fds)
        attached = answer.replies[0]
        assert isinstance(attached, m.Attached)
        if shared and len(answer.fds) != 2:
            raise LinkBroken(f"{session.name} sent {len(answer.fds)} descriptors of shared memory, not 2")
        if part.lsn:
            self.failures += 1  # a new primary has not heard what this worker's hyperparameters are
        old, part.mapped = part.mapped, Mapped(answer.fds, attached.size) if shared else None
        part.lsn = max(part.lsn, attached.lsn)
        part.known, part.clock = attached.members, attached.clock
        if self._memory is not None and part.live:
            self._map_again(part, self._memory)
        if old is not None:
            old.close()
        part.resume(attached.seq)

    @interrupts.deferred
    def rejoin(self, members: int) -> None:
        """After a rest: others' steps were applied meanwhile. A shard counts from when it knows ``members``."""
        self._members = members
        if not self.spec.sync.collective:
            return
        deadline = self._client.runtime.now() + self._client.timeout
        for part in self._parts:
            self._client.reach(part.session)
            self._attach_until(part, deadline, members)
        self.clock = max(part.clock for part in self._parts)
        self.refresh()
        if not self.live:
            self.pull().wait()
        if self.renewed is not None:
            self.renewed()

    @interrupts.deferred
    def aside(self, away: bool, deadline: float) -> None:
        """Others' reads and steps do without this worker, or wait for it again.

        A shard that nobody serves is left out: whoever needs it hears of it.
        """
        for part in self._parts:
            with contextlib.suppress(LinkError, DeadlineExceeded):
                self._client.request(part.session, m.Aside(self.number, away), deadline)

    def _live_pieces(self) -> list[memory.Piece]:
        """All shards' values side by side."""
        by_shard = {part.session.shard: part for part in self._parts}
        pieces = []
        for block in self.layout.blocks:
            mapped = by_shard[block.shard].mapped
            assert mapped is not None
            pieces.append(memory.Piece(mapped.fd, block.local, block.size))
        return pieces

    def _map_again(self, part: Part, region: Values) -> None:
        """The new primary's memory at the same addresses. Where it shares none, memory of this process: pulled."""
        for block in part.blocks:
            piece = None if part.mapped is None else memory.Piece(part.mapped.fd, block.local, block.size)
            region.replace(block.start, piece, block.size)
        if part.mapped is None:
            part.live = False
            part.expect()
            self._uncopied = True

    def _views(self) -> None:
        assert self._memory is not None
        self.values, self.gradients = self._memory.tensors, self._gradients.tensors
        for part in self._parts:
            part.flat_values, part.flat_gradients = self._memory.landing, self._gradients.bytes

    @property
    def live(self) -> bool:
        """Whether all values are the servers' own memory: a pull copies nothing."""
        return all(part.live for part in self._parts)

    @property
    def paced(self) -> bool:
        """Whether others' reads or steps may have to wait for what this worker does next, other than under ``Bulk``."""
        return self.spec.sync.paced

    @property
    def by_bytes(self) -> bool:
        """Whether some push carries bytes; else servers read ``gradients`` itself, under ``Bulk`` after END."""
        return any(part.mapped is None for part in self._parts)

    @property
    def truth(self) -> Mapping[str, torch.Tensor]:
        """What arrived last, whatever was written into ``values`` since; for reading."""
        assert self._memory is not None
        return self._memory.arrived

    def gradient_runs(self, names: Sequence[str]) -> list[torch.Tensor]:
        """The memory of these gradients in as few flat tensors as it lies in, to read it in one go.

        A run may cover padding, which is zero, and a small neighbour.
        """
        return self._gradients.runs(names)

    @interrupts.deferred
    def refresh(self) -> None:
        """Throw away what was written into ``values`` here: they are what arrived last again."""
        assert self._memory is not None
        self._memory.drop()

    @interrupts.deferred
    def written(self) -> list[str]:
        """The parameters whose ``values`` were written here and differ from what arrived, to the bit.

        What was written and is the same is dropped: a page that stays this process's own stands still for ever.
        """
        assert self._memory is not None
        return self._memory.changed()

    # ---- steps -----------------------------------------------------------------------------------

    @interrupts.deferred
    def push(self, names: Sequence[str], groups: Groups | None = None, *, anew: bool = False) -> None:
        """The gradients of ``names``, already written into ``gradients``, leave now as part of the current step.

        ``groups``: hyperparameters that changed, one mapping per group. ``anew`` (``Bulk`` only): what was pushed of
        the step before is void. Raises ``UsageError`` for an unknown name.
        """
        self.settle()
        body = m.pack(m.StepBody(tuple(dict(g) for g in groups))) if groups is not None else b""
        if anew:
            self._pushed.clear()
        for part, spans in zip(self._parts, self._spans_of(names), strict=True):
            if spans or body or anew:
                part.push(spans, self.clock + 1, self._members, 0, body, Flag.ANEW if anew else Flag.NONE)
        self._pushed.update(names)

    @interrupts.deferred
    def step(self, groups: Groups | None = None, skip: bool = False, *, merged: bool = False, based: int = 0,
             writes: Mapping[str, torch.Tensor] | None = None) -> Ticket:  # fmt: skip
        """End the step: all pushed since the last one is this worker's contribution. Fresh values are on their way.

        ``skip``: this worker's gradient is not finite; under Bulk the step is skipped by all. ``merged``: what was
        pushed is ``mean()``, changed: the lowest rank's is the step's gradient. ``writes``: parameters that were
        written outside the optimizer (``Bulk`` only): the lowest rank's are the values that the step starts from.
        ``based``: as for ``mean``.
        """
        self.settle()
        flags = Flag.NONE if self.live else Flag.WANT
        if writes:
            self._write(writes, self.clock + 1)
            flags |= Flag.WROTE
        if merged:
            flags |= Flag.MERGED
        return self._end([[] for _ in self._parts], groups, skip, flags, based)

    @interrupts.deferred
    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Overwrite parameters on the servers before whatever is pushed next; not under ``Bulk``. Does not wait."""
        self.settle()
        self._write(values, 0)

    @interrupts.deferred
    def mean(self, *, past: bool = False, based: int = 0) -> tuple[dict[str, torch.Tensor], set[str]]:
        """The aggregate gradient of the step under way. ``Bulk`` only; every worker must ask for it or end the step.

        Pushed must be all that this worker contributes. Blocks until every worker has. Returns new tensors by name (the
        mean over workers; the sum with ``Bulk("sum")``), and the names that some worker has contributed to.

        ``past``: what was pushed is the gradient of the step before once more. Raises ``UsageError`` unless every
        worker asks for that; the next push must be ``anew``. ``based``: how many means of this step went, changed, into
        what was pushed; the same on every worker.
        """
        self.settle()
        flat = plain(self.layout.size)
        landing = memoryview(flat.numpy()).cast("B")  # type: ignore[arg-type]
        for part in self._parts:
            body = m.pack(m.StepBody(based=based)) if based else b""
            part.ask_mean(self.clock + 1, self._members, landing, past, body)
        self._pump("met", None)
        ranges = [part.take_mean() for part in self._parts]
        self._raise_failed()
        names = set()
        for part, spans in zip(self._parts, ranges, strict=True):
            covered = [s.parameter for s in part.segments if any(a <= s.offset < b for a, b in spans)]
            names |= {self.spec.parameters[i].name for i in covered}
        return views(flat, self.spec, self.layout), names

    def _write(self, values: Mapping[str, torch.Tensor], clock: int) -> None:
        flats = {self._checked_index(name, value): as_bytes(value) for name, value in values.items()}
        for part in self._parts:
            pieces = [(s, self._piece_of(s, flats[s.parameter])) for s in part.segments if s.parameter in flats]
            if pieces:
                part.assign(pieces, clock, self._members)

    def _piece_of(self, segment: Segment, flat: memoryview) -> memoryview:
        p = self.spec.parameters[segment.parameter]
        size = p.nbytes // max(1, p.numel)
        return flat[segment.start * size : segment.stop * size]

    @interrupts.deferred
    def push_step(self, names: Sequence[str], *, want: bool) -> Ticket:
        """``push`` and ``step`` in one; ``want`` asks for fresh values."""
        self.settle()
        self._pushed.update(names)
        return self._end(self._spans_of(names), None, False, Flag.WANT if want and not self.live else Flag.NONE)

    @interrupts.deferred
    def push_pull(self) -> Ticket:
        """Push everything and get everything back, block by block as it is applied where the policy lets it."""
        streams = self.spec.sync.immediate and not self.spec.sync.paced
        names = [p.name for p in self.spec.parameters]
        if not streams or self.spec.max_grad_norm is not None or any(p.mapped for p in self._parts):
            return self.push_step(names, want=True)
        self.settle()
        for part in self._parts:
            part.push_pull(self.clock + 1, self._members, b"")
        return self._ended(True)

    @interrupts.deferred
    def settle(self) -> None:
        """Until the last step is acknowledged: then the memory of its gradients is free again."""
        if self._open:
            self._settle(None)

    def _end(self, spans: list[list[Span]], groups: Groups | None, skip: bool, want: int, based: int = 0) -> Ticket:
        scale = norm = None
        if self.spec.max_grad_norm is not None and not self.spec.sync.collective and not skip:
            norm, scale = clip_factor(self.spec.max_grad_norm, self._square_norm())
        body = b""
        digest = None if self._said == (self.digest, self.failures) else self.digest
        self._said = self.digest, self.failures
        if groups is not None or norm is not None or digest is not None or based:
            packed = tuple(dict(g) for g in groups) if groups is not None else None
            body = m.pack(m.StepBody(packed, scale, norm, digest, based))
        flags = Flag.END | want | (Flag.SKIP if skip else Flag.NONE)
        for part, own in zip(self._parts, spans, strict=True):
            mine = flags & ~Flag.WANT if part.live else flags
            part.push(own, self.clock + 1, self._members, mine, body)
        return self._ended(bool(want & Flag.WANT))

    def _ended(self, want: bool) -> Ticket:
        self.clock += 1
        self._pushed.clear()
        self._open = True
        self._uncopied = self._uncopied or want
        if want:
            self._prefetch()
        self._ticket = Ticket(self._all_settled, self._settle)
        return self._ticket

    def _square_norm(self) -> float:
        """Of what this worker contributes, in float64."""
        norms = [torch.linalg.vector_norm(self.gradients[n], dtype=torch.float64).item() for n in self._pushed]
        return math.fsum(norm * norm for norm in norms)

    def _prefetch(self) -> None:
        for part in self._parts:
            link = part.session.link
            if link is not None and part.mapped is None and part.awaiting and part.size > _LARGE:
                link.prefetch(part.finished)

    def _all_settled(self) -> bool:
        return all(part.settled() for part in self._parts)

    def _settle(self, timeout: float | None) -> StepResult:
        """Wait until every shard has acknowledged the step. A failure takes the clock back: nothing was applied."""
        self._pump("settled", timeout)
        self._open = False
        stale = lsn = lag = 0
        applied = True
        error: HeadwaterError | None = None
        for part in self._parts:
            error = error or part.error
            stale, lsn, lag = max(stale, part.staleness), max(lsn, part.lsn), max(lag, part.lag)
            applied = applied and not part.skipped
            if part.members > self._members:
                self._members = self._client.members = part.members
            if part.live:  # fresh values without a byte moved count as pulled, as a doorbell counts as pushed
                part.session.pulled_bytes += part.size
        if error is not None:
            self._failed(error)
        self._client.observed(stale, lag)
        first = self._parts[0].note
        apart = any(part.note.apart for part in self._parts)
        differ = any(part.note.differ for part in self._parts)
        result = StepResult(
            self.clock, applied, first.norm, stale, lsn, first.skipped_by, first.groups, self._alike(), apart, differ
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
        self._uncopied = False
        self.failures += 1
        if self._ticket is not None:
            self._ticket.reject(error)
        raise error

    def _pump(self, what: str, timeout: float | None) -> None:
        now = self._client.runtime.now
        begun = now()
        patience = self._patience(what, timeout)
        self._meets = what == "met"
        waiting = [part for part in self._parts if not getattr(part, what)()]
        turn = _FIRST
        try:
            while waiting:
                for part in waiting:
                    self._pump_part(part, getattr(part, what), patience, turn)
                waiting = [part for part in waiting if not getattr(part, what)()]
                turn = min(2 * turn, TURN)
        finally:
            self._meets = False
        self._client.waited(now() - begun)

    def _patience(self, what: str, timeout: float | None) -> Patience:
        """For others: under ``Bulk`` until they have come to this step too, else until they are not too far behind."""
        sync, clock = self.spec.sync, self.clock + (what == "met")
        if sync.read_bound is not None:
            clock -= sync.read_bound
        elif not sync.collective:
            clock = ANY if sync.paced else 0
        return Patience(self._client, timeout, m.WhoIsLate(self.spec.name, clock))

    @property
    def reached(self) -> int:
        """The step that this worker has come to: the last that it ended, or the one whose mean it waits for."""
        return self.clock + self._meets

    def _pump_part(self, part: Part, done: Callable[[], bool], patience: Patience, turn: float = TURN) -> None:
        """Wait for one server for a turn: it may wait for another that is dead, or be dead itself without a sign.

        Another worker's death undoes a step; it is pushed again here, from the same memory. Steps of other tables too:
        somebody who waits for one of them may be who this table waits for.
        """
        client, link = self._client, part.session.link
        assert link is not None
        for table in client.tables.values():
            if table is self or table._open:  # noqa: SLF001 - another table, of this class
                table._push_lost_again()  # noqa: SLF001
        try:
            link.pump(lambda: done() or part.lost is not None, min(patience.deadline, client.runtime.now() + turn))
        except LinkError as error:
            client.recover(part.session, patience.deadline, error)
        except DeadlineExceeded:
            patience.look(part.session.name)
            if turn == TURN and not client.still_there(part.session, patience.deadline):
                moved = DeadlineExceeded(f"{part.session.name} has another primary now")
                client.recover(part.session, patience.deadline, moved)

    def _push_lost_again(self) -> None:
        for part in self._parts:
            if part.lost is not None:
                self._members = self._client.members = max(part.members, self._members)
                part.push_again(self._members)

    # ---- values ----------------------------------------------------------------------------------

    @interrupts.deferred
    def wait(self, names: Iterable[str] | None = None, timeout: float | None = None) -> None:
        """Until ``values`` of these parameters (default all) are fresh after the last ``step`` or ``pull``."""
        if self._open:
            self._settle(timeout)
        if not self._uncopied or self.live:
            return
        if names is not None and not any(part.mapped for part in self._parts):
            self._wait_for(names, timeout)
            return
        self._pump("current", timeout)  # what was pushed of the next step is acknowledged with that step
        self._raise_failed()
        for part in self._parts:
            if part.mapped is not None and not part.live:
                assert self._memory is not None
                part.copy_out(self._memory.truth)
        self._uncopied = False

    def _wait_for(self, names: Iterable[str], timeout: float | None) -> None:
        """Streams: values arrive in the shards' order, so a parameter may be ready before the rest."""
        wanted = {self._index[name] for name in names}
        patience = self._patience("current", timeout)
        for part in self._parts:
            upto = max((s.end for s in part.segments if s.parameter in wanted), default=0)
            while upto and not part.current(upto):
                self._pump_part(part, partial(part.current, upto), patience)
        self._raise_failed()
        if all(part.current() for part in self._parts):
            self._uncopied = False

    def _raise_failed(self) -> None:
        for part in self._parts:
            if part.error is not None:
                error, part.error = part.error, None
                self.failures += 1
                raise error

    @interrupts.deferred
    def pull(self) -> Ticket:
        """Ask for the newest values; ``wait`` (of the ticket or the table) makes ``values`` fresh."""
        if self.spec.sync.collective:
            self.settle()  # else the answer could be from before the commit; other policies answer in order
        self.refresh()
        if self.live:
            return Ticket(_yes, lambda timeout: self._result())
        for part in self._parts:
            if not part.live:
                part.pull(self.clock)
        self._uncopied = True
        self._prefetch()
        return Ticket(lambda: not self._uncopied, self._pulled)

    def _pulled(self, timeout: float | None) -> StepResult:
        self.wait(None, timeout)
        return self._result()

    def _result(self) -> StepResult:
        return StepResult(self.clock, True, None, max(p.lag for p in self._parts), max(p.lsn for p in self._parts))

    def _spans_of(self, names: Sequence[str]) -> list[list[Span]]:
        """Per part, the local byte ranges of these parameters, neighbours joined."""
        key = tuple(names)
        found = self._spans.get(key)
        if found is None:
            unknown = [name for name in names if name not in self._index]
            if unknown:
                raise UsageError(f"table {self.spec.name!r} has no parameter {unknown[0]!r}; nothing was sent")
            wanted = {self._index[name] for name in names}
            found = self._spans[key] = [part.spans(wanted) for part in self._parts]
        return found

    # ---- whole state -----------------------------------------------------------------------------

    @interrupts.deferred
    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Overwrite parameters on the servers, whatever the policy. Blocks until all have them.

        Raises ``ShapeMismatch`` or ``UsageError``; nothing was sent then.
        """
        self.wait()
        self._write(values, 0)
        self._pump("assigned_or_failed", None)
        self._raise_failed()
        if not self.live:
            self.pull().wait()

    def _checked_index(self, name: str, value: torch.Tensor) -> int:
        if name not in self._index:
            raise UsageError(f"table {self.spec.name!r} has no parameter {name!r}; nothing was sent")
        check_tensor(self.spec.parameters[self._index[name]], value)
        return self._index[name]

    @interrupts.deferred
    def slots(self) -> dict[str, dict[str, torch.Tensor]]:
        """The optimizer state: by parameter and slot name, in the shapes of ``torch.optim``."""
        self.wait()
        return join_slots(self.spec, self._slots())

    def _slots(self) -> Iterator[m.Slot]:
        for part in self._parts:
            for reply in self._client.request(part.session, m.Slots(self.number)):
                assert isinstance(reply, m.SlotPart)
                yield from reply.slots

    @interrupts.deferred
    def assign_slots(self, slots: Slots) -> None:
        """Replace the optimizer state of the whole table; the inverse of ``slots``."""
        self.wait()
        for part in self._parts:
            for request in slot_requests(self.number, self.spec, part.segments, slots):
                self._client.request(part.session, request)


def _yes() -> bool:
    return True
