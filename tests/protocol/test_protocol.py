"""The runs in ``*.txt``, carried out by the real machines: what they answer is what the file says.

``make protocol`` writes the files anew; read what has changed before you commit it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from headwater.server.replication import records as r
from headwater.server.replication.replica import Replica
from tests.protocol.script import replay
from tests.simulator.test_seeded_bugs import acknowledge_before_replicating

REWRITE = bool(os.environ.get("HEADWATER_REWRITE"))  # now: while a test runs, no such variable is set
FILES = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_run_goes_as_it_is_written(path: Path, tmp_path: Path) -> None:
    written = path.read_text(encoding="utf-8")
    found = replay(written, tmp_path)
    if REWRITE:
        path.write_text(found, encoding="utf-8")
        return
    diff = "\n".join(difflib.unified_diff(written.splitlines(), found.splitlines(), "the file", "the machines", n=6))
    if diff:
        pytest.fail(f"{path.name} (make protocol writes it anew):\n{diff}", pytrace=False)


def forget_at_each_opening(patch: pytest.MonkeyPatch) -> None:
    """A session that is opened again has applied nothing yet: what it sends again is applied twice."""
    seat = Replica._seat

    def forgetful(self: Replica, body: r.Seat) -> None:
        seat(self, body)
        self.sessions[body.session].done.clear()
        self.sessions[body.session].seq.clear()

    patch.setattr(Replica, "_seat", forgetful)


@pytest.mark.parametrize(
    ("bug", "run", "line"),
    [
        (acknowledge_before_replicating, "replicated", "+    apply 7: t = -6"),
        (forget_at_each_opening, "duplicate", "+    apply 6: t = -4"),
    ],
)
def test_a_bug_shows(
    bug: Callable[[pytest.MonkeyPatch], None], run: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bug(monkeypatch)
    written = (Path(__file__).parent / f"{run}.txt").read_text(encoding="utf-8")
    assert line in list(difflib.unified_diff(written.splitlines(), replay(written, tmp_path).splitlines(), lineterm=""))
