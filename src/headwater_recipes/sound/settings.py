"""Options that recipes about sounds have beside those of all recipes, and how their figures are called."""

from __future__ import annotations

from typing import Annotated

from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import Wording
from headwater_recipes.common.settings import Training

WORDING = Wording(
    unit="sounds",
    loss="nats per sound",
    headline="accuracy {accuracy:.3f}",
    data="sounds",
    prepared="the sounds as spectrograms",
)


class SoundTraining(Training, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults are for a machine of two cores."""

    data: Annotated[
        tuple[str, ...],
        Option(
            "A folder of your own with a subfolder per label. Its sounds lie in a folder per speaker, or their names "
            "begin with the speaker and _, as in Speech Commands. Or a name that the library "
            "datasets finds (owner/name). Default: see above.",
            path=True,
            named=True,
            fixed=True,
        ),
    ] = ()
    rate: Annotated[
        int, Option("Samples per second that sounds are brought to.", least=4000, most=48_000, fixed=True)
    ] = 8000
    seconds: Annotated[float, Option("Of a sound, that the network sees at once.", above=0.2, fixed=True)] = 2.0
    width: Annotated[int, Option("Of the network; 4 to 512.", least=4, most=512, fixed=True)] = 32
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 20
    parts: int = 1
    dropout: float = 0.3
    smoothing: float = 0.1
    validate_every: int = 100
