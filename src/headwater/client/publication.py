"""Publishing from a client: a version is begun while the caller waits a moment, and finished while it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from headwater.errors import InternalError, UsageError
from headwater.types import Bulk, VersionInfo
from headwater.wire import versions as v

if TYPE_CHECKING:
    from headwater.client.client import Client
    from headwater.client.table import Table


class Publication:
    """A version on its way. Its moment is past: what is pushed from now on is not in it.

    ``number``: of the version. ``pause``: after ``wait``, the longest that a shard did nothing else for it, in seconds.
    """

    def __init__(self, client: Client, number: int) -> None:
        self.number = number
        self.pause = 0.0
        self._client = client
        self._info: VersionInfo | None = None

    def wait(self, timeout: float | None = None) -> VersionInfo:
        """Until readers can lease it.

        Raises ``UnknownVersion`` or ``ClusterError`` if it was given up, ``DeadlineExceeded``.
        """
        if self._info is None:
            found = self._client.ask(v.Await(self.number), timeout)
            if not isinstance(found, v.Found):
                raise InternalError(f"the coordinator answered {type(found).__name__} to the wish for a version")
            self._info, self.pause = found.info, found.pause
        return self._info


def publish(
    client: Client,
    tables: Iterable[Table],
    name: str,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    keep: int = 3,
    age: float | None = None,
    tags: Iterable[str] = (),
) -> Publication:
    """See ``Client.publish``."""
    chosen = list(tables)
    if not chosen:
        raise UsageError("a version is of one table or more; nothing was published")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UsageError(f"metadata {key!r}: {value!r} is not of text; nothing was published")
    for table in chosen:  # another server may have to take over for that
        table.settle()
    clocks = tuple((table.number, table.clock) for table in chosen if isinstance(table.spec.sync, Bulk))
    begun = client.ask(
        v.Publish(
            model or chosen[0].spec.name, name, tuple(table.number for table in chosen), clocks, dict(metadata or {}),
            keep, age, tuple(tags), time.time(),
        )
    )  # fmt: skip
    if not isinstance(begun, v.Publishing):
        raise InternalError(f"the coordinator answered {type(begun).__name__} to a publication")
    return Publication(client, begun.number)
