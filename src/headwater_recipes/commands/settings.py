"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated, ClassVar

from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe
from headwater_recipes.sound.settings import WORDING, SoundTraining


class CommandsSettings(SoundTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``takes`` are of each voice."""

    MINUTES: ClassVar[float] = 3.5

    takes: Annotated[
        int, Option("How often each voice says each word. Default: {default}.", least=1, most=50, fixed=True)
    ] = 2
    words: Annotated[str, Option("Of the 74 words these alone, as zero,one,hello. Default: all.", fixed=True)] = ""
    seconds: float = 1.0
    parts: int = 4
    dropout: float = 0.1
    smoothing: float = 0.05
    warmup: int = 50


RECIPE = Recipe(
    name="commands",
    help="""Train a small network that tells which word is spoken.

    By default 74 words (digits, letters, the radio's alphabet, days) that
    eSpeak NG says in 27 voices, accents, speeds and pitches; judged on the 6
    voices held out, and on a person's recordings of the same words.

    Example: headwater train commands
    """,
    task="headwater_recipes.commands.task:Commands",
    settings=CommandsSettings,
    wording=WORDING,
    served="headwater_recipes.sound.served:AudioClassification",
    about=About(
        task="spoken words",
        data=("espeak", "asterisk-en"),
        model="CNN on log-mel",
        metric="accuracy",
        baseline="MFCC and nearest centroid",
        minutes=4.5,
    ),
)
