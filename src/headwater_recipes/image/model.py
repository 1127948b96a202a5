"""The model: a ResNet of transformers from scratch, or a classifier that there is, with a head for these classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwater import pretrained
from headwater.errors import DataError

if TYPE_CHECKING:
    from transformers import ResNetForImageClassification


def labels(classes: Sequence[str]) -> dict[str, Any]:
    """What a configuration says of the classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}


def build(classes: Sequence[str], seed: int) -> ResNetForImageClassification:
    """A ResNet (He et al., 2015) of three stages of one basic block each, 0.3 million parameters.

    Its stem halves an image twice: 28 pixels are 7 before the first stage.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    configuration = ResNetConfig(
        num_channels=3,
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        **labels(classes),
    )
    return ResNetForImageClassification(configuration)


def read(folder: Path) -> Any:
    """The model of a run or checkpoint folder, in float32. Raises ``DataError`` if it is not whole."""
    from transformers import AutoModelForImageClassification

    return pretrained.load(AutoModelForImageClassification, str(folder), dtype=torch.float32, use_safetensors=True)


def begin(name: str, classes: Sequence[str], seed: int) -> Any:
    """A classifier that there is, to train on; its head is new if it tells another number of classes apart.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        DataError: there is no such model, or it cannot be read.
    """
    from transformers import AutoModelForImageClassification

    try:
        found = pretrained.load(AutoModelForImageClassification, name, dtype=torch.float32, use_safetensors=True)
    except DataError as error:
        raise DataError(f"--model {name}: {error}. Nothing was started.") from error
    torch.manual_seed(seed)
    configuration = type(found.config)(**found.config.to_dict() | labels(classes))
    fresh: Any = AutoModelForImageClassification.from_config(configuration)  # type: ignore[no-untyped-call]
    values = fresh.state_dict()
    kept = {key: value for key, value in found.state_dict().items() if value.shape == values[key].shape}
    fresh.load_state_dict(values | kept)
    return fresh
