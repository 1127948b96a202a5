"""What a classifier of texts is compared with: the commonest class, and logistic regression on the words' TF-IDF."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater_recipes.text.labelled import Labelled, Row

_MOST = 3000
"""Words that a model is asked about, one by one."""


def baselines(found: Labelled) -> dict[str, dict[str, float]]:
    """Accuracy and macro-F1 on the held-out texts: ``majority`` (with the loss, in nats, of the classes' frequencies)
    and ``tfidf_logistic_regression``, scikit-learn's with its own settings but ``sublinear_tf``, on the whole texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    given, wanted = ([row.label for row in part] for part in (found.training, found.held_out))
    counts = Counter(given)
    commonest = counts.most_common(1)[0][0]

    def score(said: Sequence[Any]) -> dict[str, float]:
        f1 = f1_score(wanted, said, average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(wanted, said)), "macro_f1": float(f1)}

    loss = -float(np.mean([np.log(counts[label] / len(given)) for label in wanted]))
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
    try:
        vectors = vectorizer.fit_transform(_joined(found.training))
    except ValueError:  # no text has a word
        tfidf = score([commonest] * len(wanted))
    else:
        fitted = LogisticRegression(max_iter=1000).fit(vectors, given)
        tfidf = score(fitted.predict(vectorizer.transform(_joined(found.held_out))))
    return {"majority": {**score([commonest] * len(wanted)), "loss": loss}, "tfidf_logistic_regression": tfidf}


def _joined(rows: Sequence[Row]) -> list[str]:
    return [f"{row.text} {row.second}" for row in rows]


def frequent_words(rows: Sequence[Row], least: int = 5) -> list[str]:
    """Up to ``_MOST`` words that stand in at least ``least`` texts, the commonest first."""
    counts = Counter(word for row in rows for word in set(re.findall(r"[^\W\d_]{2,}", row.text.lower())))
    return [word for word, count in counts.most_common(_MOST) if count >= least]
