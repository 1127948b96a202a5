"""From a model to a table: which tensors, under which names, in which groups, filled how. No network here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from headwater.errors import ShapeMismatch, UnknownOptimizer, UsageError
from headwater.integrations.torch.parameters import span
from headwater.integrations.torch.wrappers import named_parameters
from headwater.types import Init, ParameterSpec
from headwater.wire import optimizers
from headwater.wire.tensors import dtype_name

Inits = Init | Mapping[str, Init] | None
"""How the parameters start: the model's own values, one initialiser, or one per glob pattern of names."""

_VALUES = Init("values")


class Setup(NamedTuple):
    """What a model's optimizer will hold, before any server heard of it.

    ``parameters`` are all tensors of the groups by name, the model's in registration order and then those that are
    not the model's, each once; ``groups`` the parameter groups and ``defaults`` the defaults as the torch optimizer
    itself would have them. ``inner``: that optimizer, where the servers have none of its kind.
    """

    parameters: dict[str, torch.Tensor]
    groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    inner: torch.optim.Optimizer | None = None


def trainable(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that a table has to hold. Raises ``UsageError`` for what no table can, or if there is none."""
    held = {name: p for name, p in parameters.items() if p.requires_grad or p.grad is not None}
    if not held:
        raise UsageError("the model has no trainable parameter; nothing was created")
    for name, p in held.items():
        _check_kind(name, p)
    _check_overlap(held)
    return held


def check_forwards(model: torch.nn.Module) -> None:
    """With several workers: raises ``UsageError`` for a module whose forward writes its parameter, each another way."""
    for name, module in model.named_modules():
        writes = isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.max_norm is not None
        if writes and module.weight.requires_grad:
            raise UsageError(
                f"module {name!r} has max_norm={module.max_norm}: each forward writes the rows that this worker's "
                "batch uses, so that workers' parameters part. Leave max_norm out, and clip all rows between two steps"
            )


def specs(
    parameters: Mapping[str, torch.Tensor], groups: Sequence[Mapping[str, Any]], init: Inits
) -> tuple[ParameterSpec, ...]:
    """One ``ParameterSpec`` per parameter, in their order.

    Raises:
        ShapeMismatch: a dtype that no table holds.
        UsageError: a parameter on the meta device for which ``init`` says nothing.
    """
    group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
    return tuple(
        ParameterSpec(name, _shape(p), _dtype(name, p), group_of[id(p)], _init_of(name, p, init))
        for name, p in parameters.items()
    )


def _shape(p: torch.Tensor) -> tuple[int, ...]:
    """A table holds a complex number as two real ones, as torch's optimizers step it."""
    return (*p.shape, 2) if p.is_complex() else tuple(p.shape)


def set_up(
    model: torch.nn.Module,
    optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
    params: Any,
    args: Sequence[Any],
    hyper: Mapping[str, Any],
) -> Setup:
    """Sort out the parameters of ``model`` and their groups.

    ``params`` is None (all parameters, one group) or what a torch optimizer takes: tensors, (name, tensor) pairs or
    group dictionaries, of the model or beside it. ``args``: the optimizer's arguments by position, behind ``params``.
    ``optimizer`` may be made already, if it is one that runs at the worker.

    Raises:
        UsageError: a tensor that is given twice.
        UnknownOptimizer: torch refuses the hyperparameters, or the servers do.
    """
    named: dict[str, torch.Tensor] = dict(named_parameters(model))
    groups = [_listed(group) for group in _as_groups(model, params)]
    given = {id(p): p for group in groups for p in group["params"]}
    for name, p in named.items():
        if id(p) in given and isinstance(p, torch.nn.parameter.UninitializedParameter):
            raise UsageError(f"parameter {name!r} has no shape yet: run one forward through the lazy module first")
    if len(given) != sum(len(group["params"]) for group in groups):
        raise UsageError("params names a parameter twice; each belongs to one group")
    own = {id(p) for p in named.values()}
    beside = [p for key, p in given.items() if key not in own]
    parameters = {name: p for name, p in named.items() if id(p) in given}
    parameters |= {f"beside.{number}": p for number, p in enumerate(beside)}
    if isinstance(optimizer, torch.optim.Optimizer):
        return Setup(parameters, optimizer.param_groups, optimizer.defaults, optimizer)
    hyper = _by_name(optimizer, args, hyper)
    if not on_servers(optimizer):
        inner = _built(optimizer, groups, hyper)
        return Setup(parameters, inner.param_groups, inner.defaults, inner)
    full, defaults = complete_groups(optimizer, groups, hyper)
    return Setup(parameters, full, defaults)


def on_servers(optimizer: Any) -> bool:
    """Whether the servers have this very class: no code crosses the wire."""
    name = getattr(optimizer, "__name__", "")
    return name in optimizers.KNOWN and getattr(torch.optim, name, None) is optimizer


def _by_name(
    optimizer: type[torch.optim.Optimizer], args: Sequence[Any], hyper: Mapping[str, Any]
) -> Mapping[str, Any]:
    if not args:
        return hyper
    if not isinstance(optimizer, type):
        raise UsageError(f"headwater.Optimizer takes a class of optimizers second, not {optimizer!r}")
    takes = [name for name in inspect.signature(optimizer.__init__).parameters if name not in ("self", "params")]
    if len(args) > len(takes):
        raise UsageError(f"{optimizer.__name__} takes {len(takes)} arguments behind params, not {len(args)}")
    placed = dict(zip(takes, args, strict=False))
    twice = placed.keys() & hyper.keys()
    if twice:
        raise UsageError(f"{optimizer.__name__}: {min(twice)} is given by position and by name")
    return {**placed, **hyper}


def _built(
    optimizer: type[torch.optim.Optimizer], groups: Sequence[dict[str, Any]], hyper: Mapping[str, Any]
) -> torch.optim.Optimizer:
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise UsageError(
            f"headwater.Optimizer takes a class of optimizers second, not {optimizer!r}; one that is made already goes "
            "into headwater.wrap(optimizer, model)"
        )
    build: Any = optimizer
    plain = len(groups) == 1 and groups[0].keys() == {"params"}
    try:
        built: torch.optim.Optimizer = build(groups[0]["params"] if plain else groups, **hyper)
    except (TypeError, ValueError) as error:
        raise UnknownOptimizer(f"{optimizer.__name__} refuses its arguments: {error}") from error
    return built


def complete_groups(
    optimizer: type[torch.optim.Optimizer], groups: Sequence[Mapping[str, Any]], hyper: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The parameter groups and the defaults that ``optimizer(groups, **hyper)`` would have, checked as it does.

    The torch optimizer is built on meta tensors, so that it allocates no state.
    """
    name = optimizer.__name__
    given = [{key: value for key, value in group.items() if key not in ("params", "fused")} for group in groups]
    shells = [[_shell(p) for p in group["params"]] for group in groups]
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


def _shell(p: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(_shape(p), dtype=p.real.dtype if p.is_complex() else p.dtype, device="meta"))


def materialise(parameters: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
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
        return [{"params": list(model.parameters())}]
    if isinstance(params, torch.Tensor | Mapping | str):
        raise UsageError(f"params must be a list of groups or of parameters, not {type(params).__name__}")
    items = list(params)
    if items and all(isinstance(item, Mapping) for item in items):
        return [dict(item) for item in items]
    return [{"params": items}]


def _listed(group: dict[str, Any]) -> dict[str, Any]:
    """The group with a list of tensors."""
    params = group.get("params")
    if params is None or isinstance(params, set):
        raise UsageError("a parameter group is {'params': [the model's parameters, in order], 'lr': …}")
    tensors = [params] if isinstance(params, torch.Tensor) else list(params)
    tensors = [item[1] if isinstance(item, tuple) else item for item in tensors]
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"params holds {tensor!r}, which is no tensor")
    return {**group, "params": tensors}


def _check_kind(name: str, parameter: torch.Tensor) -> None:
    if not parameter.is_leaf:
        raise UsageError(f"parameter {name!r} was computed from others (it is no leaf), so it cannot be trained itself")
    if parameter.device.type == "cpu" and parameter.is_shared():  # type: ignore[no-untyped-call]
        raise UsageError(
            f"parameter {name!r} is in memory that processes share (share_memory()); Headwater's workers share "
            "parameters through the servers, and would cut it off from the other processes. Start the workers with "
            "`headwater run --workers N`, each with a model of its own"
        )
    if parameter.layout is not torch.strided or type(parameter.data) is not torch.Tensor:
        raise UsageError(
            f"parameter {name!r} is a {type(parameter.data).__name__} ({parameter.layout}); a table holds plain "
            "dense tensors"
        )


def _check_overlap(parameters: Mapping[str, torch.Tensor]) -> None:
    """Two parameters over the same memory are one variable; the servers would give them two."""
    spans = []
    for name, p in parameters.items():
        if not p.is_meta and p.numel():
            spans.append((str(p.device), *span(p), name))
    spans.sort()
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < stop:
            raise UsageError(
                f"parameters {name!r} and {other!r} share memory without being the same parameter. Tie them: "
                f"assign one nn.Parameter to both places (a.weight = b.weight), or give them memory of their own"
            )


def _dtype(name: str, parameter: torch.Tensor) -> str:
    try:
        return dtype_name(parameter.real.dtype if parameter.is_complex() else parameter.dtype)
    except ShapeMismatch as error:
        raise ShapeMismatch(f"parameter {name!r}: {error}") from error


def _init_of(name: str, parameter: torch.Tensor, init: Inits) -> Init:
    found = init if isinstance(init, Init) else _VALUES
    if isinstance(init, Mapping):
        found = next((how for pattern, how in init.items() if fnmatchcase(name, pattern)), _VALUES)
    if found.kind == "values" and parameter.is_meta:
        raise UsageError(
            f"parameter {name!r} is on the meta device and has no values; say how it starts: init={{{name!r}: "
            "headwater.init.normal(0.02), …}"
        )
    return found
