"""A tiny random Llama with a tiny tokenizer, as a Hugging Face folder, and chats to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from headwater_recipes.lm import model
from headwater_recipes.text.corpus import Corpus, Document
from headwater_recipes.text.tokenizer import END, train

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COLOURS = ("red", "green", "blue", "black")

TINY: dict[str, Any] = {
    "workers": 1,
    "servers": 1,
    "batch": 4,
    "seq": 48,
    "lr": 1e-2,
    "warmup": 2,
    "steps": 6,
    "log_every": 2,
    "save_every": 100,
    "validate_every": 100,
    "publish_every": 0,
    "precision": "float32",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """ChatML over bytes."""
    text = " ".join(f"user assistant Which colour has thing {i}? It is {COLOURS[i % 4]}." for i in range(40))
    made = train(Corpus((Document("text", text),), ()), 320)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    made.pad_token = END
    made.chat_template = TEMPLATE
    return made


def write_model(folder: Path) -> Path:
    """The whole model, in safetensors."""
    words = tokenizer()
    words.save_pretrained(folder)
    torch.manual_seed(0)
    configuration = model.config("tiny", len(words), 128)
    configuration.tie_word_embeddings = True
    configuration.eos_token_id = words.eos_token_id
    LlamaForCausalLM(configuration).save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 60) -> Path:
    """Questions whose answers can be learnt."""
    lines = [
        {"prompt": f"Which colour has thing {i}?", "response": f"It is {COLOURS[i % 4]}."}
        if i % 2
        else {
            "messages": [
                {"role": "user", "content": f"Which colour has thing {i}?"},
                {"role": "assistant", "content": f"It is {COLOURS[i % 4]}."},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
