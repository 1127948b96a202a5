"""How long a test waits for what must come. It only catches hangs: no test may depend on the machine's speed."""

from __future__ import annotations

PATIENCE = 180.0  # seconds; less than the timeout of a whole test in pyproject.toml
