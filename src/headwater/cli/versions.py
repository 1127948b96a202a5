"""``headwater versions``: what is published, and what tags mean."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Group
from rich.text import Text

import headwater
from headwater.cli.console import counted, err, out
from headwater.cli.mistakes import Group as Commands
from headwater.cli.options import Address, Timeout
from headwater.cli.status import duration, locate, size, standing
from headwater.cli.tables import fit, grid, left_out, watch
from headwater.errors import UsageError
from headwater.wire import versions as v

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from headwater.readers import Weights

_ALL = 116
"""Columns of a terminal that everything fits into."""


class _ListsByDefault(Commands):
    """``headwater versions lm`` is ``headwater versions list lm``; with another word behind it was to be a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell wants to know what could come here
            return super().parse_args(ctx, args)
        if args and args[0] not in self.commands and args[1:] and not args[1].startswith("-") and args[0][:1] != "-":
            ctx.fail(f"No such command {args[0]!r}.{self.meant(args[0])}")
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ListsByDefault,
    help="List the published versions of all models (or of one: headwater versions MODEL); move tags, publish, export.",
    no_args_is_help=False,
)

Model = Annotated[str, typer.Argument(help="The table set: the name of the trainer's headwater.Optimizer.")]
Name = Annotated[str, typer.Argument(help="A version, or a tag that means it.")]
Tag = Annotated[str, typer.Argument(help="Such as production.")]
Patience = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the outcome.")]


def _connected(address: str | None, timeout: float) -> headwater.Client:
    return headwater.connect(locate(address), role="reader", timeout=timeout)


# ---- the list ----------------------------------------------------------------------------------------


@app.command("list")
def list_versions(
    model: Annotated[str, typer.Argument(help="Default: all models.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    watching: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between refreshes.")] = 1.0,
    address: Address = None,
    timeout: Timeout = 10.0,
) -> None:
    """All versions, newest first. This is what headwater versions does by itself."""
    with _connected(address, timeout) as ps:
        if as_json:
            relay = ps.status().relay
            silent, why = (relay.silent, relay.why) if relay is not None else (0.0, "")
            typer.echo(msgspec.json.encode(v.VersionList(ps.versions(model), silent=silent, why=why)).decode())
            return
        if watching:
            watch(partial(now_listed, ps, model), every)
            return
        console = out()
        console.print(now_listed(ps, model, console.width))


def now_listed(ps: headwater.Client, model: str, width: int) -> RenderableType:
    """The list; above it, at a relay, whether it hears from where its versions come from."""
    status = ps.status()
    table = draw(ps.versions(model), status.replicas, time.time(), width)
    return table if status.relay is None else Group(standing(status.relay), table)


def draw(found: Sequence[v.VersionStatus], wanted: int, now: float, width: int = _ALL) -> RenderableType:
    """The table. ``wanted``: copies of every part; ``now``: seconds since 1970; ``width``: columns of the terminal."""
    if not found:
        return Text("nothing is published", "dim")
    models = {each.info.model for each in found}
    ready = [each for each in found if each.state == "ready"]
    head = f"{counted(len(found), 'version')} of {counted(len(models), 'model')}, "
    head += f"{size(sum(each.info.nbytes * each.copies for each in ready))} held"
    table = grid(
        None, "model~", "name~", "number>", "step>", "age>", "size>", "state", "tags~", "leases>", "copies", "parent~",
    )  # fmt: skip
    names = {each.info.number: each.info.name for each in found}
    for each in sorted(found, key=lambda each: (each.info.model, -each.info.number)):
        info = each.info
        lost, few = each.state == "lost", each.state == "ready" and each.copies < wanted
        cells: dict[str, str | Text] = {
            "model": info.model,
            "name": info.name,
            "number": str(info.number),
            "step": f"{info.step:,}",
            "age": duration(max(0.0, now - info.time)),
            "size": size(info.nbytes) if info.nbytes else "–",
            "state": Text(each.state, {"ready": "green", "lost": ""}.get(each.state, "yellow")),
            "tags": " ".join(each.tags) or "–",
            "leases": str(each.leases),
            "copies": f"{each.copies} of {wanted}" if each.state in ("ready", "lost") else "–",
            "parent": names.get(info.parent, f"{info.parent}, gone") if info.parent else "–",
        }
        style = "bold red" if lost else "yellow" if few else ""
        table.add_row(*(cells[str(column.header)] for column in table.columns), style=style)
    model = () if len(models) > 1 else ("model",)
    taken = fit(table, width, ("parent", *model, "leases", "number", "size", "copies", "age"))
    rest = [Text(), left_out(taken)] if taken else []
    return Group(Text(head, "bold"), _health(found, wanted), Text(), table, *rest)


def _health(found: Sequence[v.VersionStatus], wanted: int) -> Text:
    """In one line: whether every version can be leased, and would be if a server died."""
    states = Counter(each.state for each in found)
    few = sum(each.state == "ready" and each.copies < wanted for each in found)
    if states["lost"]:
        lost = ", ".join(each.info.name for each in found if each.state == "lost")
        return Text(f"lost: {lost}: no server that is there holds all of it; retire it, or publish again", "bold red")
    if few:
        return Text(f"{counted(few, 'version')} with fewer than {wanted} copies: one server may be the last", "yellow")
    coming = states["waiting"] + states["cutting"]
    rest = f"; {coming} on the way" if coming else ""
    if wanted > 1:
        return Text(f"every version has its {wanted} copies{rest}", "green")
    return Text(f"one copy of every version: a server that dies takes its parts along{rest}", "dim")


