"""What a cluster is made of: servers, shards, copies, and what it keeps on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from headwater.cluster.store.sqlite import SqliteStore
from headwater.errors import UsageError
from headwater.transports.address import Address, parse

Ack = Literal["memory", "disk"]
_LISTEN = "tcp://127.0.0.1:0"


@dataclass(frozen=True, slots=True)
class Shape:
    """The wishes of who starts a cluster.

    Attributes:
        servers: processes that host shards. 0: no cluster.
        shards: slices of every table; fixed for the life of the cluster. Default: as many as servers.
        replicas: copies of every shard, on as many servers. With 2 or more a server may die.
        min_copies: a shard with fewer copies acknowledges nothing until it has them again.
        ack: ``"memory"``: an acknowledged push is in the memory of every copy; ``"disk"``: in their logs on disk too.
        silence: seconds without a word after which a process counts as dead.
        state: folder of what the coordinator, and logs, must remember. With it the coordinator may die.
        snapshots: folder that snapshots are written to.
        snapshot_every: seconds between two snapshots.
        restore: a snapshot, or a folder of them, to begin with.
        address: join the cluster that runs there instead of starting one; no server is started then.
        listen: where the coordinator listens; the servers take free ports of the same interface.

    Raises ``UsageError`` if these do not fit together.
    """

    servers: int = 1
    shards: int | None = None
    replicas: int = 1
    min_copies: int = 1
    ack: Ack = "memory"
    silence: float | None = None
    state: Path | None = None
    snapshots: Path | None = None
    snapshot_every: float | None = None
    restore: Path | None = None
    address: str | None = None
    listen: str = _LISTEN

    def __post_init__(self) -> None:
        for name in ("state", "snapshots", "restore"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else Path(given))
        if self.address:
            object.__setattr__(self, "servers", 0)
        told = "the cluster at {} runs already: shards, copies, state and snapshots are chosen where it is started"
        for wrong, why in (
            (self.servers < 0, f"servers={self.servers}: a cluster has 0 servers (none) or more"),
            (self.shards is not None and self.shards < 1, f"shards={self.shards}: a cluster has 1 shard or more"),
            (self.replicas < 1, f"replicas={self.replicas}: a shard has 1 copy or more"),
            (
                self.servers > 0 and self.replicas > self.servers,
                f"replicas={self.replicas} with servers={self.servers}: the copies of a shard lie on as many servers",
            ),
            (
                not 1 <= self.min_copies <= max(1, self.replicas),
                f"min_copies={self.min_copies}: must be from 1 to the number of copies, replicas={self.replicas}",
            ),
            (self.ack not in get_args(Ack), f'ack={self.ack!r}: must be "memory" or "disk"'),
            (
                self.ack == "disk" and self.state is None,
                'ack="disk": name the folder that the logs shall outlive the cluster in: state=… (--state)',
            ),
            (self.silence is not None and self.silence <= 0, f"silence={self.silence}: must be above 0 seconds"),
            (
                self.snapshot_every is not None and self.snapshot_every <= 0,
                f"snapshot_every={self.snapshot_every}: must be above 0 seconds",
            ),
            (
                self.snapshot_every is not None and self.snapshots is None,
                "snapshot_every: name the folder that snapshots go to: snapshots=… (--snapshots)",
            ),
            (self.address is not None and not self.plain, told.format(self.address)),
        ):
            if wrong:
                raise UsageError(f"{why}; nothing was started")

    @property
    def own(self) -> bool:
        """Whether the job runs on a cluster of its own, or on none."""
        return self.address is None

    @property
    def plain(self) -> bool:
        """Whether nothing but the number of servers, and an address, was asked for."""
        return replace(self, address=None, listen=_LISTEN) == Shape(self.servers)

    def prepare(self) -> None:
        """Make the folders. Raises ``UsageError`` if one cannot be made or there is nothing to restore."""
        for folder in (self.state, self.snapshots):
            try:
                if folder is not None:
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"{folder} cannot be made: {error.strerror}; nothing was started") from None
        if self.restore is not None and not self.restore.exists():
            raise UsageError(f"there is no snapshot {self.restore} to restore; nothing was started")
        if self.restore is not None and not self.restore.is_dir():
            raise UsageError(
                f"{self.restore} is a file, and a snapshot is a folder: name it, or the folder of snapshots that it is "
                "in; nothing was started"
            )

    def set_aside(self, findable: bool) -> None:
        """Forget the state of a cluster that has ended, if nothing is lost with it.

        ``findable``: servers of it that run elsewhere may come back, as the coordinator listens where it did before.

        Raises ``UsageError`` if it had tables and no snapshot was given to begin with; ``StateInUse`` if it runs.
        """
        if self.state is None or (self.restore is None and (findable or self.ack == "disk")):
            return
        store = SqliteStore(self.state)
        try:
            known = store.items()
            if self.restore is None and any(key.startswith("table/") for key in known):
                raise UsageError(
                    f"the state in {self.state} is of a cluster that has ended, and what its servers held in memory is "
                    "gone with them: begin with a snapshot (--restore), or with another folder; nothing was started"
                )
            if known:
                store.put(dict.fromkeys(known))
        finally:
            store.close()

    def coordinator_options(self, state: Path | None) -> list[str]:
        """Of its command line; ``state`` is the folder it is to use."""
        options = {
            "--servers": str(self.servers),
            "--shards": None if self.shards is None else str(self.shards),
            "--replicas": None if self.replicas == 1 else str(self.replicas),
            "--min-copies": None if self.min_copies == 1 else str(self.min_copies),
            "--ack": None if self.ack == "memory" else self.ack,
            "--silence": None if self.silence is None else f"{self.silence:g}",
            "--state": _absolute(state),
            "--snapshots": _absolute(self.snapshots),
            "--snapshot-every": None if self.snapshot_every is None else f"{self.snapshot_every:g}",
            "--restore": _absolute(self.restore),
        }
        return [word for name, value in options.items() if value is not None for word in (name, value)]

    def server_options(self, name: str) -> list[str]:
        """Of the command line of the server ``name``, which finds its log again when it is started again."""
        return ["--data", str(_absolute(self.state / name))] if self.ack == "disk" and self.state else []


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def checked_listen(listen: str, token: str | None) -> Address:
    """Raises ``UsageError`` for an address that a coordinator cannot or should not listen on."""
    found = parse(listen)
    if found.host in ("", "0.0.0.0", "::"):
        raise UsageError(
            f"{listen}: clients are told the address that a server listens on, so name one interface of this "
            "machine; nothing was started"
        )
    if not found.loopback and token is None:
        raise UsageError(
            f"{listen} can be reached from other machines: give the token yourself, so that it can be given to "
            "them (HEADWATER_TOKEN or HEADWATER_TOKEN_FILE); nothing was started"
        )
    return found
