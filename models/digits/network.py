"""A network for handwritten digits: 64 pixels -> 256 -> 256 -> 10 scores."""

from __future__ import annotations

import torch
from torch import nn


class Digits(nn.Module):
    """x [B, 64] float32, raw pixels -> logits [B, 10] float32.

    `mean` and `scale` standardise x; training sets them.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("scale", torch.ones(64))
        self.layers = nn.Sequential(
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(256, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers((x - self.mean) * self.scale)
        return logits
