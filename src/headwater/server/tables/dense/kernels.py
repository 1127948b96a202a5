"""The optimizers that step flat memory, by name in ``FLAT``.

A kernel gets lists of matching *pieces* (1-D tensors: parameter, gradient, slots) and steps them in place,
with the arithmetic of ``torch.optim`` to the last bit. How the pieces must be cut for that is measured, and
held by tests/server/tables/dense/test_bits.py:

- ``padded``: one piece may run over many parameters and the zero padding between them. Holds for unfused
  kernels in float32 and float64, and for ``torch._fused_sgd_`` in those dtypes *when it meets no scalar tail*:
  its vector part rounds like the unfused default of ``torch.optim.SGD``, its scalar tail does not.
- ``tails``: a piece ends where a parameter does not fill its last 64 bytes, without the padding. Holds for the
  fused Adam, AdamW and Adagrad, whose scalar tails round differently from their vector part: the tail must
  cover the same elements as in a per-tensor step.
- ``segments``: a piece is one segment, which is the very call that torch makes. For unfused kernels in
  bfloat16 and float16, where running on into the padding changes last bits, and for eps = 0.

``torch._fused_sgd_`` (torch 2.13, CPU) leaves bfloat16 and float16 parameters unchanged in its vector part,
so SGD never uses it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from headwater.types import Hyper

Cut = Literal["padded", "tails", "segments"]
Tensors = list[torch.Tensor]

_EXACT = (torch.float32, torch.float64)


class Cohort:
    """Segments that have always been stepped together, and so share their step count.

    ``step`` holds the count of the step that is being applied, as the kernels want it (float32, 0-D).
    """

    __slots__ = ("count", "step")

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.step = torch.tensor(float(count), dtype=torch.float32, device="cpu")

    def advance(self) -> None:
        self.count += 1
        self.step.fill_(self.count)


class Kernel:
    """One optimizer with the hyperparameters of one group, for one dtype.

    ``slots`` are the names of its state; ``counts``: whether a step moves the cohort's count; ``has_step``:
    whether torch keeps that count as the slot "step"; ``initial``: what a slot holds before the first step.
    """

    slots: tuple[str, ...] = ()
    cut: Cut = "padded"
    counts = True
    has_step = True
    initial = 0.0

    def __call__(self, params: Tensors, grads: Tensors, slots: tuple[Tensors, ...], cohort: Cohort) -> None:
        """Step ``params`` in place. ``cohort.count`` is the number of this step, 1 for the first."""
        raise NotImplementedError


class Sgd(Kernel):
    """``torch.optim.SGD``; with ``fused=True`` and float32 or float64 ``torch.optim.SGD(fused=True)``."""

    has_step = False

    def __init__(self, hyper: Mapping[str, Any], dtype: torch.dtype) -> None:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        self._hyper = {name: hyper[name] for name in names}
        self._exact = dtype in _EXACT
        self.slots = ("momentum_buffer",) if hyper["momentum"] != 0 else ()
        self.counts = bool(self.slots)
        if not self._exact:
            self.cut = "segments"
        elif hyper["fused"]:
            self.cut = "tails"

    def __call__(self, params: Tensors, grads: Tensors, slots: tuple[Tensors, ...], cohort: Cohort) -> None:
        first = cohort.count == 1
        if self._exact:
            buffers = slots[0] if slots else []
            torch._fused_sgd_(params, grads, buffers, is_first_step=first and bool(slots), **self._hyper)
            return
        state: list[torch.Tensor | None] = [None] * len(params) if first or not slots else list(slots[0])
        sgd(params, grads, state, foreach=False, fused=False, **self._hyper)
        if first and slots:
            for kept, made in zip(slots[0], state, strict=True):
                assert made is not None
                kept.copy_(made)


class Adam(Kernel):
    """``torch.optim.Adam`` or ``AdamW``: fused unless ``fused=False``, each bit-identical to its torch twin."""

    def __init__(self, hyper: Mapping[str, Any], dtype: torch.dtype, decoupled: bool) -> None:
        self._hyper = {name: hyper[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
        self._hyper["beta1"], self._hyper["beta2"] = hyper["betas"]
        self._decoupled = decoupled
        self._fused = hyper["fused"] is not False
        self._kernel: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
        self.slots = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if hyper["amsgrad"] else ())
        self.cut = _cut(self._fused, hyper["eps"], dtype)

    def __call__(self, params: Tensors, grads: Tensors, slots: tuple[Tensors, ...], cohort: Cohort) -> None:
        largest = slots[2] if len(slots) > 2 else []
        if self._fused:
            steps = [cohort.step] * len(params)
            self._kernel(params, grads, slots[0], slots[1], largest, steps, **self._hyper)
            return
        steps = _steps_before(cohort, len(params))
        adam(params, grads, slots[0], slots[1], largest, steps, foreach=False, fused=False,
             decoupled_weight_decay=self._decoupled, **self._hyper)  # fmt: skip


class Adagrad(Kernel):
    """``torch.optim.Adagrad``: fused unless ``fused=False``, each bit-identical to its torch twin."""

    slots = ("sum",)

    def __init__(self, hyper: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._hyper = {name: hyper[name] for name in ("lr", "lr_decay", "weight_decay", "eps", "maximize")}
        self._fused = hyper["fused"] is not False
        self.initial = float(hyper["initial_accumulator_value"])
        self.cut = _cut(self._fused, hyper["eps"], dtype)

    def __call__(self, params: Tensors, grads: Tensors, slots: tuple[Tensors, ...], cohort: Cohort) -> None:
        if self._fused:
            torch._fused_adagrad_(params, grads, slots[0], [cohort.step] * len(params), **self._hyper)
            return
        steps = _steps_before(cohort, len(params))
        adagrad(params, grads, slots[0], steps, foreach=False, fused=False, **self._hyper)


class Assign(Kernel):
    """The aggregate (see ``average``) becomes the value: for module buffers, of any dtype."""

    counts = False
    has_step = False

    def __init__(self, hyper: Mapping[str, Any], dtype: torch.dtype) -> None:
        """It has no hyperparameters and takes every dtype."""

    def __call__(self, params: Tensors, grads: Tensors, slots: tuple[Tensors, ...], cohort: Cohort) -> None:
        for param, grad in zip(params, grads, strict=True):
            param.copy_(grad)


def _adam(hyper: Mapping[str, Any], dtype: torch.dtype) -> Kernel:
    return Adam(hyper, dtype, decoupled=bool(hyper["decoupled_weight_decay"]))


def _adamw(hyper: Mapping[str, Any], dtype: torch.dtype) -> Kernel:
    return Adam(hyper, dtype, decoupled=True)


FLAT: dict[str, Callable[[Mapping[str, Any], torch.dtype], Kernel]] = {
    "SGD": Sgd,
    "Adam": _adam,
    "AdamW": _adamw,
    "Adagrad": Adagrad,
    "Assign": Assign,
}
"""The optimizers that have a kernel here, by name; the others of the closed list run in generic.py."""


def kernel(name: str, hyper: Mapping[str, Hyper], dtype: torch.dtype) -> Kernel:
    """The kernel of optimizer ``name`` (one of ``FLAT``) with complete hyperparameters."""
    return FLAT[name](hyper, dtype)


def _cut(fused: bool, eps: float, dtype: torch.dtype) -> Cut:
    if fused:
        return "tails"
    # With eps = 0 the padding would become 0 / 0, so pieces leave it out.
    return "padded" if dtype in _EXACT and eps > 0 else "segments"


def _steps_before(cohort: Cohort, pieces: int) -> Tensors:
    """Unfused torch functions count the step themselves: they get the count before it, one tensor per piece."""
    return [torch.tensor(float(cohort.count - 1), dtype=torch.float32, device="cpu") for _ in range(pieces)]


def aggregate(out: torch.Tensor, sources: Tensors, divide: int, scale: float | None) -> None:
    """Fill ``out`` with the aggregate of equally long ``sources`` (not modified).

    out := (sources[0] + sources[1] + …) / divide · scale, in that order, in the gradient's own dtype.

    Integers are summed in int64 (``out``'s dtype) and divided rounding down; bool is "any". The scale, a
    float64, is rounded to float32 for float32 gradients and below, as ``Tensor.mul_`` does.
    """
    first, rest = sources[0], sources[1:]
    if rest:
        if out.dtype is first.dtype:
            torch.add(first, rest[0], out=out)
        else:  # narrow integers: add would wrap before it widens
            out.copy_(first).add_(rest[0])
        for source in rest[1:]:
            out.add_(source)
        if divide > 1:
            _divide(out, out, divide)
    elif divide > 1:
        _divide(first, out, divide)
    elif scale is not None:
        torch.mul(first, scale, out=out)
        return
    else:
        out.copy_(first)
    if scale is not None:
        out.mul_(scale)


def _divide(source: torch.Tensor, out: torch.Tensor, divide: int) -> None:
    if out.dtype is torch.int64:
        torch.div(source, divide, rounding_mode="floor", out=out)
    elif out.dtype is torch.bool:
        out.copy_(source)
    else:
        torch.div(source, divide, out=out)


def average(out: torch.Tensor, sources: Tensors, divide: int, scale: float | None) -> None:
    """Fill ``out`` with the mean of equally long ``sources``, of state rather than of gradients (``Assign``).

    Element by element: what has the same bits in all of them is that value, so that a constant stays one (masks of
    ``finfo.min``, NaN, -0.0). Else the sum in the order of ``sources`` in their own dtype (half precision: in float64)
    by their number, where that is finite; where it is not, the mean in float64, so that only an infinity or NaN that
    was contributed gives one. Integers: the exact mean, rounded down. With ``divide`` 1 it is ``aggregate``.
    """
    if divide == 1 or len(sources) == 1 or sources[0].dtype is torch.bool:
        aggregate(out, sources, 1, scale)
    elif sources[0].dtype.is_floating_point:
        _average_floats(out, sources)
    else:
        _average_integers(out, sources)


def _average_floats(out: torch.Tensor, sources: Tensors) -> None:
    first, rest = sources[0], sources[1:]
    bits = _BITS[first.itemsize]
    same = first.view(bits) == rest[0].view(bits)
    for source in rest[1:]:
        same &= first.view(bits) == source.view(bits)
    if bool(same.all()):
        out.copy_(first)
        return
    if first.dtype in _EXACT:
        mean = first + rest[0]
        for source in rest[1:]:
            mean += source
        mean /= len(sources)
        over = ~torch.isfinite(mean)
        if bool(over.any()):
            mean = torch.where(over, _wide_mean(sources), mean)
    else:
        mean = _wide_mean(sources)
    torch.where(same, first, mean, out=out)


def _wide_mean(sources: Tensors) -> torch.Tensor:
    """In float64, rounded once; of float64 each is divided first, so that their sum cannot overflow."""
    dtype = sources[0].dtype
    if dtype is torch.float64:
        return torch.stack([source / len(sources) for source in sources]).sum(0)
    total = sources[0].double()
    for source in sources[1:]:
        total += source
    return (total / len(sources)).to(dtype)


def _average_integers(out: torch.Tensor, sources: Tensors) -> None:
    """⌊Σx / n⌋ = Σ⌊x / n⌋ + ⌊Σ(x mod n) / n⌋: nothing overflows that the result would not."""
    count = len(sources)
    out.zero_()
    left = torch.zeros_like(out)
    for source in sources:
        wide = source.to(out.dtype)
        out.add_(torch.div(wide, count, rounding_mode="floor"))
        left.add_(torch.remainder(wide, count))
    out.add_(left.div_(count, rounding_mode="floor"))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of ``dtype`` are summed: integers in int64, so that a mean cannot wrap."""
    return dtype if dtype.is_floating_point or dtype is torch.bool else torch.int64
