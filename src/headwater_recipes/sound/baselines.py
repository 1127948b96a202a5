"""What the network is compared with: the commonest label, and classical features with scikit-learn's classifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from headwater_recipes.sound.examples import Examples
from headwater_recipes.sound.features import in_equal_parts, statistics
from headwater_recipes.sound.score import Floats, Ints, scores

CENTROID = "MFCC and nearest centroid"
LOGISTIC = "MFCC statistics and logistic regression"


def majority(examples: Examples, labels: Ints) -> dict[str, float]:
    """Of telling the commonest label of the sounds learnt from, whatever is heard."""
    learnt = examples.labels[examples.places(held=False)]
    return scores(np.full(len(labels), int(torch.bincount(learnt).argmax())), labels)


def centroid(examples: Examples, judged: Sequence[tuple[list[Tensor], Ints]]) -> list[dict[str, float]]:
    """Of the label whose mean over the sounds learnt from is nearest, for each set of spectrograms and labels."""
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), NearestCentroid())
    model.fit(*_learnt(examples, in_equal_parts))
    return [scores(model.predict(_table(mels, in_equal_parts)), labels) for mels, labels in judged]


def logistic(examples: Examples, judged: Sequence[tuple[list[Tensor], Ints]]) -> list[dict[str, float]]:
    """Of logistic regression, in which labels count alike; for each set of spectrograms and labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced"))
    model.fit(*_learnt(examples, statistics))
    found = []
    for mels, labels in judged:
        told = model.predict_log_proba(_table(mels, statistics))
        found.append(scores(told.argmax(1), labels, told))
    return found


def _learnt(examples: Examples, features: Callable[[Tensor], Tensor]) -> tuple[Floats, Ints]:
    places = examples.places(held=False)
    return _table([examples.mel(place) for place in places], features), examples.labels[places].numpy()


def _table(mels: Sequence[Tensor], features: Callable[[Tensor], Tensor]) -> Floats:
    return torch.stack([features(mel) for mel in mels]).numpy()
