"""Where the pretrained model comes from: a package, a folder, a GGUF file, the hub.

Values become float32, in which the servers keep them. Nothing pickled is read, and no code that a model brings along
is run.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch

from headwater import pretrained
from headwater.errors import DataError
from headwater_recipes.finetune import adapter
from headwater_recipes.finetune.settings import FinetuneSettings

SMOLLM2 = "smollm2"
"""The default model, SmolLM2-135M-Instruct (Apache-2.0), by this name."""

_SHORT = 512
"""Up to so many tokens plain attention is faster on a CPU than the fused kernel's backward."""


def smollm2() -> Path:
    """The GGUF file of the default model. Raises ``DataError`` if its package is not installed."""
    return pretrained.packaged(SMOLLM2)


def load(name: str) -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer.

    Args:
        name: ``smollm2``, a Hugging Face folder, a ``.gguf`` file, or a name on the hub.

    Raises:
        DataError: there is no such model, or it cannot be read.
    """
    path = smollm2() if name == SMOLLM2 else Path(name)
    try:
        if path.suffix == ".gguf":
            return _from_gguf(path)
        return _from_pretrained(str(path))
    except DataError as error:
        known = path.is_file() or any(path.glob("*.safetensors"))
        others = (
            "a Hugging Face folder with safetensors, a .gguf file, or a name on the hub that can be reached from here"
        )
        remedy = "" if known else f"; give {others}"
        raise DataError(f"--model {name}: {error}. Nothing was started{remedy}.") from error


def _from_pretrained(name: str, **options: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    model = pretrained.load(AutoModelForCausalLM, name, dtype=torch.float32, use_safetensors=True, **options)
    return model, pretrained.load_tokenizer(name, **options)


def _from_gguf(path: Path) -> tuple[Any, Any]:
    """Dequantised: a plain model that knows nothing of the file any more, and so can be saved."""
    if not path.is_file():
        raise DataError("no such file")
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else turns off
        found, tokenizer = _from_pretrained(str(path.parent), gguf_file=path.name)
    described = found.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        described.pop(name, None)
    model = type(found)(type(found.config).from_dict(described))
    model.load_state_dict(found.state_dict())
    model.generation_config = found.generation_config
    return model, tokenizer


def read(folder: Path, seq: int | None = None) -> Any:
    """The model of a folder that this recipe wrote; ``seq``: the tokens of the longest example to train on.

    Raises:
        DataError: the folder's model is not whole.
    """
    from transformers import AutoModelForCausalLM

    model = pretrained.load(AutoModelForCausalLM, str(folder), dtype=torch.float32, use_safetensors=True)
    if seq is not None and seq <= _SHORT:
        model.set_attn_implementation("eager")
    return model


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a run folder. Raises ``DataError`` if it cannot be read."""
    return pretrained.load_tokenizer(str(folder))


def read_model(folder: Path, found: Path | None, settings: FinetuneSettings) -> Any:
    """The model of the checkpoint ``found``; without one, that which the run began with."""
    if not settings.lora:
        return read(found or folder, settings.seq)
    model = adapter.wrap(read(folder / adapter.BASE, settings.seq), settings)
    if found is not None:
        adapter.read(model, found)
    return model
