"""``headwater status``: the cluster, as its coordinator sees it."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Group
from rich.text import Text

import headwater
from headwater.cli.console import counted, out
from headwater.cli.options import Address, Timeout
from headwater.cli.tables import fit, grid, left_out, watch
from headwater.errors import UsageError
from headwater.launch.registry import complaint, find, running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from headwater.wire.messages import ClusterStatus, RelayStatus, ShardStatus

_WINDOW = 5.0
"""Seconds that the rates of --watch are averaged over."""

_ALL = 116
"""Columns of a terminal that everything fits into."""

_SPARE_OF_SERVERS = ("address+sessions+up", "learner", "pid", "backup", "memory", "pulled")
_SPARE_OF_SHARDS = ("epoch", "LSN", "learners", "lag")
_SPARE_OF_TABLES = ("per shard", "parameters", "elements", "optimizer", "sync")
_SPARE_OF_MODELS = ("held", "leases", "age", "tags")
_SPARE_OF_WORKERS = ("pid", "heard", "refused", "pulled", "staleness")
"""Columns that a narrow terminal does without, the first to go first."""

_UNITS = ("B", "kB", "MB", "GB", "TB")

_EMPTY = re.compile(r"\(\w+=(None|'mean')\)")
"""What a policy does not set: ``Async(max_staleness=None)`` is shown as ``Async``."""


def status(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    watching: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 1.0,
    timeout: Timeout = 10.0,
) -> None:
    """Show servers, shards and their copies, tables, workers, clocks and throughput of a cluster."""
    with headwater.connect(locate(address), role="reader", timeout=timeout) as ps:
        if as_json:
            typer.echo(msgspec.json.encode(_seen_from_outside(ps.status())).decode())
        elif watching:
            _watch(ps, every)
        else:
            console = out()
            console.print(draw(_seen_from_outside(ps.status()), width=console.width))


def locate(address: str | None) -> str:
    """The address to ask; its token, if a launcher of this user left it, goes into this process's environment.

    Raises ``UsageError`` if no cluster is known, or more than one.
    """
    address = address or os.environ.get("HEADWATER_ADDRESS")
    if address is None:
        records = running()
        if not records:
            why = f". {complaint()}" if complaint() else ""
            raise UsageError(f"no cluster of yours runs here; give --address or HEADWATER_ADDRESS (headwater up){why}")
        if len(records) > 1:
            known = "; ".join(f"{record.address} ({record.command}, pid {record.pid})" for record in records)
            raise UsageError(f"{len(records)} clusters of yours run here, choose one by --address: {known}")
        address = records[0].address
    record = find(address)
    if record and not (os.environ.get("HEADWATER_TOKEN") or os.environ.get("HEADWATER_TOKEN_FILE")):
        os.environ["HEADWATER_TOKEN"] = record.token
    return address


def _seen_from_outside(status: ClusterStatus) -> ClusterStatus:
    """Without this command itself, which is a reader for a moment."""
    others = tuple(client for client in status.workers if client.role == "worker" or client.pid != os.getpid())
    return msgspec.structs.replace(status, workers=others)


def _watch(ps: headwater.Client, every: float) -> None:
    """Redraw; rates are over the last seconds, as the byte counters come with heartbeats."""
    seen: deque[tuple[float, ClusterStatus]] = deque()

    def drawn(width: int) -> RenderableType:
        now = time.monotonic()
        seen.append((now, _seen_from_outside(ps.status())))
        while now - seen[0][0] > _WINDOW:
            seen.popleft()
        return draw(seen[-1][1], seen[0][1], now - seen[0][0], width)

    watch(drawn, every)


def draw(
    now: ClusterStatus, before: ClusterStatus | None = None, seconds: float = 0.0, width: int = _ALL
) -> RenderableType:
    """The tables. With ``before``, a status of ``seconds`` ago, what was pushed and pulled is a rate.

    ``width``: columns of the terminal; a narrow one is not shown everything.
    """
    if now.relay is not None:
        return _relay(now, now.relay, width)
    earlier = before if before and seconds > 0 else None
    workers = [worker for worker in now.workers if worker.role == "worker"]
    head = ", ".join(
        (
            counted(sum(server.state != "dead" for server in now.servers), "server"),
            counted(len(now.shards), "shard"),
            counted(len(now.tables), "table"),
            counted(len(workers), "worker"),
        )
    )
    tables: list[tuple[Table, tuple[str, ...]]] = [
        (_servers(now, earlier, seconds), _SPARE_OF_SERVERS),
        (_shards(now), _SPARE_OF_SHARDS),
    ]
    if now.tables:
        tables.append((_tables(now), _SPARE_OF_TABLES))
    if now.models:
        tables.append((_models(now), _SPARE_OF_MODELS))
    if now.workers:
        tables.append((_workers(now, earlier, seconds), _SPARE_OF_WORKERS))
    return Group(Text(f"Headwater, up {duration(now.uptime)}: {head}", "bold"), health(now), *_fitted(tables, width))


def _fitted(tables: Sequence[tuple[Table, tuple[str, ...]]], width: int) -> list[RenderableType]:
    """The tables, an empty line before each, without the columns for which there is no room; below, which those are."""
    parts: list[RenderableType] = []
    taken: list[str] = []
    for table, spare in tables:
        taken += fit(table, width, spare)
        parts += [Text(), table]
    return [*parts, Text(), left_out(taken)] if taken else parts


def _relay(now: ClusterStatus, relay: RelayStatus, width: int) -> RenderableType:
    """A relay has no servers and no tables, but versions and readers."""
    head = f"Relay, up {duration(now.uptime)}: {counted(len(now.models), 'model')}, {size(relay.nbytes)} held"
    tables: list[tuple[Table, tuple[str, ...]]] = [(_models(now), _SPARE_OF_MODELS)] if now.models else []
    if now.workers:
        tables.append((_workers(now, None, 0.0), _SPARE_OF_WORKERS))
    said = Text(f"{head}, {size(relay.sent_bytes)} sent to readers", "bold")
    return Group(said, standing(relay), *_fitted(tables, width))


def standing(relay: RelayStatus) -> Text:
    """In one line: whether new versions come to a relay."""
    if not relay.silent:
        return Text(f"versions come from {relay.upstream}", "green")
    said = f"{relay.upstream} has been silent for {duration(relay.silent)} ({relay.why}); what is here is served"
    return Text(said, "bold red")


def health(now: ClusterStatus) -> Text:
    """In one line: whether what is acknowledged is where it should be."""
    unserved = [shard for shard in now.shards if not _served(shard)]
    short = [shard for shard in now.shards if _served(shard) and shard.copies < shard.wanted]
    if unserved:
        said = f"nobody serves {_named([shard.shard for shard in unserved])}"
        last = sorted({shard.primary for shard in unserved if shard.primary >= 0})
        why = f": the last copy was on {_named(last, 'server')}, which is dead" if last else ": pushes to it wait"
        return Text(said + why, "bold red")
    if short:
        fewest = min(shard.copies for shard in short)
        learning = sum(len(shard.learners) for shard in short)
        what = f"{_named([shard.shard for shard in short])}: {'one copy' if fewest == 1 else f'{fewest} copies'}"
        coming = f"{learning} being brought up to date" if learning else "no server to put another on"
        blocked = "; pushes wait" if fewest < now.min_copies else ""
        return Text(f"{what} of {now.replicas}, {coming}{blocked}", "bold red" if blocked else "yellow")
    if now.replicas > 1:
        return Text(f"every shard has its {now.replicas} copies", "green")
    return Text("one copy of every shard: a server that dies ends the job", "dim")


def _served(shard: ShardStatus) -> bool:
    """Whether somebody who lives has it."""
    return shard.primary >= 0 and shard.copies > 0


def _named(numbers: Sequence[int], what: str = "shard") -> str:
    """``shard 3``, ``shards 0-2 5``."""
    return f"{what if len(numbers) == 1 else f'{what}s'} {ranges(numbers)}"


def ranges(numbers: Sequence[int]) -> str:
    """``0-2 5``; a dash for none."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs) or "–"


