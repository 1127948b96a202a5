"""``python -m headwater.cli.chaos``: the command without the rest of the command line."""

import typer

from headwater.cli.chaos.command import chaos

if __name__ == "__main__":
    typer.run(chaos)
