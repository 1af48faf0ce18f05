"""392 cars of 1970 to 1982 (UCI Auto MPG), as mlxtend ships them: a table of numbers and categories.

Which third of them a car's mileage lies in is to be told from its engine, weight, year and origin. None of the tables
that scikit-learn ships has categories with names. Standardising is the network's own affair. Needs no torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LABELS = ["under 19 mpg", "19 to 27 mpg", "over 27 mpg"]
BOUNDS = [19, 27]  # miles per gallon; they make three thirds of the cars
NUMBERS = ["displacement", "horsepower", "weight", "acceleration", "model_year"]
CATEGORIES = {"cylinders": ["3", "4", "5", "6", "8"], "origin": ["USA", "Europe", "Japan"]}
_COLUMNS = ["cylinders", *NUMBERS, "origin"]  # as the data set has them
_HELD_OUT = 98  # one in four

Rows = dict[str, NDArray[Any]]
Split = tuple[Rows, NDArray[np.int64]]


def training() -> Split:
    """The rows to learn from, by input (see `inputs`), and y [294] int64."""
    columns, y = _shuffled()
    return inputs({name: column[_HELD_OUT:] for name, column in columns.items()}), y[_HELD_OUT:]


def held_out() -> Split:
    """The rows that training never sees, the same every time, by input, and y [98] int64."""
    columns, y = _shuffled()
    return inputs({name: column[:_HELD_OUT] for name, column in columns.items()}), y[:_HELD_OUT]


def table() -> dict[str, list[Any]]:
    """The held-out rows as a user has them: columns by name, numbers and words."""
    columns, _ = _shuffled()
    return {name: column[:_HELD_OUT].tolist() for name, column in columns.items()}


def inputs(columns: Rows) -> Rows:
    """The network's inputs: numbers [N, 5] float32, and of each category the codes [N] int64."""
    numbers = np.stack([columns[name] for name in NUMBERS], axis=1).astype(np.float32)
    codes = {name: np.array([words.index(word) for word in columns[name]]) for name, words in CATEGORIES.items()}
    return {"numbers": numbers, **codes}


def _shuffled() -> tuple[Rows, NDArray[np.int64]]:
    from mlxtend.data import autompg_data  # a second to import

    x, mpg = autompg_data()
    order = np.random.default_rng(0).permutation(len(x))
    columns: Rows = {name: x[order, place] for place, name in enumerate(_COLUMNS)}
    columns["cylinders"] = np.array([str(int(count)) for count in columns["cylinders"]])
    columns["origin"] = np.array([CATEGORIES["origin"][int(code) - 1] for code in columns["origin"]])
    return columns, np.digitize(mpg[order], BOUNDS).astype(np.int64)
