"""Train `document` on five measurements of wines, and export it. A second on one core.

Usage: `python models/document/train.py [--repository DIR] [--force]`.
"""

import sys
from pathlib import Path

from data import LABELS, held_out, training

sys.path.append(str(Path(__file__).parents[1]))
from recipe import Recipe, run  # found beside the recipes' folders


def network():
    from network import FeedForwardNet  # brings PyTorch in

    return FeedForwardNet()


RECIPE = Recipe(
    folder=Path(__file__).parent,
    network=network,
    training=training,
    held_out=held_out,
    labels=LABELS,
    one_scale=False,
    epochs=30,
    batch_rows=16,
    learning_rate=0.01,
    accuracy=0.9,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
