"""Train `digits` on scikit-learn's handwritten digits, and export it. A few seconds on one core.

Usage: `python models/digits/train.py [--repository DIR] [--force]`.
"""

import sys
from pathlib import Path

from data import LABELS, held_out, training

sys.path.append(str(Path(__file__).parents[1]))
from recipe import Recipe, run  # found beside the recipes' folders


def network():
    from network import Digits  # brings PyTorch in

    return Digits()


RECIPE = Recipe(
    folder=Path(__file__).parent,
    network=network,
    training=training,
    held_out=held_out,
    labels=LABELS,
    one_scale=True,
    epochs=25,
    batch_rows=64,
    learning_rate=0.002,
    accuracy=0.97,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