def _servers(now: ClusterStatus, earlier: ClusterStatus | None, seconds: float) -> Table:
    table = grid(
        "Servers", "server>", "address", "pid>", "state", "primary~", "backup~", "learner~", "memory>", "sessions>",
        "pushed>", "pulled>", "up>",
    )  # fmt: skip
    old = {server.pid: server for server in earlier.servers} if earlier else {}
    for server in sorted(now.servers, key=lambda server: server.server):
        was = old.get(server.pid)
        table.add_row(
            str(server.server),
            server.address.removeprefix("tcp://"),
            str(server.pid),
            _state(server.state),
            ranges(server.primaries),
            ranges(server.backups),
            ranges(server.learners),
            size(server.nbytes),
            str(server.sessions),
            _flow(server.pushed_bytes, was.pushed_bytes if was else None, seconds),
            _flow(server.pulled_bytes, was.pulled_bytes if was else None, seconds),
            duration(server.uptime),
        )
    return table


def _shards(now: ClusterStatus) -> Table:
    """What stands out: a shard that nobody serves, one with fewer copies than wanted."""
    table = grid("Shards", "shard>", "epoch>", "primary>", "backups~", "learners~", "LSN>", "lag>", "copies")
    for shard in now.shards:
        blocked = not _served(shard) or shard.copies < now.min_copies
        style = "bold red" if blocked else "" if shard.copies >= shard.wanted else "yellow"
        primary = "nobody" if shard.primary < 0 else str(shard.primary) if shard.copies else f"{shard.primary} dead"
        table.add_row(
            str(shard.shard),
            str(shard.epoch),
            primary,
            ranges(shard.backups),
            ranges(shard.learners),
            f"{shard.lsn:,}",
            f"{shard.lag:,}",
            f"{shard.copies} of {shard.wanted}",
            style=style,
        )
    return table


