"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated

from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe
from headwater_recipes.sound.settings import WORDING, SoundTraining

DATA = ("klettres", "ktuberling", "asterisk-en", "asterisk-es", "asterisk-fr", "asterisk-it", "asterisk-ru")


class SpeechSettings(SoundTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``speakers`` counts the one that is held out."""

    speakers: Annotated[
        int,
        Option(
            "Take the languages of so many speakers or more; with 2 there are 13, of most of which one person is "
            "learnt from. Default: {default}.",
            least=2,
            most=4,
            fixed=True,
        ),
    ] = 3


RECIPE = Recipe(
    name="speech",
    help="""Train a small network that tells which language is spoken.

    By default the 5 languages of which packages of Debian carry 3 speakers or
    more: KTuberling's speaker of each is held out. That is few people to learn
    a language from, and the figures say so.

    Example: headwater train speech
    """,
    task="headwater_recipes.speech.task:Speech",
    settings=SpeechSettings,
    wording=WORDING,
    served="headwater_recipes.sound.served:AudioClassification",
    about=About(
        task="spoken language",
        data=DATA,
        model="CNN on log-mel",
        metric="accuracy, macro-F1, EER",
        baseline="MFCC statistics and logistic regression",
        minutes=4,
    ),
)
