"""Whether samples show the class that they were asked for, as a linear classifier reads them.

It is fitted to the features of real training images and reads samples: the idea of GAN-test
(Shmelkov et al., arXiv 1807.09499). The classification accuracy score (Ravuri and Vinyals, arXiv
1905.10887) goes the other way: it trains on samples, and so also sees what they lack. Here a model
that only makes the most typical image of each class gets full marks: recall shows that.
"""

from typing import Any

import numpy as np
import torch

from ..data.sources import evenly_spaced
from .features import import_eval

MOST_FITTED = 20_000  # images, evenly spaced, that the classifier is fitted to
MOST_STEPS = 1000  # of its optimizer


class ClassReader:
    """A multinomial logistic regression on standardised features, fitted once.

    Attributes:
        classifier: scikit-learn's pipeline; None before `fit`.
        description: what it is and was fitted to, in words.
    """

    def __init__(self) -> None:
        self.classifier: Any = None
        self.description: str | None = None

    def fit(self, features: torch.Tensor, labels: np.ndarray) -> None:
        """Fit it to features (N, d) of real images with labels (N,), of at least two classes.

        Once: later calls do nothing.
        """
        if self.classifier is not None:
            return
        scale, regression = import_eval("sklearn.preprocessing"), import_eval("sklearn.linear_model")
        classifier = import_eval("sklearn.pipeline").make_pipeline(
            scale.StandardScaler(), regression.LogisticRegression(max_iter=MOST_STEPS)
        )
        rows = evenly_spaced(len(labels), MOST_FITTED)
        self.classifier = classifier.fit(features[rows].double().numpy(), labels[rows])
        self.description = f"logistic regression (C = 1) on standardised features of {len(rows)} real images"

    def accuracy(self, features: torch.Tensor, labels: np.ndarray) -> float:
        """Share of features (N, d) that are read as their labels (N,)."""
        return float((self.classifier.predict(features.double().numpy()) == labels).mean())
