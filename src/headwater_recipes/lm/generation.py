"""Continue a prompt with the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from headwater.errors import UsageError
from headwater_recipes.common.trainer import quiet
from headwater_recipes.lm import model, tokenizer


def generate_text(
    folder: Path, prompt: str, *, max_new_tokens: int = 200, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> str:
    """The prompt and its continuation.

    Args:
        folder: a run folder.
        max_new_tokens: how many tokens to add; fewer if the model ends the document. Beyond the length that the model
            was trained on, it goes on from the last half of that.
        temperature: 0 takes the likeliest token each time; 1 samples as the model says.
        top_k: sample among so many likeliest tokens.
        seed: the same seed, the same text.

    Raises:
        DataError: no model there. UsageError: an argument out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or top_k < 1:
        raise UsageError("max_new_tokens and top_k must be 1 or more, temperature 0 or more; nothing was generated")
    quiet()
    loaded, words = cast(Any, model.load(folder)).eval(), tokenizer.load(folder)
    end: int = words.get_vocab()[tokenizer.END]
    ids: list[int] = cast(Any, words)(prompt)["input_ids"] or [end]
    context: int = loaded.config.max_position_embeddings
    aim = len(ids) + max_new_tokens
    choice = {"do_sample": temperature > 0} | ({"temperature": temperature, "top_k": top_k} if temperature else {})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        while len(ids) < aim:
            seen = ids[-(context // 2) :] if len(ids) >= context else ids
            known = torch.tensor([seen])
            more = min(aim - len(ids), context - len(seen))
            made = loaded.generate(
                known, attention_mask=torch.ones_like(known), max_new_tokens=more, pad_token_id=end, **choice
            )
            ids += made[0, len(seen) :].tolist()
            if ids[-1] == end:
                break
    return cast(str, words.decode(ids, skip_special_tokens=True))
