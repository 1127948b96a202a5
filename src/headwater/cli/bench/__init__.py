"""``headwater bench``: what Headwater costs, beside the ceiling of the same machine in the same minute."""

from __future__ import annotations

from headwater.cli.bench.commands import app

__all__ = ["app"]
