"""``headwater add-server``: one more server for a running cluster, in the foreground."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer

import headwater
from headwater.cli.console import complain, note, out
from headwater.cli.drain import empty, holdings
from headwater.cli.options import Address
from headwater.cli.run import report, token_of
from headwater.cli.status import locate
from headwater.errors import HeadwaterError
from headwater.launch import Launcher, Shape, address_of

if TYPE_CHECKING:
    from headwater.launch import Process

_LEAVING = 5.0


def add_server(
    address: Address = None,
    listen: Annotated[
        str | None, typer.Option(help="Where it listens, if not on a free port of the coordinator's interface.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that moving its shards away may take.")] = 600.0,
) -> None:
    """Start a server that joins a running cluster, and stay in the foreground.

    Shards move to it while training goes on. Ctrl-C moves them away
    again and ends it; a second Ctrl-C ends it at once.
    """
    found = locate(address)
    job = Launcher(Shape(address=found), token=token_of(found))
    with job.signals(), job:
        process = job.add_server(listen)
        where = address_of(process).removeprefix("tcp://")
        out().print(f"A server at {where} (pid {process.pid}) has joined the cluster at {found}.", highlight=False)
        out().print("To end it: Ctrl-C, which first moves its shards away.", style="dim")
        outcome = job.wait()
        if outcome.interrupted:
            gone = _leave(job, process, found, timeout)
            raise typer.Exit(0 if gone else 1)
    report(outcome)
    raise typer.Exit(outcome.code)


def _leave(job: Launcher, process: Process, cluster: str, timeout: float) -> bool:
    """Drain the server; a signal meanwhile, or its end, cuts that short. Whether nothing was left on it."""
    failed: list[str] = []

    def drain() -> None:
        try:
            with headwater.connect(cluster, role="reader", timeout=timeout) as ps:
                mine = address_of(process)
                server = next((each for each in ps.status().servers if each.address == mine), None)
                if server is None:
                    failed.append("the cluster does not know it any more")
                    return
                note(f"headwater: {holdings(server)}; moving them away (Ctrl-C again: end it at once)")
                empty(ps, server.server)
        except HeadwaterError as error:
            failed.append(f"{error.code}: {error}")

    thread = threading.Thread(target=drain, name="headwater-drain", daemon=True)
    thread.start()
    while thread.is_alive() and process.running:
        if job.linger(0.1):
            failed.append("interrupted")
            break
    else:
        thread.join(1.0)
    until = time.monotonic() + _LEAVING
    while not failed and process.running and time.monotonic() < until:  # it ends by itself when it is empty
        job.linger(0.1)
    if failed:
        complain(f"not everything was moved away ({failed[0]}); what had no copy elsewhere is lost")
    else:
        out().print("Its shards are on other servers now. The server has ended.")
    return not failed
