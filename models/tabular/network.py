"""Numbers and categories of a table: an embedding for each category, then 10 -> 32 -> 3. [B] rows give [B, 3]."""

from __future__ import annotations

import torch
from torch import nn


class Tabular(nn.Module):
    """numbers [B, 5] float32, raw; cylinders [B] and origin [B] int64, codes -> logits [B, 3] float32.

    `mean` and `scale` standardise the numbers first; training sets them.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("scale", torch.ones(5))
        self.cylinders = nn.Embedding(5, 3)
        self.origin = nn.Embedding(3, 2)
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, numbers: torch.Tensor, cylinders: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
        standardised = (numbers - self.mean) * self.scale
        row = torch.cat([standardised, self.cylinders(cylinders), self.origin(origin)], dim=1)
        logits: torch.Tensor = self.layers(row)
        return logits
