"""Continue a prompt with a causal model."""

from __future__ import annotations

from typing import Any, cast

import torch

from headwater.errors import UsageError


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The prompt and its continuation.

    Args:
        max_new_tokens: how many tokens to add; fewer if the model ends the document. Beyond the length that the model
            was trained on, it goes on from the last half of that.
        temperature: 0 takes the likeliest token each time; 1 samples as the model says.
        top_k: sample among so many likeliest tokens.
        seed: the same seed, the same text.

    Raises:
        UsageError: an argument out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or top_k < 1:
        raise UsageError("max_new_tokens and top_k must be 1 or more, temperature 0 or more; nothing was generated")
    model = model.eval()
    end: int = tokenizer.eos_token_id
    ids: list[int] = tokenizer(prompt)["input_ids"] or [end]
    context: int = model.config.max_position_embeddings
    aim = len(ids) + max_new_tokens
    choice = {"do_sample": temperature > 0} | ({"temperature": temperature, "top_k": top_k} if temperature else {})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        while len(ids) < aim:
            seen = ids[-(context // 2) :] if len(ids) >= context else ids
            known = torch.tensor([seen])
            more = min(aim - len(ids), context - len(seen))
            made = model.generate(
                known, attention_mask=torch.ones_like(known), max_new_tokens=more, pad_token_id=end, **choice
            )
            ids += made[0, len(seen) :].tolist()
            if ids[-1] == end:
                break
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))
