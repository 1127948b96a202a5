"""Addresses, and who is on the same host."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from headwater.errors import UsageError

PORTED = {"tcp"}
"""Schemes whose addresses have a port (``schemes.register`` adds to them)."""


@dataclass(frozen=True, slots=True)
class Address:
    """``tcp://host:port``, ``local://name`` (an abstract unix socket) or ``inproc://name``.

    ``schemes.py`` says what else a scheme stands for.
    """

    scheme: str
    host: str
    port: int = 0

    def __str__(self) -> str:
        if self.scheme in PORTED:
            host = f"[{self.host}]" if ":" in self.host else self.host
            return f"{self.scheme}://{host}:{self.port}"
        return f"{self.scheme}://{self.host}"

    @property
    def loopback(self) -> bool:
        """Whether only this host can reach it."""
        if self.scheme not in PORTED:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse(text: str) -> Address:
    """Read an address. Raises ``UsageError`` with the forms that are allowed."""
    scheme, found, rest = text.partition("://")
    if found and scheme in ("inproc", "local"):
        return Address(scheme, rest)
    host, colon, port = rest.rpartition(":")
    if scheme in PORTED and colon and port.isdigit() and int(port) < 65536:
        return Address(scheme, host.strip("[]"), int(port))
    raise UsageError(f"address {text!r} is none of tcp://HOST:PORT and inproc://NAME")


def host_identity() -> str:
    """What two processes must share to reach each other's abstract sockets: boot, network namespace and user.

    Empty where shared memory as Headwater needs it does not exist. Reading blocks that a server may be
    writing relies on total store order, so other machines than x86-64 use TCP.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    text = f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.getuid()}"
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
