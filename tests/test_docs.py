"""Pages that name things of the code name all of them."""

from __future__ import annotations

import re
from pathlib import Path

import headwater

ROOT = Path(headwater.__file__).parents[2]


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    code = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    used = {name for text in code for name in re.findall(r"\bHEADWATER_[A-Z_]*[A-Z]\b", text)}
    assert used <= set(re.findall(r"HEADWATER_[A-Z_]+", page))
