"""``headwater serve``: a model over HTTP, with weights that stay current."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.text import Text

import headwater
from headwater.cli import plugins
from headwater.cli.console import err, out
from headwater.cli.environment import let_threads_sleep
from headwater.cli.options import Address
from headwater.cli.status import locate
from headwater.errors import UsageError
from headwater.gateway import loading
from headwater.gateway.loading import Dtype, FromReader, LoadPlan, Still
from headwater.launch.registry import running

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from socket import socket

    from headwater.gateway.engine_types import Source
    from headwater.gateway.limits import Limits
    from headwater.gateway.served import Model, Served
    from headwater.gateway.serving import Server

log = logging.getLogger("headwater.gateway")

_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

_BODY, _RECIPE_BODY = "1MiB", "16MiB"

_PATIENCE = 5.0
"""Seconds that a model which is being loaded when the server ends has to come to its end."""


def serve(
    model: Annotated[
        str,
        typer.Option(help="A run's folder, smollm2, a Hugging Face folder or hub name, a GGUF file, or a table set."),
    ],
    base: Annotated[str | None, typer.Option(help="Where --model is a table set: the files of the model.")] = None,
    module: Annotated[str | None, typer.Option(help="PACKAGE.MODULE:FACTORY of an nn.Module, for /v1/predict.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call it. Default: as the folder.")] = None,
    tag: Annotated[str, typer.Option(help="Which version: a tag to follow, or a version's name.")] = "latest",
    static: Annotated[bool, typer.Option("--static", help="Serve the files' own weights; follow no cluster.")] = False,
    address: Address = None,
    host: Annotated[str, typer.Option(help="Where to listen. Beyond this machine only with --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line, that you alone can read; read again on changes.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Generations that run together.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 64,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")] = 60.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 4096,
    max_body: Annotated[
        str | None, typer.Option(help="Of a request. Default: 1MiB; 16MiB for a recipe's model.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse requests with unknown fields. Default: ignore and name them.")
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            help="An origin whose pages may read answers, such as https://chat.example; * for all; repeatable."
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Compute in this. Default: as the weights are.")] = None,
) -> None:
    """Answer over HTTP with the newest weights of a cluster, or those of files.

    Language models have the OpenAI-compatible /v1/completions,
    /v1/chat/completions and /v1/responses, sentence encoders
    /v1/embeddings, runs of other recipes the Hugging Face inference API
    of their task, any other module (--module) /v1/predict. In a browser
    the address has a page to try the model.

    Example: headwater serve --model runs/lm-20260101-120000

    Every answer names the version that made it. Ctrl-C ends it: what
    runs has ten seconds to end.
    """
    let_threads_sleep()
    with err().status("loading the server …"):
        import headwater.gateway.app
        import headwater.gateway.serving  # noqa: F401 - both are needed later, and take their time here
        from headwater.gateway.limits import Limits

    wanted = loading.plan(model, base=base, module=module, name=name)
    size = parse_size(max_body or (_RECIPE_BODY if wanted.recipe else _BODY))
    limits = Limits(body=size, deadline=deadline, max_tokens=max_tokens, queue=queue, strict=strict)
    door = _Door(host, port, api_keys, check_origins(cors or ()))
    _run(wanted, _Weights(tag, static, address, slots, dtype), limits, door)


class _Weights(NamedTuple):
    """Which weights answer, and how they compute: the options of these names."""

    tag: str
    static: bool
    address: str | None
    slots: int
    dtype: Dtype | None


class _Door(NamedTuple):
    """Where clients come in, and who may: the options of these names; ``origins`` is --cors."""

    host: str
    port: int
    api_keys: Path | None
    origins: Sequence[str]


def _run(wanted: LoadPlan, weights: _Weights, limits: Limits, door: _Door) -> None:
    """Serve until the end. Whatever cannot work is found before the server listens, but for the model's files."""
    from headwater.gateway.app import make_app
    from headwater.gateway.auth import Keys
    from headwater.gateway.served import Served
    from headwater.gateway.serving import Server, bind

    keys = Keys(door.api_keys) if door.api_keys else None
    make = _maker(wanted, weights, limits)
    with closing(bind(door.host, door.port, proven=keys is not None)) as sock:
        where = None if weights.static else _cluster(wanted, weights.address)
        with err().status("looking for the model …"):
            loading.check_reachable(wanted)
        _log_to_stderr()
        with closing(_source(wanted, where)) as source:
            served = Served(wanted.name)
            server = Server(make_app(served, limits, keys, door.origins), limits)
            wait = partial(loading.wait_for_first, source, weights.tag, served)
            loader = _Loader(served, server, wait, partial(make, source))
            _announce(wanted, weights.tag, where, sock, door.api_keys)
            loader.start()
            server.run(sockets=[sock])
            loader.finish()
    out().print("The server has ended.")


