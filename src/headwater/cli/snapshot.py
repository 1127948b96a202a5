"""``headwater snapshot``: write one now."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

import headwater
from headwater.cli.console import err, out
from headwater.cli.options import Address, Timeout
from headwater.cli.status import locate, size
from headwater.errors import InternalError
from headwater.wire import messages as m


def snapshot(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    timeout: Timeout = 600.0,
) -> None:
    """Write a snapshot of every table while training goes on.

    It is durable when the command has ended. The cluster must have been
    started with --snapshots; --restore begins a cluster with it.
    """
    with headwater.connect(locate(address), role="reader", timeout=timeout) as ps, err().status("writing a snapshot …"):
        taken = ps.ask(m.TakeSnapshot())
    if not isinstance(taken, m.SnapshotTaken):
        raise InternalError(f"the coordinator answered {type(taken).__name__} to the wish for a snapshot")
    if as_json:
        typer.echo(msgspec.json.encode(taken).decode())
        return
    rate = f", {size(taken.nbytes / taken.seconds)}/s" if taken.seconds > 0 else ""
    out().print(taken.path, highlight=False, soft_wrap=True)
    pause = f"; training paused for {1000 * taken.pause:.0f} ms"
    out().print(f"{size(taken.nbytes)} in {taken.seconds:.1f} s{rate}{pause}", style="dim", highlight=False)
