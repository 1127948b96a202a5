"""What is trained: a recipe's data, model, loss, metrics and report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self

import torch
from rich.console import Console

from headwater.errors import UsageError
from headwater_recipes.common import checkpoint
from headwater_recipes.common.recipe import Recipe
from headwater_recipes.common.settings import AnySettings
from headwater_recipes.common.stages import clock, say

Sums = Mapping[str, int | float]
"""What is added up over batches and ranks; metrics are made of it."""


class Batch(NamedTuple):
    """``inputs`` is what the task's loss is given; ``learnt`` the number of things that the loss is the sum of;
    ``seen`` the units that go through the model (padding left out), for the rate.
    """

    inputs: Any
    learnt: int
    seen: int


_OF_CLASSES = {"prepare": "prepare(cls, settings, console)", "metrics": "metrics(cls, sums)"}
"""Methods that the launching process calls on a task's class, which it has no object of then."""


@dataclass(frozen=True)
class Ended:
    """A run that came to its end: ``sums`` and ``metrics`` of all held-out data, ``rows`` of ``metrics.jsonl``;
    ``difference`` as ``Task.verify`` found it.
    """

    step: int
    seconds: float
    sums: Sums
    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    difference: float | None

    @property
    def before(self) -> Mapping[str, Any] | None:
        """The validation before the first step, if there was one."""
        return next((row for row in self.rows if row["kind"] == "validation" and row["step"] == 0), None)


class Task(ABC, Generic[AnySettings]):
    """The launching process asks it to prepare a run and to report on it; the workers, one for each rank, for the rest.

    What differs from recipe to recipe, and nothing else: who starts, when it is saved, what is shown is common to all.
    ``folder`` is a run folder that ``prepare`` has filled.
    """

    recipe: ClassVar[Recipe[Any]]
    validates_first: ClassVar[bool] = False
    """Whether the model is validated before the first step: one that knows something already."""

    def __init__(self, settings: AnySettings, folder: Path, rank: int = 0, world: int = 1) -> None:
        self.settings, self.folder, self.rank, self.world = settings, folder, rank, world

    def __init_subclass__(cls, **words: Any) -> None:
        super().__init_subclass__(**words)
        for name, form in _OF_CLASSES.items():
            if name in vars(cls) and not isinstance(vars(cls)[name], classmethod | staticmethod):
                method = f"{cls.__module__}.{cls.__qualname__}.{name}"
                raise UsageError(f"{method} is called on the class, without a run: write @classmethod and def {form}")

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The task of a run folder, by the settings that the run was begun with. Raises ``DataError``."""
        return cls(checkpoint.read_state(folder, cls.recipe.settings).settings, folder)

    # ---- data ------------------------------------------------------------------------------------

    @classmethod
    def prepare(cls, settings: AnySettings, console: Console) -> Callable[[Path], None]:
        """Read and check the data, before there is a run folder; what is returned then fills the folder.

        Raises ``DataError`` if the data cannot be used.
        """
        del settings, console
        return lambda folder: None

    @abstractmethod
    def batches(self, step: int) -> Sequence[Batch]:
        """What this rank learns from in a step. It depends on the seed, rank, world and step only, so that a run can
        go on anywhere. Gradients of several are accumulated.
        """

    @abstractmethod
    def held_out(self, whole: bool) -> Iterable[Batch]:
        """This rank's share of the held-out data: of all of it, or of a part that is quick to do."""

    # ---- model -----------------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """The model with its first values, the same on all ranks; or on the meta device, see ``first_values``."""

    def first_values(self) -> Mapping[str, Any] | None:
        """For ``headwater.Optimizer(init=…)``: how servers draw the values of a model on the meta device."""
        return None

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of what is trained: matrices decay, the gains of norms and biases do not."""
        trained = [p for p in model.parameters() if p.requires_grad]
        decay = self.settings.weight_decay
        kinds = [([p for p in trained if p.ndim >= 2], decay), ([p for p in trained if p.ndim < 2], 0.0)]
        return [{"params": params, "weight_decay": decay} for params, decay in kinds if params]

    def write(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the model's part of a checkpoint, as the ecosystem loads it."""
        checkpoint.write_model(model, folder)

    def read(self, folder: Path) -> torch.nn.Module:
        """The model that ``write`` wrote. Raises ``DataError`` if it is not whole."""
        return checkpoint.load_model(self.build(), folder)

    # ---- loss and metrics ------------------------------------------------------------------------

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The sum over ``batch.learnt`` things; the mean over all batches of a step is what is minimized."""

    def measure(self, model: torch.nn.Module, batch: Batch) -> Sums:
        """What a held-out batch adds to the sums."""
        return {"loss": self.loss(model, batch).item(), "count": batch.learnt}

    @classmethod
    def metrics(cls, sums: Sums) -> dict[str, float]:
        """The metrics of held-out data, ``loss`` among them."""
        return {"loss": sums["loss"] / max(1, sums["count"])}

    def verify(self, model: torch.nn.Module) -> float | None:
        """Rank 0, at the end: the largest difference between this model's outputs and those of the saved one."""
        del model
        return None

    # ---- report ----------------------------------------------------------------------------------

    def figures(self, ended: Ended) -> dict[str, Any]:
        """What ``report.json`` says beside the step and the seconds of training."""
        return {f"validation_{name}": value for name, value in ended.metrics.items()}

    def baseline(self, figures: Mapping[str, Any]) -> tuple[str, float] | None:
        """A loss to compare with, and its name, for the picture."""
        del figures
        return None

    def tell(self, ended: Ended, figures: Mapping[str, Any], console: Console) -> None:
        """Show the user what came of it, and write more into the folder if there is more.

        Of ``figures`` the numbers are shown, ``baseline`` (names to figures, or to figures by their names) and
        ``pictures`` (names of files).
        """
        say(console, f"trained {ended.step} steps in {clock(ended.seconds)}; on held-out data: {_words(figures)}")
        for name, value in dict(figures.get("baseline") or {}).items():
            told = _words(value) if isinstance(value, Mapping) else f"{value:.4g}"
            say(console, f"  beside it, {name}: {told}")
        files = ["model.safetensors", *figures.get("pictures", ()), "metrics.jsonl", "loss.png", "report.json"]
        say(console, f"{self.folder}: {', '.join(files)}", whole=True)


_OF_TRAINING = ("step", "training_seconds")


def _words(found: Mapping[str, Any]) -> str:
    """The numbers, by their names."""
    numbers = {name: value for name, value in found.items() if type(value) in (int, float) and name not in _OF_TRAINING}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def add(parts: Iterable[Sums]) -> dict[str, int | float]:
    """Sums by their names."""
    found: dict[str, int | float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0) + value
    return found
