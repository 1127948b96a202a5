"""What a run of this recipe is asked to do."""

from __future__ import annotations

from typing import Annotated, ClassVar

from headwater_recipes.common.options import Option
from headwater_recipes.common.recipe import About, Recipe
from headwater_recipes.text.settings import CLASSES, ClassifyingTraining


class QaSettings(ClassifyingTraining, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The defaults are judged on BoolQ's questions. ``seq``: of a question and its passage."""

    MINUTES: ClassVar[float] = 3.7

    data: Annotated[
        tuple[str, ...],
        Option(
            "boolq (yes or no; the default), disflqa (spans), a .jsonl file of objects with question, passage and "
            "answer (true or false, or words of the passage), a .json file in SQuAD's form, a folder with train.* and "
            "dev.*, or a name that the library datasets finds (google/boolq, squad).",
            fixed=True,
        ),
    ] = ("boolq",)
    seq: Annotated[int, Option("Tokens of question and passage at most. Default: {default}.", least=32, fixed=True)] = (
        192
    )
    lr: Annotated[float, Option("Peak learning rate. Default: 1e-4, with --scratch 1e-3.", above=0)] = 1e-4
    batch: Annotated[int, Option("Questions per worker and step. Default: {default}.", least=1)] = 16


RECIPE = Recipe(
    name="qa",
    help="""Answer questions about a passage: with yes or no, or by a span of it, as the data's answers are.

    Example: headwater train qa --workers 2
    Example: headwater train qa --data disflqa
    Example: headwater train qa --data squad/train.json

    Ctrl-C stops and saves; --resume goes on. The run's folder holds a
    model that AutoModelForSequenceClassification (yes or no) or
    AutoModelForQuestionAnswering (spans) loads, its metrics, and
    answers marked in their passages. Minutes on two cores teach
    little more than the commoner answer: see docs/qa.md.
    """,
    task="headwater_recipes.qa.task:QuestionAnswering",
    settings=QaSettings,
    wording=CLASSES._replace(unit="questions", data="questions"),
    about=About(
        task="question answering: yes or no, spans",
        data=("boolq", "disflqa"),
        model="MiniLM, 22.7 M parameters (10.9 M trained)",
        metric="accuracy (yes or no), exact match and F1 (spans)",
        baseline="commonest answer, TF-IDF + logistic regression; sliding window",
        minutes=4.5,
    ),
    served="headwater_recipes.qa.serving:ServedAnswers",
)
