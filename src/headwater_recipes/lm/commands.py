"""The commands that the recipe adds to ``headwater``: ``train lm`` and ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def train(
    data: Annotated[
        list[Path] | None, typer.Option(help="Text files or folders. Default: Python's standard library.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/lm-DATE-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --run, or the newest run.")] = False,
    preset: Annotated[str | None, typer.Option(help="Model: tiny, 6m, 9m or 12m. Default: 9m.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", help="Worker processes. Default: 2.")] = None,
    servers: Annotated[int | None, typer.Option("--servers", "-s", help="Servers. Default: 2.")] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", "-r", help="Copies of every shard; with 2 a server may die. Default: 1.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Slices of the model. Default: as many as servers.")] = None,
    min_copies: Annotated[int | None, typer.Option(help="Block rather than go on with fewer copies.")] = None,
    ack: Annotated[
        str | None, typer.Option(help="memory, or disk: acknowledge what is in logs. Default: memory.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of what the coordinator remembers (and logs). Default: a private one.")
    ] = None,
    snapshots: Annotated[Path | None, typer.Option(help="Folder that the cluster's snapshots go to.")] = None,
    snapshot_every: Annotated[float | None, typer.Option(help="Seconds between two snapshots.")] = None,
    restore: Annotated[Path | None, typer.Option(help="Begin with the values of this snapshot.")] = None,
    sync: Annotated[str | None, typer.Option(help="bulk, stale:N, async or async:N. Default: bulk.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per worker and step.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens that the tokenizer learns.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many steps in all.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for so long in all. Default: 2.5.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of values, batches and the sample.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, float32 or bfloat16: of the workers' matrix products.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between rows of metrics.jsonl.")] = None,
) -> None:
    """Train a small language model through servers of its own.

    Example: headwater train lm --workers 2 --servers 3 --replicas 2 --minutes 5

    Ctrl-C stops and saves; --resume goes on. The run's folder holds a
    model that transformers loads, its metrics and its loss curve.
    """
    from headwater_recipes.lm import job
    from headwater_recipes.lm.settings import Settings, make_changes

    given: dict[str, Any] = {
        "data": tuple(str(path.resolve()) for path in data) if data else None,
        "preset": preset,
        "workers": workers,
        "servers": servers,
        "replicas": replicas,
        "shards": shards,
        "min_copies": min_copies,
        "ack": ack,
        "state": str(state.resolve()) if state else None,
        "snapshots": str(snapshots.resolve()) if snapshots else None,
        "snapshot_every": snapshot_every,
        "sync": sync,
        "batch": batch,
        "seq": seq,
        "lr": lr,
        "vocabulary": vocabulary,
        "steps": steps,
        "minutes": minutes,
        "seed": seed,
        "precision": precision,
        "save_every": save_every,
        "validate_every": validate_every,
        "log_every": log_every,
    }
    changes = make_changes(given)
    console = Console()
    folder = job.resume(run, changes) if resume else job.prepare(Settings(**changes), run, console)
    code = job.Job(folder, console, restore).run()
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
    from headwater_recipes.lm.checkpoint import find_folder
    from headwater_recipes.lm.generation import generate_text

    folder = find_folder(run)
    text = generate_text(folder, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    typer.echo(text)
