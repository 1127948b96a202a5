"""From a model to a table: which tensors, under which names, in which groups, filled how. No network here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from headwater.errors import ShapeMismatch, UnknownOptimizer, UsageError
from headwater.types import Init, OptimizerSpec, ParameterSpec
from headwater.wire import optimizers
from headwater.wire.tensors import dtype_name

Inits = Init | Mapping[str, Init] | None
"""How the parameters start: the model's own values, one initialiser, or one per glob pattern of names."""

_VALUES = Init("values")


class Plan(NamedTuple):
    """What a model's optimizer will hold, before any server heard of it.

    ``parameters`` are the model's trainable tensors by name, in registration order, each once; ``groups`` the
    parameter groups and ``defaults`` the defaults as the torch optimizer itself would have them; ``frozen`` the
    parameters that are left out because they need no gradient.
    """

    parameters: dict[str, torch.nn.Parameter]
    groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    frozen: dict[str, torch.nn.Parameter]

    def specs(self, init: Inits) -> tuple[ParameterSpec, ...]:
        """One ``ParameterSpec`` per parameter, in registration order.

        Raises:
            ShapeMismatch: a dtype that no table holds.
            UsageError: a parameter on the meta device for which ``init`` says nothing.
        """
        group_of = {id(p): index for index, group in enumerate(self.groups) for p in group["params"]}
        return tuple(
            ParameterSpec(name, tuple(p.shape), _dtype(name, p), group_of[id(p)], _init_of(name, p, init))
            for name, p in self.parameters.items()
        )


def plan(model: torch.nn.Module, optimizer: type[torch.optim.Optimizer], params: Any, hyper: Mapping[str, Any]) -> Plan:
    """Sort out the parameters of ``model`` and their groups.

    ``params`` is None (all trainable parameters, one group) or what a torch optimizer takes: tensors, (name,
    tensor) pairs or group dictionaries, all of them the model's own. Frozen parameters among them are left out.

    Raises:
        UsageError: a tensor that is not the model's, given twice, overlapping another one in memory, or of a
            kind that a table cannot hold.
        UnknownOptimizer: not in the closed list, or torch refuses the hyperparameters.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"headwater.Optimizer takes the model first, not {type(model).__name__}: parameters are known by their "
            "names in it. Parameter groups go into params=[{'params': …, 'lr': …}, …]"
        )
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    groups = [_own(group, names) for group in _as_groups(model, params)]
    chosen = {id(p) for group in groups for p in group["params"]}
    if len(chosen) != sum(len(group["params"]) for group in groups):
        raise UsageError("params names a parameter twice; each belongs to one group")
    if not chosen:
        raise UsageError("the model has no trainable parameter; nothing was created")
    held = {name: p for name, p in named.items() if id(p) in chosen}
    for name, p in held.items():
        _check_kind(name, p)
    _check_overlap(held)
    frozen = {name: p for name, p in named.items() if not p.requires_grad}
    full, defaults = complete_groups(optimizer, groups, hyper)
    return Plan(held, full, defaults, frozen)


def complete_groups(
    optimizer: type[torch.optim.Optimizer], groups: Sequence[Mapping[str, Any]], hyper: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The parameter groups and the defaults that ``optimizer(groups, **hyper)`` would have, checked as it does.

    The torch optimizer is built on meta tensors, so that it allocates no state.
    """
    name = getattr(optimizer, "__name__", str(optimizer))
    optimizers.info(name)
    if getattr(torch.optim, name, None) is not optimizer:
        raise UnknownOptimizer(
            f"{optimizer!r} is not torch.optim.{name}: no code crosses the wire, so servers run only their own list"
        )
    given = [{key: value for key, value in group.items() if key not in ("params", "fused")} for group in groups]
    shells = [[torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]] for group in groups]
    plain = {key: value for key, value in hyper.items() if key != "fused"}
    build: Any = optimizer
    try:
        built = build([{"params": p, **rest} for p, rest in zip(shells, given, strict=True)], **plain)
    except (TypeError, ValueError) as error:
        raise UnknownOptimizer(f"torch.optim.{name} refuses its arguments: {error}") from error
    complete = []
    for full, group in zip(built.param_groups, groups, strict=True):
        fused = group.get("fused", hyper.get("fused"))
        # Meta tensors have no fused kernels, so torch could not be asked about this one.
        if fused is not None:
            full["fused"] = fused
        complete.append({**full, "params": list(group["params"])})
        optimizers.complete(name, optimizers.select(name, full))
    return complete, {**built.defaults, **({"fused": hyper["fused"]} if "fused" in hyper else {})}


