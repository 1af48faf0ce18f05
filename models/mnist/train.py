"""Train `mnist` on 5,000 MNIST images, and export it. Ten seconds on one core.

Usage: `python models/mnist/train.py [--repository DIR] [--force]`.
"""

import sys
from pathlib import Path

from data import LABELS, held_out, training

sys.path.append(str(Path(__file__).parents[1]))
from recipe import Recipe, run  # found beside the recipes' folders


def network():
    from network import Mnist  # brings PyTorch in

    return Mnist()


RECIPE = Recipe(
    folder=Path(__file__).parent,
    network=network,
    training=training,
    held_out=held_out,
    labels=LABELS,
    one_scale=True,
    epochs=15,
    batch_rows=128,
    learning_rate=0.002,
    accuracy=0.94,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE))
