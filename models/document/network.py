"""The feedforward network of the textbooks: 5 features -> 10 hidden -> 3 scores. A batch of [4, 5] gives [4, 3]."""

from __future__ import annotations

import torch
from torch import nn


class FeedForwardNet(nn.Module):
    """x [B, 5] float32, raw features -> logits [B, 3] float32.

    A = ReLU(X · W1ᵀ + b1); Z = A · W2ᵀ + b2. `mean` and `scale` standardise x first; training sets them.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("scale", torch.ones(5))
        self.hidden = nn.Linear(5, 10)
        self.relu = nn.ReLU()
        self.output = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.relu(self.hidden((x - self.mean) * self.scale)))
        return logits
