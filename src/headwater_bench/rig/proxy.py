"""A TCP proxy that breaks what passes through it: for tests of real processes, on one machine.

A ``ProxyNetwork`` is a set of proxies, one in front of each process that listens. It knows both ends of every
connection by name (``Owners`` finds out who connected), so a fault can strike a process, or one pair, in one direction
or both.
Faults of one stream are those that TCP allows: bytes are delayed, held back, lost with the connection, or damaged;
never reordered or doubled.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, Self, TypeVar

Kind = Literal["hold", "swallow", "delay", "flip", "truncate"]
Way = Literal["both", "to", "from"]
Tap = Callable[[bytes], None]
T = TypeVar("T")

CHUNK = 64 << 10  # bytes read at once
QUEUE = 64  # chunks under way in one direction: then the sender feels it
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to bytes of the connections of ``who`` (with ``peer``, or with everybody).

    hold: they wait until the rule is lifted, as in a partition. swallow: they are lost without a word, and the
    connection breaks when the rule is lifted (half-open). delay: they arrive ``seconds`` later. flip: one bit of
    each of the next ``count`` chunks is turned. truncate: the next ``count`` chunks are cut and their connections
    closed. ``way``: bytes towards ``who``, from it, or both.
    """

    kind: Kind
    who: str
    way: Way = "both"
    peer: str = ""
    seconds: float = 0.0
    count: int = 1

    def concerns(self, source: str, target: str) -> bool:
        """Whether bytes from ``source`` to ``target`` are meant."""
        there = self.way != "from" and target == self.who and self.peer in ("", source)
        back = self.way != "to" and source == self.who and self.peer in ("", target)
        return there or back


