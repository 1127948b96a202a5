"""Disks that crash: what a run did is recorded, and every beginning of it can be looked at as a crash leaves it.

Two kinds. *Killed*: the process ends, everything that it has done is there, its last write perhaps in part. *Power
lost*: what was not synced may be there, or not, or a part of it; names that changed in a folder without a sync of the
folder may have changed, or not, in their order.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from headwater.server.snapshots.disk import Disk, Sink


class Op(NamedTuple):
    """``kind``: folder, create, write, sync, rename, unlink, rmdir, sync_folder or done. Paths are relative."""

    kind: str
    path: str = ""
    data: bytes = b""
    to: str = ""


class Recorder(Disk):
    """The real disk, and a record of all that is done to it. ``skip``: kinds that are not done, which is a bug."""

    def __init__(self, root: Path, skip: tuple[str, ...] = ()) -> None:
        self.root = root
        self.ops: list[Op] = []
        self.skip = skip

    def done(self) -> None:
        """A snapshot exists, its writer says."""
        self.ops.append(Op("done"))

    def _note(self, kind: str, path: Path, data: bytes = b"", to: Path | None = None) -> None:
        if kind not in self.skip:
            name = str(path.relative_to(self.root))
            self.ops.append(Op(kind, name, data, str(to.relative_to(self.root)) if to else ""))

    def make_folder(self, path: Path) -> None:
        if not path.exists():
            self._note("folder", path)
        self._note("sync_folder", path.parent) if path != self.root else None
        super().make_folder(path)

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[Sink]:
        self._note("create", path)
        with super().create(path) as file:
            yield _Recorded(self, path, file)

    def rename(self, path: Path, to: Path) -> None:
        self._note("rename", path, to=to)
        super().rename(path, to)

    def unlink(self, path: Path) -> None:
        self._note("unlink", path)
        super().unlink(path)

    def remove_folder(self, path: Path) -> None:
        self._note("rmdir", path)
        super().remove_folder(path)

    def sync_folder(self, path: Path) -> None:
        if path != self.root.parent:
            self._note("sync_folder", path)
        super().sync_folder(path)


class _Recorded:
    def __init__(self, disk: Recorder, path: Path, file: Sink) -> None:
        self._disk, self._path, self._file = disk, path, file

    def write(self, data: memoryview | bytes) -> None:
        self._disk._note("write", self._path, bytes(data))
        self._file.write(data)

    def sync(self) -> None:
        self._disk._note("sync", self._path)
        self._file.sync()


class Crash(NamedTuple):
    """``least``: snapshots that existed by then; the next one may exist too."""

    what: str
    folder: Path
    least: int


@dataclass
class _Inode:
    """A file. ``safe``: what is on disk for sure."""

    data: bytearray = field(default_factory=bytearray)
    safe: bytes = b""

    def left(self, rng: random.Random) -> bytes:
        data = bytes(self.data)
        if data == self.safe:
            return data
        kept = rng.randrange(len(self.safe), len(data) + 1)
        hole = rng.choice((0, 0, kept - len(self.safe)))  # blocks that were promised and never written
        return data[: kept - hole] + bytes(hole)


_Names = dict[str, _Inode]


class _Model:
    """Folders of files, of which some is on disk."""

    def __init__(self) -> None:
        self.folders: dict[str, _Names] = {".": {}}
        self.safe: dict[str, _Names] = {".": {}}
        self.pending: dict[str, list[Callable[[dict[str, _Names]], None]]] = {}

    def do(self, op: Op) -> None:
        parent, _, name = op.path.rpartition("/")
        parent = parent or "."
        if op.kind == "write":
            self.folders[parent][name].data += op.data
        elif op.kind == "sync":
            inode = self.folders[parent][name]
            inode.safe = bytes(inode.data)
        elif op.kind == "sync_folder":
            for change in self.pending.pop(op.path, []):
                change(self.safe)
        elif op.kind != "done":
            change = self._change(op, parent, name)
            change(self.folders)
            self.pending.setdefault(parent, []).append(change)

    def _change(self, op: Op, parent: str, name: str) -> Callable[[dict[str, _Names]], None]:
        if op.kind == "create":
            inode = _Inode()
            return lambda at: at.setdefault(parent, {}).__setitem__(name, inode)
        if op.kind == "folder":
            return lambda at: at.__setitem__(op.path, {})
        if op.kind == "unlink":
            return lambda at: at.get(parent, {}).pop(name, None) and None
        if op.kind == "rmdir":
            return lambda at: at.pop(op.path, None) and None
        inode = self.folders[parent][name]
        new = op.to.rpartition("/")[2]

        def rename(at: dict[str, _Names]) -> None:
            at.get(parent, {}).pop(name, None)
            at.setdefault(parent, {})[new] = inode

        return rename

    def killed(self) -> dict[str, dict[str, bytes]]:
        return {
            folder: {name: bytes(inode.data) for name, inode in names.items()} for folder, names in self.folders.items()
        }

    def power_lost(self, rng: random.Random) -> dict[str, dict[str, bytes]]:
        left = {folder: dict(names) for folder, names in self.safe.items()}
        for changes in self.pending.values():
            for change in changes[: rng.randrange(len(changes) + 1)]:
                change(left)
        return {folder: {name: inode.left(rng) for name, inode in names.items()} for folder, names in left.items()}


def crashes(ops: list[Op], room: Path, seed: int = 0, tries: int = 3) -> Iterator[Crash]:
    """Every beginning of ``ops`` and, of each write, a few beginnings: as a kill and as a loss of power leave it."""
    rng = random.Random(seed)
    for count in range(len(ops) + 1):
        cuts = [-1]
        if count < len(ops) and ops[count].kind == "write":
            cuts += [rng.randrange(len(ops[count].data)) for _ in range(tries)]
        for cut in cuts:
            model, least = _Model(), sum(op.kind == "done" for op in ops[:count])
            for op in ops[:count]:
                model.do(op)
            if cut >= 0:
                model.do(ops[count]._replace(data=ops[count].data[:cut]))
            what = f"after {count} of {len(ops)} operations" + (f" and {cut} bytes" if cut >= 0 else "")
            yield Crash(f"killed {what}", _lay(model.killed(), room / f"{count}-{cut}-k"), least)
            yield Crash(f"power lost {what}", _lay(model.power_lost(rng), room / f"{count}-{cut}-p"), least)


def _lay(left: dict[str, dict[str, bytes]], folder: Path) -> Path:
    for name, names in left.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, data in names.items():
            (folder / name / file).write_bytes(data)
    return folder
