"""The command, and the run from beginning to end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from headwater.cli.console import err, out
from headwater.cli.environment import exported

if TYPE_CHECKING:
    from headwater_bench.chaos.report import ChaosReport
    from headwater_bench.chaos.runner import Timeline

QUIET_SHARE, QUIET_LEAST = 0.1, 1.5  # of the run, and seconds, without faults first


class Transport(StrEnum):
    """How servers, workers and the reader reach one another."""

    tcp = "tcp"
    local = "local"


class Mode(StrEnum):
    """A synchronisation policy."""

    bulk = "bulk"
    stale = "stale"
    async_ = "async"


def chaos(
    mode: Annotated[Mode, typer.Option(help="The synchronisation policy.")] = Mode.bulk,
    seconds: Annotated[float, typer.Option(min=3.0, help="How long to push, with and without faults.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The faults and their order are drawn from it.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
    transport: Annotated[
        Transport,
        typer.Option(help="tcp: through proxies that break it (one worker shares memory). local: all share it."),
    ] = Transport.tcp,
    workers: Annotated[int, typer.Option(min=1, max=16, help="How many workers push.")] = 3,
    only_servers: Annotated[
        bool, typer.Option("--only-servers", help="Strike servers and the coordinator, no worker.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help='Strike with such faults alone, e.g. "kill server"; may be repeated.')
    ] = None,
    every: Annotated[float, typer.Option(min=0.0, help="Seconds from one fault to the next, at least.")] = 0.0,
    faultless: Annotated[
        bool, typer.Option("--faultless", help="Strike nobody: what the harness itself costs.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder with logs and ledgers.")] = False,
) -> None:
    """Run a cluster under kills, stops and network faults, and check that nothing acknowledged is lost.

    3 servers with 2 copies of every shard, 3 workers, a reader, and a coordinator that keeps its state on disk, all as
    processes of this machine. Exit code 1 if a push was lost or applied twice, or another promise was broken.
    """
    console = err()

    def say(line: str) -> None:
        console.print(Text(line, "red" if "FAILED" in line else "dim"), soft_wrap=True)

    report, timeline = perform(
        mode.value,
        seconds,
        seed,
        say,
        local=transport == Transport.local,
        workers=workers,
        only_servers=only_servers,
        only=only or (),
        every=every,
        faultless=faultless,
        keep=keep,
    )
    if as_json:
        from headwater_bench.chaos.report import to_json

        print(to_json(report))
    else:
        from headwater_bench.chaos.report import draw

        out().print(draw(report, timeline))
    if not report.ok:
        sys.exit(1)


def perform(
    mode: str,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
    *,
    local: bool = False,
    workers: int = 3,
    only_servers: bool = False,
    only: Sequence[str] = (),
    every: float = 0.0,
    faultless: bool = False,
    keep: bool = False,
) -> tuple[ChaosReport, Timeline]:
    """One run. Nothing of it is left behind, unless ``keep``."""
    from headwater_bench.chaos import reference, report, schedule
    from headwater_bench.chaos.processes import add_workers
    from headwater_bench.chaos.replay import Recorder
    from headwater_bench.chaos.runner import ChaosRun
    from headwater_bench.chaos.verdict import examine
    from headwater_bench.chaos.workload import Workload
    from headwater_bench.rig.cluster import Cluster
    from headwater_bench.rig.monitor import Monitor

    faults = schedule.draw(seed, int(seconds * 4), workers=0 if only_servers else workers, only=only)
    recorder = Recorder()
    workload = Workload(mode, workers)
    with Cluster(seed, recorder.tap, local=local) as cluster:
        cluster.kept = keep
        add_workers(cluster, workload)
        if keep:
            say(f"logs and ledgers: {cluster.folder}")
        with contextlib.closing(Monitor(cluster.direct["coordinator"], cluster.token.encode())) as monitor:
            run = ChaosRun(cluster, monitor, recorder, seed, say)
            run.warm_up()
            if not run.timeline.failures:
                quiet = seconds if faultless else max(QUIET_LEAST, QUIET_SHARE * seconds)
                run.calm(quiet)
                if not faultless:
                    run.storm(faults, seconds - quiet, every)
            run.heal()
            run.end_workers()
            with _as_client(cluster.token, str(cluster.direct["coordinator"])):
                verdict = examine(run, cluster, workload)
        run.note("comparing")
        ledgers = [tail.ledger for tail in run.tails.values()]
        same = reference.compare([x for x in ledgers if x.rank >= 0]) if mode == "bulk" else reference.Comparison(0, 0)
        return report.make(mode, seed, seconds, run.timeline, ledgers, verdict, same), run.timeline


def _as_client(token: str, address: str) -> contextlib.AbstractContextManager[None]:
    """This process's environment is that of a client of the cluster."""
    return exported({"HEADWATER_TOKEN": token, "HEADWATER_ADDRESS": address, "HEADWATER_TRANSPORT": "tcp"})
