"""Shared memory without names: sealed memfds, mapped page by page side by side.

A memfd leaves nothing behind after ``kill -9``: the kernel frees it with the last process that holds it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from headwater.errors import NotEnoughMemory, ProtocolError, UsageError

AVAILABLE = sys.platform == "linux" and hasattr(os, "memfd_create")
_SEALS = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW: a peer can never pull pages away under a reader
_SEAL_WRITES = 0x10  # F_SEAL_FUTURE_WRITE: only mappings that were made before it may write
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_HUGE = 2 << 20  # bytes of a huge page
_FAILED = ctypes.c_void_p(-1).value

_CGROUP = Path("/sys/fs/cgroup")
_GROUPS = (  # limit, used, and the cache in it that the kernel gives back: versions 2 and 1
    (_CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat", "inactive_file"),
    (
        _CGROUP / "memory/memory.limit_in_bytes",
        _CGROUP / "memory/memory.usage_in_bytes",
        _CGROUP / "memory/memory.stat",
        "total_inactive_file",
    ),
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its control group if that is less."""
    free = _number(Path("/proc/meminfo"), "MemAvailable:", 1024)
    for limit, used, stat, cache in _GROUPS:
        if limit.exists() and used.exists():
            text = limit.read_text(encoding="ascii").strip()
            if text.isdigit():
                taken = int(used.read_text(encoding="ascii")) - _number(stat, cache, 1, 0)
                free = min(free, int(text) - taken)
    return max(0, free)


def _number(path: Path, key: str, unit: int, default: int = 1 << 62) -> int:
    for line in path.read_text(encoding="ascii").splitlines() if path.exists() else ():
        if line.startswith(key):
            return int(line.split()[1]) * unit
    return default


def create(name: str, size: int) -> int:
    """A new memfd of ``size`` zero bytes, sealed; the caller closes it.

    ``name`` shows in /proc only. Raises ``NotEnoughMemory`` now rather than a SIGBUS later.
    """
    free = available_memory()
    if size > free:  # the kernel would take the pages, and then kill somebody for them
        raise NotEnoughMemory(
            f"{size} bytes of shared memory for {name!r}, but {free} are free on this machine; nothing was created"
        )
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in name[:64])
    fd = os.memfd_create(f"headwater:{shown}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if size:
            os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise NotEnoughMemory(
            f"{size} bytes of shared memory for {name!r} were refused ({error.strerror}); nothing was created"
        ) from None
    return fd


class Sealed:
    """A memfd that this process writes and others can only read: ``fd`` for them, ``region`` for itself.

    Its pages come with the first write, in huge pages where the kernel has them, so that making it costs nothing.
    Raises ``NotEnoughMemory`` where they would not fit now, ``beside`` bytes that are promised to others.
    """

    def __init__(self, name: str, size: int, beside: int = 0) -> None:
        free = available_memory() - beside
        if size > free:
            raise NotEnoughMemory(f"{size} bytes for a {name}, but {free} are free on this machine; none were taken")
        try:
            self.fd = os.memfd_create(f"headwater:{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise NotEnoughMemory(
                f"{size} bytes for a {name} were refused ({error.strerror}); none were taken"
            ) from None
        try:
            os.ftruncate(self.fd, size)
            self.region = Region([Piece(self.fd, 0, size)], huge=True)
            try:
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS | _SEAL_WRITES)
            except OSError:  # a kernel before 5.1: readers are trusted to map it for reading only
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise
        self._close = weakref.finalize(self, close_all, (self.fd,))

    def close(self) -> None:
        """Let go of the descriptor. The bytes go with the last mapping of them, here or elsewhere."""
        self._close()
        self.fd = -1


def verify(fd: int, size: int) -> None:
    """Refuse a received descriptor that is no memfd, smaller than agreed, or could still shrink."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise ProtocolError("a descriptor that is no memfd was sent as shared memory") from None
    if seals & _SEALS != _SEALS or os.fstat(fd).st_size < size:
        raise ProtocolError(
            f"shared memory of {os.fstat(fd).st_size} bytes with seals {seals:#x} instead of {size} sealed bytes"
        )


class Piece(NamedTuple):
    """``size`` bytes of ``fd`` from ``offset``; all page-aligned."""

    fd: int
    offset: int
    size: int


class _Scan(ctypes.Structure):
    """``struct pm_scan_arg`` of ``ioctl(PAGEMAP_SCAN)``, from Linux 6.7 on."""

    _fields_: ClassVar = [
        (name, ctypes.c_uint64)
        for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
            "inverted", "mask", "any_of", "give",
        )
    ]  # fmt: skip


_PAGEMAP_SCAN = 0xC0606610
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4  # PAGE_IS_*
_RUNS = 512  # ranges per call
_Runs = ctypes.c_uint64 * (3 * _RUNS)


def _copied(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Addresses of pages in a private mapping of a file that are no longer the file's: the kernel copied them.

    Raises ``UsageError`` where the kernel does not say (no /proc).
    """
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"/proc/self/pagemap cannot be read ({error.strerror}): without it nobody can tell whether a parameter was "
            "written outside the optimizer. Mount /proc for this process"
        ) from None
    try:
        yield from _scanned(fd, address, address + size)
    except OSError:  # a kernel before 6.7
        yield from _listed(fd, address, size)
    finally:
        os.close(fd)