def _tables(now: ClusterStatus) -> Table:
    table = grid("Tables", "name~", "parameters>", "elements>", "size>", "per shard>", "optimizer", "sync~", "clock>")
    for each in now.tables:
        table.add_row(
            each.name,
            f"{each.parameters:,}",
            f"{each.elements:,}",
            size(each.nbytes),
            _per_shard(each.shards),
            each.optimizer,
            _EMPTY.sub("", each.sync),
            str(each.clock),
        )
    return table


def _models(now: ClusterStatus) -> Table:
    """What is published, one line per model; what no server holds any more stands out."""
    table = grid("Published", "model~", "newest~", "step>", "age>", "versions>", "tags~", "leases>", "held>")
    for each in now.models:
        newest = each.newest
        table.add_row(
            each.model,
            newest.name if newest is not None else "–",
            f"{newest.step:,}" if newest is not None else "–",
            duration(max(0.0, time.time() - newest.time)) if newest is not None else "–",
            f"{each.versions}, {each.lost} lost" if each.lost else str(each.versions),
            " ".join(each.tags) or "–",
            str(each.leases),
            size(each.nbytes),
            style="bold red" if newest is None else "yellow" if each.lost else "",
        )
    return table


def _workers(now: ClusterStatus, earlier: ClusterStatus | None, seconds: float) -> Table:
    table = grid(
        "Workers and readers",
        "rank>",
        "role",
        "pid>",
        "state",
        "clock>",
        "staleness>",
        "heard>",
        "pushed>",
        "pulled>",
        "refused>",
    )
    old = {worker.pid: worker for worker in earlier.workers} if earlier else {}
    for worker in now.workers:
        was = old.get(worker.pid)
        trains = worker.role == "worker"
        table.add_row(
            str(worker.rank) if trains else "–",
            worker.role,
            str(worker.pid),
            _state(worker.state),
            str(worker.clock) if trains else "–",
            str(worker.staleness) if trains else "–",
            f"{worker.heard:.1f} s",
            _flow(worker.pushed_bytes, was.pushed_bytes if was else None, seconds),
            _flow(worker.pulled_bytes, was.pulled_bytes if was else None, seconds),
            Text(str(worker.refused), "yellow" if worker.refused else "") if trains else "–",
        )
    return table


def size(count: float) -> str:
    """``12.3 MB``: bytes in decimal units, three digits."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.{0 if power == 0 or count >= 99.95 else 1}f} {_UNITS[power]}"


def _per_shard(parts: Sequence[int]) -> str:
    """``4.0 MB + 4.1 MB``, ``3 × 4.0 MB``, ``16 × 3.9 MB to 4.1 MB``."""
    low, high = size(min(parts, default=0)), size(max(parts, default=0))
    if len(parts) == 2:
        return " + ".join(size(part) for part in parts)
    many = f"{len(parts)} × " if len(parts) > 1 else ""
    return f"{many}{low}" if low == high else f"{many}{low} to {high}"


def _state(state: str) -> Text:
    return Text(state, {"alive": "green", "dead": "bold red"}.get(state, "yellow"))


def _flow(count: int, before: int | None, seconds: float) -> str:
    """The rate since an earlier count, or without one the bytes so far."""
    return size(count) if before is None else f"{size(max(0, count - before) / seconds)}/s"


def duration(seconds: float) -> str:
    """``3 min 7 s``: two units, down to seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
