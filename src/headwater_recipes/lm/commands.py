"""The commands that the recipe adds to ``headwater``: ``train lm`` and ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headwater_recipes.common import options
from headwater_recipes.common.stages import stage

_NO_SETTINGS = ("run", "resume", "restore", "only_rank0")
"""Options that are of one launch and not kept in the run's folder."""


def train(
    data: Annotated[
        list[Path] | None, typer.Option(help="Text files or folders. Default: Python's standard library.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/lm-DATE-TIME.")] = None,
    resume: options.Resume = False,
    preset: Annotated[str | None, typer.Option(help="Model: tiny, 6m, 9m or 12m. Default: 9m.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", help="Worker processes. Default: 2.")] = None,
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
    batch: Annotated[int | None, typer.Option(help="Sequences per worker and step.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens that the tokenizer learns.")] = None,
    steps: options.Steps = None,
    minutes: Annotated[float | None, typer.Option(help="Train for so long in all. Default: 2.5.")] = None,
    seed: options.Seed = None,
    precision: options.Precision = None,
    publish_every: Annotated[
        int | None, typer.Option(help="Steps between versions that readers can follow. Default: none.")
    ] = None,
    save_every: options.SaveEvery = None,
    validate_every: options.ValidateEvery = None,
    log_every: options.LogEvery = None,
    only_rank0: options.OnlyRank0 = False,
) -> None:
    """Train a small language model through servers of its own.

    Example: headwater train lm --workers 2 --servers 3 --replicas 2 --minutes 5

    Ctrl-C stops and saves; --resume goes on. The run's folder holds a
    model that transformers loads, its metrics and its loss curve.
    """
    given = dict(locals())
    options.let_threads_sleep()
    console = Console()
    with stage(console, "loading torch"):
        from headwater_recipes.common.settings import make_changes
        from headwater_recipes.lm import job
        from headwater_recipes.lm.settings import Settings

    changes = make_changes({name: value for name, value in given.items() if name not in _NO_SETTINGS})
    folder = job.resume(run, changes) if resume else job.prepare(Settings(**changes), run, console)
    code = job.Job(folder, console, restore, only_rank0=only_rank0).run()
    if code:
        raise typer.Exit(code)


def generate(
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def __init__(self",
    run: Annotated[Path | None, typer.Option(help="A run's folder. Default: the newest in runs/.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time; 1: as the model says.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among so many likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed, the same text.")] = 0,
) -> None:
    """Continue a prompt with a trained model.

    Example: headwater generate --run runs/lm-20260101-120000 --prompt "import os"
    """
    options.let_threads_sleep()
    with Console(stderr=True).status("loading the model and writing …"):
        from headwater_recipes.common.checkpoint import find_folder
        from headwater_recipes.lm.generation import generate_text
        from headwater_recipes.lm.settings import RECIPE

        folder = find_folder(RECIPE, run)
        text = generate_text(
            folder, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )
    typer.echo(text)
