"""After training: the figures beside the baselines, the pictures, and what it is most wrong about."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console

from headwater import pretrained
from headwater_recipes.common import checkpoint
from headwater_recipes.common.pictures import draw_confusion
from headwater_recipes.common.stages import clock, say, say_saved
from headwater_recipes.common.task import Ended
from headwater_recipes.text import classified, classifying, encoder, pictures
from headwater_recipes.text.labelled import Row

if TYPE_CHECKING:
    from headwater_recipes.sentiment.task import Sentiment

PICTURES = ("confusion.png", "words.png")
_SHOWN = 3
_TOLD = 20
_BARS = 15


def figures(task: Sentiment, ended: Ended) -> dict[str, Any]:
    """For ``report.json``; draws the pictures and writes ``mistakes.json``."""
    folder = task.folder
    model = task.read(folder).eval()
    names = encoder.class_names(model)
    counts = np.zeros((len(names), len(names)), np.int64)
    found = classifying.confusion(ended.sums)
    counts[: len(found), : len(found)] = found
    accuracy, held = ended.metrics["accuracy"], int(counts.sum())
    draw_confusion(folder / PICTURES[0], counts, names, f"{folder.name}: {held:,} held-out texts, {accuracy:.1%} right")
    title = "words that alone are taken for a class, and how surely"
    pictures.telling_words(folder / PICTURES[1], telling(model, folder, names), title)
    checkpoint.write_json(folder / "mistakes.json", mistakes(task.said(model), folder, names))
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": float(np.sqrt(accuracy * (1 - accuracy) / max(1, held))),
        "macro_f1": ended.metrics["macro_f1"],
        "validation_loss": ended.metrics["loss"],
        "held_out_texts": held,
        "classes": names,
        "baseline": msgspec.json.decode((folder / "baseline.json").read_bytes()),
        "pictures": list(PICTURES),
        "largest_logit_difference_of_saved_model": ended.difference,
    }


def telling(model: Any, folder: Path, names: list[str]) -> dict[str, list[tuple[str, float]]]:
    """Of each class the words of the training texts that the model, given one alone, takes for it most surely."""
    words: list[str] = msgspec.json.decode((folder / "words.json").read_bytes())
    if not words:
        return {name: [] for name in names}
    tokenizer = pretrained.load_tokenizer(str(folder))
    tokens = classified.encode(tokenizer, [Row(word, names[0]) for word in words], names, tokenizer.model_max_length)
    shares = _softmax(classifying.all_logits(model, tokens.texts, int(model.config.pad_token_id)))
    found = {}
    for index, name in enumerate(names):
        order = np.argsort(-shares[:, index], kind="stable")[:_BARS]
        found[name] = [(words[i], float(shares[i, index])) for i in order]
    return found


def mistakes(logits: npt.NDArray[np.float32], folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Held-out texts that another class than theirs was said of, the surest first."""
    lines = (folder / "held_out.jsonl").read_bytes().split(b"\n")
    rows = [msgspec.json.decode(line) for line in lines if line]
    shares = _softmax(logits)
    said = shares.argmax(1)
    wrong = [i for i, row in enumerate(rows) if names[said[i]] != row["label"]]
    wrong.sort(key=lambda i: -float(shares[i].max()))
    return [{**rows[i], "said": names[said[i]], "share": round(float(shares[i].max()), 4)} for i in wrong[:_TOLD]]


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    raised = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    shares: npt.NDArray[np.float64] = raised / raised.sum(1, keepdims=True)
    return shares


def tell(folder: Path, found: Mapping[str, Any], console: Console) -> None:
    """Show the figures, and what it is most wrong about."""
    say(
        console,
        f"trained {found['step']} steps in {clock(found['training_seconds'])}; "
        f"on {found['held_out_texts']:,} held-out texts of {len(found['classes'])} classes:",
    )
    tfidf, majority = (found["baseline"][name] for name in ("tfidf_logistic_regression", "majority"))
    for name, score in (("this model", found), ("TF-IDF + logistic regression", tfidf), ("commonest class", majority)):
        say(console, f"  {name:<29} accuracy {score['accuracy']:.1%}   macro-F1 {score['macro_f1']:.3f}")
    say_saved(console, "AutoModelForSequenceClassification", "logits", found["largest_logit_difference_of_saved_model"])
    for each in msgspec.json.decode((folder / "mistakes.json").read_bytes())[:_SHOWN]:
        text = textwrap.shorten(each["text"], 160, placeholder=" …")
        say(console, f"  {each['label']}, taken for {each['said']} ({each['share']:.0%}): {text}")
    say(
        console,
        f"{folder}: model, tokenizer, mistakes.json, metrics.jsonl, loss.png, {', '.join(PICTURES)}, report.json",
    )
    say(console, f"serve it: headwater serve --model {folder}", whole=True)
