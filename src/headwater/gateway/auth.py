"""API keys: a file of them, one a line, that its owner alone can read."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.errors import UsageError
from headwater.gateway.problems import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable

_LONGEST = 1 << 20


class Keys:
    """The keys of a file; read again when it has changed, so that a key can be added or withdrawn.

    Lines that are empty or begin with ``#`` are passed over. What is held are SHA-256 digests. If a changed file cannot
    be read, or others can read it, every key is refused until it is right again: a withdrawn key must not live on.

    Raises:
        UsageError: the file is not there, empty, too long, or others can read it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._digests = _read(path)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises ``Refusal`` (401) unless the headers carry ``authorization: Bearer KEY`` with a key of the file."""
        given = next((value for name, value in headers if name == b"authorization"), None)
        scheme, _, key = (given or b"").strip().partition(b" ")
        if given is None or scheme.lower() != b"bearer":
            raise _unauthorised("no API key was given; send it as authorization: Bearer KEY", "missing_api_key")
        if not self._known(key.strip()):
            raise _unauthorised("the API key is not one of this server's", "invalid_api_key")

    def _known(self, key: bytes) -> bool:
        """Compares with all, each in constant time."""
        self._refresh()
        digest = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        try:
            self._digests = _read(self._path)
        except UsageError:
            self._digests = ()
        self._stamp = stamp


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, replaced, or made readable."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def _read(path: Path) -> tuple[bytes, ...]:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_LONGEST + 1)
    except OSError as error:
        raise UsageError(f"the file of API keys {path} cannot be read: {error.strerror}; nothing was started") from None
    if mode & 0o077:
        raise UsageError(
            f"the file of API keys {path} can be read by others (mode {mode:04o}): chmod 600 {path}; "
            "nothing was started"
        )
    lines = (line.strip() for line in content.splitlines())
    keys = [line for line in lines if line and not line.startswith(b"#")]
    if not keys or len(content) > _LONGEST:
        raise UsageError(f"the file of API keys {path} holds no key, or too many: one a line; nothing was started")
    return tuple(hashlib.sha256(key).digest() for key in keys)


def _unauthorised(message: str, slug: str) -> Refusal:
    return Refusal(401, message, kind="authentication_error", slug=slug, headers={"www-authenticate": "Bearer"})
