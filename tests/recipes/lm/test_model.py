from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from headwater.errors import UsageError
from headwater_recipes.common import trainer
from headwater_recipes.lm import model
from headwater_recipes.lm.settings import PRESETS, LmSettings
from headwater_recipes.lm.task import LanguageModel


def test_a_preset_is_called_by_its_millions_of_parameters() -> None:
    for preset in set(PRESETS) - {"tiny"}:
        made = model.empty(model.config(preset))
        size = sum(p.numel() for p in made.parameters())
        assert round(size / 1e6) == int(preset.removesuffix("m"))


def test_parameters_wait_on_the_meta_device_for_the_servers() -> None:
    made = model.empty(model.config("tiny", 300, 32))
    assert all(p.is_meta for p in made.parameters())
    assert not any(b.is_meta for b in made.buffers())
    for name, _ in made.named_parameters():
        kind = next(init.kind for pattern, init in model.initialisers().items() if fnmatchcase(name, pattern))
        assert kind == ("ones" if "norm" in name else "normal")


def test_gains_do_not_decay(run: Path) -> None:
    made = model.empty(model.config("tiny", 300, 32))
    matrices, gains = LanguageModel(LmSettings(seq=16, weight_decay=0.1), run).groups(made)
    assert (matrices["weight_decay"], gains["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in gains["params"]} == {1}
    assert len(matrices["params"]) + len(gains["params"]) == len(list(made.parameters()))


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="'huge' is none of tiny"):
        model.config("huge")


def test_precision_is_a_fact_of_the_processor() -> None:
    assert trainer.fast_bfloat16() is trainer.fast_bfloat16()
    assert torch.get_num_threads() == 1
