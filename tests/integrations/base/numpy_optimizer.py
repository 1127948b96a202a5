"""The integration of another framework, whole: numpy arrays as parameters, gradients handed over by the caller."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headwater.client import StepResult
from headwater.integrations.base.parameter import TableParameter
from headwater.integrations.base.steps import Steps, TrainOptions
from headwater.types import Init, ParameterSpec

Arrays = Mapping[str, npt.NDArray[Any]]


class NumpyOptimizer:
    """``arrays`` are the table's memory from then on; ``groups[0]`` holds the hyperparameters."""

    def __init__(self, client: Any, arrays: Arrays, options: TrainOptions, **hyper: Any) -> None:
        self.groups = [hyper]
        specs = [ParameterSpec(name, a.shape, a.dtype.name, init=Init("values")) for name, a in arrays.items()]
        spec = options.spec("numpy", specs, self.groups)
        self.table = client.table(spec, {name: torch.from_numpy(a) for name, a in arrays.items()})
        self.table.wait()
        held = [(name, self.table.gradients[name], self.table.values[name]) for name in arrays]
        self.parameters = [TableParameter(*each, copies=False) for each in held]
        self.arrays = {p.name: p.values.numpy() for p in self.parameters}
        self.steps = Steps(client, self.table, self.parameters, self, lambda: self.groups, options)

    def step(self, gradients: Arrays) -> StepResult | None:
        """One step of the servers' optimizer; a parameter without a gradient takes no part."""
        self.steps.begin()
        present = [p for p in self.parameters[::-1] if p.name in gradients]
        for p in present:
            np.copyto(p.gradient.numpy(), gradients[p.name])
            p.changed = True
            if self.steps.gradients.early:
                self.steps.gradients.ready(p)
        writes = {name: self.table.values[name].clone() for name in self.table.written()}
        self.steps.write_first(writes)
        self.steps.gradients.finish(present)
        self.steps.end(writes, skip=self.steps.gradients.skip)
        return self.steps.arrive()

    def show(self, parameters: Sequence[TableParameter], same: Collection[TableParameter]) -> None:
        """The arrays are that memory."""

    def keep(self, parameters: Sequence[TableParameter]) -> None:
        """What was written stays where it is."""
