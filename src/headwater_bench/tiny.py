"""A worker of ``bench recovery``'s second part: a step is a sleep, in place of a device's computation, and a push.

``python -m headwater_bench.tiny FILE SECONDS``: a line in the file for every acknowledged step, until SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import torch

import headwater
from headwater_bench.chaos.ledger import LedgerWriter

ELEMENTS = 4096
STOPPING: list[int] = []


def main(path: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda number, _: STOPPING.append(number))
    writer = LedgerWriter(path)
    with headwater.connect() as client:
        table = client.dense("tiny", (ELEMENTS,), optimizer=torch.optim.SGD, sync=headwater.Bulk(), lr=0.1)
        table.gradient.fill_(1e-3)
        number = 0
        while not STOPPING:
            number += 1
            time.sleep(seconds)
            result = table.push(table.gradient).wait()
            writer.write("A", "tiny", number, result.clock)


class Acks:
    """When each step of a worker was acknowledged, and which it was; read while the file grows."""

    def __init__(self, path: Path) -> None:
        self.found: list[tuple[float, int]] = []
        self._path, self._offset = path, 0

    def read(self) -> None:
        if not self._path.exists():
            return
        data = self._path.read_bytes()[self._offset :]
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode().splitlines():
            _, _, _, clock, when = line.split(" ")
            self.found.append((float(when), int(clock)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
