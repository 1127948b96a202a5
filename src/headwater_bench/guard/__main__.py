"""``python -m headwater_bench.guard [--update] [--show N]``: see ``make bench-guard`` in CONTRIBUTING.md."""

from __future__ import annotations

import sys

from headwater_bench.guard.compare import main

if __name__ == "__main__":
    main(sys.argv[1:])
