"""Which records wait for which followers. A record counts when everyone who follows has accepted it.

Source of the rule: viewstamped replication (Liskov & Cowling 2012) with a view service instead of a quorum, as in
Boxwood and the Google File System: all members of the view, not most, so that one survivor holds everything.
"""

from __future__ import annotations

from collections import deque

from headwater.server.replication.records import Record


class Log:
    """``required``: server -> the last LSN that it has accepted. ``blocked``: too few copies to go on with."""

    def __init__(self, lsn: int = 0) -> None:
        self.last = lsn  # the last LSN given out
        self.pending: deque[Record] = deque()
        self.required: dict[int, int] = {}
        self.blocked = False

    @property
    def replicated(self) -> bool:
        return bool(self.required) or self.blocked

    def append(self, record: Record) -> None:
        self.last = record.lsn
        self.pending.append(record)

    def accepted(self, server: int, lsn: int) -> None:
        """A follower has every record up to ``lsn``."""
        if server in self.required:
            self.required[server] = max(self.required[server], min(lsn, self.last))

    def next_accepted(self) -> Record | None:
        """The next record that everyone has."""
        if not self.pending or self.blocked:
            return None
        lsn = self.pending[0].lsn
        for has in self.required.values():
            if has < lsn:
                return None
        return self.pending.popleft()

    @property
    def accepted_by_all(self) -> int:
        """The last record that every follower has, and that is or may be applied here."""
        here = self.pending[0].lsn - 1 if self.pending else self.last
        return min([*self.required.values(), here])

    def behind(self) -> dict[int, int]:
        """How many records each follower has yet to accept."""
        return {server: self.last - has for server, has in self.required.items()}
