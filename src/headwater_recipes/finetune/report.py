"""After training: the loss before and after, and the same questions asked again."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwater_recipes.common import checkpoint
from headwater_recipes.common.stages import clock, say, stage
from headwater_recipes.common.task import Ended
from headwater_recipes.finetune import answers, model
from headwater_recipes.finetune.settings import FinetuneSettings
from headwater_recipes.text.task import score_of

_SHOWN = 200
"""Characters of an answer that are shown; answers.json has all."""


def figures(ended: Ended) -> dict[str, Any]:
    """For ``report.json``."""
    score = score_of(ended.sums)
    return {
        "held_out_loss_before": ended.before and ended.before["loss"],
        "held_out_loss": score.loss,
        "held_out_tokens": score.tokens,
        "tokens_per_second": round(_rate(ended.rows), 1),
    }


def tell(folder: Path, settings: FinetuneSettings, ended: Ended, console: Console) -> None:
    """Show the figures and the answers."""
    before, after = ended.before, score_of(ended.sums)
    say(
        console,
        f"trained {ended.step} steps in {clock(ended.seconds)}; loss on {after.tokens:,} held-out tokens: "
        f"{before['loss'] if before else float('nan'):.3f} before, {after.loss:.3f} after (nats per token)",
    )
    _answers(folder, settings, console)
    say(console, f"{folder}: model, tokenizer, answers.json, metrics.jsonl, loss.png, report.json")
    say(console, f"serve it: headwater serve --model {folder}", whole=True)


def _answers(folder: Path, settings: FinetuneSettings, console: Console) -> None:
    """Ask again, and show both."""
    with stage(console, "asking the same again"):
        tokenizer = model.read_tokenizer(folder)
        trained = model.read_model(folder, checkpoint.newest(folder), settings)
        before = answers.read(folder)
        said = answers.ask(trained, tokenizer, [each.prompt for each in before])
    after = [msgspec.structs.replace(each, after=text) for each, text in zip(before, said, strict=True)]
    answers.write(folder, after)
    console.print(_compared(after, console.width))


_SIDE_BY_SIDE = 80
"""Columns of a terminal that has room for three answers beside one another."""


def _compared(found: Sequence[answers.Asked], width: int) -> RenderableType:
    """What was asked, and what the model said before and after."""
    if width < _SIDE_BY_SIDE:
        parts: list[RenderableType] = []
        for each in found:
            parts += [Text(), _asked(each)]
            for name, said in (("before", each.before), ("after", each.after)):
                parts.append(Text(f"{name}: ", "bold").append(_short(said), "not bold"))
        return Group(*parts)
    table = Table(show_lines=True, expand=True)
    for name, share in (("asked, and what the data says", 4), ("before", 4), ("after", 4)):
        table.add_column(name, ratio=share, overflow="fold")
    for each in found:
        table.add_row(_asked(each), Text(_short(each.before)), Text(_short(each.after)))
    return table


def _asked(each: answers.Asked) -> Text:
    kind = "held out" if each.held_out else "trained on"
    return Text(f"{_short(each.question)}\n").append(f"{kind}: {_short(each.wanted)}", "dim")


def _rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """Tokens of all workers, paddings left out, per second of training."""
    tokens = seconds = 0.0
    for row in rows:
        if row["kind"] == "step":
            since = max(0.0, row["elapsed"] - seconds)
            tokens, seconds = tokens + row["tokens_per_second"] * since, row["elapsed"]
    return tokens / seconds if seconds else 0.0


def _short(text: str) -> str:
    """On one line, and not much of it."""
    return textwrap.shorten(text, _SHOWN, placeholder=" …")
