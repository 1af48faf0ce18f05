"""Train `tabular` on a table of cars, and export it with its columns and categories. Seconds on one core.

Usage: `python models/tabular/train.py [--repository DIR] [--force]`.
"""

import sys
from pathlib import Path

from data import CATEGORIES, LABELS, NUMBERS, held_out, training

sys.path.append(str(Path(__file__).parents[1]))
from recipe import Recipe, run  # found beside the recipes' folders


def network():
    from network import Tabular  # brings PyTorch in

    return Tabular()


RECIPE = Recipe(
    folder=Path(__file__).parent,
    network=network,
    training=training,
    held_out=held_out,
    labels=LABELS,
    columns={"numbers": NUMBERS},
    categories=CATEGORIES,
    one_scale=False,
    epochs=60,
    batch_rows=16,
    learning_rate=0.01,
    accuracy=0.8,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
