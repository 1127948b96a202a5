"""A dense table at a client: between flat memories here and ranges of bytes on the shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch

from headwater import interrupts
from headwater.client.dense.geometry import ShardGeometry, Span
from headwater.client.dense.memory import Gradients, Mapped, Values, as_bytes, check_tensor, plain, views
from headwater.client.dense.part import DensePart
from headwater.client.dense.slots import Slots, join_slots, slot_requests
from headwater.client.patience import Patience
from headwater.client.session import Session
from headwater.client.shards import Shards
from headwater.client.table import Table
from headwater.client.tickets import StepResult, Ticket
from headwater.errors import HeadwaterError, LinkBroken, UsageError
from headwater.layout.dense import layout, only
from headwater.transports import memory
from headwater.types import DenseSpec, Hyper, TableSpec
from headwater.wire import messages as m
from headwater.wire.exact import clip_factor
from headwater.wire.frames import Flag

Groups = Sequence[Mapping[str, Hyper]]
_LARGE = 256 << 10  # bytes of values from which they are received while the worker computes


class DenseTable(Table):
    """Many parameters with one optimizer and one policy; what ``headwater.Optimizer`` uses.

    ``gradients`` and ``values`` map names to CPU tensors of the parameters' shapes and dtypes, views of two flat
    memories. With ``live`` the values are the servers' own memory: a pull copies nothing. With ``by_bytes`` some push
    carries bytes; else servers read ``gradients`` itself, under ``Bulk`` after END.

    It has more methods than other classes because an optimizer does all with it that can be done with a table; what
    needs none is in ``ShardGeometry``, ``Gradients``, ``Values`` and ``slots``.
    """

    spec: DenseSpec
    _parts: list[DensePart]

    def __init__(self, shards: Shards, declared: m.Declared) -> None:
        super().__init__(shards, declared)
        self.spec = only(declared.spec)
        self.layout = layout(self.spec, len(shards.sessions))
        self._spans: dict[tuple[str, ...], list[list[Span]]] = {}
        self._pushed: set[str] = set()
        self._index = {p.name: i for i, p in enumerate(self.spec.parameters)}
        self._names = tuple(self._index)
        self._said = 0, 0  # the digest that was sent last, and the failures then
        self._uncopied = False  # values were asked for and not yet waited for
        sessions = [shards.sessions[shard] for shard in self.layout.participants]
        for session in sessions:
            shards.reach(session)
        sharing = [session.link is not None and session.link.shared for session in sessions]
        self._gradients = Gradients(self.spec, self.layout, any(sharing))
        live = all(sharing) and not self.spec.sync.reads_own_memory
        self._parts = [self._part_of(session, live) for session in sessions]
        self._values: Values | None = None
        self._join(self._members)
        self._values = Values(self.spec, self.layout, self._live_pieces() if live else None)
        for part in self._parts:
            part.land_in(self._values.landing)
        self.values, self.gradients = self._values.tensors, self._gradients.tensors

    @classmethod
    def check(cls, spec: TableSpec, values: Mapping[str, torch.Tensor]) -> None:
        """Those of other parameters than the spec asks for are ignored."""
        for p in only(spec).parameters:
            if p.name in spec.given:
                check_tensor(p, values[p.name])

    def load(self, values: Mapping[str, torch.Tensor], assign: bool) -> None:
        """Parameters of other inits than ``values`` are there already."""
        if assign:
            self.assign({name: values[name] for name in self.spec.given})
        elif not self.live:
            self.pull().wait()

    def _part_of(self, session: Session, live: bool) -> DensePart:
        geometry = ShardGeometry(self.layout.blocks_of(session.shard), self.layout.segments[session.shard])
        return DensePart(session, self.number, geometry, self._gradients.bytes, live=live)

    # ---- attachments -----------------------------------------------------------------------------

    def _part_on(self, session: Session) -> DensePart:
        return next(part for part in self._parts if part.session is session)

    def _to_share(self, session: Session) -> tuple[tuple[int, ...], int]:
        """The gradients, with a server of this host."""
        if session.link is None or not session.link.shared or self._gradients.fd < 0:
            return (), 0
        return (self._gradients.fd,), self.layout.size

    def _attached(self, session: Session, attached: m.Attached, fds: tuple[int, ...]) -> None:
        """Map the shard's values if it shares them, and where it holds what the user sees, at the same addresses."""
        part, shared = self._part_on(session), bool(self._to_share(session)[0])
        if shared and len(fds) != 2:
            raise LinkBroken(f"{session.name} sent {len(fds)} descriptors of shared memory, not 2")
        old, part.mapped = part.mapped, Mapped(fds, attached.size) if shared else None
        if self._values is not None and part.live:
            self._map_again(part, self._values)
        if old is not None:
            old.close()
        self._look_at_parts()

    def _look_at_parts(self) -> None:
        self.live = all(part.live for part in self._parts)
        self.by_bytes = any(part.mapped is None for part in self._parts)

    def _live_pieces(self) -> list[memory.Piece]:
        """All shards' values side by side."""
        mapped = {part.session.shard: part.mapped for part in self._parts}
        pieces = []
        for block in self.layout.blocks:
            there = mapped[block.shard]
            assert there is not None
            pieces.append(memory.Piece(there.fd, block.local, block.size))
        return pieces

    def _map_again(self, part: DensePart, values: Values) -> None:
        """The new primary's memory at the same addresses. Where it shares none, memory of this process: pulled."""
        for block in part.geometry.blocks:
            piece = None if part.mapped is None else memory.Piece(part.mapped.fd, block.local, block.size)
            values.replace(block.start, piece, block.size)
        if part.mapped is None:
            part.live = False
            part.expect()
            self._uncopied = True

    def _renew(self) -> None:
        self.refresh()
        if not self.live:
            self.pull().wait()

    # ---- memory ----------------------------------------------------------------------------------

    @property
    def truth(self) -> Mapping[str, torch.Tensor]:
        """What arrived last, whatever was written into ``values`` since; for reading."""
        assert self._values is not None
        return self._values.arrived

    def gradient_runs(self, names: Sequence[str]) -> list[torch.Tensor]:
        """The memory of these gradients in as few flat tensors as it lies in, to read it in one go.

        A run may cover padding, which is zero, and a small neighbour.
        """
        return self._gradients.runs(names)

    @interrupts.deferred
    def refresh(self) -> None:
        """Throw away what was written into ``values`` here: they are what arrived last again."""
        assert self._values is not None
        self._values.drop()

    @interrupts.deferred
    def written(self) -> list[str]:
        """The parameters whose ``values`` were written here and differ from what arrived, to the bit.

        What was written and is the same is dropped: a page that stays this process's own stands still for ever.
        """
        assert self._values is not None
        return self._values.changed()

    # ---- steps -----------------------------------------------------------------------------------

    @interrupts.deferred
    def push(self, names: Sequence[str], groups: Groups | None = None, *, anew: bool = False) -> None:
        """The gradients of ``names``, already written into ``gradients``, leave now as part of the current step.

        ``groups``: hyperparameters that changed, one mapping per group. ``anew`` (``Bulk`` only): what was pushed of
        the step before is void. Raises ``UsageError`` for an unknown name.
        """
        if self._open:
            self._settle(None)
        body = m.pack(m.StepBody(tuple(dict(g) for g in groups))) if groups is not None else b""
        if anew:
            self._pushed.clear()
        for part, spans in zip(self._parts, self._spans_of(names), strict=True):
            if spans or body or anew:
                part.push_spans(spans, self.clock + 1, self._members, 0, body, Flag.ANEW if anew else Flag.NONE)
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
        if self._open:
            self._settle(None)
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
        if self._open:
            self._settle(None)
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
        if self._open:
            self._settle(None)
        flat = plain(self.layout.size)
        landing = memoryview(flat.numpy()).cast("B")  # type: ignore[arg-type]
        for part in self._parts:
            body = m.pack(m.StepBody(based=based)) if based else b""
            part.ask_mean(self.clock + 1, self._members, landing, past, body)
        self._pump(DensePart.met, None, ahead=True)
        ranges = [part.take_mean() for part in self._parts]
        self._raise_failed()
        covered = set().union(*(p.geometry.parameters_in(own) for p, own in zip(self._parts, ranges, strict=True)))
        return views(flat, self.spec, self.layout), {self.spec.parameters[i].name for i in covered}

    def _write(self, values: Mapping[str, torch.Tensor], clock: int) -> None:
        flats = {self._checked_index(name, value): as_bytes(value) for name, value in values.items()}
        for part in self._parts:
            pieces = part.geometry.pieces(self.spec, flats)
            if pieces:
                part.assign(pieces, clock, self._members)

    def _checked_index(self, name: str, value: torch.Tensor) -> int:
        if name not in self._index:
            raise UsageError(f"table {self.spec.name!r} has no parameter {name!r}; nothing was sent")
        check_tensor(self.spec.parameters[self._index[name]], value)
        return self._index[name]

    @interrupts.deferred
    def push_step(self, names: Sequence[str], *, want: bool) -> Ticket:
        """``push`` and ``step`` in one; ``want`` asks for fresh values."""
        return self._push_step(names, want)

    def _push_step(self, names: Sequence[str], want: bool) -> Ticket:
        if self._open:
            self._settle(None)
        self._pushed.update(names)
        return self._end(self._spans_of(names), None, False, Flag.WANT if want and not self.live else Flag.NONE)

    @interrupts.deferred
    def push_pull(self) -> Ticket:
        """Push everything and get everything back, block by block as it is applied where the policy lets it."""
        streams = self.spec.sync.immediate and not self.spec.sync.paced
        if not streams or self.spec.max_grad_norm is not None or any(p.mapped for p in self._parts):
            return self._push_step(self._names, True)
        if self._open:
            self._settle(None)
        for part in self._parts:
            part.push_streaming(self.clock + 1, self._members)
        return self._ended(True)

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
            mine = flags
            if part.live:  # fresh values without a byte moved count as pulled, as a doorbell counts as pushed
                part.session.pulled_bytes += part.size
                mine &= ~Flag.WANT
            part.push_spans(own, self.clock + 1, self._members, mine, body)
        return self._ended(bool(want & Flag.WANT))

    def _ended(self, want: bool) -> Ticket:
        self._pushed.clear()
        ticket = self._step_ended()
        if want:
            self._uncopied = True
            self._prefetch()
        return ticket

    def _square_norm(self) -> float:
        """Of what this worker contributes, in float64."""
        norms = [torch.linalg.vector_norm(self.gradients[n], dtype=torch.float64).item() for n in self._pushed]
        return math.fsum(norm * norm for norm in norms)

    def _prefetch(self) -> None:
        for part in self._parts:
            link = part.session.link
            if link is not None and part.mapped is None and part.awaiting and part.size > _LARGE:
                link.prefetch(part.finished)

    def _failed(self, error: HeadwaterError) -> NoReturn:
        self._uncopied = False
        super()._failed(error)

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
        self._pump(DensePart.current, timeout)  # what was pushed of the next step is acknowledged with that step
        self._raise_failed()
        for part in self._parts:
            if part.mapped is not None and not part.live:
                assert self._values is not None
                part.copy_out(self._values.truth)
        self._uncopied = False

    def _wait_for(self, names: Iterable[str], timeout: float | None) -> None:
        """Streams: values arrive in the shards' order, so a parameter may be ready before the rest."""
        wanted = {self._index[name] for name in names}
        patience = Patience(self._shards, timeout, self._who_is_late)
        for part in self._parts:
            upto = part.geometry.end_of(wanted)

            def ready(part: DensePart, upto: int = upto) -> bool:
                return part.current(upto)

            while upto and not ready(part):
                self._shards.pump_one(part, ready, patience)
        self._raise_failed()
        if all(part.current() for part in self._parts):
            self._uncopied = False

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
            found = self._spans[key] = [part.geometry.spans_of(wanted) for part in self._parts]
        return found

    # ---- whole state -----------------------------------------------------------------------------

    @interrupts.deferred
    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Overwrite parameters on the servers, whatever the policy. Blocks until all have them.

        Raises ``ShapeMismatch`` or ``UsageError``; nothing was sent then.
        """
        self.wait()
        self._write(values, 0)
        self._pump(DensePart.assigned, None)
        self._raise_failed()
        if not self.live:
            self.pull().wait()

    @interrupts.deferred
    def slots(self) -> dict[str, dict[str, torch.Tensor]]:
        """The optimizer state: by parameter and slot name, in the shapes of ``torch.optim``."""
        self.wait()
        return join_slots(self.spec, self._slots())

    def _slots(self) -> Iterator[m.Slot]:
        for part in self._parts:
            for reply in self._shards.request(part.session, m.Slots(self.number)):
                assert isinstance(reply, m.SlotPart)
                yield from reply.slots

    @interrupts.deferred
    def assign_slots(self, slots: Slots) -> None:
        """Replace the optimizer state of the whole table; the inverse of ``slots``."""
        self.wait()
        for part in self._parts:
            for request in slot_requests(self.number, self.spec, part.geometry.segments, slots):
                self._shards.request(part.session, request)


def _yes() -> bool:
    return True
