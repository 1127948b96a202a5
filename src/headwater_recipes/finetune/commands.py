"""The command that the recipe adds to ``headwater``: ``finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headwater import pretrained
from headwater_recipes.common import options
from headwater_recipes.common.stages import stage

_NO_SETTINGS = ("run", "resume", "restore", "only_rank0")
"""Options that are of one launch and not kept in the run's folder."""


def finetune(
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, a Hugging Face folder, a .gguf file or a name on the hub. Default: smollm2."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Chats (.jsonl) or plain text. Default: docstrings of Python's standard library."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/finetune-DATE-TIME.")] = None,
    resume: options.Resume = False,
    lora: Annotated[int | None, typer.Option(help="Train an adapter of this rank only. Default: all weights.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="The adapter's scale. Default: twice its rank.")] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Modules that get an adapter, by commas. Default: all-linear.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", help="Worker processes. Default: 1.")] = None,
    servers: options.Servers = None,
    replicas: options.Replicas = None,
    shards: options.Shards = None,
    min_copies: options.MinCopies = None,
    ack: options.Ack = None,
    state: options.StateFolder = None,
    snapshots: options.Snapshots = None,
    snapshot_every: options.SnapshotEvery = None,
    restore: options.Restore = None,
    sync: options.Sync = None,
    batch: Annotated[int | None, typer.Option(help="Examples per worker at once. Default: 8.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per worker and step. Default: 1.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of an example at most. Default: 256.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. Default: 1e-4, with --lora 1e-3.")] = None,
    steps: options.Steps = None,
    minutes: Annotated[float | None, typer.Option(help="Train for so long in all. Default: 5.")] = None,
    seed: options.Seed = None,
    precision: options.Precision = None,
    publish_every: Annotated[
        int | None, typer.Option(help="Steps between versions that readers can follow; 0: none. Default: 10.")
    ] = None,
    save_every: options.SaveEvery = None,
    validate_every: options.ValidateEvery = None,
    log_every: options.LogEvery = None,
    only_rank0: options.OnlyRank0 = False,
) -> None:
    """Train a pretrained language model on, and see what it answers then.

    Example: headwater finetune --minutes 5
    Example: headwater finetune --data chats.jsonl --lora 8 --workers 2

    Ctrl-C stops and saves; --resume goes on. While it trains,
    headwater serve --model RUN answers with the newest version.
    """
    given = dict(locals())
    options.let_threads_sleep()
    console = Console()
    if model is not None and model not in pretrained.PACKAGED and not Path(model).exists():
        with stage(console, "looking for the model"):
            pretrained.on_the_hub(model)  # raises: before anything is loaded
    with stage(console, "loading torch"):
        from headwater_recipes.common.settings import make_changes
        from headwater_recipes.finetune import job
        from headwater_recipes.finetune.settings import complete

    changes = make_changes({name: value for name, value in given.items() if name not in _NO_SETTINGS})
    if model is not None and Path(model).exists():  # also a folder that is called as the default model is
        changes["model"] = str(Path(model).resolve())  # workers may run elsewhere
    folder = job.resume(run, changes) if resume else job.prepare(complete(changes), run, console)
    code = job.Job(folder, console, restore, only_rank0=only_rank0).run()
    if code:
        raise typer.Exit(code)
