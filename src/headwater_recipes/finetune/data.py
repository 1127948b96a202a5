"""The model, the data as tokens and the answers before, in the run folder."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from headwater import pretrained
from headwater.errors import DataError
from headwater_recipes.common import checkpoint
from headwater_recipes.common.stages import say, stage
from headwater_recipes.finetune import adapter, answers, docstrings, model
from headwater_recipes.finetune.settings import FinetuneSettings
from headwater_recipes.text import chats, examples


def prepare(wanted: FinetuneSettings, console: Console) -> Callable[[Path], None]:
    """See ``Task.prepare``. Raises ``DataError`` too if the model cannot be used."""
    with stage(console, "loading transformers"):
        pretrained.quiet()
    found = _read(wanted, console)
    loaded, tokenizer = _load(wanted, console)
    with stage(console, "writing the data as tokens"):
        training = examples.encode(tokenizer, found.training, wanted.seq)
        held_out = examples.encode(tokenizer, found.held_out, wanted.seq)
    say(console, _describe(found, training, held_out, wanted.seq))
    asked = answers.choose(tokenizer, found.training, found.held_out)
    with stage(console, "asking the model what it knows before"):
        said = answers.ask(loaded, tokenizer, [each.prompt for each in asked])
    adapted = adapter.wrap(copy.deepcopy(loaded), wanted) if wanted.lora else None

    def fill(folder: Path) -> None:
        with stage(console, "writing the model and the data"):
            _write(folder, loaded, tokenizer, adapted)
            examples.save(folder, "training", training.examples)
            examples.save(folder, "held_out", held_out.examples)
            before = [msgspec.structs.replace(each, before=text) for each, text in zip(asked, said, strict=True)]
            answers.write(folder, before)

    return fill


def _read(wanted: FinetuneSettings, console: Console) -> chats.Corpus:
    with stage(console, "reading the data"):
        found = chats.from_paths([Path(p) for p in wanted.data]) if wanted.data else docstrings.standard_library()
        return _shuffled(found, wanted.seed)


def _load(wanted: FinetuneSettings, console: Console) -> tuple[Any, Any]:
    begun = time.monotonic()
    with stage(console, "loading the model"):
        loaded, tokenizer = model.load(wanted.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    size = sum(p.numel() for p in loaded.parameters())
    say(console, f"model: {wanted.model}, {size / 1e6:.1f} M parameters ({time.monotonic() - begun:.1f} s)")
    return loaded, tokenizer


def _shuffled(found: chats.Corpus, seed: int) -> chats.Corpus:
    """So that the first few, which are asked about and validated on, are of all kinds."""
    random = np.random.default_rng(seed)
    training, held_out = (
        tuple(items[i] for i in random.permutation(len(items))) for items in (found.training, found.held_out)
    )
    return chats.Corpus(training, held_out, found.source)


def _describe(found: chats.Corpus, training: examples.Encoded, held_out: examples.Encoded, seq: int) -> str:
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


def _write(folder: Path, loaded: Any, tokenizer: Any, adapted: Any) -> None:
    """The pretrained model as a folder of transformers; for LoRA within one of peft, with the fresh adapter."""
    tokenizer.save_pretrained(folder)
    if adapted is None:
        checkpoint.write_model(loaded, folder)
        return
    base = folder / adapter.BASE
    checkpoint.write_model(loaded, base)
    tokenizer.save_pretrained(base)
    adapter.write(adapted, folder, folder)
