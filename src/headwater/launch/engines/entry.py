"""What every launched process runs first: tie its life to the launcher's, then become the command.

Run as ``python -I -S entry.py PARENT_PID command args…``. A ``preexec_fn`` would do the same in fewer files, but it
runs Python between fork and exec, which can deadlock when the launcher has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Ask Linux to kill this process, and what it becomes by exec, when ``parent`` ends; elsewhere do nothing."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request was in place
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Exit code 126 or 127, as a shell's, when the command cannot be run."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    die_with(parent)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"headwater: cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main()
