"""``headwater run``: a cluster, and a script of the user's in every worker."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwater.cli import options
from headwater.cli.console import complain, counted, err, note
from headwater.errors import UsageError
from headwater.launch import Launcher, Rules, Shape
from headwater.launch.registry import find

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headwater.launch import Outcome


Words = Annotated[list[str], typer.Argument(metavar="SCRIPT [ARGUMENTS]...", help="What every worker runs.")]
Servers = Annotated[int, typer.Option("--servers", "-s", min=0, help="Servers to start.")]
Workers = Annotated[int, typer.Option("--workers", "-w", min=1, help="Workers to start.")]
Module = Annotated[bool, typer.Option("--module", "-m", help="The script is a module, as in python -m.")]
Joined = Annotated[
    str | None, typer.Option(help="Join the cluster at this address (see headwater up) instead of starting one.")
]
Transport = Annotated[
    str | None, typer.Option(help="Set HEADWATER_TRANSPORT for the workers: tcp leaves shared memory unused.")
]
FirstRank = Annotated[int, typer.Option(min=0, help="The rank of the first worker here.")]
World = Annotated[
    int | None, typer.Option(min=1, help="Workers in all, if others are launched elsewhere. Default: those here.")
]
Grace = Annotated[float, typer.Option(min=0.0, help="Seconds between SIGTERM and SIGKILL after a failure.")]
Patience = Annotated[float, typer.Option(min=0.0, help="Seconds for workers to finish after Ctrl-C or SIGTERM.")]
Elastic = Annotated[
    bool, typer.Option("--elastic", help="A worker that dies does not end the job while another remains.")
]
RestartWorkers = Annotated[
    int, typer.Option(min=0, help="With --elastic: start a worker that dies again, up to so many times.")
]
OnlyRank0 = Annotated[
    bool, typer.Option("--only-rank0", help="Show what rank 0 writes, and why another fails if one does.")
]
StdinRank = Annotated[
    int | None,
    typer.Option(min=0, help="The worker that reads what you type. Default: a single one, or --only-rank0's."),
]


def run(
    words: Words,
    servers: Servers = 1,
    workers: Workers = 1,
    module: Module = False,
    address: Joined = None,
    transport: Transport = None,
    first_rank: FirstRank = 0,
    world: World = None,
    grace: Grace = 5.0,
    patience: Patience = 20.0,
    shards: options.Shards = None,
    replicas: options.Replicas = 1,
    min_copies: options.MinCopies = 1,
    ack: options.Ack = "memory",
    state: options.State = None,
    snapshots: options.Snapshots = None,
    snapshot_every: options.SnapshotEvery = None,
    restore: options.Restore = None,
    elastic: Elastic = False,
    restart_workers: RestartWorkers = 0,
    only_rank0: OnlyRank0 = False,
    stdin_rank: StdinRank = None,
) -> None:
    """Run SCRIPT in every worker, beside a cluster of its own.

    Example: headwater run --servers 2 --workers 2 train.py --epochs 3

    SCRIPT is a file that ends in .py, a module with -m, or any program.
    A worker finds its rank, the number of workers, address and token in
    its environment: docs/environment.md lists the names.

    A single worker reads what you type, so input() and breakpoint()
    work; of several the one that --stdin-rank names.

    If a worker fails, the others are stopped, and its exit code becomes
    this command's; with --elastic they go on. With --replicas 2 a server
    that dies is replaced, and training goes on meanwhile.
    """
    command = command_line(words, module)
    stdin_rank = reader(stdin_rank, first_rank, workers, only_rank0)
    job = Launcher(
        Shape(servers, shards, replicas, min_copies, ack, None, state, snapshots, snapshot_every, restore, address),
        rules=Rules(grace=grace, patience=patience, elastic=elastic, restart_workers=restart_workers),
        token=token_of(address),
        env={"HEADWATER_TRANSPORT": transport} if transport else {},
        only_rank0=only_rank0,
        once=True,
    )
    with job.signals(), job:
        note(f"headwater: {_cluster(job)}, {counted(workers, 'worker')}: {' '.join(words)}")
        job.start_workers(command, workers, first_rank=first_rank, world=world, stdin_rank=stdin_rank)
        _watch(job, patience)
    report(job.outcome)
    raise typer.Exit(job.outcome.code)


def token_of(address: str | None) -> str | None:
    """The token that the launcher of a running cluster has left for its user, if it is one of this host."""
    record = find(address) if address else None
    return record.token if record else None


def _cluster(job: Launcher) -> str:
    """``2 servers, 2 copies of every shard, at tcp://…``."""
    joined = not job.shape.own
    cluster = counted(len(job.servers), "server") if job.servers else "a cluster" if joined else "no servers"
    cluster += f", {job.shape.replicas} copies of every shard," if job.shape.replicas > 1 else ""
    return f"{cluster} at {job.address}" if job.address else cluster


def _watch(job: Launcher, patience: float) -> None:
    """Until the job has ended."""
    if job.advice:
        note(f"headwater: {job.advice}")
    told = False
    while job.poll(1.0):
        if job.outcome.interrupted and not told:
            told = True
            note(f"headwater: the workers have {patience:g} s to end; another Ctrl-C does not wait")


def reader(wanted: int | None, first_rank: int, workers: int, only_rank0: bool) -> int | None:
    """The rank that reads this command's standard input, if one may.

    Raises ``UsageError`` for one that is not started here.
    """
    if wanted is not None and not first_rank <= wanted < first_rank + workers:
        last = first_rank + workers - 1
        raise UsageError(f"--stdin-rank {wanted}: the workers here are {first_rank} to {last}; nothing was started")
    if wanted is None and not (workers == 1 or (only_rank0 and first_rank == 0)):
        return None
    if not _foreground():
        return None
    return first_rank if wanted is None else wanted


def _foreground() -> bool:
    """Whether there is a standard input to read: in the background what is typed there is for the shell."""
    try:
        os.fstat(0)
        return not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def command_line(words: Sequence[str], module: bool) -> list[str]:
    """What a worker executes. Raises ``UsageError`` when there is nothing of that name."""
    script, *arguments = words
    if module:
        return [sys.executable, "-m", script, *arguments]
    if script.endswith(".py"):
        if not Path(script).is_file():
            raise UsageError(f"there is no file {script}; nothing was started")
        return [sys.executable, script, *arguments]
    program = shutil.which(script)
    if program is None:
        raise UsageError(f"{script} is neither a .py file nor a program; nothing was started (a module needs -m)")
    return [program, *arguments]


def report(outcome: Outcome) -> None:
    """Say how the job ended, if not well: the process at fault and its traceback, last on the screen and once."""
    if outcome.interrupted:
        if err().is_terminal:
            err().print()  # the terminal has shown ^C
        note(f"headwater: {outcome.message}; {outcome.remains}")
    elif outcome.failed:
        if outcome.last_words and not outcome.shown:
            err().print(f"--- the last words of {outcome.failed}:", style="dim", markup=False, highlight=False)
            err().print(outcome.last_words, markup=False, highlight=False, soft_wrap=True)
        complain(f"{outcome.error.code}: {outcome.message}" if outcome.error else outcome.message)
