"""The largest values of an output's rows, with their labels. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forwardpass.client.errors import InvalidArgument

_SUM: Final = 1e-2  # how far from 1 the sum of a row of probabilities may be: half precision


class Ranked(NamedTuple):
    """A label, the output's value at its place, and its probability; None where the output has no probabilities."""

    label: str
    value: float
    probability: float | None


def as_probabilities(values: NDArray[Any], name: str, softmax: bool | None) -> NDArray[np.float64] | None:
    """The probabilities in an output's rows [B, N]; None: the output has none.

    `softmax` None: taken of outputs whose name has `logit`. Others are probabilities where each row sums to 1.
    """
    rows = values.astype(np.float64)
    if softmax or (softmax is None and "logit" in name.casefold()):
        powers: NDArray[np.float64] = np.exp(rows - rows.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))
    is_distribution = (rows >= 0).all() and (np.abs(rows.sum(axis=1) - 1) <= _SUM).all()
    return rows if is_distribution and softmax is None else None


def ranked(values: NDArray[Any], name: str, labels: Sequence[str], k: int, softmax: bool | None) -> list[list[Ranked]]:
    """The `k` largest of each row [B, N], the largest first; of a row with NaN none. Labels left out: the places.

    Raises InvalidArgument for an output that is no rows of numbers.
    """
    if k < 1:
        raise InvalidArgument(f"k: expected at least 1, got {k}")
    if values.ndim != 2 or values.dtype.kind not in "iuf" or not values.shape[1]:
        raise InvalidArgument(
            f"output '{name}': expected rows of numbers to rank, got {values.dtype}{list(values.shape)}"
        )
    words = labels if len(labels) == values.shape[1] else [str(place) for place in range(values.shape[1])]
    probabilities = as_probabilities(values, name, softmax)
    order = np.argsort(-values.astype(np.float64), axis=1, kind="stable")[:, :k]
    return [
        []
        if values.dtype.kind == "f" and np.isnan(row).any()
        else [
            Ranked(words[i], float(row[i]), None if probabilities is None else float(probabilities[number, i]))
            for i in order[number]
        ]
        for number, row in enumerate(values)
    ]
