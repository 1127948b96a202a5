"""LoRA: the pretrained values stay as they are, and a few small matrices beside them are trained. The file of ``peft``.

The run folder is then what ``peft`` writes (``adapter_config.json``, ``adapter_model.safetensors``), the pretrained
model lying in ``base/``: so ``PeftModel`` and ``AutoModelForCausalLM`` load it, with the names of the table.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from headwater import pretrained
from headwater.errors import DataError, UsageError
from headwater_recipes.finetune.settings import FinetuneSettings

BASE = "base"
"""The folder of the pretrained model, in the run folder."""


def wrap(model: Any, settings: FinetuneSettings) -> Any:
    """The model, changed, with a fresh adapter, whose first values depend on the seed only.

    Raises:
        UsageError: ``peft`` is not installed, or finds no module by the names of --lora-targets.
    """
    peft = _peft()
    targets = settings.lora_targets
    config = peft.LoraConfig(
        r=settings.lora,
        lora_alpha=settings.lora_alpha or 2 * settings.lora,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will go
            torch.manual_seed(settings.seed)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"--lora-targets {targets}: {error}; nothing was started") from error


def write(model: Any, folder: Path, run: Path) -> None:
    """The adapter's values and its description, which says where in the run folder ``run`` the model itself is."""
    peft = _peft()
    values = peft.get_peft_model_state_dict(model)
    save_file(values, folder / "adapter_model.safetensors")
    config = model.peft_config["default"]
    config.base_model_name_or_path = str((run / BASE).resolve())
    config.save_pretrained(folder)


def read(model: Any, folder: Path) -> None:
    """Give the adapter of ``model`` the values that ``write`` wrote.

    Raises:
        DataError: the file is missing or damaged, or has not all of the values.
    """
    try:
        values = pretrained.read_file(folder / "adapter_model.safetensors")
        pretrained.check_adapter(model, folder)
    except DataError as error:
        raise DataError(f"{error}. The run cannot go on from it.") from error
    _peft().set_peft_model_state_dict(model, values)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("--lora needs peft; nothing was started. Install it: pip install 'headwater[lora]'") from error
    return peft
