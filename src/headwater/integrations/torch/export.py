"""A torch optimizer's state from the files that ``headwater export`` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from headwater.errors import DataError, UsageError


def load_optimizer_state(
    folder: str | Path, names: Sequence[Sequence[str]] | Sequence[str] | None = None
) -> dict[str, Any]:
    """What ``torch.optim.Optimizer.load_state_dict`` takes, of the optimizer that the table had.

    Args:
        folder: with ``optimizer.safetensors`` and ``optimizer.json``.
        names: the parameters' names in your optimizer's order, per group (or a list of names, for one group). Only
            needed if that order is not the one of ``model.named_parameters()`` within each group.

    Example:
        >>> opt = torch.optim.AdamW(model.parameters())          # doctest: +SKIP
        >>> opt.load_state_dict(load_optimizer_state("out"))     # doctest: +SKIP

    Raises:
        DataError: a file is missing or damaged.
        UsageError: ``names`` are not the table's, or grouped differently.
    """
    folder = Path(folder)
    try:
        tensors = load_file(folder / "optimizer.safetensors")
        rest = msgspec.json.decode((folder / "optimizer.json").read_bytes(), type=dict[str, Any])
        groups = [_group(group) for group in rest["param_groups"]]
        held: list[list[str]] = rest["names"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder}: the optimizer's state cannot be read ({error})") from error
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, slot = key.partition(".")
        state.setdefault(int(index), {})[slot] = tensor
    if names is not None:
        state = _renumbered(state, held, _grouped(names))
    return {"state": state, "param_groups": groups}


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples: ``betas`` becomes one again."""
    return {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}


def _grouped(names: Sequence[Sequence[str]] | Sequence[str]) -> list[list[str]]:
    if all(isinstance(name, str) for name in names):
        return [[str(name) for name in names]]
    return [list(group) for group in names]


def _renumbered(
    state: Mapping[int, dict[str, torch.Tensor]], held: list[list[str]], wanted: list[list[str]]
) -> dict[int, dict[str, torch.Tensor]]:
    if [sorted(group) for group in held] != [sorted(group) for group in wanted]:
        raise UsageError(
            f"names: the exported groups hold {[len(group) for group in held]} parameters, such as {held[0][:3]}; "
            "give the same names in the same groups"
        )
    number = {name: index for index, name in enumerate(chain.from_iterable(held))}
    order = [number[name] for name in chain.from_iterable(wanted)]
    return {new: state[old] for new, old in enumerate(order) if old in state}
