"""The ``headwater bench`` command group."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from headwater_bench.options import Options, Transport
from headwater_bench.report import Figure, Report, machine, to_json, to_table

app = typer.Typer(
    name="bench",
    help="What Headwater costs here, beside the ceiling of the same machine in the same minute.",
    invoke_without_command=True,
    no_args_is_help=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1, help="Pairs measured (memory: steps; recovery: events of each kind). Default: the bench's own."
    ),
]
Size = Annotated[int, typer.Option(min=1, help="Size of the dense table in MB.")]
Servers = Annotated[int, typer.Option(min=1, help="Servers in the cluster.")]
Where = Annotated[Transport | None, typer.Option(help="Default: local, then tcp.")]

BENCHES = (
    "dense", "small", "many", "step", "memory", "replicas", "snapshot", "recovery",
    "publish", "delta", "relay", "serve", "races",
)  # fmt: skip
"""Each is a module of this package with a function ``measure``; ``all`` runs them in this order."""


def load(bench: str) -> Callable[[Options], list[Figure]]:
    """What measures a bench. It needs torch, which ``headwater --help`` should not wait for."""
    measure: Callable[[Options], list[Figure]] = importlib.import_module(f"headwater_bench.{bench}").measure
    return measure


def run(name: str, options: Options, as_json: bool) -> None:
    """Measure one bench, or with ``all`` every one, and print its report."""
    # Before torch loads: threads of OpenMP that spin after their work would take a server's core from it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    where = machine()
    if name == "all":
        figures = [f for each in BENCHES for f in prefixed(each, load(each)(options))]
    else:
        figures = load(name)(options)
    show(Report(name, where, figures), as_json)


def prefixed(bench: str, figures: list[Figure]) -> list[Figure]:
    """The figures named ``bench: name``, as ``targets.py`` names them."""
    return [Figure(f"{bench}: {f.name}", f.value, f.unit, f.ceiling, f.target, f.met) for f in figures]


def show(report: Report, as_json: bool) -> None:
    if as_json:
        print(to_json(report))
        return
    Console().print(to_table(report))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@app.callback()
def _all_by_default(context: typer.Context, json: Json = False) -> None:
    if context.invoked_subcommand is None:
        run("all", Options(_note), json)


@app.command("dense")
def _dense(
    transport: Where = None, size: Size = 64, rounds: Rounds = None, servers: Servers = 2, json: Json = False
) -> None:
    """64 MB pushed, applied and pulled, beside the kernel alone, Gloo, and a raw socket."""
    run("dense", Options(_note, rounds, size, transport, servers), json)


@app.command("small")
def _small(transport: Where = None, rounds: Rounds = None, servers: Servers = 2, json: Json = False) -> None:
    """1 KB pushed and pulled, beside the same bytes over a raw socket."""
    run("small", Options(_note, rounds, transport=transport, servers=servers), json)


@app.command("many")
def _many(transport: Where = None, rounds: Rounds = None, servers: Servers = 2, json: Json = False) -> None:
    """1,000 tensors of 1 KB in one table, beside the fused step alone."""
    run("many", Options(_note, rounds, transport=transport, servers=servers), json)


@app.command("step")
def _step(transport: Where = None, rounds: Rounds = None, servers: Servers = 2, json: Json = False) -> None:
    """A 12 M parameter language model on 2 workers, beside no synchronisation and DDP over Gloo."""
    run("step", Options(_note, rounds, transport=transport, servers=servers), json)


@app.command("memory")
def _memory(size: Size = 64, rounds: Rounds = None, servers: Servers = 2, json: Json = False) -> None:
    """What the servers hold, beside what the table needs, for 1, 2 and 3 workers."""
    run("memory", Options(_note, rounds, size, servers=servers), json)


@app.command("replicas")
def _replicas(transport: Where = None, rounds: Rounds = None, servers: Servers = 2, json: Json = False) -> None:
    """A training step and a push of 16 MB with two copies of every shard, beside one."""
    run("replicas", Options(_note, rounds, transport=transport, servers=servers), json)


@app.command("snapshot")
def _snapshot(rounds: Rounds = None, servers: Servers = 2, json: Json = False) -> None:
    """500 MB written while a worker trains, and restored by three servers, beside a plain write and read."""
    run("snapshot", Options(_note, rounds, servers=servers), json)


@app.command("publish")
def _publish(
    size: Annotated[int, typer.Option(min=1, help="Size of the table in MB.")] = 500,
    rounds: Rounds = None,
    servers: Servers = 2,
    json: Json = False,
) -> None:
    """500 MB published, leased, copied out and followed, beside a memcpy and a raw socket."""
    run("publish", Options(_note, rounds, servers=servers, version=size), json)


@app.command("relay")
def _relay(
    size: Annotated[int, typer.Option(min=1, help="Size of the table in MB.")] = 500,
    rounds: Rounds = None,
    servers: Servers = 2,
    json: Json = False,
) -> None:
    """A reader that joins late behind a relay, beside a dense fetch; what leaves the publisher for 1, 4, 16 readers."""
    run("relay", Options(_note, rounds, servers=servers, version=size), json)


@app.command("recovery")
def _recovery(rounds: Rounds = None, json: Json = False) -> None:
    """How long the death of a server or worker stops training, and what deaths cost in the long run."""
    run("recovery", Options(_note, rounds), json)


@app.command("serve")
def _serve(rounds: Rounds = None, json: Json = False) -> None:
    """Eight answers at once on one core, beside generate() one by one, and 20 changes of weights meanwhile."""
    run("serve", Options(_note, rounds), json)


@app.command("delta")
def _delta(
    size: Annotated[int, typer.Option(min=1, help="Size of the weights in MB.")] = 500,
    rounds: Rounds = None,
    json: Json = False,
) -> None:
    """What changed between two versions of 500 MB, encoded and applied by one thread, beside one copy of them."""
    run("delta", Options(_note, rounds, size), json)


@app.command("races")
def _races(
    reads: Annotated[int | None, typer.Option(min=1, help="End after so many reads. Default: 100,000.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1.0, help="End after so long anyway. Default: 120.")] = None,
    seed: Annotated[int, typer.Option(help="The faults and their order are drawn from it.")] = 1,
    json: Json = False,
) -> None:
    """Reads of versions, every element checked, while versions are published and processes are killed: none is torn."""
    run("races", Options(_note, reads=reads, seconds=seconds, seed=seed), json)


@app.command("all")
def _all(size: Size = 64, servers: Servers = 2, json: Json = False) -> None:
    """Every bench, one after the other."""
    run("all", Options(_note, size=size, servers=servers), json)
