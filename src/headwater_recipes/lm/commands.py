"""The commands that the recipe adds to ``headwater``: ``train lm`` and ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headwater_recipes.common.command import command, let_threads_sleep
from headwater_recipes.lm.settings import RECIPE

train = command(RECIPE)


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
    let_threads_sleep()
    with Console(stderr=True).status("loading the model and writing …"):
        from headwater_recipes.common.checkpoint import find_folder
        from headwater_recipes.lm.model import generate_text

        folder = find_folder(RECIPE, run)
        text = generate_text(
            folder, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )
    typer.echo(text)
