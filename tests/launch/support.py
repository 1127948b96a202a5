"""What the launcher's tests share."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

from tests.patience import PATIENCE

FOREVER = "import select\nwhile True: select.select([], [], [], 0.1)"
"""Until a signal: one that comes right before ``signal.pause()`` would be slept through."""


def python(code: str) -> list[str]:
    """A worker: the shortest Python that runs ``code``."""
    return [sys.executable, "-S", "-c", code]


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended but was not collected by its parent does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for_end(pid: int) -> None:
    """Until the process ends (it need not be a child), within patience."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], PATIENCE)[0], f"process {pid} still runs"
    finally:
        os.close(fd)
