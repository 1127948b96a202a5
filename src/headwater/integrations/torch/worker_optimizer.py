"""Optimizers that the servers do not have: they run at each worker on the mean gradient; the servers keep values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from headwater import interrupts
from headwater.errors import NonFiniteGradient, UsageError
from headwater.integrations.torch.core import Core
from headwater.types import Bulk
from headwater.wire.tensors import finite


class WorkerOptimizer:
    """``inner`` steps the model's own parameters; what it wrote is the state that all workers go on from."""

    def __init__(self, core: Core, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self._core = core
        core.say_once(
            f"{type(inner).__name__} is not among the servers' optimizers: it runs at each worker, on the mean "
            "gradient, and the servers keep the values. Its own state is the worker's: save it with state_dict()"
        )

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """One step of ``inner``; with several workers ``closure`` returns the mean of their losses."""
        core = self._core
        core.begin()
        loss = None
        if closure is None:
            if not self._ready():
                core.end(core.held.written(), skip=True)
                return None
            interrupts.interruptible(self.inner.step)
        else:
            given: Any = self._evaluation(closure)
            loss = interrupts.interruptible(self.inner.step, given)
        if core.options.sync.collective:
            writes = core.held.written()
            core.table.push([], anew=True)  # the gradients have been used here
            try:
                core.end(writes)
            except UsageError:  # another try begins where this one did
                core.steps.values.take_back()
                raise
        else:
            self._push_moves()
        return loss

    def _evaluation(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            with torch.enable_grad():
                loss = interrupts.interruptible(closure)
            self._ready()
            return self._mean_loss(loss) if self._core.several() else loss

        return evaluate

    def _ready(self) -> bool:
        """Let ``.grad`` be what the optimizer may step on; False if the step is to be skipped."""
        core = self._core
        if core.several():
            core.gradients.see_mean()
        gradients = [p.grad for p in core.held.parameters if p.grad is not None]
        if core.options.nonfinite != "allow" and not all(finite(_values(g)) for g in gradients):
            if core.options.nonfinite == "skip":
                return False
            raise NonFiniteGradient(
                f"a gradient on rank {core.client.rank} holds NaN or Inf; the step was not taken. nonfinite='skip' "
                "passes over such steps on all workers, opt.skip_step() over this one"
            )
        if core.options.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(core.held.parameters, core.options.max_grad_norm)
        return True

    def _mean_loss(self, loss: Any) -> Any:
        """An optimizer that decides by the loss (a line search) must decide alike on all workers."""
        value = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        name = f"{self._core.table.spec.name}.loss"
        shared = self._core.client.dense(
            name, (1,), dtype=torch.float64, optimizer="Assign", sync=Bulk(), nonfinite="allow"
        )
        shared.push(torch.tensor([value], dtype=torch.float64, device="cpu"))
        mean = shared.pull().item()
        if isinstance(loss, torch.Tensor):
            return torch.full_like(loss.detach(), mean if not math.isnan(mean) else math.nan)
        return mean

    def _push_moves(self) -> None:
        """Without steps of all workers values would overwrite one another: what they moved by adds up."""
        core = self._core
        moved = []
        for leaf in core.held.leaves:
            truth = core.table.truth[leaf.name]
            now = leaf.parameter.detach()
            now = torch.view_as_real(now) if now.is_complex() else now
            target = core.table.gradients[leaf.name]
            torch.sub(truth, now.cpu(), out=target)
            if target.any():
                moved.append(leaf)
        core.table.refresh()
        core.steps.gradients.push(moved, [leaf.name for leaf in moved])
        core.end({})


def _values(gradient: torch.Tensor) -> torch.Tensor:
    plain = gradient.detach()
    if plain.layout is not torch.strided:
        plain = plain.coalesce().values()
    return torch.view_as_real(plain) if plain.is_complex() else plain
