"""The model: a ResNet of transformers whose pooled output, of length one, is where a face lies; and its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from headwater import pretrained


def build(seed: int) -> Any:
    """A ``transformers.ResNetModel`` of three stages of one basic block each, 0.3 million parameters."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(seed)
    return ResNetModel(
        ResNetConfig(
            num_channels=3, embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic"
        )
    )


def read(folder: Path) -> Any:
    """The model of a run or checkpoint folder, in float32. Raises ``DataError`` if it is not whole."""
    from transformers import AutoModel

    return pretrained.load(AutoModel, str(folder), dtype=torch.float32, use_safetensors=True)


def embed(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, S, S) to (N, D) vectors of length one: the cosine of two says how alike the faces are."""
    return F.normalize(model(pixel_values=pixels).pooler_output.flatten(1).float())


def embed_both(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """As ``embed``, of the mean over a face and its mirror image, for judging and answering."""
    return F.normalize(embed(model, pixels) + embed(model, pixels.flip(3)))


def contrast(vectors: torch.Tensor, labels: torch.Tensor, margin: float, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss (Khosla and others, 2020, equation 2), where the cosine of two images of one person
    is lessened by a margin first, as in CosFace (Wang and others, 2018). Summed over the N images.

    Args:
        vectors: (N, D), of length one.
        labels: (N,) of persons. An image without another of its person counts for nothing.
    """
    itself = torch.eye(len(labels), dtype=torch.bool)
    same = (labels[:, None] == labels[None]) & ~itself
    alike = (vectors @ vectors.T - margin * same) / temperature
    likelihood = alike - alike.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return -(likelihood.masked_fill(~same, 0).sum(1) / same.sum(1).clamp(min=1)).sum()
