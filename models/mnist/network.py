"""A network for MNIST images: 784 pixels -> 512 -> 512 -> 10 scores."""

from __future__ import annotations

import torch
from torch import nn


class Mnist(nn.Module):
    """x [B, 784] float32, raw pixels -> logits [B, 10] float32.

    `mean` and `scale` standardise x; training sets them.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(784))
        self.register_buffer("scale", torch.ones(784))
        self.layers = nn.Sequential(
            nn.Linear(784, 512),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(512, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers((x - self.mean) * self.scale)
        return logits
