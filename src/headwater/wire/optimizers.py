"""The closed list of server-side optimizers: names, defaults, checks. Light to import: no torch.

An optimizer crosses the wire as a name and numbers, never as code. ``KNOWN`` lists every name a server
accepts: the element-wise and matrix optimizers of ``torch.optim`` with the defaults of their signatures,
and ``Assign`` (value := aggregate), which module buffers use.

To add one: a line in ``KNOWN``, and in ``_NUMBER``, ``_TUPLE``, ``_FLAGS`` or ``_CHOICES`` for each hyperparameter that
no other has. If it is in ``torch.optim`` that is all: servers run torch's own class, one small instance after the
other. For a faster one, and for one that torch does not have, write a ``Kernel`` and enter it in ``FLAT`` (both in the
servers' ``kernels.py``). ``headwater.Optimizer`` takes classes of ``torch.optim``; others are named in an
``OptimizerSpec``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from headwater.errors import UnknownOptimizer
from headwater.types import DenseSpec, Hyper, OptimizerSpec, ParameterSpec

FLOATS = ("float64", "float32", "bfloat16", "float16")
"""The dtypes that an optimizer can step; ``Assign`` takes every dtype of ``types.ITEMSIZE``."""

_NUMBER: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda v: v >= 0, "0 or more"),
    "weight_decay": (lambda v: v >= 0, "0 or more"),
    "momentum": (lambda v: v >= 0, "0 or more"),
    "dampening": (lambda v: True, "a number"),
    "eps": (lambda v: v >= 0, "0 or more"),
    "lr_decay": (lambda v: v >= 0, "0 or more"),
    "initial_accumulator_value": (lambda v: v >= 0, "0 or more"),
    "alpha": (lambda v: v >= 0, "0 or more"),
    "rho": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "momentum_decay": (lambda v: v >= 0, "0 or more"),
    "lambd": (lambda v: True, "a number"),
    "t0": (lambda v: v > 0, "above 0"),
    "beta2_decay": (lambda v: v <= 0, "0 or less"),
    "d": (lambda v: v >= 1, "1 or more"),
    "ns_steps": (lambda v: 0 < v < 100 and v == int(v), "a whole number from 1 to 99"),
}
_TUPLE: dict[str, tuple[int, Callable[[tuple[float, ...]], bool], str]] = {
    "betas": (2, lambda v: all(0 <= b < 1 for b in v), "two numbers, 0 or more and below 1"),
    "etas": (2, lambda v: 0 < v[0] < 1 < v[1], "two numbers, 0 < first < 1 < second"),
    "step_sizes": (2, lambda v: 0 <= v[0] <= v[1], "two numbers, 0 <= first <= second"),
    "ns_coefficients": (3, lambda v: True, "three numbers"),
}
_FLAGS = frozenset({"nesterov", "maximize", "amsgrad", "centered", "decoupled_weight_decay"})
_CHOICES: dict[str, tuple[Hyper, ...]] = {
    "fused": (None, True, False),
    "adjust_lr_fn": (None, "original", "match_rms_adamw"),
}
_DROPPED = ("foreach", "capturable", "differentiable")


@dataclass(frozen=True)
class OptimizerInfo:
    """One entry of the closed list.

    ``defaults`` are those of the ``torch.optim`` signature, without ``foreach``, ``capturable`` and
    ``differentiable``, which mean nothing on a server. ``whole_tensor``: an update mixes the elements of a
    parameter, so a parameter must lie whole in one shard. ``slots``: state elements per parameter element,
    from the hyperparameters (an upper bound; Adafactor's factored state is counted by ``slot_elements``).
    """

    name: str
    defaults: Mapping[str, Hyper] = field(default_factory=dict)
    whole_tensor: bool = False
    slots: Callable[[Mapping[str, Hyper]], int] = lambda hyper: 2


def _info(
    name: str,
    slots: int | Callable[[Mapping[str, Hyper]], int],
    whole_tensor: bool = False,
    **defaults: Hyper,
) -> tuple[str, OptimizerInfo]:
    count = (lambda hyper: slots) if isinstance(slots, int) else slots
    return name, OptimizerInfo(name, MappingProxyType(defaults), whole_tensor, count)


def _adam_slots(hyper: Mapping[str, Hyper]) -> int:
    return 2 + bool(hyper["amsgrad"])


def _sgd_slots(hyper: Mapping[str, Hyper]) -> int:
    return int(hyper["momentum"] != 0)


def _rmsprop_slots(hyper: Mapping[str, Hyper]) -> int:
    return 1 + (hyper["momentum"] != 0) + bool(hyper["centered"])


_BETAS = (0.9, 0.999)
KNOWN: Mapping[str, OptimizerInfo] = MappingProxyType(
    dict(
        (
            _info("SGD", _sgd_slots, lr=0.001, momentum=0, dampening=0, weight_decay=0, nesterov=False,
                  maximize=False, fused=None),
            _info("Adam", _adam_slots, lr=0.001, betas=_BETAS, eps=1e-08, weight_decay=0, amsgrad=False,
                  maximize=False, fused=None, decoupled_weight_decay=False),
            _info("AdamW", _adam_slots, lr=0.001, betas=_BETAS, eps=1e-08, weight_decay=0.01, amsgrad=False,
                  maximize=False, fused=None),
            _info("Adagrad", 1, lr=0.01, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10,
                  maximize=False, fused=None),
            _info("RMSprop", _rmsprop_slots, lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0,
                  centered=False, maximize=False),
            _info("Adadelta", 2, lr=1.0, rho=0.9, eps=1e-06, weight_decay=0, maximize=False),
            _info("Adamax", 2, lr=0.002, betas=_BETAS, eps=1e-08, weight_decay=0, maximize=False),
            _info("NAdam", 2, lr=0.002, betas=_BETAS, eps=1e-08, weight_decay=0, momentum_decay=0.004,
                  decoupled_weight_decay=False, maximize=False),
            _info("RAdam", 2, lr=0.001, betas=_BETAS, eps=1e-08, weight_decay=0, decoupled_weight_decay=False,
                  maximize=False),
            _info("Rprop", 2, lr=0.01, etas=(0.5, 1.2), step_sizes=(1e-06, 50), maximize=False),
            _info("ASGD", 1, lr=0.01, lambd=0.0001, alpha=0.75, t0=1000000.0, weight_decay=0, maximize=False),
            _info("Adafactor", 1, whole_tensor=True, lr=0.01, beta2_decay=-0.8, eps=(0.001,), d=1.0,
                  weight_decay=0.0, maximize=False),
            _info("Muon", 1, whole_tensor=True, lr=0.001, weight_decay=0.1, momentum=0.95, nesterov=True,
                  ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-07, ns_steps=5, adjust_lr_fn=None),
            _info("Assign", 0),
        )
    )
)  # fmt: skip
"""Every optimizer that a server runs. Adafactor's ``eps=(None, e)`` travels as ``(e,)``: a tuple holds numbers."""


def info(name: str) -> OptimizerInfo:
    """The entry of ``name``.

    Raises:
        UnknownOptimizer: the name is not in the list; the message suggests the nearest one.
    """
    if name in KNOWN:
        return KNOWN[name]
    folded = {known.lower(): known for known in KNOWN}
    near = difflib.get_close_matches(str(name).lower(), folded, n=1)
    hint = f" Did you mean {folded[near[0]]}?" if near else ""
    raise UnknownOptimizer(
        f"no optimizer {name!r} on the servers; nothing was created.{hint} They run: {', '.join(KNOWN)}."
    )


def select(name: str, group: Mapping[str, Any]) -> dict[str, Hyper]:
    """The hyperparameters of a ``torch.optim`` parameter group that travel: no ``params``, no ``initial_lr``.

    What a server would have to ignore is left out (``foreach``, and keys that schedulers add); ``capturable``
    and ``differentiable`` stay when they are true, so that ``complete`` refuses them. Tensors of one element
    become numbers.
    """
    defaults = info(name).defaults
    picked = {key: _plain(value) for key, value in group.items() if key in defaults}
    picked.update({key: True for key in ("capturable", "differentiable") if group.get(key)})
    return picked


def complete(name: str, hyper: Mapping[str, Any]) -> dict[str, Hyper]:
    """``hyper`` checked and filled up with the defaults of optimizer ``name``.

    Raises:
        UnknownOptimizer: unknown name or key, or a value out of range.
    """
    group = dict(info(name).defaults)
    group.update(checked(name, hyper))
    if group.get("nesterov") and name == "SGD" and (group["momentum"] == 0 or group["dampening"] != 0):
        raise UnknownOptimizer("SGD(nesterov=True) needs momentum above 0 and dampening 0; nothing was changed")
    return group


def checked(name: str, hyper: Mapping[str, Any]) -> dict[str, Hyper]:
    """``hyper`` (all keys or some) with every value checked, normalised (lists to tuples) and ``foreach`` dropped.

    Raises:
        UnknownOptimizer: unknown name or key, or a value out of range.
    """
    defaults = info(name).defaults
    clean: dict[str, Hyper] = {}
    for key, value in hyper.items():
        if key in _DROPPED and key not in defaults:
            if value and key != "foreach":
                raise UnknownOptimizer(f"{name}({key}=True) cannot run on a server; leave {key} out")
        elif key == "decoupled_weight_decay" and name == "AdamW" and value is True:
            continue  # torch writes it into AdamW's groups, though its signature lacks it
        elif key not in defaults:
            raise UnknownOptimizer(_unknown_key(name, key, defaults))
        else:
            clean[key] = _check_value(name, key, _plain(value))
    return clean


def check(spec: DenseSpec) -> OptimizerSpec:
    """The table's optimizer with every group complete, if the servers can run it on all of its parameters.

    Raises:
        UnknownOptimizer: unknown name, key or value; a dtype or shape that the optimizer cannot step;
            a parameter whose group does not exist. The message names the parameter.
    """
    name = spec.optimizer.name
    groups = tuple(complete(name, group) for group in spec.optimizer.groups)
    for parameter in spec.parameters:
        _check_parameter(name, parameter, len(groups))
    if name == "Assign" and spec.max_grad_norm is not None:
        raise UnknownOptimizer(f"table {spec.name!r}: Assign has no gradients to clip; leave max_grad_norm out")
    return OptimizerSpec(name, groups)


def slot_elements(name: str, hyper: Mapping[str, Hyper], shape: tuple[int, ...], elements: int) -> int:
    """Elements of optimizer state for ``elements`` of a parameter of ``shape``, in the parameter's dtype."""
    if name == "Adafactor" and len(shape) > 1:
        return elements // max(1, shape[-1]) + elements // max(1, shape[-2])
    return info(name).slots(hyper) * elements


def _check_parameter(name: str, parameter: ParameterSpec, groups: int) -> None:
    who = f"parameter {parameter.name!r}"
    if not 0 <= parameter.group < groups:
        raise UnknownOptimizer(f"{who} is in group {parameter.group}, but the optimizer has {groups} group(s)")
    if name == "Assign":
        return
    if parameter.dtype not in FLOATS:
        raise UnknownOptimizer(f"{who} is {parameter.dtype}; {name} steps {', '.join(FLOATS)}, only Assign the rest")
    if name == "Muon" and len(parameter.shape) != 2:
        raise UnknownOptimizer(
            f"{who} has shape {parameter.shape}; Muon steps 2-D parameters only. "
            "Put the others into a table with another optimizer."
        )


def _unknown_key(name: str, key: str, defaults: Mapping[str, Hyper]) -> str:
    near = difflib.get_close_matches(key, defaults, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    takes = ", ".join(defaults) or "no hyperparameters"
    return f"{name} has no hyperparameter {key!r}.{hint} It takes: {takes}."


def _plain(value: Any) -> Any:
    """A 0-dimensional tensor or numpy scalar as a number, a list as a tuple, without importing either library."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value if item is not None)
    if hasattr(value, "item") and not isinstance(value, bool | int | float | str):
        return value.item()
    return value


def _check_value(name: str, key: str, value: Any) -> Hyper:
    says = f"{name}({key}={value!r})"
    if key in _FLAGS:
        _require(isinstance(value, bool), says, "True or False")
        return bool(value)
    if key in _CHOICES:
        choices = _CHOICES[key]
        _require(any(value is choice or (isinstance(value, str) and value == choice) for choice in choices), says,
                 "one of " + ", ".join(map(repr, choices)))  # fmt: skip
        return value  # type: ignore[no-any-return]
    if name == "Adafactor" and key == "eps":
        _require(isinstance(value, tuple) and len(value) in (1, 2) and all(map(_is_number, value))
                 and min(value) >= 0, says, "(None, e2) or (e1, e2), each 0 or more")  # fmt: skip
        return tuple(map(float, value))
    if key in _TUPLE:
        length, holds, wanted = _TUPLE[key]
        _require(isinstance(value, tuple) and len(value) == length and all(map(_is_number, value))
                 and holds(value), says, wanted)  # fmt: skip
        return tuple(map(float, value))
    holds_number, wanted = _NUMBER[key]
    _require(_is_number(value) and holds_number(value), says, wanted)
    return int(value) if key == "ns_steps" else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, says: str, wanted: str) -> None:
    if not holds:
        raise UnknownOptimizer(f"{says}: must be {wanted}; nothing was changed")