# ---- tags ----------------------------------------------------------------------------------------------


@app.command()
def tag(
    model: Model,
    tag: Tag,
    name: Annotated[str | None, typer.Argument(help="The version, or another tag that means it.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the tag away.")] = False,
    address: Address = None,
    timeout: Timeout = 10.0,
) -> None:
    """Let a tag mean a version: make it, or move it. Readers that follow it change over at once."""
    if delete == (name is not None):
        raise UsageError("name a version, or take the tag away with --delete; nothing was changed")
    with _connected(address, timeout) as ps:
        if name is None:
            ps.untag(model, tag)
            _say(f"{model} has no tag {tag} any more")
        else:
            ps.tag(model, tag, name)
            _say(f"{tag} of {model} means {_meant(ps, model, tag)}")


@app.command()
def rollback(
    model: Model,
    tag: Tag,
    to: Annotated[str | None, typer.Option(help="The version to go back to. Default: its parent.")] = None,
    address: Address = None,
    timeout: Timeout = 10.0,
) -> None:
    """Move a tag back to the version before. Readers that follow it change over at once."""
    with _connected(address, timeout) as ps:
        ps.rollback(model, tag, to)
        _say(f"{tag} of {model} means {_meant(ps, model, tag)}")


def _meant(ps: headwater.Client, model: str, tag: str) -> str:
    """``step-1200 (number 12, step 1,200)``; without the rest, if somebody has moved the tag meanwhile."""
    found = [each.info for each in ps.versions(model) if tag in each.tags]
    return ", ".join(f"{info.name} (number {info.number}, step {info.step:,})" for info in found) or "nothing any more"


@app.command()
def retire(model: Model, name: Name, address: Address = None, timeout: Timeout = 10.0) -> None:
    """Let a version go that no tag and no reader holds."""
    with _connected(address, timeout) as ps:
        ps.retire(model, name)
    _say(f"{name} of {model} is retired; readers that map its memory keep it until they let go")


# ---- versions in and out -----------------------------------------------------------------------------


@app.command()
def publish(
    model: Model,
    name: Annotated[str, typer.Argument(help="Of the new version.")],
    tables: Annotated[
        list[str] | None,
        typer.Option(help="A table of the version; also several times. Default: MODEL, and MODEL.buffers."),
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="The newest versions that are kept; tags and leases hold more.")] = 3,
    age: Annotated[float | None, typer.Option(min=0.0, help="Seconds after which all but the newest may go.")] = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="That moves to it; also several times.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for readers; also several times.")] = None,
    address: Address = None,
    timeout: Patience = 60.0,
) -> None:
    """Publish what tables hold now, while training goes on."""
    words = _pairs(metadata or [])
    with _connected(address, timeout) as ps:
        if not tables:
            there = {table.name for table in ps.status().tables}
            tables = [model, *({f"{model}.buffers"} & there)]
        with err().status("publishing …"):
            begun = ps.publish(tables, name, model=model, keep=keep, age=age, tags=tags or (), metadata=words)
            info = begun.wait()
    _say(f"{info.name} of {info.model}: number {info.number}, step {info.step:,}, {size(info.nbytes)}")
    out().print(f"digest {info.digest}; servers paused for {1000 * begun.pause:.1f} ms", style="dim", highlight=False)


def _pairs(words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UsageError(f"metadata {word!r} is not KEY=VALUE; nothing was published")
        found[key] = value
    return found


@app.command()
def export(
    model: Model,
    name: Name,
    folder: Annotated[Path, typer.Argument(help="The folder that model.safetensors goes into.", metavar="OUT")],
    force: Annotated[bool, typer.Option("--force", help="Write over a model.safetensors that is there.")] = False,
    address: Address = None,
    timeout: Patience = 300.0,
) -> None:
    """Write a version as OUT/model.safetensors, which loads without Headwater."""
    path = folder / "model.safetensors"
    if path.exists() and not force:
        raise UsageError(f"{path} exists; nothing was written. Name another folder, or give --force")
    with headwater.reader(model, locate(address), timeout=timeout) as reader, reader.lease(name) as weights:
        with err().status("writing …"):
            save(weights, path)
        info = weights.version
    _say(f"{path}  {size(path.stat().st_size)}")
    out().print(f"{info.name} of {info.model}, step {info.step:,}, digest {info.digest}", style="dim", highlight=False)


def save(weights: Weights, path: Path) -> None:
    """A version's tensors as a safetensors file, whole or not at all; its header says which version they are.

    Raises ``DiskFull`` or ``UsageError``; what was there is as it was then.
    """
    from headwater.server.snapshots.plain import Tensor, write
    from headwater.wire.tensors import DTYPES

    info = weights.version
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent}: {error.strerror}; nothing was written") from None
    told = {"model": info.model, "version": info.name, "step": str(info.step), "digest": info.digest}
    tensors = [
        Tensor(name, DTYPES[each.dtype], each.shape, lambda name=name: (weights[name],))  # type: ignore[misc]
        for name, each in weights.shapes().items()
    ]
    try:
        write(path, tensors, told)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        raise


def _say(text: str) -> None:
    out().print(text, highlight=False, soft_wrap=True, markup=False)