def _maker(wanted: LoadPlan, weights: _Weights, limits: Limits) -> Callable[[Source], Model]:
    """What loads the model, once its source has a version. Raises ``UsageError``: its code is not here."""
    if wanted.recipe and weights.dtype:
        raise UsageError(
            f"--dtype {weights.dtype}: models of a recipe compute in the dtype that they were trained in, as "
            f"{wanted.recipe!r} makes their inputs; leave it out; nothing was started"
        )
    module = loading.make_module(wanted.module) if wanted.module else None
    recipe = plugins.find_task(wanted.recipe) if wanted.recipe else None

    def make(source: Source) -> Model:
        tag, slots, dtype = weights.tag, weights.slots, weights.dtype
        return loading.load(wanted, source, limits, tag=tag, slots=slots, dtype=dtype, module=module, recipe=recipe)

    return make


def _source(wanted: LoadPlan, where: str | None) -> FromReader | Still:
    if where:
        return FromReader(headwater.reader(wanted.tables, where))
    return Still(wanted.tables, loading.step_of(wanted))


def parse_size(text: str) -> int:
    """Bytes of ``1MiB``, ``500kB`` or ``1000``. Raises ``UsageError``."""
    found = re.fullmatch(r"([1-9]\d*) ?(|B|kB|MB|GB|KiB|MiB|GiB)", text.strip())
    if found is None:
        raise UsageError(f"--max-body {text}: a size such as 1MiB, 500kB or 1000; nothing was started")
    return int(found[1]) * _UNITS[found[2]]


def check_origins(origins: Sequence[str]) -> Sequence[str]:
    """The origins, if browsers would send them so. Raises ``UsageError``."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z,]+", origin):
            raise UsageError(
                f"--cors {origin}: an origin such as https://chat.example or http://127.0.0.1:3000, without a path, "
                "or *; nothing was started"
            )
    return origins


def _cluster(wanted: LoadPlan, address: str | None) -> str | None:
    """The address of the cluster whose versions are served; None: there is none, and the files' own weights are.

    Raises ``UsageError``: several clusters run here, or a table set is wanted and none does.
    """
    known = address or os.environ.get("HEADWATER_ADDRESS") or running()
    return locate(address) if known or not wanted.complete else None


class _Loader:
    """Loads the model beside the server, which meanwhile says that it is not ready. If that fails, the server ends."""

    def __init__(self, served: Served, server: Server, wait: Callable[[], bool], load: Callable[[], Model]) -> None:
        self._served = served
        self._server = server
        self._wait = wait
        self._load = load
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="headwater-load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Raises what loading has raised."""
        self._thread.join(_PATIENCE)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            if self._wait():
                self._attach()
        except Exception as error:  # noqa: BLE001 - raised again where the command ends
            self._error = error
            self._server.should_exit = True

    def _attach(self) -> None:
        began = time.monotonic()
        model = self._load()
        self._served.attach(model)
        if self._served.closing:
            model.close()
            return
        version = model.statistics().version
        named = f"version {version.name} (number {version.number}, step {version.step})"
        log.info("ready with %s, loaded in %.1f s", named, time.monotonic() - began)


def _log_to_stderr() -> None:
    """One line a request, and whatever else the server has to say; no progress bars in a file of them."""
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("headwater", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _announce(wanted: LoadPlan, tag: str, where: str | None, sock: socket, api_keys: Path | None) -> None:
    """What one needs to know to ask; each line can be copied whole, so none is wrapped."""
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    weights = (
        f"{tag!r} of table set {wanted.tables!r} at {where}" if where else "the model's own; no cluster is followed"
    )
    rows = {
        "model": wanted.name,
        "weights": weights,
        "address": f"{url}/v1",
        "keys": f"those in {api_keys}" if api_keys else "none: whoever can reach the address may ask",
        "to look": f"curl {url}/readyz",
        "to try": f"{url}/ in a browser",
        "to end": "Ctrl-C",
    }
    console = out()
    console.print(Text(f"Headwater {headwater.__version__} serves", "bold"))
    for name, value in rows.items():
        console.print(Text().append(f"  {name:<10}", "dim").append(value), soft_wrap=True)
