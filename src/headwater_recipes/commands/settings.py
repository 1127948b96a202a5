"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated

from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe
from headwater_recipes.sound.settings import WORDING, SoundTraining


class CommandsSettings(SoundTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``takes`` are of each voice."""

    takes: Annotated[
        int, Option("How often each voice says each word. Default: {default}.", least=1, most=50, fixed=True)
    ] = 2
    words: Annotated[str, Option("Of the 74 words these alone, as zero,one,hello. Default: all.", fixed=True)] = ""
    seconds: float = 1.0


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