class Owners:
    """Who holds the other end of a connection on this machine, by ``/proc``."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}

    def register(self, name: str, pid: int) -> None:
        """From now on ``name`` is this process."""
        self._pids[name] = pid

    def find(self, port: int, towards: int) -> str:
        """The name of the process that connected from ``port`` to the port ``towards``; "?" for a stranger."""
        inode = _inode(port, towards)
        if inode:
            for name, pid in list(self._pids.items()):
                if _holds(pid, inode):
                    return name
        return "?"


def _inode(port: int, towards: int) -> str:
    here, there = f":{port:04X}", f":{towards:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(here) and fields[2].endswith(there):
            return fields[9] if fields[9] != "0" else ""
    return ""


def _holds(pid: int, inode: str) -> bool:
    wanted = f"socket:[{inode}]"
    try:
        held = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    for each in held:
        with contextlib.suppress(OSError):
            if str(each.readlink()) == wanted:
                return True
    return False


@dataclass(eq=False, slots=True)
class _Passage:
    """One connection through a proxy."""

    source: str
    target: str
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    tainted: bool = False  # bytes of it are lost: it can only break

    def concerns(self, who: str, peer: str) -> bool:
        ends = {self.source, self.target}
        return who in ends and (not peer or peer in ends)

    def reset(self) -> None:
        """Break it as a crashed host does: RST to both ends."""
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class ProxyNetwork:
    """Proxies and their faults. All methods may be called from any thread; the bytes move in one of its own.

    ``identify`` gives the name of who connected from a port to a port. ``tap`` may give, for (source, target), a
    function that sees the bytes of that direction as they are passed on. What is random comes from ``seed``.
    """

    def __init__(
        self,
        seed: int = 0,
        identify: Callable[[int, int], str] | None = None,
        tap: Callable[[str, str], Tap | None] | None = None,
    ) -> None:
        self._random = Random(seed)
        self._identify = identify or (lambda port, towards: "?")
        self._tap = tap or (lambda source, target: None)
        self._rules: dict[int, Rule] = {}
        self._left: dict[int, int] = {}  # of rules that strike a number of chunks
        self._numbers = 0
        self._links: set[_Passage] = set()
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._struck: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="headwater-proxy", daemon=True)
        self._thread.start()

    # ---- from outside ----------------------------------------------------------------------------

    def open(self, name: str, target: tuple[str, int]) -> int:
        """Listen on a free port of loopback for connections to ``name``, which listens at ``target``."""
        return self._call(self._open(name, target))

    def apply(self, rule: Rule) -> int:
        """The rule holds from now on; returns its number."""
        return self._call(self._apply(rule))

    def lift(self, number: int) -> None:
        """The rule holds no longer. Connections that lost bytes by it break now."""
        self._call(self._lift(number))

    def reset(self, who: str, peer: str = "") -> int:
        """Break the connections of ``who``; returns how many."""
        return self._call(self._reset(who, peer))

    def links(self) -> list[tuple[str, str]]:
        """Both ends of each connection."""
        return self._call(self._list())

    def struck(self) -> dict[str, int]:
        """Chunks that a rule of each kind has struck."""
        return dict(self._struck)

    def close(self) -> None:
        """Break everything and end."""
        if self._thread.is_alive():
            self._call(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    # ---- in the loop -----------------------------------------------------------------------------

    async def _open(self, name: str, target: tuple[str, int]) -> int:
        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = self._loop.create_task(self._serve(name, target, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        server = await asyncio.start_server(accepted, "127.0.0.1", 0, limit=CHUNK)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _apply(self, rule: Rule) -> int:
        self._numbers += 1
        self._rules[self._numbers] = rule
        self._left[self._numbers] = rule.count
        self._wake()
        return self._numbers

    async def _lift(self, number: int) -> None:
        rule = self._rules.pop(number, None)
        if rule is not None and rule.kind == "swallow":
            for link in [link for link in self._links if link.tainted]:
                link.reset()
        self._wake()

    async def _reset(self, who: str, peer: str) -> int:
        found = [link for link in self._links if link.concerns(who, peer)]
        for link in found:
            link.reset()
        return len(found)

    async def _list(self) -> list[tuple[str, str]]:
        return [(link.source, link.target) for link in self._links]

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for link in list(self._links):
            link.reset()
        self._rules.clear()
        self._wake()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _serve(
        self, name: str, target: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        port, here = writer.get_extra_info("peername")[1], writer.get_extra_info("sockname")[1]
        link = _Passage(self._identify(port, here), name, [writer])
        self._links.add(link)
        try:
            await self._released(link.source, name)
            there, back = await asyncio.open_connection(*target, limit=CHUNK)
            link.writers.append(back)
            await asyncio.gather(
                self._pump(link, reader, back, link.source, name), self._pump(link, there, writer, name, link.source)
            )
        except OSError:
            link.reset()
        finally:
            self._links.discard(link)
            for each in link.writers:
                each.close()

    async def _pump(
        self, link: _Passage, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str, target: str
    ) -> None:
        """One direction: what is read waits its delay in a bounded queue, then meets the other rules."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE)
        feeding = asyncio.ensure_future(self._feed(reader, queue, source, target))
        tap = self._tap(source, target)
        try:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                await self._released(source, target)
                if not data:
                    writer.write_eof()
                    return
                passed, last = self._damage(link, data, source, target)
                if tap is not None and passed:
                    tap(passed)
                writer.write(passed)
                await writer.drain()
                if last:
                    for each in link.writers:
                        each.close()
                    return
        except OSError:
            link.reset()
        finally:
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await feeding

    async def _feed(
        self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]], source: str, target: str
    ) -> None:
        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:
                data = b""
            late = sum(rule.seconds for _, rule in self._of("delay", source, target))
            self._struck["delay"] += bool(late)
            await queue.put((self._loop.time() + late, data))

    def _of(self, kind: Kind, source: str, target: str) -> list[tuple[int, Rule]]:
        return [(n, rule) for n, rule in self._rules.items() if rule.kind == kind and rule.concerns(source, target)]

    async def _released(self, source: str, target: str) -> None:
        if self._of("hold", source, target):
            self._struck["hold"] += 1
        while self._of("hold", source, target):
            await self._changed.wait()

    def _damage(self, link: _Passage, data: bytes, source: str, target: str) -> tuple[bytes, bool]:
        """What is left of the bytes, and whether the connection ends with them."""
        if link.tainted or self._of("swallow", source, target):
            link.tainted = True
            self._struck["swallow"] += 1
            return b"", False
        if self._takes("flip", source, target):
            at = self._random.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << self._random.randrange(8)]) + data[at + 1 :]
        if self._takes("truncate", source, target):
            return data[: self._random.randrange(len(data))], True
        return data, False

    def _takes(self, kind: Kind, source: str, target: str) -> bool:
        for number, _ in self._of(kind, source, target):
            if self._left[number] > 0:
                self._left[number] -= 1
                self._struck[kind] += 1
                return True
        return False