def optimizer_spec(name: str, groups: Sequence[Mapping[str, Any]]) -> OptimizerSpec:
    """The groups' hyperparameters as they travel."""
    return OptimizerSpec(name, tuple(optimizers.select(name, group) for group in groups))


def materialise(parameters: Iterable[torch.nn.Parameter], values: Iterable[torch.Tensor]) -> None:
    """Let every parameter be the table's own memory: the same object as before, at another address.

    A parameter on the meta device gets memory for the first time; a swap keeps its identity, so that tied
    modules and parameter groups stay right.
    """
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.is_meta:
            fresh = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, fresh)  # type: ignore[no-untyped-call]
        else:
            parameter.data = value


def _as_groups(model: torch.nn.Module, params: Any) -> list[dict[str, Any]]:
    if params is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if isinstance(params, torch.Tensor | Mapping | str):
        raise UsageError(f"params must be a list of groups or of parameters, not {type(params).__name__}")
    items = list(params)
    if items and all(isinstance(item, Mapping) for item in items):
        return [dict(item) for item in items]
    return [{"params": items}]


def _own(group: dict[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """The group with its trainable parameters only, each of them the model's."""
    params = group.get("params")
    if params is None or isinstance(params, set):
        raise UsageError("a parameter group is {'params': [the model's parameters, in order], 'lr': …}")
    tensors = [params] if isinstance(params, torch.Tensor) else list(params)
    tensors = [item[1] if isinstance(item, tuple) else item for item in tensors]
    for tensor in tensors:
        if id(tensor) not in names:
            what = f"a tensor of shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else repr(tensor)
            raise UsageError(f"params holds {what}, which is not a parameter of the model")
    return {**group, "params": [tensor for tensor in tensors if tensor.requires_grad]}


def _check_kind(name: str, parameter: torch.nn.Parameter) -> None:
    if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
        raise UsageError(f"parameter {name!r} has no shape yet: run one forward through the lazy module first")
    if parameter.layout is not torch.strided or type(parameter.data) is not torch.Tensor:
        raise UsageError(
            f"parameter {name!r} is a {type(parameter.data).__name__} ({parameter.layout}); a table holds plain "
            "dense tensors"
        )


def _check_overlap(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Two parameters over the same memory are one variable; the servers would give them two."""
    spans = []
    for name, p in parameters.items():
        if not p.is_meta and p.numel():
            last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size(), name))
    spans.sort()
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < stop:
            raise UsageError(
                f"parameters {name!r} and {other!r} share memory without being the same parameter. Tie them: "
                f"assign one nn.Parameter to both places (a.weight = b.weight), or give them memory of their own"
            )


def _dtype(name: str, parameter: torch.nn.Parameter) -> str:
    try:
        return dtype_name(parameter.dtype)
    except ShapeMismatch as error:
        raise ShapeMismatch(f"parameter {name!r}: {error}") from error


def _init_of(name: str, parameter: torch.nn.Parameter, init: Inits) -> Init:
    found = init if isinstance(init, Init) else _VALUES
    if isinstance(init, Mapping):
        found = next((how for pattern, how in init.items() if fnmatchcase(name, pattern)), _VALUES)
    if found.kind == "values" and parameter.is_meta:
        raise UsageError(
            f"parameter {name!r} is on the meta device and has no values; say how it starts: init={{{name!r}: "
            "headwater.init.normal(0.02), …}"
        )
    return found
