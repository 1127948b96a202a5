"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated, ClassVar

from headwater.errors import UsageError
from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe
from headwater_recipes.text.settings import CLASSES, ClassifyingTraining


class SentimentSettings(ClassifyingTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The defaults are judged on sentences that critics wrote of films."""

    MINUTES: ClassVar[float] = 3.0

    data: Annotated[
        tuple[str, ...],
        Option(
            "sentences (of critics; the default), reviews (whole ones; --seq 128 or more), newsgroups, "
            ".csv/.tsv/.jsonl files with columns text and label, a folder with train.* and test.*, or a name that the "
            "library datasets finds (owner/name:configuration).",
            fixed=True,
        ),
    ] = ("sentences",)
    text: Annotated[str, Option("The column of the texts. Default: {default}.", fixed=True)] = "text"
    label: Annotated[str, Option("The column of the classes. Default: {default}.", fixed=True)] = "label"

    def check(self) -> None:
        super().check()
        if self.text == self.label:
            raise UsageError(
                f"--text and --label are both {self.text}: the classes need a column of their own; nothing was started"
            )


RECIPE = Recipe(
    name="sentiment",
    help="""Tell what a text says: whether a review is for or against, what a post is about, or one's own classes.

    Example: headwater train sentiment --workers 2
    Example: headwater train sentiment --data letters.csv --text body --label topic

    Ctrl-C stops and saves; --resume goes on. The run's folder holds a
    model that AutoModelForSequenceClassification loads, its metrics,
    its confusion matrix, and the words that tell it most.
    """,
    task="headwater_recipes.sentiment.task:Sentiment",
    settings=SentimentSettings,
    wording=CLASSES,
    about=About(
        task="text classification: polarity of reviews, topics",
        data=("movie-reviews",),
        model="MiniLM, 22.7 M parameters (10.9 M trained), or BERT from scratch",
        metric="accuracy, macro-F1",
        baseline="commonest class, TF-IDF + logistic regression",
        minutes=3.5,
    ),
    served="headwater_recipes.text.serving:ServedClassifier",
)
