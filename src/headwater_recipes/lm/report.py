"""After training: the figures beside a baseline, and a sample of what the model writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from headwater_recipes.common.stages import clock, say, say_saved
from headwater_recipes.common.task import Ended
from headwater_recipes.lm.model import generate_text
from headwater_recipes.lm.settings import LmSettings
from headwater_recipes.text import perplexity, tokenizer
from headwater_recipes.text.task import score_of

PROMPT = "def __init__(self"
"""What the sample at the end begins with, when the corpus is the standard library."""


def figures(arrays: tokenizer.Arrays, length: int, ended: Ended) -> dict[str, Any]:
    """For ``report.json``; the baseline is measured on the windows of the final validation."""
    score = score_of(ended.sums)
    unigram = perplexity.unigram(arrays, perplexity.starts(arrays, length), length)
    return {
        "validation_loss": score.loss,
        "validation_bits_per_byte": score.bits_per_byte,
        "unigram_loss": unigram.loss,
        "unigram_bits_per_byte": unigram.bits_per_byte,
        "validation_tokens": score.tokens,
        "validation_bytes": score.nbytes,
        "largest_logit_difference_of_saved_model": ended.difference,
    }


def tell(folder: Path, settings: LmSettings, found: Mapping[str, Any], console: Console) -> None:
    """Show the figures and the sample."""
    say(
        console,
        f"trained {found['step']} steps in {clock(found['training_seconds'])}; "
        f"on {found['validation_tokens']:,} held-out tokens:",
    )
    for name, beside in (("validation", ""), ("unigram", "   (the baseline: no context)")):
        bits, loss = found[f"{name}_bits_per_byte"], found[f"{name}_loss"]
        say(console, f"  {name:<12} {bits:.3f} bits per byte   loss {loss:.3f}{beside}")
    say_saved(
        console, "AutoModelForCausalLM.from_pretrained", "logits", found["largest_logit_difference_of_saved_model"]
    )
    say(console, "")
    say(console, sample(folder, prompt_of(folder, settings.data), settings.seed), whole=True)
    say(console, "")
    say(console, f"{folder}: model.safetensors, config.json, tokenizer.json, metrics.jsonl, loss.png, report.json")
    say(console, f'go on writing: headwater generate --run {folder} --prompt "import os"', whole=True)


def sample(folder: Path, prompt: str, seed: int) -> str:
    """Generated text; written to ``sample.txt``."""
    text = generate_text(folder, prompt, max_new_tokens=160, seed=seed)
    (folder / "sample.txt").write_text(text + "\n", encoding="utf-8")
    return text


def prompt_of(folder: Path, data: tuple[str, ...]) -> str:
    """The first words of the held-out text; of the standard library ``def``, a start that it can do something with."""
    if not data:
        return PROMPT
    tokens = tokenizer.load_arrays(folder).validation[:8].tolist()
    return str(tokenizer.load(folder).decode(tokens, skip_special_tokens=True))
