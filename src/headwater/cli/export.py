"""``headwater export``: a snapshot as plain files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.console import complain, err, out
from headwater.cli.status import size


def export(
    snapshot: Annotated[Path, typer.Argument(help="A folder of snapshots (the newest sound one is taken), or one.")],
    folder: Annotated[Path, typer.Argument(help="Where the files go: a new or empty folder.", metavar="OUT")],
    sha256: Annotated[bool, typer.Option("--sha256", help="Check the files by SHA-256 too; slower.")] = False,
) -> None:
    """Write a snapshot as model.safetensors and a torch optimizer's state.

    headwater.integrations.torch.export.load_optimizer_state(OUT) gives what
    load_state_dict() of the plain torch optimizer takes.
    """
    from headwater.server.snapshots.export import export as write
    from headwater.server.snapshots.restore import newest

    with err().status("reading the snapshot …"):
        found = newest(snapshot)
    for error in found.refused:
        complain(f"refused: {error}")
    with found.snapshot as opened, err().status("writing …"):
        if sha256:
            opened.verify(sha256=True)
        written = write(opened, folder)
    made = opened.manifest
    tables = ", ".join(f"{table.spec.name} at clock {table.mark.clock}" for table in made.tables)
    out().print(f"snapshot {made.number} of {made.created}: {tables}", highlight=False, soft_wrap=True)
    for path in written:
        out().print(f"{path}  {size(path.stat().st_size)}", highlight=False, soft_wrap=True)