def _scanned(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    runs = _Runs()
    while start < end:
        scan = _Scan(
            ctypes.sizeof(_Scan), 0, start, end, 0, ctypes.addressof(runs), _RUNS, 0, _FILE, _FILE,
            _PRESENT | _SWAPPED, _FILE,
        )  # fmt: skip
        found = fcntl.ioctl(fd, _PAGEMAP_SCAN, scan)
        for at in range(0, 3 * found, 3):
            yield runs[at], runs[at + 1]
        start = scan.walk_end


def _listed(fd: int, address: int, size: int) -> Iterator[tuple[int, int]]:
    """One 64-bit entry per page: bit 61 says that it is the file's, 62 and 63 that there is one."""
    pages = -(-size // mmap.PAGESIZE)
    entries = array.array("Q", os.pread(fd, 8 * pages, address // mmap.PAGESIZE * 8))
    for page, entry in enumerate(entries):
        if entry >> 62 and not entry >> 61 & 1:
            at = address + page * mmap.PAGESIZE
            yield at, at + mmap.PAGESIZE


def _unmap(address: int, size: int) -> None:
    _libc.munmap(address, size)


class Region:
    """Pieces of shared memory mapped side by side, as one buffer.

    ``buffer`` keeps the mapping alive: it is unmapped when the last memoryview or tensor on it is gone.
    ``private`` maps copy-on-write: a stray write stays in this process. ``huge``: in huge pages where the kernel can.
    ``reserve``: bytes of address space, if ``pieces`` are mapped into them later (``replace``).
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        writable: bool = True,
        private: bool = False,
        huge: bool = False,
        reserve: int = 0,
    ) -> None:
        self.size = reserve or sum(piece.size for piece in pieces)
        room = max(self.size, mmap.PAGESIZE)
        taken = room + _HUGE if huge else room
        begin = _libc.mmap(None, taken, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        if begin == _FAILED:
            raise NotEnoughMemory(f"{taken} bytes of address space were refused; nothing was mapped")
        address = -(-begin // _HUGE) * _HUGE if huge else begin
        self.buffer = (ctypes.c_ubyte * room).from_address(address)
        # Not at the process's exit, while daemon threads may still write there: the kernel unmaps after them.
        weakref.finalize(self.buffer, _unmap, begin, taken).atexit = False
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable or private else 0)
        flags = (mmap.MAP_PRIVATE if private else mmap.MAP_SHARED) | _MAP_FIXED
        at = address
        for piece in pieces:
            if piece.size and _libc.mmap(at, piece.size, protection, flags, piece.fd, piece.offset) == _FAILED:
                raise NotEnoughMemory(f"mapping {piece.size} bytes failed: {os.strerror(ctypes.get_errno())}")
            at += piece.size
        self._address = address
        if huge:
            _libc.madvise(address, self.size, _MADV_HUGEPAGE)

    def replace(self, start: int, piece: Piece, size: int, *, private: bool = True, writable: bool = True) -> None:
        """Map other memory over bytes ``start:start+size``, at the same addresses.

        ``private`` maps copy-on-write. Raises ``NotEnoughMemory``; the bytes are undefined then.
        """
        flags = (mmap.MAP_PRIVATE if private else mmap.MAP_SHARED) | _MAP_FIXED
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        at = self._address + start
        if size and _libc.mmap(at, size, protection, flags, piece.fd, piece.offset) == _FAILED:
            raise NotEnoughMemory(f"mapping {size} bytes failed: {os.strerror(ctypes.get_errno())}")

    @property
    def view(self) -> memoryview:
        return memoryview(self.buffer).cast("B")[: self.size]

    def written(self) -> list[tuple[int, int]]:
        """In a private mapping: the pages that this process has written, as sorted byte ranges."""
        return [(start - self._address, stop - self._address) for start, stop in _copied(self._address, self.size)]

    def touch(self, start: int, stop: int) -> None:
        """Find the pages of ``start:stop`` now, and not when they are first read: 0.1 ms per MB, in few calls.

        A kernel before 5.14 finds them later; whatever else is wrong shows when they are read.
        """
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > first:
            _libc.madvise(self._address + first, stop - first, _MADV_POPULATE_READ)

    def populate(self, start: int, stop: int) -> bool:
        """Have pages to write to behind ``start:stop`` now. The bytes stay as they are, whoever writes meanwhile.

        False where it does not: a kernel before 5.14, or no memory.
        """
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, len(self.buffer))
        return stop <= first or _libc.madvise(self._address + first, last - first, _MADV_POPULATE_WRITE) == 0

    def drop(self, start: int, stop: int) -> None:
        """Forget the page-table entries of ``start:stop`` (whole pages inside it).

        The bytes stay in the memfd; this process just no longer counts them as resident. In a private
        mapping this also throws away copies that stray writes made.
        """
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            _libc.madvise(self._address + first, last - first, _MADV_DONTNEED)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
