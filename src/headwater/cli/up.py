"""``headwater up``: a cluster in the foreground."""

from __future__ import annotations

import secrets
import stat
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import headwater
from headwater.cli import options
from headwater.cli.console import note, out
from headwater.cli.run import report
from headwater.errors import UsageError
from headwater.launch import Launcher, Shape
from headwater.launch.registry import complaint, keep_token, withdraw, write_private
from headwater.wire.auth import token_from_environment


def up(
    servers: Annotated[int, typer.Option("--servers", "-s", min=1, help="Servers to start.")] = 1,
    listen: Annotated[
        str, typer.Option(help="Where the coordinator listens; port 0 takes a free one.")
    ] = "tcp://127.0.0.1:0",
    token_file: Annotated[
        Path | None,
        typer.Option(help="The file of the shared token; made, readable by you alone, if it does not exist."),
    ] = None,
    shards: options.Shards = None,
    replicas: options.Replicas = 1,
    min_copies: options.MinCopies = 1,
    ack: options.Ack = "memory",
    state: options.State = None,
    snapshots: options.Snapshots = None,
    snapshot_every: options.SnapshotEvery = None,
    restore: options.Restore = None,
) -> None:
    """Start a coordinator and servers and stay in the foreground.

    Example: headwater up --servers 3 --replicas 2

    Ctrl-C ends them; a second one does not wait (exit code 130). With
    two copies or more, a server that dies is replaced, and its shards
    go on meanwhile.

    Without --token-file, HEADWATER_TOKEN or HEADWATER_TOKEN_FILE a
    token is made for this cluster; to listen beyond this machine, one
    of the three must be given.
    """
    given = read_token(token_file) if token_file else _from_environment()
    shape = Shape(
        servers, shards, replicas, min_copies, ack, None, state, snapshots, snapshot_every, restore, listen=listen
    )  # fmt: skip
    job = Launcher(shape, token=given)
    made: Path | None = None
    try:
        with job.signals(), job:
            if given is None:
                made = _kept(job.environment()["HEADWATER_TOKEN"])
            if why := complaint():
                note(f"headwater: {why}")
            _announce(job, token_file or made)
            outcome = job.wait()
    finally:
        withdraw(made)
    if outcome.interrupted:
        out().print("The cluster has ended.")
        raise typer.Exit(130 if job.hurried else 0)
    report(outcome)
    raise typer.Exit(outcome.code)


def _kept(token: str) -> Path:
    try:
        return keep_token(token)
    except OSError as error:
        raise UsageError(
            f"no private folder for the token can be had ({error}): give --token-file, or HEADWATER_TOKEN; "
            "the cluster was stopped"
        ) from None


def read_token(path: Path) -> str:
    """The token in ``path``, which is made with a random one if it does not exist.

    Raises ``UsageError`` if others can read the file, or if it is empty.
    """
    try:
        write_private(path, secrets.token_hex(32) + "\n")
    except FileExistsError:
        pass
    except OSError as error:
        raise UsageError(f"the token file {path} cannot be made: {error.strerror}; nothing was started") from None
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file {path} cannot be read: {error}; nothing was started") from None
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(
            f"the token file {path} can be read by others (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}; "
            "nothing was started"
        )
    if not text:
        raise UsageError(f"the token file {path} is empty; delete it to have one made; nothing was started")
    return text


def _from_environment() -> str | None:
    token = token_from_environment()
    return token.decode() if token else None


def _announce(job: Launcher, token_file: Path | None) -> None:
    """What one needs to know to use the cluster; each line can be copied whole, so none is wrapped."""
    join = [f"export HEADWATER_ADDRESS={job.address}"]
    if token_file:
        join.append(f"export HEADWATER_TOKEN_FILE={token_file.absolute()}")
    rows = {
        "servers": f"{len(job.servers)}, and a coordinator",
        **_keeping(job.shape),
        "address": str(job.address),
        "token": f"in {token_file}, which only you can read" if token_file else "the one in the environment",
        "to join": "\n            ".join(join),
        "to look": "headwater status --watch",
        "to end": "Ctrl-C",
    }
    console = out()
    console.print(Text(f"Headwater {headwater.__version__}", "bold"))
    for name, value in rows.items():
        console.print(Text().append(f"  {name:<10}", "dim").append(value), soft_wrap=True)


def _keeping(shape: Shape) -> dict[str, str]:
    """What outlives what."""
    found = {}
    if shape.replicas > 1:
        where = "on disk" if shape.ack == "disk" else "in memory"
        held = f", {shape.min_copies} at least" if shape.min_copies > 1 else ""
        found["copies"] = f"{shape.replicas} of every shard{held}; acknowledged when all have it {where}"
    if shape.state is not None:
        found["state"] = str(shape.state.absolute())
    if shape.snapshots is not None:
        often = f", every {shape.snapshot_every:g} s" if shape.snapshot_every else ", when asked: headwater snapshot"
        found["snapshots"] = f"{shape.snapshots.absolute()}{often}"
    if shape.restore is not None:
        found["restored"] = str(shape.restore.absolute())
    return found
