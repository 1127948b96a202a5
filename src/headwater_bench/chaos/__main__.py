"""``python -m headwater_bench.chaos``: the command without the rest of the command line."""

import typer

from headwater_bench.chaos.command import chaos

if __name__ == "__main__":
    typer.run(chaos)
