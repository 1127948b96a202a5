"""All that a coordinator asks of its host, as one struct, and the order in which the host carries it out.

A host is a loop of three steps: hand one event to the ``Coordinator``, carry out the ``Effects`` that come back, take
the next event. ``server/hosts.py`` does it with a store, a thread for files and sockets; ``launch/inproc.py`` and
``headwater.testing`` by direct calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from headwater.errors import HeadwaterError
from headwater.types import TableSpec
from headwater.wire import messages as m
from headwater.wire.outgoing import Instruction


class MakeFolder(NamedTuple):
    """Make a folder for a new snapshot. Answered by ``FolderMade`` or an error."""


class WriteManifest(NamedTuple):
    """Every shard's part is on disk: make it a snapshot. Answered by ``ManifestWritten`` or an error.

    ``plan``: the state of the data plans.
    """

    number: int
    parts: tuple[m.CutDone, ...]
    tables: Mapping[int, TableSpec]
    plan: bytes


class DeleteFolder(NamedTuple):
    """This snapshot was given up: delete what there is of it. There is no answer."""

    number: int


class FolderMade(NamedTuple):
    """The next snapshot has this number; its parts go into ``folder``."""

    number: int
    folder: str


class ManifestWritten(NamedTuple):
    """The snapshot exists, at ``path``."""

    path: str


Job = MakeFolder | WriteManifest | DeleteFolder
Outcome = FolderMade | ManifestWritten | HeadwaterError


class Effects(NamedTuple):
    """What follows from one event. The host carries out the fields from the first to the last."""

    durable: Mapping[str, bytes | None]
    """Keys of the store and their new values; None deletes a key. All of them must be on disk, in one atomic write,
    BEFORE the host begins with the fields below: nobody may hear of what a crash could undo. If the write fails, the
    coordinator's memory is ahead of its disk. The process must then end without sending (``Halt``); the next one goes
    on from what the disk has."""

    jobs: Sequence[Job]
    """Work on files, for another thread. The host begins it in this order, AFTER ``durable`` is on disk, and waits for
    none of it: ``send`` goes out meanwhile. What a job came to is the event ``Coordinator.finished``."""

    send: Sequence[Instruction]
    """Frames to send and servers to connect to, AFTER ``durable`` is on disk. Frames to one peer leave in this order:
    a primary must hear of its view before the verdicts for it, and of a cut before the next step's commit. A frame to a
    peer that has gone is dropped; whoever takes its place is told anew."""
