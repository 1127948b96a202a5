"""The launching process of a run of this recipe: prepare the folder, and at the end write the report."""

from __future__ import annotations

import copy
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwater.errors import DataError
from headwater_recipes.common import checkpoint, display, job, metrics
from headwater_recipes.common.stages import stage
from headwater_recipes.common.trainer import quiet
from headwater_recipes.finetune import adapter, answers, data, docstrings, examples, source
from headwater_recipes.finetune.settings import RECIPE, Settings, check
from headwater_recipes.finetune.worker import read_model

_SHOWN = 200
"""Characters of an answer that are shown; answers.json has all."""


def prepare(wanted: Settings, run: Path | None, console: Console) -> Path:
    """Make the run folder: the model, the data as tokens, the answers before, and the settings.

    Raises:
        DataError: the data or the model cannot be used, or the folder holds something. UsageError: a setting that
            cannot work.
    """
    check(wanted)
    if not checkpoint.free(run):
        checkpoint.new_folder(RECIPE.name, run)  # raises: says what is wrong, before any work is done
    with stage(console, "loading transformers"):
        quiet()
    with stage(console, "reading the data"):
        found = data.from_paths([Path(p) for p in wanted.data]) if wanted.data else docstrings.standard_library()
        found = _shuffled(found, wanted.seed)
    begun = time.monotonic()
    with stage(console, "loading the model"):
        model, tokenizer = source.load(wanted.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    size = sum(p.numel() for p in model.parameters())
    _say(console, f"model: {wanted.model}, {size / 1e6:.1f} M parameters ({time.monotonic() - begun:.1f} s)")
    with stage(console, "writing the data as tokens"):
        training = examples.encode(tokenizer, found.training, wanted.seq)
        held_out = examples.encode(tokenizer, found.held_out, wanted.seq)
    _say(console, _describe(found, training, held_out, wanted.seq))
    asked = answers.choose(tokenizer, found.training, found.held_out)
    with stage(console, "asking the model what it knows before"):
        said = answers.ask(model, tokenizer, [each.prompt for each in asked])
    adapted = adapter.wrap(copy.deepcopy(model), wanted) if wanted.lora else None
    with checkpoint.making(RECIPE.name, run) as folder, stage(console, "writing the model and the data"):
        _write(folder, model, tokenizer, adapted)
        examples.save(folder, "training", training.examples)
        examples.save(folder, "held_out", held_out.examples)
        before = [msgspec.structs.replace(each, before=text) for each, text in zip(asked, said, strict=True)]
        answers.write(folder, before)
        checkpoint.begin(folder, wanted)
    return folder


def _shuffled(found: data.Corpus, seed: int) -> data.Corpus:
    """So that the first few, which are asked about and validated on, are of all kinds."""
    random = np.random.default_rng(seed)
    training, held_out = (
        tuple(items[i] for i in random.permutation(len(items))) for items in (found.training, found.held_out)
    )
    return data.Corpus(training, held_out, found.source)


def _describe(found: data.Corpus, training: examples.Encoded, held_out: examples.Encoded, seq: int) -> str:
    for what, encoded in (("to train on", training), ("held out", held_out)):
        if not len(encoded.examples):
            raise DataError(
                f"{found.source}: no example is left {what} ({encoded.dropped} are questions of more than {seq} "
                f"tokens). Nothing was started; give more data, or a greater --seq."
            )
    tokens, learnt = len(training.examples.ids), int(training.examples.learnt.sum())
    line = (
        f"data: {found.source}, {len(training.examples):,} examples to train on, {len(held_out.examples):,} held out; "
        f"{tokens:,} tokens, {learnt:,} of them learnt from"
    )
    cut, dropped = training.cut + held_out.cut, training.dropped + held_out.dropped
    return line + (f"; {cut} cut to {seq} tokens" if cut else "") + (f", {dropped} left out" if dropped else "")


def _write(folder: Path, model: Any, tokenizer: Any, adapted: Any) -> None:
    """The pretrained model as a folder of transformers; for LoRA within one of peft, with the fresh adapter."""
    tokenizer.save_pretrained(folder)
    if adapted is None:
        checkpoint.write_model(model, folder)
        return
    base = folder / adapter.BASE
    checkpoint.write_model(model, base)
    tokenizer.save_pretrained(base)
    adapter.write(adapted, folder, folder)


class Job(job.Job[Settings]):
    """One launch of a run whose folder is ready."""

    def __init__(
        self, folder: Path, console: Console, restore: Path | None = None, *, only_rank0: bool = False
    ) -> None:
        super().__init__(RECIPE, folder, console, restore, only_rank0=only_rank0)

    def _report(self) -> None:
        assert self.board.final is not None
        done, rows = self.board.finished[0], self.board.rows
        metrics.plot(self.folder, rows)
        before = next((row for row in rows if row["kind"] == "validation" and row["step"] == 0), None)
        after = self.board.final
        found = {
            "step": done.step,
            "training_seconds": round(done.elapsed, 1),
            "held_out_loss_before": before and before["loss"],
            "held_out_loss": after.loss,
            "held_out_tokens": after.tokens,
            "tokens_per_second": round(_rate(rows), 1),
        }
        checkpoint.write_json(self.folder / "report.json", found)
        self._say("")
        self._say(
            f"trained {done.step} steps in {display.clock(done.elapsed)}; loss on {after.tokens:,} held-out tokens: "
            f"{before['loss'] if before else float('nan'):.3f} before, {after.loss:.3f} after (nats per token)"
        )
        self._answers()
        self._say(f"{self.folder}: model, tokenizer, answers.json, metrics.jsonl, loss.png, report.json")
        self._say(f"serve it: headwater serve --model {self.folder}", whole=True)

    def _answers(self) -> None:
        """Ask again, and show both."""
        with stage(self.console, "asking the same again"):
            tokenizer = source.read_tokenizer(self.folder)
            model = read_model(self.folder, checkpoint.newest(self.folder), self.settings)
            before = answers.read(self.folder)
            said = answers.ask(model, tokenizer, [each.prompt for each in before])
        after = [msgspec.structs.replace(each, after=text) for each, text in zip(before, said, strict=True)]
        answers.write(self.folder, after)
        self.console.print(_compared(after, self.console.width))


_SIDE_BY_SIDE = 80
"""Columns of a terminal that has room for three answers beside one another."""


def _compared(found: Sequence[answers.Answer], width: int) -> RenderableType:
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


def _asked(each: answers.Answer) -> Text:
    kind = "held out" if each.held_out else "trained on"
    return Text(f"{_short(each.question)}\n").append(f"{kind}: {_short(each.wanted)}", "dim")


def _rate(rows: list[dict[str, Any]]) -> float:
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


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=not console.is_terminal)


def resume(run: Path | None, changes: dict[str, Any]) -> Path:
    """See ``job.resume``."""
    return job.resume(RECIPE, run, changes)
