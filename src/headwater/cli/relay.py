"""``headwater relay``: one copy of published versions for many readers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.text import Text

from headwater.cli.console import counted, note, out
from headwater.cli.status import locate, size
from headwater.relay.events import Back, Taken, Trouble

if TYPE_CHECKING:
    from headwater.relay.events import News
    from headwater.relay.serving import Serving


def relay(
    model: Annotated[list[str], typer.Option("--model", help="A table set to follow; also several times.")],
    upstream: Annotated[
        str | None,
        typer.Option(help="The cluster or relay that versions come from. Default: HEADWATER_ADDRESS, or yours here."),
    ] = None,
    listen: Annotated[
        str, typer.Option(help="Where readers connect; port 0 takes a free one. Beyond this machine only with a token.")
    ] = "tcp://127.0.0.1:0",
    advertise: Annotated[
        str | None, typer.Option(help="What readers elsewhere are told to connect to, instead of --listen.")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="The newest versions of each model that are kept.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line and nothing else.")] = False,
) -> None:
    """Keep a copy of published versions here, and serve readers with it.

    Example: headwater relay --model lm --upstream tcp://10.0.0.1:7000

    headwater.reader("lm", address=...) takes the relay's address as it
    does a cluster's. What leaves the cluster does not grow with the
    number of readers. Ctrl-C ends it.
    """
    from headwater.relay.serving import Serving

    say = _say_json if as_json else _say
    where = locate(upstream)
    serving = Serving(model, where, listen_at=listen, advertise=advertise, keep=keep, report=say)
    serving.loop.stop_on_signals()
    _ready(serving, model, where, as_json=as_json)
    serving.run()
    if not as_json:
        out().print("The relay has ended.")


def _ready(serving: Serving, models: list[str], upstream: str, *, as_json: bool) -> None:
    if as_json:
        _line(
            {"event": "ready", "address": serving.address, "upstream": upstream, "models": models, "pid": os.getpid()}
        )
        return
    named = f"{counted(len(models), 'model')} ({', '.join(models)})"
    _print(f"headwater relay at {serving.address}: {named} from {upstream}")


def _say(news: News) -> None:
    match news:
        case Taken(info, nbytes, way, seconds):
            how = {"whole": "whole", "delta": "as a delta"}.get(way, "partly as a delta")
            _print(f"{info.model} {info.name} step {info.step:,}: {size(nbytes)} {how}, {seconds:.2f} s")
        case Trouble(text):
            note(text)
        case Back(seconds):
            note(f"versions come again, after {seconds:.0f} s")


def _say_json(news: News) -> None:
    match news:
        case Taken(info, nbytes, way, seconds):
            _line({"event": "taken", "version": info, "nbytes": nbytes, "way": way, "seconds": seconds})
        case Trouble(text):
            _line({"event": "trouble", "text": text})
        case Back(seconds):
            _line({"event": "back", "seconds": seconds})


def _line(event: dict[str, Any]) -> None:
    print(msgspec.json.encode(event).decode(), flush=True)


def _print(text: str) -> None:
    out().print(Text(text), soft_wrap=True)
