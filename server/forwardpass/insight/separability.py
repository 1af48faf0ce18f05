"""Three measures of how separable classes are in a representation, and its first two principal components.

Needs scikit-learn. The probe's accuracy comes with its standard error.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forwardpass.errors import InsightError
from forwardpass.optional_imports import need

FOLDS = 5
_SILHOUETTE_ROWS = 2000  # limit, because it compares every pair


@dataclass(frozen=True, slots=True)
class Separability:
    """Separability of the rows of one tensor by class."""

    tensor: str
    places: int  # values per row
    probe: float  # share of held-out rows that a linear classifier gets right, 0 to 1
    probe_error: float  # its standard error
    fisher: float  # scatter between the class means divided by scatter within the classes, as traces
    silhouette: float  # -1 to 1: how much closer a row is to its own class than to the nearest other
    points: NDArray[np.float64]  # [rows, 2], the first two principal components
    variance: tuple[float, float]  # share of the variance along each, 0 to 1


def measure(tensor: str, rows: NDArray[Any], classes: NDArray[np.int64]) -> Separability:
    """`rows` [N, ...] are flattened; `classes` [N], each of at least FOLDS rows (see `check_classes`)."""
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    right = probe(flat, classes)
    points, variance = principal(flat)
    silhouette = need("sklearn.metrics", "insight").silhouette_score(
        flat, classes, sample_size=min(_SILHOUETTE_ROWS, len(flat)), random_state=0
    )
    # Estimated with two more rows each right and wrong, so that the error is not zero if all are right.
    likely = (right * len(flat) + 2) / (len(flat) + 4)
    error = math.sqrt(likely * (1 - likely) / (len(flat) + 4))
    return Separability(tensor, flat.shape[1], right, error, fisher(flat, classes), float(silhouette), points, variance)


def check_classes(classes: NDArray[Any], rows: int) -> NDArray[np.int64]:
    """Labels as int64 [N], valid for a probe. Raises InsightError with what was expected."""
    if classes.ndim != 1 or len(classes) != rows:
        raise InsightError(f"labels have shape {list(classes.shape)}; expected [{rows}], one for every row")
    whole = classes.astype(np.int64)
    if not np.array_equal(whole, classes):
        raise InsightError("labels are not whole numbers")
    values, counts = np.unique(whole, return_counts=True)
    if len(values) < 2:
        raise InsightError("labels name one class only; expected at least two")
    if counts.min() < FOLDS:
        scarce = values[counts.argmin()]
        raise InsightError(f"class {scarce} has {counts.min()} rows; expected at least {FOLDS} of every class")
    return whole


def probe(rows: NDArray[np.float64], classes: NDArray[np.int64]) -> float:
    """Accuracy of logistic regression on standardised features, FOLDS-fold: each row is held out once."""
    linear = need("sklearn.linear_model", "insight")
    selection = need("sklearn.model_selection", "insight")
    scaler = need("sklearn.preprocessing", "insight").StandardScaler()
    classifier = linear.LogisticRegression(C=0.1, tol=1e-3, max_iter=300)
    pipeline = need("sklearn.pipeline", "insight").make_pipeline(scaler, classifier)
    folds = selection.StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # A probe that has not fully converged is still a linear probe, and its accuracy is measured.
        warnings.simplefilter("ignore")
        found = selection.cross_val_predict(pipeline, rows, classes, cv=folds)
    return float((found == classes).mean())


def fisher(rows: NDArray[np.float64], classes: NDArray[np.int64]) -> float:
    """tr S_B / tr S_W: S_B the scatter of class means around the overall mean, S_W of rows around their class mean."""
    centre = rows.mean(axis=0)
    between = within = 0.0
    for value in np.unique(classes):
        own = rows[classes == value]
        mean = own.mean(axis=0)
        between += len(own) * float(((mean - centre) ** 2).sum())
        within += float(((own - mean) ** 2).sum())
    return between / within if within else math.inf


def principal(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The rows along their two directions of largest variance, [N, 2], and the share of the variance along each."""
    centred = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(values)[::-1][:2]
    directions = vectors[:, order]
    # An eigenvector's sign is arbitrary: its largest component is made positive, so that pictures do not flip.
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
    points = centred @ directions
    shares = values[order] / max(float(values.sum()), 1e-300)
    if points.shape[1] < 2:
        points = np.column_stack([points, np.zeros(len(points))])
        shares = np.append(shares, 0.0)
    return points, (float(shares[0]), float(shares[1]))
