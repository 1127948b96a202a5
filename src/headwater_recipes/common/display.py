"""The progress of a run: a live picture on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headwater_recipes.common.board import Board

_BARS = "▁▂▃▄▅▆▇█"
_UNITS = ("B", "kB", "MB", "GB", "TB")
_PLAIN_EVERY = 5.0


class Display(Protocol):
    """How a run is shown while it goes on."""

    def update(self, board: Board, cluster: Any) -> None:
        """Show the present state; ``cluster`` is a ``ClusterStatus`` or None."""

    def note(self, line: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """The run is over."""


def make(console: Console) -> Display:
    """The display that suits the console."""
    return Picture(console) if console.is_terminal else Lines(console)


class Lines:
    """One line each few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, Any] | None = None
        self._last = float("-inf")
        self._validation: dict[str, Any] | None = None

    def update(self, board: Board, cluster: Any) -> None:
        row, now = board.last, time.monotonic()
        held = board.validated
        if held is not None and held is not self._validation:
            self._validation = held
            self.note(
                f"step {held['step']:>6}  validation loss {held['loss']:.3f}  {held['bits_per_byte']:.3f} bits/byte"
            )
        if row is None or row is self._shown or now - self._last < _PLAIN_EVERY:
            return
        self._shown, self._last = row, now
        beside = "" if cluster is None else f"  {_alive(cluster)}"
        beside += f"  published {board.published}" if board.published else ""
        self.note("  ".join(figures(row)) + f"  ETA {clock(board.seconds_left)}" + beside)

    def note(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """Nothing to end."""


def _alive(cluster: Any) -> str:
    """``2 servers and 2 workers alive``, as the coordinator sees it."""
    servers = sum(server.state in ("alive", "draining") for server in cluster.servers)
    workers = sum(worker.role == "worker" and worker.state == "alive" for worker in cluster.workers)
    return f"{_count(servers, 'server')} and {_count(workers, 'worker')} alive"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def figures(row: dict[str, Any]) -> list[str]:
    """The figures of a row of metrics, as words."""
    return [
        f"step {row['step']:>6}",
        f"loss {row['loss']:.3f}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
        f"pushed {size(row['pushed_bytes_per_second'])}/s",
        f"pulled {size(row['pulled_bytes_per_second'])}/s",
        f"staleness {row['staleness']}",
    ]


class Picture:
    """Redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()
        self._before: dict[int, tuple[float, int, int]] = {}

    def update(self, board: Board, cluster: Any) -> None:
        self._live.update(self._draw(board, cluster), refresh=True)

    def note(self, line: str) -> None:
        self._live.console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _draw(self, board: Board, cluster: Any) -> RenderableType:
        row = board.last
        if row is None:
            return Text("starting the workers …" if len(board.started) == 0 else "first steps …", "dim")
        parts: list[RenderableType] = [_headline(board, row), _curve(board), Text(), _worker_table(board)]
        if cluster is not None:
            parts += [Text(), self._server_table(cluster)]
            parts += [_copies(cluster)] if cluster.replicas > 1 else []
        return Group(*parts)

    def _server_table(self, cluster: Any) -> Table:
        table = _table("server", "state", "primary of", "backup of", "memory", "pushed to it", "pulled from it")
        now = time.monotonic()
        for server in sorted(cluster.servers, key=lambda server: server.server):
            pushed = pulled = 0.0
            if server.pid in self._before:
                then, had_pushed, had_pulled = self._before[server.pid]
                pushed = max(0, server.pushed_bytes - had_pushed) / max(now - then, 1e-3)
                pulled = max(0, server.pulled_bytes - had_pulled) / max(now - then, 1e-3)
            if server.pid not in self._before or now - self._before[server.pid][0] > 5.0:
                self._before[server.pid] = (now, server.pushed_bytes, server.pulled_bytes)
            table.add_row(
                str(server.server),
                Text(server.state, "" if server.state == "alive" else "yellow"),
                _numbers(server.primaries),
                _numbers([*server.backups, *(f"({shard})" for shard in server.learners)]),
                size(server.nbytes),
                f"{size(pushed)}/s",
                f"{size(pulled)}/s",
            )
        return table


def _numbers(found: Iterable[object]) -> str:
    return " ".join(str(each) for each in found) or "–"


def _copies(cluster: Any) -> Text:
    """Whether every shard has the copies that were asked for."""
    short = [shard for shard in cluster.shards if shard.copies < shard.wanted]
    if not short:
        return Text(f"every shard has its {cluster.replicas} copies", "green")
    named = _numbers(shard.shard for shard in short)
    return Text(f"too few copies of {_count(len(short), 'shard')} ({named}); training goes on", "bold yellow")


def _headline(board: Board, row: dict[str, Any]) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    held = board.validated
    shown = f"validation {held['bits_per_byte']:.3f} bits/byte" if held else ""
    shown += f"  published {board.published}" if board.published else ""
    line.add_row(
        Text("training", "bold"),
        ProgressBar(total=1.0, completed=row["progress"], width=36),
        Text(f"ETA {clock(board.seconds_left)}" if row["progress"] < 1 else "saving and validating …"),
    )
    names = Text("  ".join(figures(row)) + f"  {shown}")
    return Group(line, names)


def _curve(board: Board) -> Text:
    """The training loss so far, as bars."""
    losses = [row["loss"] for row in board.rows if row["kind"] == "step"]
    width = 60
    if len(losses) > width:
        losses = [losses[i * len(losses) // width] for i in range(width)]
    low, high = min(losses), max(losses)
    scale = (len(_BARS) - 1) / max(high - low, 1e-9)
    return Text("loss ", "dim") + Text("".join(_BARS[round((loss - low) * scale)] for loss in losses), "cyan")


def _worker_table(board: Board) -> Table:
    table = _table("worker", "step", "loss", "tokens/s", "pushed", "pulled", "staleness")
    for rank, said in sorted(board.latest.items()):
        table.add_row(
            f"w{rank}",
            str(said.step),
            f"{said.loss:.3f}",
            f"{said.tokens_per_second:,.0f}",
            f"{size(said.pushed_per_second)}/s",
            f"{size(said.pulled_per_second)}/s",
            str(said.staleness),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def size(count: float) -> str:
    """Bytes in decimal units: ``12.3 MB``."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.{0 if power == 0 or count >= 99.95 else 1}f} {_UNITS[power]}"


def clock(seconds: float | None) -> str:
    """``1:05``; a dash while it is not known."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
