"""The progress of a run: a live picture on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from headwater_recipes.common.board import Board
from headwater_recipes.common.recipe import Wording
from headwater_recipes.common.stages import clock, redraws, waiting

_BARS = "▁▂▃▄▅▆▇█"
_UNITS = ("B", "kB", "MB", "GB", "TB")
_PLAIN_EVERY = 5.0
_GAP = "  "
_FIRST = "starting the workers: they load torch"


class Display(Protocol):
    """How a run is shown while it goes on."""

    def update(self, board: Board, cluster: Any) -> None:
        """Show the present state; ``cluster`` is a ``ClusterStatus`` or None."""

    def note(self, line: str, *, whole: bool = False) -> None:
        """Show a line that stays; ``whole``: it is not broken between words."""

    def close(self) -> None:
        """The run is over."""


def make(console: Console, wording: Wording) -> Display:
    """The display that suits the console."""
    return Picture(console, wording) if redraws(console) else Lines(console, wording)


def _pause(board: Board) -> str:
    """Why there is no next step yet; nothing while there are steps."""
    if board.doing or board.now is not None:
        return board.doing
    return "first step" if board.started else _FIRST


class Lines:
    """One line each few seconds."""

    def __init__(self, console: Console, wording: Wording) -> None:
        self._console, self._wording = console, wording
        self._shown = -1
        self._last = float("-inf")
        self._validation: dict[str, Any] | None = None
        self._pause = ""

    def update(self, board: Board, cluster: Any) -> None:
        row, now = board.now, time.monotonic()
        held = board.validated
        if held is not None and held is not self._validation:
            self._validation = held
            beside = _GAP + self._wording.shown(held) if self._wording.headline else ""
            self.note(f"step {held['step']:>6}  validation loss {held['loss']:.3f}{beside}")
        pause = _pause(board)
        if pause and pause != self._pause:
            self.note(f"{pause} …")
        self._pause = pause
        if row is None or row["step"] == self._shown or now - self._last < _PLAIN_EVERY:
            return
        self._shown, self._last = row["step"], now
        beside = "" if cluster is None else f"  {_alive(cluster)}"
        beside += f"  published {board.published}" if board.published else ""
        self.note(_GAP.join(figures(row, self._wording.unit)) + f"  ETA {clock(board.seconds_left)}" + beside)

    def note(self, line: str, *, whole: bool = True) -> None:
        del whole  # in a file there is no edge
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


def figures(row: dict[str, Any], unit: str) -> list[str]:
    """The figures of a row of metrics, as words."""
    return [
        f"step {row['step']:>6}",
        f"loss {row['loss']:.3f}",
        f"{row[f'{unit}_per_second']:,.0f} {unit}/s",
        f"pushed {size(row['pushed_bytes_per_second'])}/s",
        f"pulled {size(row['pulled_bytes_per_second'])}/s",
        f"staleness {row['staleness']}",
    ]


class Picture:
    """Redrawn in place."""

    def __init__(self, console: Console, wording: Wording) -> None:
        self._wording = wording
        self._live = Live(console=console, auto_refresh=False, transient=False)
        self._live.start()
        self._before: dict[int, tuple[float, int, int]] = {}
        self._pause, self._since = "", time.monotonic()

    def update(self, board: Board, cluster: Any) -> None:
        self._live.update(self._draw(board, cluster), refresh=True)

    def note(self, line: str, *, whole: bool = False) -> None:
        self._live.console.print(Text(line), soft_wrap=whole)

    def close(self) -> None:
        self._live.stop()

    def _draw(self, board: Board, cluster: Any) -> RenderableType:
        row, pause, width = board.now, _pause(board), self._live.console.width
        if pause != self._pause:
            self._pause, self._since = pause, time.monotonic()
        paused = waiting(pause, time.monotonic() - self._since) if pause else None
        if row is None:
            return paused or Text()
        tables = [_worker_table(board, self._wording.unit)]
        if cluster is not None:
            tables.append(self._server_table(cluster))
        parts: list[RenderableType] = [_bar(board, row, width, paused), *_headline(board, row, self._wording, width)]
        parts += [_curve(board, width), *(part for table in tables for part in (Text(), _fit(table, width)))]
        if cluster is not None and cluster.replicas > 1:
            parts.append(_copies(cluster))
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


def _bar(board: Board, row: dict[str, Any], width: int, paused: Text | None) -> RenderableType:
    """How far the training is, and what comes after it or how long it takes."""
    beside = paused or Text(f"ETA {clock(board.seconds_left)}")
    line = Table.grid(Column(no_wrap=True), Column(), Column(no_wrap=True, overflow="ellipsis"), padding=(0, 2))
    room = max(8, width - len("training") - 2 * len(_GAP) - len(beside) - 2)
    line.add_row(Text("training", "bold"), ProgressBar(1.0, row["progress"], width=min(36, room)), beside)
    return line


def _headline(board: Board, row: dict[str, Any], wording: Wording, width: int) -> list[Text]:
    """The figures in lines that are broken between two of them."""
    held = board.validated
    words = figures(row, wording.unit)
    words += ["validation " + (wording.shown(held) if wording.headline else f"loss {held['loss']:.3f}")] if held else []
    words += [f"published {board.published}"] if board.published else []
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(_GAP) + len(word) <= width:
            lines[-1] += _GAP + word
        else:
            lines.append(word)
    return [Text(line) for line in lines]


def _curve(board: Board, width: int) -> Text:
    """The training loss so far, as bars."""
    losses = [row["loss"] for row in board.rows if row["kind"] == "step"]
    if not losses:
        return Text("loss …", "dim")
    width = min(60, max(8, width - len("loss ")))
    if len(losses) > width:
        losses = [losses[i * len(losses) // width] for i in range(width)]
    low, high = min(losses), max(losses)
    scale = (len(_BARS) - 1) / max(high - low, 1e-9)
    return Text("loss ", "dim") + Text("".join(_BARS[round((loss - low) * scale)] for loss in losses), "cyan")


_SPARE = ("memory", "backup of", "pulled", "pulled from it", "staleness", "primary of", "pushed")
"""Columns that a narrow terminal does without, the first to go first."""


def _fit(table: Table, width: int) -> Table:
    """Without columns for which there is no room."""
    for name in _SPARE:
        widths = [max(len(str(cell)) for cell in (column.header, *column.cells)) for column in table.columns]
        if sum(widths) + len(_GAP) * (len(widths) - 1) <= width:
            break
        table.columns = [column for column in table.columns if column.header != name]
    table.columns = [replace(column, _index=place) for place, column in enumerate(table.columns)]
    return table


def _worker_table(board: Board, unit: str) -> Table:
    table = _table("worker", "step", "loss", f"{unit}/s", "pushed", "pulled", "staleness")
    for rank, said in sorted(board.latest.items()):
        table.add_row(
            f"w{rank}",
            str(said.step),
            f"{said.loss:.3f}",
            f"{said.units_per_second:,.0f}",
            f"{size(said.pushed_per_second)}/s",
            f"{size(said.pulled_per_second)}/s",
            str(said.staleness),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def size(count: float) -> str:
    """Bytes in decimal units: ``12.3 MB``."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.{0 if power == 0 or count >= 99.95 else 1}f} {_UNITS[power]}"
