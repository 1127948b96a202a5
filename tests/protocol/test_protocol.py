"""The runs in ``*.txt``, carried out by the real machines: what they answer is what the file says.

``make protocol`` writes the files anew; read what has changed before you commit it.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest

from tests.protocol.script import replay

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
