"""What a program has learnt: the parameters of its modules, its own tensors, its losses. Called as its last line."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import save_file


def save(names: dict[str, Any]) -> None:
    found: dict[str, torch.Tensor] = {}
    for name, value in names.items():
        if isinstance(value, torch.nn.Module):
            found |= {f"{name}.{key}": each for key, each in value.named_parameters()}
            found |= {f"buffer {name}.{key}": each for key, each in value.named_buffers()}
        elif isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf:
            found[name] = value
        elif name == "losses":
            found[name] = torch.tensor([float(each) for each in value], dtype=torch.float64)
    path = os.environ["SCRIPTS_OUT"].format(rank=os.environ.get("RANK", "0"))
    save_file({name: _plain(value) for name, value in found.items()}, path)


def _plain(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return (torch.view_as_real(value) if value.is_complex() else value).clone(memory_format=torch.contiguous_format)
