"""What a recipe says of itself: its command, its settings, its words, and where its task is found."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, cast

from headwater.errors import UsageError
from headwater_recipes.common.settings import AnySettings

if TYPE_CHECKING:
    from headwater_recipes.common.serving import Served
    from headwater_recipes.common.task import Task


class Wording(NamedTuple):
    """How the figures of a run are called.

    Attributes:
        unit: what goes through the model (words, images, seconds), for rates and in ``metrics.jsonl``.
        loss: its unit; "" if it has none.
        headline: a format string of the validation's metrics, shown while it trains; "" for the loss alone.
        data: what is held out: text, images.
        prepared: what the folder of a run that has not begun holds.
    """

    unit: str = "samples"
    loss: str = ""
    headline: str = ""
    data: str = "data"
    prepared: str = "the prepared data"

    def shown(self, metrics: Mapping[str, float]) -> str:
        """The headline of a validation's metrics. A mistake in it is shown in its place: it must not end a training."""
        try:
            return self.headline.format(**metrics)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            return f"(headline {self.headline!r}: {error}; there are {', '.join(metrics)})"


_PLAIN = Wording()


class About(NamedTuple):
    """What ``headwater recipes`` says of a recipe, with its default settings.

    Attributes:
        task: what the model learns to do: image classification.
        data: names in the catalog of data sets, whose licences are shown too; or words, for data that are in none.
        model: which architecture, of how many parameters.
        metric: what it is judged by on data that it never saw.
        baseline: what stands beside it.
        minutes: that a run takes on two cores, evaluation included.
        licence: of data that are in no catalog.
    """

    task: str
    data: tuple[str, ...]
    model: str
    metric: str
    baseline: str
    minutes: float
    licence: str = ""


@dataclass(frozen=True)
class Recipe(Generic[AnySettings]):
    """Light: nothing that it names is loaded before it is wanted.

    Attributes:
        name: begins the names of its runs' folders.
        help: what ``--help`` says; lines that begin with "Example:" are typed as they stand.
        task: ``module:Class``, a ``Task`` whose ``recipe`` this is.
        settings: their type.
        command: what the user types; ``headwater train NAME`` if it is "".
        patience: seconds that the workers get after Ctrl-C, SIGTERM or SIGHUP to end their step and save.
        served: ``module:Class``, a ``serving.Served``, by which ``headwater serve`` answers with a run's model; ""
            if it is not served in this way.
        about: for the table of all recipes.
    """

    name: str
    help: str
    task: str
    settings: type[AnySettings]
    command: str = ""
    wording: Wording = _PLAIN
    patience: float = 60.0
    served: str = ""
    about: About | None = None

    def __post_init__(self) -> None:
        """Raises ``UsageError`` for what would be shown, or found, as something else than is meant."""
        if self.about is not None and type(self.about.data) is not tuple:
            raise UsageError(f"recipe {self.name!r}: About.data is a tuple of names, not {self.about.data!r}")
        if self.wording.headline and "{" not in self.wording.headline:
            raise UsageError(
                f"recipe {self.name!r}: Wording.headline is a format of the validation's metrics, as "
                f"'accuracy {{accuracy:.3f}}', and {self.wording.headline!r} names none"
            )
        for field, value in (("task", self.task), ("served", self.served or ":")):
            if value.count(":") != 1:
                raise UsageError(f"recipe {self.name!r}: {field}={value!r} must be 'module:Class'")

    @property
    def typed(self) -> str:
        """The command."""
        return self.command or f"headwater train {self.name}"

    def load(self) -> type[Task[Any]]:
        """The task's class; loads torch. Raises ``UsageError``: it is another recipe's, or no task."""
        task = cast("type[Task[Any]]", pkgutil.resolve_name(self.task))
        if getattr(task, "recipe", None) is not self:
            raise UsageError(f"recipe {self.name!r}: {self.task} has no line 'recipe = RECIPE' that names this recipe")
        return task

    def load_served(self) -> type[Served]:
        """The class that answers with a run's model; loads torch. ``served`` must not be ""."""
        return cast("type[Served]", pkgutil.resolve_name(self.served))
