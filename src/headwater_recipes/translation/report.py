"""After training: BLEU and chrF beside the baselines, ten translations, and what the model looks at."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from rich.console import Console

from headwater import pretrained
from headwater_recipes.common.pictures import new_figure
from headwater_recipes.common.stages import clock, say, say_saved
from headwater_recipes.common.task import Ended
from headwater_recipes.translation import data, decode, dictionary
from headwater_recipes.translation.verses import Pair

if TYPE_CHECKING:
    from headwater_recipes.translation.task import Translation

SAMPLE = 600
"""Held-out pairs that are translated, drawn at random."""
PICTURES = ("translations.png", "attention.png")
_SHOWN = 10
_TOLD = 3
_WIDTH = 118


def figures(task: Translation, ended: Ended) -> dict[str, Any]:
    """For ``report.json``; draws the pictures and writes the translations."""
    folder = task.folder
    model: Any = task.read(folder).eval()
    tokenizer = pretrained.load_tokenizer(str(folder))
    pairs, count = data.read_pairs(folder / "held_out.jsonl", SAMPLE, task.settings.seed)
    sources = [pair.source for pair in pairs]
    said = decode.translate(model, tokenizer, sources, task.settings.seq)
    known = msgspec.json.decode((folder / "dictionary.json").read_bytes())
    rows = [{**pair._asdict(), "output": text} for pair, text in zip(pairs, said, strict=True)]
    (folder / "translations.jsonl").write_bytes(b"\n".join([*map(msgspec.json.encode, rows), b""]))
    shown = rows[:: max(1, len(rows) // _SHOWN)][:_SHOWN]
    (folder / "translations.txt").write_text("\n\n".join(map(_lines, shown)) + "\n", encoding="utf-8")
    draw_translations(folder / PICTURES[0], shown, f"{folder.name}: held-out sentences, evenly drawn")
    draw_attention(folder / PICTURES[1], model, tokenizer, _of_ten_words(model, tokenizer, sources))
    return {
        **score(said, pairs),
        "loss": ended.metrics["loss"],
        "token_accuracy": ended.metrics["token_accuracy"],
        "translated_pairs": len(pairs),
        "held_out_pairs": count,
        "languages": [task.settings.source, task.settings.target],
        "baseline": {
            "word_by_word": score([dictionary.translate(text, known) for text in sources], pairs),
            "copying": score(sources, pairs),
        },
        "pictures": list(PICTURES),
        "largest_logit_difference_of_saved_model": ended.difference,
    }


def _of_ten_words(model: Any, tokenizer: Any, sources: Sequence[str]) -> str:
    """A piece, as the model translates it at once, that can be looked at."""
    found = decode.pieces_of(model, tokenizer, sources, tokenizer.model_max_length)
    return min((piece for part in found for piece in part), key=lambda piece: abs(len(piece.split()) - 10))


def score(said: Sequence[str], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Of a whole corpus, as sacreBLEU has them, 0 to 100: BLEU (Post 2018, https://aclanthology.org/W18-6319) and chrF
    (Popović 2015, https://aclanthology.org/W15-3049), with the signatures that say how they were computed.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    references = [[pair.target for pair in pairs]]
    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(list(said), references).score,
        "chrf": chrf.corpus_score(list(said), references).score,
        "signatures": [str(bleu.get_signature()), str(chrf.get_signature())],
    }


# ---- pictures --------------------------------------------------------------------------------------


def _lines(row: Mapping[str, str]) -> str:
    return "\n".join(f"{name}: {row[name]}" for name in ("source", "target", "output"))


def draw_translations(path: Path, rows: Sequence[Mapping[str, str]], title: str) -> None:
    """Under each other: the source, how people translated it, and how the model does."""
    colours = {"source": "#444444", "target": "#1a7f37", "output": "#1f4e9c"}
    lines: list[tuple[str, str, str]] = []
    for row in rows:
        for name, colour in colours.items():
            text = textwrap.shorten(row[name], 3 * _WIDTH, placeholder=" …").replace("$", r"\$")
            for index, line in enumerate(textwrap.wrap(text, _WIDTH) or ["(nothing)"]):
                lines.append(({"target": "reference"}.get(name, name) if not index else "", line, colour))
        lines.append(("", "", "black"))
    height = 0.21 * len(lines) + 0.6
    figure = new_figure(11.5, height)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(len(lines), -0.5))
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    for place, (name, line, colour) in enumerate(lines):
        axes.text(0.0, place, name, fontsize=8, color=colour, fontweight="bold", va="center")
        axes.text(0.08, place, line, fontsize=8.5, color=colour, va="center")
    figure.savefig(path, dpi=110)


def draw_attention(path: Path, model: Any, tokenizer: Any, text: str) -> None:
    """How much each token that is written looks at each token that is read: the mean over heads and layers."""
    given = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokenizer.model_max_length)
    before = model.config._attn_implementation  # noqa: SLF001 - there is no other way to ask
    with torch.no_grad():
        ids = model.generate(**_named(given), num_beams=1, do_sample=False, max_new_tokens=40, max_length=None)
        model.set_attn_implementation("eager")  # others do not tell
        found = model(**_named(given), decoder_input_ids=ids[:, :-1], output_attentions=True)
    model.set_attn_implementation(before)
    weights = torch.stack(found.cross_attentions).mean((0, 2))[0].numpy()
    read, written = (_labels(tokenizer, each[0].tolist()) for each in (given["input_ids"], ids[:, 1:]))
    figure = new_figure(0.42 * len(read) + 2.5, 0.3 * len(written) + 2)
    axes = figure.add_subplot()
    drawn = axes.imshow(weights, cmap="Blues", vmin=0, vmax=max(0.5, float(weights.max())), aspect="auto")
    axes.set_xticks(range(len(read)), read, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(np.arange(len(written)), written, fontsize=9)
    axes.set(xlabel="read", ylabel="written", title="what each written token looks at")
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="attention, mean over heads and layers")
    figure.savefig(path, dpi=110)


def _named(given: Any) -> dict[str, torch.Tensor]:
    return {name: given[name] for name in ("input_ids", "attention_mask")}


def _labels(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    names = [tokenizer.decode([token]).strip() or "·" for token in ids]
    return [name.replace("$", r"\$") for name in names]


# ---- what the user is shown ------------------------------------------------------------------------


def tell(folder: Path, found: Mapping[str, Any], console: Console) -> None:
    """Show the figures, and some translations."""
    of = f" of {found['held_out_pairs']:,}" if found["translated_pairs"] < found["held_out_pairs"] else ""
    say(
        console,
        f"trained {found['step']} steps in {clock(found['training_seconds'])}; "
        f"on {found['translated_pairs']:,}{of} held-out texts:",
    )
    baselines = found["baseline"]
    for name, each in (
        ("this model", found),
        ("word by word", baselines["word_by_word"]),
        ("copying", baselines["copying"]),
    ):
        say(console, f"  {name:<14} BLEU {each['bleu']:4.1f}   chrF {each['chrf']:4.1f}")
    say_saved(console, "AutoModelForSeq2SeqLM", "logits", found["largest_logit_difference_of_saved_model"])
    for each in (folder / "translations.txt").read_text(encoding="utf-8").split("\n\n")[:_TOLD]:
        for line in each.strip().split("\n"):
            say(console, f"  {textwrap.shorten(line, 160, placeholder=' …')}")
    say(
        console,
        f"{folder}: model, tokenizer, translations.jsonl, translations.txt, metrics.jsonl, loss.png, "
        f"{', '.join(PICTURES)}, report.json",
    )
    say(console, f"serve it: headwater serve --model {folder}", whole=True)
