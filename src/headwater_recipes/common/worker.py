"""A worker process of any run: ``python -m headwater_recipes.common.worker MODULE:TASK RUN``."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

from headwater_recipes.common import trainer

if __name__ == "__main__":
    trainer.main(pkgutil.resolve_name(sys.argv[1]).recipe, Path(sys.argv[2]))
